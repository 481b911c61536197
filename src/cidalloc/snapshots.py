"""The bytes of an allocator's snapshot: its numbers, its blocks, and the order of its queue."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

from .errors import InvalidArgument

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["State", "pack", "unpack"]

_HEAD = struct.Struct("<8sII")
"""`_MAGIC`, `_VERSION`, and the CRC-32 of all that follows."""
_NUMBERS = struct.Struct("<QQQQqqQQQ")
"""The numbers of a `State`, the bytes of its blocks, and the bytes of the order."""
_MAGIC, _VERSION = b"cidalloc", 1


class State(NamedTuple):
    """What a pool is made of again.

    Attributes:
        blocks: the opened blocks, 32 bytes each.
        order: the numbers of the queued blocks in their order, 8 bytes each.
    """

    capacity: int
    first: int
    block: int
    ready: int
    now: int
    last: int
    peak: int
    blocks: bytes
    order: bytes


def pack(state: State) -> bytes:
    """Return a state as bytes."""
    *numbers, blocks, order = state
    body = _NUMBERS.pack(*numbers, len(blocks), len(order)) + blocks + order
    return _HEAD.pack(_MAGIC, _VERSION, zlib.crc32(body)) + body


def unpack(snapshot: Buffer) -> State:
    """Return the state that `pack` made bytes of.

    Raises:
        InvalidArgument: they are damaged, cut short, of another version, or something else.
    """
    try:
        data = bytes(memoryview(snapshot))
    except (TypeError, BufferError):
        raise InvalidArgument(f"snapshot must be bytes, not {type(snapshot).__name__}") from None
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        raise InvalidArgument("these bytes are not the snapshot of an allocator")
    _, version, check = _HEAD.unpack_from(data)
    if version != _VERSION:
        raise InvalidArgument(
            f"the snapshot has version {version}: this cidalloc reads version {_VERSION}"
        )
    body = data[_HEAD.size :]
    if len(body) < _NUMBERS.size or zlib.crc32(body) != check:
        raise InvalidArgument("the snapshot is damaged or cut short")
    *numbers, size, _ = _NUMBERS.unpack_from(body)
    lists = body[_NUMBERS.size :]
    return State._make((*numbers, lists[:size], lists[size:]))
