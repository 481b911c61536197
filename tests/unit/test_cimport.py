"""Compiles an extension module that cimports the installed core, and runs it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCE = Path(__file__).parent / "cimport_consumer" / "consumer.pyx"
SCRIPT = """
import consumer
from cidalloc import Allocator

consumer.run(given=False)
consumer.run(given=True)
pool = Allocator()
pool.acquire_many(5)
assert consumer.held(pool) == 5
"""


def test_other_cython_code_uses_the_core(tmp_path: Path) -> None:
    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    module = f"consumer{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-I{sysconfig.get_path('include')}"]
    run(sys.executable, "-m", "cython", "-Wextra", str(SOURCE), "-o", "consumer.c")
    run(*compiler, *flags, "consumer.c", "-o", module)
    run(sys.executable, "-c", SCRIPT)
