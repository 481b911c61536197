"""The writer of a registry's file, and the process that waits to become it.

Both lock a byte of the file. The kernel releases such a lock when its process dies. The locks
belong to the open file and not to the process, so one process cannot have a lock twice either.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from .failures import explained, is_passing, unusable
from .file_format import Word

__all__ = [
    "REQUEST",
    "WRITER",
    "TakeoverRequest",
    "close",
    "process_id",
    "query",
    "try_lock",
    "unlock_and_close",
    "writer_of",
]

WRITER = 0
"""The byte that the writer locks."""
REQUEST = 1
"""The byte that a process locks while it waits to be the writer."""


def process_id(pid: int) -> int:
    """Return a number of this process that no other one has had since the machine was started.

    It is 0 if there is no such process, or if it has ended and its parent did not look yet.

    Raises:
        Unavailable: the machine fails, so that this is not known.
    """
    file = Path(f"/proc/{pid}/stat")
    try:
        after_name = file.read_text().rpartition(")")[2].split()
    except OSError as error:
        if is_passing(error):
            raise unusable(file, error) from None
        return 0
    if after_name[0] in "ZX":
        return 0
    return int(after_name[19]) << 22 | pid  # when it was started, and at most 2**22 at a time


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack("@hhqqi0q", kind, os.SEEK_SET, byte, 1, 0)


_UNLOCKED = tuple(_flock(fcntl.F_UNLCK, byte) for byte in (WRITER, REQUEST))


def try_lock(fd: int, byte: int) -> bool:
    """Lock a byte. Return False if another process has locked it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, byte))
    except BlockingIOError:
        return False
    return True


def unlock_and_close(fd: int, byte: int) -> None:
    """Unlock a byte and close the file. An error of the system is ignored, as by `close`."""
    # A mapping or a forked child may keep the file open, so closing it alone would not unlock it.
    try:  # noqa: SIM105 a context manager would need memory
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _UNLOCKED[byte])
    except (OSError, MemoryError):  # it is unlocked, and there was no memory for the result
        pass
    close(fd)


def close(fd: int) -> None:
    """Close a file. Whatever the system answers, it is closed: what counts was synced before."""
    try:  # noqa: SIM105 a context manager would need memory
        os.close(fd)
    except OSError:
        pass


def query(fd: int, byte: int) -> bool:
    """Return whether no other process has locked a byte."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(struct.unpack("@hhqqi0q", answer)[0] == fcntl.F_UNLCK)


def writer_of(file: int | Path) -> tuple[int, int]:
    """Return who writes a file: its process ID, and the `process_id` of its server.

    Raises:
        InvalidArgument, Unavailable: the file at a path cannot be read.
    """
    if isinstance(file, Path):
        with explained(file):
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return writer_of(fd)
            finally:
                close(fd)
    pid, server = struct.unpack("=QQ", os.pread(file, 16, Word.PID * 8))
    return pid, server


class TakeoverRequest:
    """A request to become the writer of a file that another process writes.

    It is a lock on a byte of the file, so the kernel withdraws it when this process dies. Its calls
    raise `InvalidArgument` or `Unavailable` if the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made = False
        with explained(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def make(self) -> bool:
        """Make the request. Return False if another process has made one before."""
        with explained(self._path):
            if not self._made and try_lock(self._fd, REQUEST):
                word = struct.pack("=Q", process_id(os.getppid()))
                os.pwrite(self._fd, word, Word.REQUESTER * 8)
                self._made = True
        return self._made

    def close(self) -> None:
        """Withdraw the request."""
        unlock_and_close(self._fd, REQUEST)
