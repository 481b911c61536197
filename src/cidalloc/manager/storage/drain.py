"""The drain of a server: a word in the header of its registry's file, and the manager's answer.

The word names the boot of the machine and the process of the server. So a drain holds when the
model is reloaded, and a new server on the same file begins without it. Whoever may write the file
may store the word, and nobody else can: no request does it.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

from ...errors import InvalidArgument
from .failures import explained, is_passing, unusable
from .file import Storage
from .file_format import HEADER_BYTES, Word, shape_of
from .file_lock import WRITER, close, query

__all__ = ["DrainSwitch", "answer", "is_draining"]


def _name_of(header: memoryview) -> int:
    """Return the word that drains the server which has the file."""
    which = header[Word.BOOT : Word.BOOT + 2].tobytes() + header[Word.SERVER : Word.SERVER + 1]
    return int.from_bytes(hashlib.blake2b(which, digest_size=8).digest(), "little") | 1


def is_draining(header: memoryview) -> bool:
    """Return whether the server that has the file is being drained."""
    word = header[Word.DRAIN]  # almost always 0, which is quicker than a digest
    return word != 0 and word == _name_of(header)


def answer(header: memoryview) -> bool:
    """Note in the file, as its writer, whether it is being drained. Return whether that is new.

    The caller lets no request run meanwhile: so after a drain was noted, no ID is issued any more.
    """
    found = _name_of(header) if is_draining(header) else 0
    new = header[Word.DRAIN_SEEN] != found
    if new:
        header[Word.DRAIN_SEEN] = found
    return new


class DrainSwitch:
    """The drain of the file at ``path``, for a process that is not its writer.

    Raises:
        InvalidArgument: the file is not there, or may not be written.
        Unavailable: the machine fails; so may every other call.
        RegistryCorrupt, RegistryMismatch: it is no registry that this version knows.
    """

    def __init__(self, path: Path) -> None:
        Storage.look(path)  # the whole of it must be sound
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if is_passing(error):
                raise unusable(path, error) from None
            raise InvalidArgument(
                f"cannot write {path}: {error.strerror}; who may write the file may drain its"
                " server"
            ) from None
        self._path = path

    def _header(self) -> memoryview:
        with explained(self._path):
            header = memoryview(os.pread(self._fd, HEADER_BYTES, 0)).cast("Q")
        shape_of(header, self._path)
        return header

    @property
    def runs(self) -> bool:
        """Whether a manager has the file."""
        with explained(self._path):
            return not query(self._fd, WRITER)

    @property
    def on(self) -> bool:
        """Whether the server that has, or last had, the file is being drained."""
        return is_draining(self._header())

    @property
    def answered(self) -> bool:
        """Whether the manager has seen the word as it is now."""
        header = self._header()
        wanted = _name_of(header) if is_draining(header) else 0
        return self.runs and header[Word.DRAIN_SEEN] == wanted

    def set(self, on: bool) -> None:
        """Drain the server that has the file, or end that."""
        word = _name_of(self._header()) if on else 0
        with explained(self._path):
            os.pwrite(self._fd, struct.pack("=Q", word), Word.DRAIN * 8)

    def close(self) -> None:
        """Close the file."""
        close(self._fd)
