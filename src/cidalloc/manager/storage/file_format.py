"""How a registry's file is laid out: its header, its extents, and what lies where.

The file is a header and extents, each in whole granules; an extent belongs to the pool's blocks or
to the sessions, and grows that array by so much. The blocks lie in the file in the order in which
they are opened, which begins anywhere in the pool, so that the file is as long as what was ever
used. In memory they lie in the order of their IDs.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
import uuid
import zlib
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

from ...errors import RegistryCorrupt, RegistryMismatch

__all__ = [
    "FORMAT",
    "GRANULE",
    "RECORD",
    "ROW",
    "Kind",
    "Shape",
    "Word",
    "extent_word",
    "extents_of",
    "fill_header",
    "header_sum",
    "shape_of",
]

FORMAT = 1
"""The version of the file's format."""
GRANULE = 1 << 16
"""Bytes: every part of the file begins at a multiple of it, whatever the page size is."""
RECORD = 32
"""Bytes of a block's record."""
ROW = 128
"""Bytes of a session's."""

_MAGIC = int.from_bytes(b"CIDALLOC", "little")
_PER_GRANULE = GRANULE // RECORD
_ETERNITY_MS = 2**50  # no time in the header is as long


class Word(IntEnum):
    """What stands where in the header, in words of 64 bits. `SUM` is over those before it."""

    MAGIC = 0
    FORMAT = 1
    UUID = 2  # two words
    SECRET = 4  # two words: the key of the tokens' digests
    FIRST = 6
    CAPACITY = 7
    BLOCK = 8
    SPLIT = 9
    SUM = 10
    # From here on they change, each with one store.
    BOOT = 12  # two words: of which boot the times are
    GENERATION = 14  # the last one given to a session
    HORIZON = 15  # milliseconds: no ID is in use for longer without a word to the registry
    PID = 16  # the writer, and the process that started it
    SERVER = 17
    REQUESTER = 18  # the same as SERVER, of who has locked the byte of claims
    EXTENTS = 128  # granules << 1 | kind, and a checksum above, until a 0
    END = 1024


class Kind(IntEnum):
    """Whose an extent is."""

    BLOCKS = 0
    ROWS = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """The pool of a file, and where in it issuing begins: at the block with the number `split`."""

    first: int
    capacity: int
    block: int
    split: int = 0

    @property
    def count(self) -> int:
        """Blocks in the pool; they are numbered from 1 on."""
        return (self.capacity - 1) // self.block + 1

    @property
    def start(self) -> int:
        """The ID that is issued first."""
        return self.first + (max(self.split, 1) - 1) * self.block

    @property
    def granules(self) -> int:
        """The length of the blocks in memory."""
        return (self.count + 1) * RECORD // GRANULE + bool((self.count + 1) % _PER_GRANULE)

    @property
    def upper(self) -> int:
        """Granules from the split on, which come first in the file."""
        return self.granules - self.split // _PER_GRANULE

    def place(self, granule: int) -> int:
        """Return where in memory the file's n-th granule of blocks lies, in bytes."""
        if granule < self.upper:
            return self.split * RECORD + granule * GRANULE
        return (granule - self.upper) * GRANULE

    def ready(self, granules: int) -> int:
        """Return how many blocks are in the file's first so many granules of blocks."""
        above = min(self.split + granules * _PER_GRANULE, self.count + 1) - max(self.split, 1)
        if granules <= self.upper:
            return max(above, 0)
        return above + min((granules - self.upper) * _PER_GRANULE, self.split) - 1

    @classmethod
    def anywhere(cls, first: int, capacity: int, block: int) -> Shape:
        """Return the shape of a pool that begins at a random place."""
        shape = cls(first, capacity, block)
        return replace(shape, split=secrets.randbelow(shape.granules) * _PER_GRANULE)


def fill_header(header: memoryview, shape: Shape) -> None:
    """Write what never changes."""
    header[Word.MAGIC], header[Word.FORMAT] = _MAGIC, FORMAT
    for word in range(Word.SECRET, Word.SECRET + 2):
        header[word] = secrets.randbits(64)
    header[Word.UUID], header[Word.UUID + 1] = struct.unpack("=QQ", uuid.uuid4().bytes)
    header[Word.FIRST], header[Word.CAPACITY] = shape.first, shape.capacity
    header[Word.BLOCK], header[Word.SPLIT] = shape.block, shape.split
    header[Word.SUM] = header_sum(header)


def header_sum(header: memoryview) -> int:
    """Return the checksum of what never changes."""
    digest = hashlib.blake2b(header[: Word.SUM].tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def extent_word(n: int, kind: Kind, granules: int) -> int:
    """Return the header's word for the n-th extent."""
    word = granules << 1 | kind
    return word | zlib.crc32(struct.pack("=QQ", n, word)) << 32


def extents_of(header: memoryview, path: Path | None) -> list[tuple[Kind, int]]:
    """Return the extents of a file in their order: whose, and how many granules.

    Raises:
        RegistryCorrupt: the list is damaged.
    """
    words = header[Word.EXTENTS : Word.END].tolist()
    found = []
    for n, word in enumerate(words[: words.index(0)]):
        kind, granules = Kind(word & 1), (word & 2**32 - 1) >> 1
        if word != extent_word(n, kind, granules):
            raise RegistryCorrupt(f"{path}: the list of extents is damaged")
        found.append((kind, granules))
    return found


def shape_of(header: memoryview, path: Path) -> Shape:
    """Return the pool that a header is of.

    Raises:
        RegistryCorrupt: it is damaged, or no header.
        RegistryMismatch: it is of another format.
    """
    if header[Word.MAGIC] != _MAGIC:
        raise RegistryCorrupt(f"{path} is not a registry of cidalloc")
    if header[Word.FORMAT] != FORMAT:
        raise RegistryMismatch(
            f"{path} has the format {header[Word.FORMAT]}, and this version of cidalloc writes"
            f" {FORMAT}: use the version that made it, or a newer one"
        )
    shape = Shape(*header[Word.FIRST : Word.SUM].tolist())
    sound = (
        header[Word.SUM] == header_sum(header)
        and shape.block in (1, 2, 4, 8, 16, 32, 64)
        and 0 < shape.capacity <= 2**38
        and 0 < shape.first <= 2**63 - shape.capacity
        and shape.split % _PER_GRANULE == 0
        and shape.split <= shape.count
        and header[Word.HORIZON] < _ETERNITY_MS
        and header[Word.END - 1] == 0
    )
    if not sound:
        raise RegistryCorrupt(f"{path}: its header is damaged")
    return shape
