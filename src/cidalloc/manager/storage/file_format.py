"""The layout of a registry's file: a header, the rows of sessions, the records of IDs.

Each part has a fixed place. The file is sparse: only what was used takes space on the disk. Two
words of the header say how much of the rows and of the records may be used. Before that a row or
record is *new*: it tells its own place, so that zeros or another page in its place are noticed.

A `checked` word has a checksum of its value and place. Records have checksums of their own, see
_core/seal.pxd.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
import uuid
import zlib
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import numpy as np

from ..._alloc import Allocator
from ...errors import CidError, RegistryCorrupt, RegistryMismatch
from ...protocol import IDs
from .. import slices

__all__ = [
    "FORMAT",
    "GRANULE",
    "HEADER_BYTES",
    "MAX_CAPACITY",
    "MAX_ROWS",
    "NEW_FILE",
    "RECORD",
    "ROW",
    "VALUE_BITS",
    "Part",
    "Shape",
    "Word",
    "checked",
    "fill_header",
    "mismatch",
    "new_content",
    "read_checked",
    "shape_of",
]

FORMAT = 2
"""The version of the file's format."""
GRANULE = 1 << 16
"""Bytes: a part grows by a multiple of it, which is a multiple of any page size."""
RECORD = 32
"""Bytes of an ID's record; record 0 belongs to no ID."""
ROW = 128
"""Bytes of a session's row, see sessions.py; row 0 belongs to no session."""
MAX_ROWS = 1 << 20
"""Rows that the file has room for."""
MAX_CAPACITY = 1 << 38
"""The most IDs in a pool."""
VALUE_BITS = 48
"""Bits of the value of most checked words; the checksum has the others."""

NEW_FILE = (
    "let the manager make a new file: drain the server ('cidalloc drain {0} --wait 10m'), stop it,"
    " move its file away ('mv {0} {0}.old'), and start it with the new settings"
)
"""How to change the pool of a manager with the file at a path."""

_PAIR = struct.Struct("=QQ")
_WORD = 2**64 - 1
_MAGIC = int.from_bytes(b"CIDALLOC", "little")
_MAX_GENERATION = 2**46  # it shares a checked word with the state of its session
_MAX_CHANGES = 2**VALUE_BITS - 2**33  # there is room to leap


class Word(IntEnum):
    """The words of the header, each of 64 bits."""

    MAGIC = 0
    FORMAT = 1
    UUID = 2  # two words
    SECRET = 4  # two words: the key of the tokens' digests
    FIRST = 6
    MODULUS = 7
    OFFSET = 8
    SUM = 9  # the checksum of the words before it, which never change
    # Each of these changes by one store. They are `checked` up to the boot; without it, the file is
    # as after a power cut.
    CAPACITY = 10
    ROWS = 11  # granules of rows that may be used
    RECORDS = 12  # granules of records that may be used
    GENERATION = 13  # of the latest session
    HORIZON = 14  # milliseconds: no ID is in use for longer unless the registry hears of it
    ISSUES_FROM = 15  # a registry that lacks its past waits until then; 0 once it has issued IDs
    WAIT = 16  # milliseconds: for how long, from when it was opened first in a boot of the machine
    CHANGES = 17  # rises with each change that an older content must not lack; see stamps.py
    COPY = 18  # a random number of a file that began as a copy, or with an older content; else 0
    BOOT = 19  # two words: the boot of the machine whose clock the times are of
    FILE = 21  # the identity of the file that was written last, by which a copy is known
    PID = 22  # the process that writes the file
    SERVER = 23  # the `process_id` of the process that started it
    REQUESTER = 24  # the same of the process that waits for the file
    DRAIN = 25  # by the command `cidalloc drain`: which server is being drained, see drain.py
    DRAIN_SEEN = 26  # the writer's answer: the same, or 0 if it is not being drained
    END = 27


HEADER_BYTES = Word.END * 8
CHECKED = range(Word.CAPACITY, Word.BOOT)
"""The checked words of the header."""


class Part(IntEnum):
    """A part of the file that grows; its value is the header's word with its length."""

    ROWS = Word.ROWS
    RECORDS = Word.RECORDS

    @property
    def place(self) -> int:
        """Where in the file it begins, in bytes."""
        return GRANULE if self is Part.ROWS else GRANULE + MAX_ROWS * ROW

    @property
    def record(self) -> int:
        """Bytes of one row or record."""
        return ROW if self is Part.ROWS else RECORD

    def word(self, number: int) -> int:
        """Return where in the file a row or record begins, in words."""
        return (self.place + number * self.record) // 8


@dataclass(frozen=True, slots=True)
class Shape:
    """A pool of ``capacity`` IDs from ``first`` on, and the order in which they are issued first.

    The allocator counts IDs from ``first`` on. The registry rotates these numbers: issuing begins
    at ``first + offset`` and goes round among the first ``modulus`` IDs. A pool that grows keeps
    its modulus, so no ID gets another number.

    Args:
        first, capacity: the pool.
        modulus: the capacity that the pool was made with; the same as ``capacity`` by default.
        offset: less than ``modulus``.
        slice: the setting that this pool is for; a file does not tell it.
    """

    first: int
    capacity: int
    modulus: int = 0
    offset: int = 0
    slice: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "modulus", self.modulus or self.capacity)

    def fits(self, found: Shape) -> bool:
        """Tell whether the pool of a file has these IDs, in any order; or is any random slice."""
        if self.slice == slices.RANDOM:
            return slices.is_random(found.first, found.capacity)
        return (self.first, self.capacity) == (found.first, found.capacity)

    def ids(self, numbers: IDs) -> IDs:
        """Return the IDs that the allocator has under these numbers of its own."""
        return self._rotated(numbers, self.offset) if self.offset else numbers

    def numbers(self, ids: IDs) -> IDs:
        """Return the allocator's numbers of these IDs; of none of the pool, one outside it."""
        return self._rotated(ids, self.modulus - self.offset) if self.offset else ids

    def _rotated(self, numbers: IDs, by: int) -> IDs:
        if len(numbers) == 1:  # the usual case; an array operation takes longer than all of this
            place = int(numbers[0]) - self.first
            if not 0 <= place < self.modulus:
                return numbers
            return np.array([(place + by) % self.modulus + self.first], np.uint64)
        places = numbers - np.uint64(self.first)
        rotated = (places + np.uint64(by)) % np.uint64(self.modulus)
        return np.where(places < self.modulus, rotated, places) + np.uint64(self.first)

    def with_id(self, error: CidError) -> CidError:
        """Return an error of the allocator with the ID in place of the allocator's number."""
        if error.cid is None:
            return error
        cid = self.ids(np.array([error.cid], np.uint64))[0]
        return type(error)(str(error).replace(f"ID {error.cid}", f"ID {cid}", 1))

    @property
    def granules(self) -> int:
        """Granules of all records."""
        return -(-(self.capacity + 1) * RECORD // GRANULE)


def fill_header(header: memoryview, shape: Shape) -> None:
    """Write all that a new header has."""
    header[Word.MAGIC], header[Word.FORMAT] = _MAGIC, FORMAT
    for word in range(Word.SECRET, Word.SECRET + 2):
        header[word] = secrets.randbits(64)
    header[Word.UUID], header[Word.UUID + 1] = struct.unpack("=QQ", uuid.uuid4().bytes)
    header[Word.FIRST] = shape.first
    header[Word.MODULUS], header[Word.OFFSET] = shape.modulus, shape.offset
    header[Word.SUM] = _sum_of(header)
    for word in CHECKED:
        header[word] = checked(word, shape.capacity if word == Word.CAPACITY else 0)


def _sum_of(header: memoryview) -> int:
    digest = hashlib.blake2b(header[: Word.SUM].tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def checked(place: int, value: int, rest: bytes = b"", bits: int = VALUE_BITS) -> int:
    """Return a word with a value and a checksum, which notices each single flipped bit.

    Args:
        place: the number of the word in the file.
        value: it has at most so many ``bits``.
        rest: what else the checksum covers.
        bits: how many of the word's bits the value has.
    """
    return value | zlib.crc32(rest, zlib.crc32(_PAIR.pack(place, value))) << bits & _WORD


def read_checked(
    words: memoryview, at: int, place: int, rest: bytes = b"", bits: int = VALUE_BITS
) -> int:
    """Return the value of the checked word ``at``; see `checked`.

    Raises:
        RegistryCorrupt: it is damaged.
    """
    word: int = words[at]
    value = word & (1 << bits) - 1
    if word != checked(place, value, rest, bits):
        raise RegistryCorrupt(f"word {place} is damaged")
    return value


def new_content(part: Part, first: int, count: int) -> bytes:
    """Return ``count`` granules of a part from granule ``first`` on, as they were never used."""
    each = GRANULE // part.record
    if part is Part.RECORDS:
        return Allocator.sealed_blocks(first * each, count * each)
    rows = np.zeros((count * each, ROW // 8), np.uint64)
    places = np.arange(len(rows), dtype=np.uint64) * np.uint64(ROW // 8)
    places += np.uint64(part.word(first * each))
    # A CRC is linear but for a constant: each bit of a place changes it in its own way.
    zero = checked(0, 0)
    rows[:, 0] = zero
    for bit in range(Part.RECORDS.word(0).bit_length()):
        change = np.uint64(checked(1 << bit, 0) ^ zero)
        rows[:, 0] ^= (places >> np.uint64(bit) & np.uint64(1)) * change
    if first == 0:
        rows[:1] = 0  # row 0 belongs to no session
    return rows.tobytes()


def shape_of(header: memoryview, path: Path) -> Shape:
    """Return the pool that a header describes.

    Raises:
        RegistryCorrupt: the header is damaged, or the file is something else.
        RegistryMismatch: the file has another format.
    """
    if header[Word.MAGIC] != _MAGIC:
        raise RegistryCorrupt(f"{path} is not a registry of cidalloc")
    if header[Word.FORMAT] != FORMAT:
        raise RegistryMismatch(
            f"{path} has the format {header[Word.FORMAT]}, and this version of cidalloc writes"
            f" {FORMAT}: use the version that made it, or a newer one"
        )
    first, modulus, offset = header[Word.FIRST : Word.SUM].tolist()
    try:
        values = {word: read_checked(header, word, word) for word in CHECKED}
    except RegistryCorrupt:
        values = dict.fromkeys(CHECKED, 0)
    capacity = values[Word.CAPACITY]
    sound = (
        header[Word.SUM] == _sum_of(header)
        and 0 <= offset < modulus <= capacity <= MAX_CAPACITY
        and 0 < first <= 2**63 - capacity
        and 0 < values[Part.ROWS] <= MAX_ROWS * ROW // GRANULE
        and 0 < values[Part.RECORDS] <= Shape(first, capacity).granules
        and values[Word.GENERATION] < _MAX_GENERATION
        and values[Word.CHANGES] < _MAX_CHANGES
    )
    if not sound:
        raise RegistryCorrupt(f"{path}: its header is damaged")
    return Shape(first, capacity, modulus, offset)


def mismatch(path: Path, found: Shape, wanted: Shape) -> RegistryMismatch:
    """Return the error that the file at a path does not fit the pool that is wanted."""
    pool, way = f"first={wanted.first}, capacity={wanted.capacity}", NEW_FILE.format(path)
    if wanted.slice:
        pool = (
            "a random slice"
            if wanted.slice == slices.RANDOM
            else f"{pool}, the slice {wanted.slice}"
        )
    elif wanted.first == found.first and wanted.capacity > found.capacity:
        way = f"enlarge the pool with 'cidalloc registry upgrade --capacity N {path}'"
    return RegistryMismatch(
        f"{path} holds a pool with first={found.first}, capacity={found.capacity}, and not {pool}:"
        f" change the settings back, or {way}"
    )
