"""Follows a child through all that it stores to a file: see test_registry_stores.py.

Where the machine is an x86-64, the child's view of the file is made read-only, so that each store
to it stops the child; then that single instruction is let through. Elsewhere the child is stopped
after each instruction, whatever it is, which takes a hundred times as long.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from sparse import PAGE, Content, content
from stepped_child import FORBIDDEN

from cidalloc.errors import RegistryCorrupt
from cidalloc.manager.storage.file import _AHEAD
from cidalloc.manager.storage.file_format import GRANULE, HEADER_BYTES, Part, read_checked

TRAPS = platform.machine() == "x86_64"
CONT, STEP, GET_REGS, SET_REGS, TO_SYSCALL, SET_OPTIONS = 7, 9, 12, 13, 24, 0x4200
EXIT_KILL, MARK_SYSCALLS = 0x100000, 1
AT_SYSCALL = signal.SIGTRAP | 0x80
MMAP, MPROTECT, MUNMAP = 9, 10, 11
BEGINS = 2**64 - errno.ENOSYS  # what rax is when a system call begins
WINDOW = 2_048  # bytes at both ends of a granule: all that changes does so there

_libc = ctypes.CDLL(None, use_errno=True)
_names = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip"


class Registers(ctypes.Structure):
    """Those of an x86-64, as far as they matter, and room for the others."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in _names.split()),
        ("others", ctypes.c_uint64 * 10),
    )


class Snapshot(NamedTuple):
    """A file's length, and the parts of it that may have changed, by their places."""

    size: int
    parts: dict[int, bytes]

    def put(self, path: Path, before: Content) -> Path:
        """Make a file of it."""
        return self._merged(before, self.parts).put(path)

    def unwatched(self, data: Content) -> Content:
        """Return all of a file that was not looked at."""
        return self._merged(data, {place: bytes(len(part)) for place, part in self.parts.items()})

    def _merged(self, data: Content, parts: dict[int, bytes]) -> Content:
        pages = {place: bytearray(page) for place, page in data.pages.items()}
        for place, part in parts.items():
            page = pages.setdefault(place - place % PAGE, bytearray(PAGE))
            page[place % PAGE : place % PAGE + len(part)] = part
        return Content(
            self.size, {place: bytes(page) for place, page in pages.items() if any(page)}
        )


class Tracee:
    """The child, which stops by itself before what is looked at, after it, and at its end."""

    def __init__(self, traps: bool = TRAPS) -> None:
        command = [sys.executable, str(Path(__file__).with_name("stepped_child.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        self.pid = ctypes.c_int(self.process.pid)
        self.traps = traps
        self.stops = 0
        self.views: list[tuple[int, int]] = []  # the file in the child's memory: place and length
        assert self.wait() == signal.SIGSTOP
        self.trace(SET_OPTIONS, EXIT_KILL | MARK_SYSCALLS)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def trace(self, request: int, data: object = None) -> None:
        if _libc.ptrace(request, self.pid, None, ctypes.c_void_p(data)):  # type: ignore[arg-type]
            reason = os.strerror(ctypes.get_errno())
            pytest.fail(f"this test has to trace a child, and ptrace says: {reason}")

    def wait(self) -> int:
        """Return the signal at which it stopped."""
        _, status = os.waitpid(self.process.pid, 0)
        self.stops += 1
        if not os.WIFSTOPPED(status):
            code = os.waitstatus_to_exitcode(status)
            assert code != FORBIDDEN, "this test has to trace a child, and ptrace is forbidden here"
            pytest.fail(f"the child exited with {code}")
        return os.WSTOPSIG(status)

    def go(self) -> None:
        """Let it run until it stops by itself."""
        stopped = int(signal.SIGTRAP)  # the last step may leave one
        while stopped == signal.SIGTRAP:
            self.trace(CONT)
            stopped = self.wait()
        assert stopped == signal.SIGSTOP, f"the child got signal {stopped}"

    def snapshots(self, name: str, path: Path) -> tuple[Content, list[Snapshot]]:
        """Return what is in the file before, and each state that differs from the one before it."""
        assert self.process.stdin
        self.process.stdin.write(f"{name}\t{path}\n")
        self.process.stdin.flush()
        self.go()
        before = content(path) if path.exists() else Content(0, {})
        found = [*self._walk(path)]
        # Where nobody looked, nothing changed but what the file grew by.
        after = found[-1].unwatched(content(path))
        for place, page in found[-1].unwatched(before).pages.items():
            assert after.pages[place] == page, "something changed where nobody looked"
        self.go()
        return Content(before.size, {**after.pages, **before.pages}), found

    def _walk(self, path: Path) -> Iterator[Snapshot]:
        while not path.exists():
            assert self._advance(None), "no file was made"
        last: Snapshot | None = None
        with path.open("rb") as file:
            self._protect(inode := os.fstat(file.fileno()).st_ino)
            while True:
                size = os.fstat(file.fileno()).st_size
                with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as memory:
                    windows = windows_of(memory)
                    while True:
                        parts = [memory[place] for place in windows]
                        if last is None or size != last.size or parts != [*last.parts.values()]:
                            places = (place.start for place in windows)
                            yield (last := Snapshot(size, dict(zip(places, parts, strict=True))))
                            if windows != windows_of(memory):
                                break
                        if not self._advance(inode):
                            self._allow(mmap.PROT_READ | mmap.PROT_WRITE)
                            self.views = []
                            return
                        if os.fstat(file.fileno()).st_size != size:
                            break

    def _advance(self, inode: int | None) -> bool:
        """Let it go on, by one change of the file at most; False if it stopped by itself."""
        self.trace(TO_SYSCALL if self.traps else STEP)
        stopped = self.wait()
        if stopped == signal.SIGSEGV and self.views:
            self._allow(mmap.PROT_READ | mmap.PROT_WRITE)
            self.trace(STEP)
            stopped = self.wait()
            self._allow(mmap.PROT_READ)
        elif stopped == AT_SYSCALL and inode:
            registers = self._registers()
            if registers.orig_rax in (MMAP, MUNMAP) and registers.rax != BEGINS:
                self._protect(inode)
        if stopped not in (signal.SIGTRAP, signal.SIGSTOP, AT_SYSCALL):
            pytest.fail(f"the child got signal {stopped}")
        return stopped != signal.SIGSTOP

    # ---- Inside the child

    def _protect(self, inode: int) -> None:
        """Make all that it sees of the file read-only."""
        if self.traps:
            maps = Path(f"/proc/{self.process.pid}/maps").read_text()
            found = re.findall(rf"^(\w+)-(\w+) r..s \S+ \S+ {inode} ", maps, re.M)
            self.views = [(int(low, 16), int(high, 16) - int(low, 16)) for low, high in found]
            self._allow(mmap.PROT_READ)

    def _allow(self, what: int) -> None:
        """Let it do that with what it sees of the file: it calls mprotect()."""
        if not self.views:
            return
        saved = self._registers()
        for place, length in self.views:
            now = Registers.from_buffer_copy(saved)
            now.rip, now.orig_rax = self._a_syscall(), 2**64 - 1
            now.rax, now.rdi, now.rsi, now.rdx = MPROTECT, place, length, what
            self.trace(SET_REGS, ctypes.addressof(now))
            self.trace(STEP)
            assert self.wait() == signal.SIGTRAP
            assert self._registers().rax == 0, "mprotect"
        self.trace(SET_REGS, ctypes.addressof(saved))

    def _registers(self) -> Registers:
        registers = Registers()
        self.trace(GET_REGS, ctypes.addressof(registers))
        return registers

    def _a_syscall(self) -> int:
        """Return where in its memory there is such an instruction."""
        if not hasattr(self, "_place"):
            maps = Path(f"/proc/{self.process.pid}/maps").read_text()
            found = re.search(r"^(\w+)-(\w+) r-xp .*/libc[.-]\S*$", maps, re.M)
            assert found, "no libc"
            low, high = (int(each, 16) for each in found.groups())
            with open(f"/proc/{self.process.pid}/mem", "rb") as memory:
                memory.seek(low)
                self._place = low + memory.read(high - low).index(b"\x0f\x05")
        return self._place


def _granules(header: memoryview, part: Part) -> int:
    try:
        return read_checked(header, part, part)
    except RegistryCorrupt:  # it is being made
        return 0


def windows_of(memory: mmap.mmap) -> list[slice]:
    """Return where anything may change: in a registry, its header and both ends of granules."""
    if len(memory) <= PAGE:
        return [slice(0, len(memory))]
    with memoryview(memory) as view, view[:HEADER_BYTES].cast("Q") as header:
        # It may grow by so much, which is filled in before it is in use.
        lengths = {part: (_granules(header, part) + _AHEAD[part]) * GRANULE for part in Part}
    found = [slice(0, HEADER_BYTES)]
    for part, length in lengths.items():
        for granule in range(part.place, part.place + length, GRANULE):
            for start in (granule, granule + GRANULE - WINDOW):
                if start + WINDOW <= len(memory):
                    found.append(slice(start, start + WINDOW))
    return found
