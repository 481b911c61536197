"""Methods of the allocator that are built on the core, in Python."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

    from ._alloc import Core
else:
    Core = object

from .errors import Exhausted, InvalidArgument, RegistryCorrupt

IDs: TypeAlias = npt.NDArray[np.integer[Any]] | Sequence[SupportsIndex]


_HEAD = struct.Struct("<8sII")
"""Of a snapshot: `_MAGIC`, `_VERSION`, and the CRC-32 of all that follows."""
_NUMBERS = struct.Struct("<QQQQqqQQQ")
"""capacity, first, block, ready, now, last, peak, bytes of blocks, bytes of the queue's order."""
_MAGIC, _VERSION = b"cidalloc", 1


class Methods(Core):
    """A pool of integer IDs, each held by one owner at a time and reused after its cooldown.

    IDs are grouped in blocks. A block serves one owner at a time. It is reused when all of its IDs
    are free and the latest of their `reuse_at` has come. The free block that is due first is reused
    first; a new block is opened only if none is due. Wide blocks are fast and small. Blocks of one
    ID waste none, and every single ID is reused in the exact order.

    Times are integers of any unit and origin. Owners are integers below 2**24; 0, the default, is
    an owner like any other. Methods may be called from several threads: a call for thousands of IDs
    releases the GIL, and other calls on the same pool wait for it. After a fork, methods raise
    `Forked` in the child. A wrong type or value raises `InvalidArgument`.

    Args:
        capacity: number of IDs, 1 to 2**38. The memory is only reserved: 32 bytes are used for each
            opened block, and 32 for each owner.
        first: the lowest ID, at least 1; the highest must be below 2**63.
        block: IDs in a block: 1, 2, 4, 8, 16, 32 or 64. The default is 1 for fewer than 2**16 IDs,
            so that all of them can be held, and 64 otherwise.
        buffer: memory for the blocks, such as a bytearray or an mmap: writable, contiguous, 8-byte
            aligned, at least `buffer_size(capacity, block)` bytes, all zero. The pool keeps a
            reference to it; only the pool may write to it.
        ready: number of blocks that may be opened so far, see the attribute; by default all.
        holders: take over the blocks that an earlier pool of the same shape left in `buffer`; its
            process may have died at any instruction. Bytes, one for each owner: not 0 if that
            owner may hold IDs.
        latest: with `holders`: a block with a later `reuse_at` is damaged.
        reuse_at: with `holders`: the last stores may be missing, as after a power cut. IDs of the
            owners in `holders` stay held; every other ID of the ready blocks cools until this time.
        live_snapshot: with `holders`: `buffer` is a copy, taken while the earlier pool was in use.
            Without this, a held ID is damage if its owner is not in `holders`; with it, such an ID
            is free.

    Raises `InvalidArgument`, also for a buffer that is not zero; `RegistryCorrupt`, before anything
    is written, for a buffer that no pool leaves behind; `MemoryError` without address space.
    Constant time; with `holders` linear in the ready blocks.
    """

    __slots__ = ()

    # `_alloc` puts all of this into the class Allocator. A subclass would make `acquire` and
    # `release` slower: CPython specialises calls only for the very class that defines a method.

    @property
    def active(self) -> int:
        """Number of held IDs."""
        return len(self)

    @property
    def high_water(self) -> int:
        """Number of IDs in the blocks that were ever opened."""
        return min(self.opened * self.block, self.capacity)

    def held(self) -> npt.NDArray[np.uint64]:
        """Return all held IDs in ascending order, as a uint64 array of shape (n,).

        Linear in the opened blocks.

        >>> pool = Allocator(100)
        >>> ids = pool.acquire_many(3)
        >>> pool.held()
        array([1, 2, 3], dtype=uint64)
        """
        return self._held()

    @property
    def free(self) -> int:
        """Number of IDs that any owner can get now, as of the latest `now` seen. Time as `cooling`.

        The owner of a block with a held ID can also get the IDs that are left in this block.

        >>> pool = Allocator(100)
        >>> pool.release(pool.acquire(), reuse_at=60)
        >>> pool.free, pool.cooling
        (99, 1)
        """
        ready = min(self.ready * self.block, self.capacity)
        return ready - self.active - self.cooling - self.pinned

    def acquire_wait(
        self,
        owner: SupportsIndex = 0,
        now: SupportsIndex = 0,
        timeout: float = math.inf,
    ) -> int:
        """Issue one ID; wait in this thread if none can be issued.

        Other threads or tasks end the wait when they release IDs, or make calls with a later `now`.
        Those that wait get IDs in the order in which they came.

        Args:
            owner: the owner that will hold it.
            now: the time, in ticks. A time before the latest one seen counts as the latest.
            timeout: seconds to wait, at least 0; without end by default.

        Raises `Exhausted` after the timeout. Amortised constant time.
        """
        self._line.check(timeout)
        with suppress(Exhausted):
            return self.acquire(owner, now)
        return self._line.wait(self, owner, now, timeout)

    async def acquire_async(
        self, owner: SupportsIndex = 0, now: SupportsIndex = 0, timeout: float = math.inf
    ) -> int:
        """Issue one ID; wait for it in a task of asyncio if none can be issued.

        It is in one line with the other tasks and threads that wait, see `acquire_wait`. A task
        that is cancelled keeps no ID.

        Args:
            owner: the owner that will hold it.
            now: the time, in ticks. A time before the latest one seen counts as the latest.
            timeout: seconds to wait, at least 0; without end by default.

        Raises `Exhausted` after the timeout. Amortised constant time.

        >>> import asyncio
        >>> pool = Allocator(1)
        >>> async def main():
        ...     cid = await pool.acquire_async()
        ...     waiting = asyncio.create_task(pool.acquire_async(timeout=5))
        ...     await asyncio.sleep(0)
        ...     pool.release(cid)
        ...     return await waiting
        >>> asyncio.run(main())
        1
        """
        line = self._line
        line.check(timeout)
        with suppress(Exhausted):
            return self.acquire(owner, now)
        return await line.wait_async(self, owner, now, timeout)

    @contextmanager
    def lease(
        self,
        owner: SupportsIndex = 0,
        now: SupportsIndex = 0,
        reuse_at: SupportsIndex | Callable[[], int] = 0,
        timeout: float | None = None,
    ) -> Iterator[int]:
        """Issue one ID for a `with` block, which releases it at its end, also after an error.

        Args:
            owner: the owner that holds it.
            now: the time, in ticks.
            reuse_at: the time, in ticks, from which it may be issued again; or a function that
                returns this time, called at the end.
            timeout: seconds to wait for an ID, as in `acquire_wait`; None does not wait.

        Raises `Exhausted`; at the end `NotHeld` if the ID was released within. Constant time.

        >>> pool = Allocator(100)
        >>> with pool.lease() as cid:
        ...     print(cid, cid in pool)
        1 True
        >>> cid in pool
        False
        """
        if timeout is None:
            cid = self.acquire(owner, now)
        else:
            cid = self.acquire_wait(owner, now, timeout)
        try:
            yield cid
        finally:
            self.release(cid, owner, reuse_at() if callable(reuse_at) else reuse_at)

    def clear(self, reuse_at: SupportsIndex = 0) -> int:
        """Release all IDs of all owners; return their number.

        Args:
            reuse_at: the time, in ticks, from which they may be issued again.

        Linear in the opened blocks.

        >>> pool = Allocator(100)
        >>> ids = pool.acquire_many(3)
        >>> pool.clear(), len(pool)
        (3, 0)
        """
        return self._clear(reuse_at)

    def reserve(self, ids: IDs, owner: SupportsIndex = 0) -> None:
        """Mark given free IDs as held, all or none, also those that are cooling.

        This loads what exists: IDs that are in use already, or that must not be issued. A block
        with a reserved ID issues no others until all of its held IDs are released; a block of one
        ID has no others. All blocks below the highest ID are opened: 32 bytes of memory each.

        Args:
            ids: a one-dimensional array of any integer type, or a sequence of ints, in any order.
            owner: the owner that will hold them.

        Raises `OutOfRange`; `Duplicate` for an ID that is held, or is given twice; `NotOwner` for
        one in a block with IDs of another owner; `Exhausted` for one in a block that is not ready,
        or is more than 2**26 blocks above the opened ones. `position` is the index of the first
        wrong ID. Raises `MemoryError` without memory for a log of the call. O(n log n), and linear
        in the opened blocks.

        >>> pool = Allocator(100)
        >>> pool.reserve([3, 1])
        >>> pool.acquire_many(3)
        array([2, 4, 5], dtype=uint64)
        """
        self._reserve(ids, owner)

    def resize(self, capacity: SupportsIndex) -> None:
        """Make the pool larger: it gets the IDs that follow its highest one.

        Args:
            capacity: the new number of IDs, at least that of before, at most 2**38.

        Raises `InvalidArgument`, also for a pool with a `buffer`; `MemoryError` without address
        space. Constant time.

        >>> pool = Allocator(1)
        >>> pool.resize(3)
        >>> pool.acquire_many(3)
        array([1, 2, 3], dtype=uint64)
        """
        self._resize(capacity)

    def snapshot(self) -> bytes:
        """Return the state of the pool as bytes for `restore`.

        It has the held IDs with their owners, the cooldowns and the order in which free IDs are
        reused. 32 bytes for each opened block, and 8 for each free one. Linear in the opened
        blocks.

        >>> pool = Allocator(100)
        >>> ids = pool.acquire_many(3)
        >>> Allocator.restore(pool.snapshot()).acquire()
        4
        """
        blocks, order, capacity, ready, now, last, peak = self._state()
        numbers = (capacity, self.first, self.block, ready, now, last, peak)
        body = _NUMBERS.pack(*numbers, len(blocks), len(order)) + blocks + order
        return _HEAD.pack(_MAGIC, _VERSION, zlib.crc32(body)) + body

    @classmethod
    def restore(cls, snapshot: Buffer) -> Self:
        """Return a new pool with the state of a snapshot.

        The pool of the snapshot must not be used any more: both would issue the same IDs. A free
        block that was left to its owner is free for all, after the cooldown of all its IDs.

        Args:
            snapshot: bytes from `snapshot`, of this version of the format.

        Raises `InvalidArgument` for another version, and for bytes that are damaged, cut short or
        no snapshot; `MemoryError` without address space. Linear in the opened blocks.
        """
        try:
            data = bytes(memoryview(snapshot))
        except (TypeError, BufferError):
            raise InvalidArgument(
                f"snapshot must be bytes, not {type(snapshot).__name__}"
            ) from None
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
        capacity, first, block, ready, now, last, peak, *sizes = _NUMBERS.unpack_from(body)
        blocks, order = body[_NUMBERS.size :][: sizes[0]], body[_NUMBERS.size + sizes[0] :]
        pool = cls(capacity, first, block, ready=ready)
        try:
            pool._load(blocks, order, now, last, peak)
        except RegistryCorrupt:
            raise InvalidArgument("the snapshot is damaged: no pool has such blocks") from None
        return pool
