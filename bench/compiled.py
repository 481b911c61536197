"""Compiles Cython files of this folder on demand, with the compiler flags of the package."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import cidalloc._alloc

HERE = Path(__file__).resolve().parent
FLAGS = ["-O3", "-DNDEBUG", "-fPIC", "-shared"]
"""What CMake's Release build passes, and nothing for one CPU alone."""


def module(name: str) -> ModuleType:
    """Return a compiled module; compile it into build/bench if it is missing or outdated.

    It is outdated if it is older than its source, or than the package, whose functions it inlines.
    """
    folder = HERE.parent / "build" / "bench"
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    parts = [HERE / f"{name}.pyx", Path(cidalloc._alloc.__file__)]
    if not library.exists() or library.stat().st_ctime < max(
        part.stat().st_ctime for part in parts
    ):
        folder.mkdir(parents=True, exist_ok=True)
        _compile(parts[0], library)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def _compile(source: Path, library: Path) -> None:
    # Under names of this process, then moved: two processes may do it at once.
    own = library.with_name(f"{os.getpid()}-{library.name}")
    c_file = library.with_name(f"{os.getpid()}-{source.stem}.c")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    include = f"-I{sysconfig.get_paths()['include']}"
    cython = [sys.executable, "-m", "cython", "--module-name", source.stem]
    for command in (
        [*cython, str(source), "-o", str(c_file)],
        [compiler, *FLAGS, include, str(c_file), "-o", str(own)],
    ):
        subprocess.run(command, check=True, stdout=sys.stderr)  # noqa: S603
    c_file.unlink()
    own.replace(library)
