"""Stamps: a registry signs the number of its changes, so that clients prove what they have seen.

A client sends the latest stamp that it got with its next request. If it is of a later state than
the registry's file, an older content of the file was put back, which lacks IDs that were issued.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import struct

from ..protocol import STAMP_DIGITS
from .storage.file import Storage
from .storage.file_format import Word

__all__ = ["Stamps"]

_STAMP = re.compile(rf"([0-9a-f]{{16}})[0-9a-f]{{{STAMP_DIGITS - 16}}}")


class Stamps:
    """The stamps of the registry in a storage.

    The key of the signatures is in an older content, too. They cover the identity of the file: a
    copy at another server signs otherwise.
    """

    def __init__(self, store: Storage) -> None:
        self._store = store
        self._secret = store.secret
        self._latest = -1, ""

    def count(self) -> None:
        """Count a change, before it is done. A content from before it must not be used."""
        self._store.write(Word.CHANGES, self._store.read(Word.CHANGES) + 1)

    @property
    def latest(self) -> str:
        """The stamp of the present state. Of two stamps, the later one is the greater text."""
        changes = self._store.read(Word.CHANGES)
        if changes != self._latest[0]:
            self._latest = changes, self._signed(changes)
        return self._latest[1]

    def unknown(self, stamp: str) -> int:
        """Return the number of changes of a stamp if the present state lacks some, else 0.

        A text that this registry has not signed proves nothing.
        """
        found = _STAMP.fullmatch(stamp)
        changes = int(found[1], 16) if found else 0
        if changes <= self._store.read(Word.CHANGES):
            return 0
        return changes if hmac.compare_digest(stamp, self._signed(changes)) else 0

    def _signed(self, changes: int) -> str:
        number = struct.pack(">Q", changes)
        what = struct.pack("=Q", self._store.header[Word.FILE]) + number
        return (number + hashlib.blake2b(what, digest_size=8, key=self._secret).digest()).hex()
