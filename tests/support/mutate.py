"""Runs the mutants of tests/mutants: the tests that each one names must fail with it.

`python mutate.py` runs those in Python, two at a time. `--core` runs those of the allocator core,
which has to be compiled for each. Any other word chooses those whose promise, name or file has it,
and `=NAME` the one of that name.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from mutants import Mutant, table, write

TESTS = Path(__file__).parent.parent
_CORE = TESTS.parent / "src" / "cidalloc" / "_alloc.pyx"
_AT_ONCE = 2
_LIMIT_S = 120
_PYTEST = (
    *("-q", "-x", "--timeout=60", "--hypothesis-seed=0", f"--rootdir={TESTS.parent}"),
    *("-p", "no:cacheprovider", "-p", "no:anyio", "-p", "no:xdist"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # of plugins that were imported before
)
# By pytest's exit code. A wild access in the core, which ends the process, is found.
_TOLD = {0: "SURVIVED", 1: "", -signal.SIGSEGV: "", -signal.SIGABRT: "", -signal.SIGBUS: ""}
_MODULES = (  # what most tests import, and what no mutant changes
    *("asyncio", "hypothesis.stateful", "numpy", "httptools", "click", "rich.console"),
    *("tritonclient.grpc.aio", "tritonclient.http.aio", "yaml"),
)


def node_ids(mutant: Mutant) -> list[str]:
    """Return pytest's names of the tests that a mutant names."""
    found = []
    for test in mutant.tests:
        file, *names = test.split("::")
        (path,) = TESTS.glob(f"*/{file}")
        found.append("::".join([str(path), *names]))
    return found


def judged(mutants: Iterable[Mutant]) -> Iterator[tuple[Mutant, str]]:
    """Run the tests of each mutant; yield it with what is wrong, which is empty if a test failed.

    A process is forked for each, which saves the time of most imports.
    """
    for name in _MODULES:
        importlib.import_module(name)
    assert "cidalloc" not in sys.modules, "the children would not import the mutant"
    todo, running = iter(mutants), dict[int, tuple[Mutant, tempfile.TemporaryDirectory[str]]]()
    while True:
        while len(running) < _AT_ONCE and (mutant := next(todo, None)) is not None:
            folder = tempfile.TemporaryDirectory()
            write(mutant, Path(folder.name))
            if mutant.is_core:
                _compile(Path(folder.name, "cidalloc"))
            running[_fork(folder.name, node_ids(mutant))] = mutant, folder
        if not running:
            return
        pid, status = os.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what a test has started and not ended
        mutant, folder = running.pop(pid)
        with folder:
            output = Path(folder.name, "output").read_text(errors="replace")
        code = os.waitstatus_to_exitcode(status)
        told = _TOLD.get(code, f"its tests did not run ({code}):\n{output}")
        yield mutant, told


def _fork(folder: str, nodes: list[str], limit_s: float = _LIMIT_S) -> int:
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.setsid()
        threading.Thread(target=_end_late, args=[limit_s], daemon=True).start()
        output = os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = folder
        code = int(pytest.main([*_PYTEST, *nodes]))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def _end_late(limit_s: float) -> None:
    time.sleep(limit_s)
    os._exit(71)


def _compile(package: Path) -> None:
    """Compile the core of a copy of the package."""
    (package / _CORE.name).write_bytes(_CORE.read_bytes())
    module = f"_alloc{sysconfig.get_config_var('EXT_SUFFIX')}"
    (package / module).unlink()
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    flags = ["-shared", "-fPIC", "-O1", f"-I{sysconfig.get_path('include')}"]
    for command in (
        [sys.executable, "-m", "cython", "-3", "cidalloc/_alloc.pyx", "-o", "cidalloc/_alloc.c"],
        [*compiler, *flags, "cidalloc/_alloc.c", "-o", f"cidalloc/{module}"],
    ):
        subprocess.run(command, cwd=package.parent, check=True)


def main(words: list[str]) -> int:
    """Run the mutants that the words choose, and print those that survive."""
    core = "--core" in words
    names = {word[1:] for word in words if word[0] == "="}
    parts = [word for word in words if word[0] not in "=-"]
    chosen = [
        each
        for each in table()
        if each.is_core == core
        and (not names or each.name in names)
        and all(part in f"{each.promise}: {each.name} {each.file}" for part in parts)
    ]
    if not chosen:
        sys.exit("no mutant is named so")
    with tempfile.TemporaryDirectory() as folder:  # a test that fails anyway kills nothing
        _fork(folder, sorted({node for each in chosen for node in node_ids(each)}), 10 * _LIMIT_S)
        if os.wait()[1]:
            sys.exit("without a mutant:\n" + Path(folder, "output").read_text())
    wrong = 0
    for mutant, told in judged(chosen):
        if told:
            wrong += 1
            print(f"{mutant.promise}: {mutant.name} ({mutant.file}): {told}", flush=True)
    print(f"{len(chosen)} mutants, {wrong} of them not killed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
