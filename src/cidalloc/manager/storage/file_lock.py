"""Locks on bytes of a file, which the kernel takes back when their process dies.

They belong to the open file and not to the process, so one process cannot have a lock twice either.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

__all__ = ["process_id", "query", "try_lock", "unlock_and_close"]


def process_id(pid: int) -> int:
    """Return a number of this process that no other one has had since the machine was started.

    It is 0 if there is no such process, or if it has ended and its parent did not look yet.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    if after_name[0] in "ZX":
        return 0
    return int(after_name[19]) << 22 | pid  # when it was started, and at most 2**22 at a time


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack("@hhqqi0q", kind, os.SEEK_SET, byte, 1, 0)


def try_lock(fd: int, byte: int) -> bool:
    """Lock a byte; False if somebody else has."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, byte))
    except BlockingIOError:
        return False
    return True


def unlock_and_close(fd: int, byte: int) -> None:
    """Unlock a byte and close the file."""
    # A mapping or a forked child may keep the file open, so closing it alone would not unlock it.
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte))
    os.close(fd)


def query(fd: int, byte: int) -> bool:
    """Tell whether nobody else has locked a byte."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(struct.unpack("@hhqqi0q", answer)[0] == fcntl.F_UNLCK)
