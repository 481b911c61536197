"""Write a registry's file anew, for a larger pool, and lose nothing of it."""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...errors import InvalidArgument, Unavailable
from .file import Storage
from .file_format import GRANULE, RECORD, Kind, Shape, Word, header_sum

__all__ = ["upgrade"]

_END = 30  # where in a block's record the number of its IDs is


def upgrade(path: Path, capacity: int) -> Shape:
    """Let the pool in the file at `path` have `capacity` IDs, and return its shape.

    The new file takes the old one's place at once, when it is whole and on the disk; up to then,
    whatever happens, the old one stands. What is held stays held, and the registry keeps its UUID
    and its sessions. No manager may run.

    Raises:
        RegistryLocked: a manager has it.
        InvalidArgument: fewer IDs than there are, or more than there can be.
        Unavailable: the disk is full.
        RegistryCorrupt, RegistryMismatch: as `Storage.open`.
    """
    path = path.resolve()  # or the file would take the place of a link to it
    old = Storage.open(path, None, boot=b"")
    try:
        old.sign()
        shape = replace(old.shape, capacity=capacity)
        if not old.shape.capacity <= capacity <= min(2**38, 2**63 - shape.first):
            raise InvalidArgument(
                f"a pool of {old.shape.capacity} IDs from {shape.first} on cannot become one of"
                f" {capacity}: it only grows, to at most 2**38 IDs and to below 2**63"
            )
        if shape != old.shape:
            _rewrite(old, path, shape)
        return shape
    finally:
        old.close()


def _rewrite(old: Storage, path: Path, shape: Shape) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        new = Storage.create(draft, shape, path)
        try:
            _copy(old, new)
            owner = path.stat()
            os.chown(draft, owner.st_uid, owner.st_gid)
            draft.chmod(owner.st_mode & 0o777)
            new.put_in_place(draft)
        finally:
            new.close()
    except OSError as error:
        if isinstance(error, Unavailable):
            raise
        raise Unavailable(f"cannot rewrite {path}: {error.strerror}; it is as it was") from None
    finally:
        draft.unlink(missing_ok=True)


def _copy(old: Storage, new: Storage) -> None:
    """Copy all records: a block has the same place in memory, however large the pool is."""
    for word in (*range(Word.UUID, Word.FIRST), *range(Word.BOOT, Word.PID)):
        new.header[word] = old.header[word]
    new.header[Word.SUM] = header_sum(new.header)
    granules = old.granules(Kind.BLOCKS)
    wrapped = granules > old.shape.upper
    if wrapped:
        # Issuing went on at the pool's beginning. The new end comes before that in the file.
        granules += new.shape.upper - old.shape.upper
    new.grow_to(Kind.BLOCKS, granules)
    new.grow_to(Kind.ROWS, old.granules(Kind.ROWS))
    source, target = memoryview(old.blocks), memoryview(new.blocks)
    for granule in range(old.granules(Kind.BLOCKS)):
        place = old.shape.place(granule)
        target[place : place + GRANULE] = source[place : place + GRANULE]
    length = old.granules(Kind.ROWS) * GRANULE
    memoryview(new.rows)[:length] = memoryview(old.rows)[:length]
    ends = np.frombuffer(target, np.uint8)[_END::RECORD]
    last, width = old.shape.count, old.shape.block
    if ends[last]:
        ends[last] = min(width, new.shape.capacity - (last - 1) * width)
    if wrapped:
        ends[last + 1 : new.shape.count + 1] = width
        ends[new.shape.count] = (new.shape.capacity - 1) % width + 1
