"""Compiles an extension module that cimports the installed core, and runs it."""

from __future__ import annotations

import os
import re
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


PAGE = Path(__file__).parent.parent.parent / "docs" / "allocator.md"
PAIR = """
import example
from cidalloc import Allocator

pool = Allocator(1)
assert [example.pair(pool) for _ in range(3)] == [1, 1, 1]
pool.acquire()
assert example.pair(pool) is None
"""


def build_and_run(source: Path, script: str, folder: Path) -> None:
    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    module = f"{source.stem}{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-I{sysconfig.get_path('include')}"]
    run(sys.executable, "-m", "cython", "-3", "-Wextra", str(source), "-o", "module.c")
    run(*compiler, *flags, "module.c", "-o", module)
    run(sys.executable, "-c", script)


def test_other_cython_code_uses_the_core(tmp_path: Path) -> None:
    build_and_run(SOURCE, SCRIPT, tmp_path)


def test_the_example_of_the_page(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```cython\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    source = tmp_path / "example.pyx"
    source.write_text(code)
    build_and_run(source, PAIR, tmp_path)


def test_the_interface_file_describes_the_functions_as_they_are() -> None:
    package = Path(__file__).parent.parent.parent / "src" / "cidalloc"
    interface = (package / "_alloc.pxd").read_text()
    comments = re.sub(r"\n# {6,}", " ", interface)  # the rest of a signature or of its description
    described = re.findall(r"^#   (\w+ pool_\w+\(.*?\))", comments, re.MULTILINE)
    found = []
    for file in (package / "_core").glob("*.pxd"):
        text = re.sub(r"\s+", " ", file.read_text())
        found += re.findall(r"cdef inline (\w+ pool_\w+\([^)]*\)) noexcept nogil:", text)
    public = set(re.findall(r"\bpool_\w+", interface.partition("\nfrom ")[2])) - {"pool_of"}
    assert set(described) == {each for each in found if set(re.findall(r"pool_\w+", each)) & public}
    assert len(described) == len(public)
