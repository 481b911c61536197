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
from stepped_child import FORBIDDEN

from cidalloc.manager.storage.file_format import GRANULE, Word

TRAPS = platform.machine() == "x86_64"
CONT, STEP, GET_REGS, SET_REGS, TO_SYSCALL, SET_OPTIONS = 7, 9, 12, 13, 24, 0x4200
EXIT_KILL, MARK_SYSCALLS = 0x100000, 1
AT_SYSCALL = signal.SIGTRAP | 0x80
MMAP, MPROTECT, MUNMAP = 9, 10, 11
BEGINS = 2**64 - errno.ENOSYS  # what rax is when a system call begins
HEADER = Word.EXTENTS * 8 + 64
WINDOW = 2_048  # bytes at both ends of an extent: all that changes does so there

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

    def put(self, path: Path, before: bytes) -> Path:
        """Make a file of it."""
        with path.open("wb") as file:
            file.write(before)
            file.truncate(self.size)
            for place, part in self.parts.items():
                file.seek(place)
                file.write(part)
        return path

    def unwatched(self, data: bytes) -> bytes:
        """Return all of a file that was not looked at."""
        rest = bytearray(data.ljust(self.size, b"\0"))
        for place, part in self.parts.items():
            rest[place : place + len(part)] = bytes(len(part))
        return bytes(rest)


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

    def snapshots(self, name: str, width: int, path: Path) -> tuple[bytes, list[Snapshot]]:
        """Return what is in the file before, and each state that differs from the one before it."""
        assert self.process.stdin
        self.process.stdin.write(f"{name}\t{width}\t{path}\n")
        self.process.stdin.flush()
        self.go()
        before = path.read_bytes() if path.exists() else b""
        found = [*self._walk(path)]
        same = found[-1].unwatched(before) == found[-1].unwatched(path.read_bytes())
        assert same, "something changed where nobody looked"
        self.go()
        return before, found

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


def windows_of(memory: mmap.mmap) -> list[slice]:
    """Return where in a file anything may change: the header, and both ends of its extents."""
    found, offset, word = [slice(0, HEADER)], GRANULE, Word.EXTENTS * 8
    # An extent's length stands between its kind and a checksum.
    while granules := int.from_bytes(memory[word : word + 8], sys.byteorder) % 2**32 >> 1:
        end = offset + granules * GRANULE
        for start in (offset, end - WINDOW):
            if start + WINDOW <= len(memory):
                found.append(slice(start, start + WINDOW))
        offset, word = end, word + 8
    return found
