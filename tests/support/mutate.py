"""Runs the mutants of tests/mutants: each must be killed by the tests that its entry names.

`python mutate.py` runs all of them, two at a time. `python mutate.py WORD` runs those whose promise,
name or file has the word.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from mutants import Mutant, table, write

TESTS = Path(__file__).parent.parent
_AT_ONCE = 2
_LIMIT_S = 60
_PYTEST = (
    *("-q", "-x", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--timeout={_LIMIT_S}"),
    *("-p", "no:anyio", "-p", "no:xdist"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # of plugins that are imported here
)
_MODULES = (  # what most tests import, and what no mutant changes
    *("asyncio", "hypothesis.stateful", "numpy", "httptools", "click", "rich.console"),
    *("tritonclient.grpc.aio", "tritonclient.http.aio", "yaml"),
)


def node_ids(mutant: Mutant) -> list[str]:
    """Return pytest's names of the tests that kill a mutant, as paths from the root."""
    found = []
    for test in mutant.tests:
        file, _, name = test.partition("::")
        (path,) = TESTS.glob(f"*/{file}")
        found.append(f"{path}::{name}")
    return found


def judged(mutants: Iterable[Mutant]) -> Iterator[tuple[Mutant, str]]:
    """Run the tests of each mutant; yield it with what is wrong: empty if a test failed.

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
            running[_fork(folder.name, node_ids(mutant))] = mutant, folder
        if not running:
            return
        pid, status = os.wait()
        mutant, folder = running.pop(pid)
        with folder:
            output = Path(folder.name, "output").read_text(errors="replace")
        code = os.waitstatus_to_exitcode(status)
        told = {0: "SURVIVED", 1: ""}.get(code, f"its tests did not run ({code}):\n{output}")
        yield mutant, told


def _fork(folder: str, nodes: list[str]) -> int:
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        output = os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.path.insert(0, folder)
        os.environ.update(PYTHONPATH=folder)
        code = int(pytest.main([*_PYTEST, "--rootdir", str(TESTS.parent), *nodes]))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def main(words: list[str]) -> int:
    """Run the mutants, and print those that survive."""
    chosen = [
        each for each in table() if all(word in f"{each.promise} {each.name} {each.file}" for word in words)
    ]
    wrong = Counter[str]()
    for mutant, told in judged(chosen):
        if told:
            wrong[mutant.promise] += 1
            print(f"{mutant.promise}: {mutant.name} ({mutant.file}): {told}", flush=True)
    print(f"{len(chosen)} mutants, {wrong.total()} not killed")
    return min(wrong.total(), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
