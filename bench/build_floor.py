"""Compiles floor.pyx on demand, with the compiler flags of the package, into build/bench."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(__file__).with_name("floor.pyx")
FLAGS = ["-O3", "-DNDEBUG", "-fPIC", "-shared"]
"""What CMake's Release build passes, and nothing for one CPU alone."""


def floor_module() -> ModuleType:
    """Return the compiled module; compile it if it is missing or older than its source."""
    folder = ROOT / "build" / "bench"
    library = folder / f"floor{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        _compile(library)
    spec = importlib.util.spec_from_file_location("floor", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(library: Path) -> None:
    # Under names of this process, then moved: two processes may do it at once.
    own = library.with_name(f"{os.getpid()}-{library.name}")
    c_file = library.with_name(f"{os.getpid()}-floor.c")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    include = f"-I{sysconfig.get_paths()['include']}"
    cython = [sys.executable, "-m", "cython", "--module-name", "floor"]
    for command in (
        [*cython, str(SOURCE), "-o", str(c_file)],
        [compiler, *FLAGS, include, str(c_file), "-o", str(own)],
    ):
        subprocess.run(command, check=True, stdout=sys.stderr)  # noqa: S603
    c_file.unlink()
    own.replace(library)
