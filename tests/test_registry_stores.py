"""Stops a process after every single store to a registry's file, and looks what is left of it.

A child works the file, one machine instruction at a time; after each, its bytes are compared. So
each state is seen in which SIGKILL can leave the file, of the very code that is installed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from crash import (
    BOOT,
    ENDED,
    LAST_BOOT,
    NEXT_BOOT,
    UNENDED,
    Facts,
    facts_of,
    judge,
    judge_reboot,
)
from stepped_child import MIDDLE, NOW, SCENARIOS, WARM

from cidalloc.store import GRANULE, Word

TIMES = [NOW, *(NOW + after + by for after in (ENDED, UNENDED, 300) for by in (-1, 0)), NOW + 1_000]
CONT, STEP, SET_OPTIONS = 7, 9, 0x4200
EXIT_KILL = 0x100000
HEADER = Word.EXTENTS * 8 + 64
WINDOW = 2_048  # bytes at both ends of an extent: all that changes does so there

_libc = ctypes.CDLL(None, use_errno=True)


class Snapshot(NamedTuple):
    """A file's length, and the parts of it that may have changed, by their places."""

    size: int
    parts: dict[int, bytes]


class Tracee:
    """The child, which stops before what is looked at and after it."""

    def __init__(self) -> None:
        script = str(Path(__file__).with_name("stepped_child.py"))
        command = [sys.executable, script]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        self.steps = 0
        stopped = self.wait()
        assert stopped == signal.SIGSTOP
        self.trace(SET_OPTIONS, EXIT_KILL)

    def trace(self, request: int, data: int = 0) -> None:
        if _libc.ptrace(request, self.pid, None, ctypes.c_void_p(data)):
            reason = os.strerror(ctypes.get_errno())
            pytest.fail(f"this test has to trace a child, and may not (ptrace: {reason})")

    def wait(self) -> int:
        """Return the signal at which it stopped."""
        _, status = os.waitpid(self.pid, 0)
        if not os.WIFSTOPPED(status):
            pytest.fail(f"the child ended with the status {status}")
        return os.WSTOPSIG(status)

    def go(self) -> None:
        """Let it run until it stops by itself."""
        stopped = signal.SIGTRAP  # the last step may leave one
        while stopped == signal.SIGTRAP:
            self.trace(CONT)
            stopped = self.wait()
        assert stopped == signal.SIGSTOP, f"the child got signal {stopped}"

    def snapshots(self, name: str, width: int, path: Path) -> tuple[bytes, list[Snapshot]]:
        """Return what is in the file before, and each state that differs from the one before it."""
        assert self.process.stdin
        self.process.stdin.write(f"{name}\t{width}\t{path}\n")
        self.process.stdin.flush()
        self.go()
        before = path.read_bytes() if path.exists() else b""
        found = [*self._walk(path)]
        same = unwatched(before, found[-1]) == unwatched(path.read_bytes(), found[-1])
        assert same, "something else changed"
        self.go()
        return before, found

    def _step(self) -> bool:
        if _libc.ptrace(STEP, self._pid, None, None):
            self.trace(STEP)
        _, status = os.waitpid(self.pid, 0)
        self.steps += 1
        if status == signal.SIGTRAP << 8 | 0x7F:
            return True
        if status != signal.SIGSTOP << 8 | 0x7F:
            pytest.fail(f"the child got the status {status:#x}")
        return False

    @property
    def _pid(self) -> ctypes.c_int:
        return ctypes.c_int(self.pid)

    def _walk(self, path: Path) -> Iterator[Snapshot]:
        while not path.exists():
            assert self._step(), "no file was made"
        last: Snapshot | None = None
        with path.open("rb") as file:
            while True:
                size = os.fstat(file.fileno()).st_size
                with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as memory:
                    windows = windows_of(memory)
                    while True:
                        parts = [memory[place] for place in windows]
                        if last is None or size != last.size or parts != [*last.parts.values()]:
                            last = Snapshot(
                                size,
                                {w.start: p for w, p in zip(windows, parts, strict=True)},
                            )
                            yield last
                            if windows != windows_of(memory):
                                break
                        if not self._step():
                            return
                        if os.fstat(file.fileno()).st_size != size:
                            break


def windows_of(memory: mmap.mmap) -> list[slice]:
    """Return where in a file anything may change: the header, and both ends of its extents."""
    found, offset, word = [slice(0, HEADER)], GRANULE, Word.EXTENTS * 8
    while granules := int.from_bytes(memory[word : word + 8], sys.byteorder) >> 1:
        end = offset + granules * GRANULE
        for start in (offset, end - WINDOW):
            if start + WINDOW <= len(memory):
                found.append(slice(start, start + WINDOW))
        offset, word = end, word + 8
    return found


def unwatched(data: bytes, last: Snapshot) -> bytes:
    """Return all that was not looked at."""
    rest = bytearray(data.ljust(last.size, b"\0"))
    for place, part in last.parts.items():
        rest[place : place + len(part)] = bytes(len(part))
    return bytes(rest)


def put(path: Path, before: bytes, snapshot: Snapshot) -> Path:
    """Make a file of a snapshot."""
    with path.open("wb") as file:
        file.write(before)
        file.truncate(snapshot.size)
        for place, part in snapshot.parts.items():
            file.seek(place)
            file.write(part)
    return path


@pytest.fixture(scope="module")
def tracee() -> Iterator[Tracee]:
    tracee = Tracee()
    yield tracee
    tracee.process.kill()
    tracee.process.communicate()
    print(tracee.steps, "instructions")


@pytest.mark.parametrize(
    ("name", "width"), [(name, width) for name, each in SCENARIOS.items() for width in each.widths]
)
def test_after_every_store(name: str, width: int, tracee: Tracee, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    shape = scenario.shape_of(width)
    before, found = tracee.snapshots(name, width, tmp_path / "it")
    print(name, width, len(found), "snapshots")
    assert len(found) >= scenario.snapshots
    copy = tmp_path / "copy"

    def facts(snapshot: Snapshot) -> Facts:
        return facts_of(put(copy, before, snapshot), shape, NOW, TIMES)

    was, will = facts(found[0]), facts(found[-1])
    for number, snapshot in enumerate(found):
        try:
            state = facts(snapshot)
            judge(state, was, will, scenario.under_way)
            judge_reboot(put(copy, before, snapshot), shape, state)
        except Exception as error:
            raise AssertionError(f"after store {number} of {len(found) - 1}") from error


@pytest.mark.parametrize("name", ["make", "make with a past"])
def test_a_file_that_is_being_made(name: str, tracee: Tracee, tmp_path: Path) -> None:
    _, found = tracee.snapshots(name, 1, tmp_path / "it")
    print(name, len(found), "snapshots")
    assert len(found) >= 3, "the writer's name, and perhaps the boot"
    horizon = 0 if name == "make" else 601_000
    for snapshot in found:
        copy = put(tmp_path / "copy", b"", snapshot)
        facts = facts_of(copy, WARM, NOW, [NOW, NOW + horizon - 1, NOW + horizon])
        assert not facts.sessions
        assert set(facts.first.values()) == {NOW + horizon}
        assert len(facts.first) == 6


@pytest.mark.parametrize("width", [1, 64])
@pytest.mark.parametrize("name", ["reopen", "reboot"])
def test_a_crash_amid_what_follows_a_crash(
    name: str, width: int, tracee: Tracee, tmp_path: Path
) -> None:
    shape = SCENARIOS[MIDDLE].shape_of(width)
    before, found = tracee.snapshots(MIDDLE, width, tmp_path / "it")
    boot = BOOT if name == "reopen" else NEXT_BOOT
    # An ID that was not yet let go, in the middle, and not all of the IDs.
    for number in {0, len(found) // 2, len(found) - 3}:
        path, copy = put(tmp_path / f"{number}", before, found[number]), tmp_path / "copy"
        then, states = tracee.snapshots(name, width, path)
        print(name, width, f"after store {number}:", len(states), "snapshots")
        assert len(states) >= (8 if name == "reboot" else 3)
        horizon = int.from_bytes(before[Word.HORIZON * 8 :][:8], sys.byteorder)
        times = TIMES if name == "reopen" else [NOW, NOW + horizon - 1, NOW + horizon]
        was, *every, will = [
            facts_of(put(copy, then, state), shape, NOW, times, boot) for state in states
        ]
        assert (was.holds, was.first) == (will.holds, will.first)
        for at, state in enumerate(every, 1):
            judge(state, was, will, {})
            judge_reboot(put(copy, then, states[at]), shape, state, LAST_BOOT)
