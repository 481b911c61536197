"""Lets calls of the system and allocations fail in a process, one after the other.

`failing_calls.c` is preloaded there; `failing_child.py` is the process.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LIBRARY = "FAILING_CALLS"
"""The variable of the environment that names the compiled library."""
CALLS = ("calls", "other errors", "interrupted")
"""The kinds of faults of calls: each call has two errors, and some may be interrupted."""
MEMORY = "memory"
"""The kind of faults of Python's own allocations."""
MANY = 50


def compiled(folder: Path) -> Path:
    """Return the library, compiled; skip the test if there is no compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler, and Linux with glibc")
    library = folder / "failing_calls.so"
    source = HERE / "failing_calls.c"
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, "-o", library, source, "-ldl"], check=True)
    return library


class Faults:
    """The faults of this process, which has the library preloaded."""

    def __init__(self) -> None:
        self._library = ctypes.PyDLL(os.environ[LIBRARY])
        self._library.failing_last.restype = ctypes.c_char_p
        self.end: Callable[[], int | None] = self._library.failing_end

    def watch(self, path: str) -> None:
        """Count the calls on files whose path begins so."""
        self._library.failing_watch(os.fsencode(path))

    def begin(self, kind: str, before: int, for_ever: bool) -> Callable[[], object]:
        """Return what lets one call fail after so many, or all from then on, until `end`.

        Of allocations not all, but `MANY`: without any memory for ever, the interpreter itself
        hangs in a `finally`.
        """
        if kind == MEMORY:
            import _testcapi

            self.end = _testcapi.remove_mem_hooks
            return partial(_testcapi.set_nomemory, before, before + (MANY if for_ever else 1))
        arguments = (before, for_ever, CALLS.index(kind))
        return partial(self._library.failing_begin, *arguments)

    def last(self) -> str:
        """Return the name of the call that failed first; an empty one if none did."""
        name: bytes = self._library.failing_last()
        return name.decode()


@dataclass
class Sweep:
    """What came of an operation in which each call failed once."""

    failed: Counter[str] = field(default_factory=Counter)  # by the name of the call
    errors: Counter[str] = field(default_factory=Counter)  # by the name of the error
    faults: list[str] = field(default_factory=list)


class Child:
    """The process in which calls fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        library = str(compiled(folder))
        environment = os.environ | {LIBRARY: library, "LD_PRELOAD": library}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "failing_child.py"), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def sweep(self, name: str, kind: str, for_ever: bool, step: int = 1) -> Sweep:
        """Do something again and again, each time with the next call failing, or each `step`."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([name, kind, for_ever, step]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the process has ended"
        found: dict[str, Any] = json.loads(line)
        return Sweep(Counter(found["failed"]), Counter(found["errors"]), found["faults"])

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
