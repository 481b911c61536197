# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: autotestdict=False, freethreading_compatible=True
"""The allocator as a Python class: arguments, exceptions, threads and forks around the C pool."""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t

import math
import os

import numpy as np

from ._core.acquire cimport see
from ._core.args cimport (FITS, as_capacity, as_cid, as_int, as_owner, as_shift, as_time,
                          check_timeout, ids_array, int_value, read_int, sorted_ids, view_ids,
                          view_memory)
from ._core.audit cimport audit
from ._core.guard cimport guard_enter, guard_init, guard_leave, guard_wait
from ._core.held cimport ALL, held_ids
from ._core.intrinsics cimport likely, unlikely
from ._core.messages cimport error, exhausted, refusal, unreservable
from ._core.methods cimport Method, Section, enter_section, leave_section, replace
from ._core.past cimport recover
from ._core.reserve cimport pool_can_reserve, pool_clear, pool_reserve
from ._core.owners cimport Counts
from ._core.pool cimport pool_ids
from ._core.resize cimport pool_resize
from ._core.seal cimport fill_new
from ._core.state cimport load_state, save_state

from . import snapshots
from .errors import InvalidArgument, RegistryCorrupt
from .waiting_line import WaitingLine

cdef extern from *:
    PyObject *new_int "PyLong_FromLongLong"(long long value) noexcept

cdef object empty = np.empty, UINT64 = np.dtype(np.uint64)
cdef int forks = 0      # between the first process and this one


def _forked():
    global forks
    forks += 1


os.register_at_fork(after_in_child=_forked)


cdef int wait(Allocator self) except -1:
    # Not inline: in the body of every method it costs 35 instructions a call pair.
    return guard_wait(&self.guard, forks)


cdef inline Pool *alive(Allocator self) except NULL:
    # Return the pool. The caller is in the critical section of `self`; no Python code may run
    # between this call and the use of the pool.
    if unlikely(self.guard.forks != forks):
        wait(self)
    return &self.pool


cdef int serve_first(Allocator self, int64_t now) except -1:
    # Let the callers that wait for an ID be first to get those that are due now.
    wait(self)
    if self.guard.queued:
        see(&self.pool, now)
        serve(self)
        wait(self)
    return 0


cdef inline Pool *in_turn(Allocator self, int64_t now) except NULL:
    # As alive(), for a call that issues IDs.
    if unlikely(self.guard.forks != forks):
        serve_first(self, now)
    return &self.pool


cdef int serve(Allocator self) except -1:
    # Not inline either.
    self._line.serve(self)
    return 0


cdef inline int freed(Allocator self) except -1:
    # Handle a change after which more IDs may be issued.
    return serve(self) if unlikely(self.guard.queued) else 0


cdef int refuse_sealed(Allocator self, str what) except -1:
    if alive(self).sealed:
        raise error(INVALID_ARGUMENT, f"a pool with sealed blocks has no {what}()")
    return 0


cdef object new_ids(uint64_t n):
    return empty(n, UINT64)


cdef Pool *pool_of(Allocator self) except NULL:
    return alive(self)


cdef class Lease:
    """An ID that a `with` block holds. `Allocator.lease` makes it."""

    cdef Allocator pool
    cdef object owner, now, reuse_at, timeout, cid

    def __enter__(self):
        """Issue the ID and return it."""
        with cython.critical_section(self):
            used = self.cid is not None
            if not used:
                self.cid = 0    # no other thread enters while this one may wait for an ID
        if used:
            raise error(INVALID_ARGUMENT, "this lease is in use: each `with` needs its own")
        cid = None
        try:
            if self.timeout is None:
                cid = self.pool.acquire(self.owner, self.now)
            else:
                cid = self.pool.acquire_wait(self.owner, self.now, self.timeout)
        finally:
            with cython.critical_section(self):
                self.cid = cid
        return cid

    def __exit__(self, kind, exception, traceback):
        """Release the ID."""
        with cython.critical_section(self):
            cid, self.cid = self.cid, None
        due = self.reuse_at() if callable(self.reuse_at) else self.reuse_at
        self.pool.release(cid, self.owner, due)


cdef class Allocator:
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
        sealed: with `holders` and blocks of one ID: the blocks have checksums, so damage to them is
            noticed by whoever takes them over. `buffer` begins with `sealed_blocks` where it is
            ready. `reserve` and `snapshot` are refused.

    Raises `InvalidArgument`, also for a buffer that is not zero; `RegistryCorrupt`, before anything
    is written, for a buffer that no pool leaves behind; `MemoryError` without address space.
    Constant time; with `holders` linear in the ready blocks.
    """

    def __cinit__(self, capacity=(1 << 30) - 1, first=1, block=None, *, buffer=None, ready=None,
                  holders=None, latest=INT64_MAX, reuse_at=None, live_snapshot=False,
                  sealed=False):
        cdef int64_t n = as_capacity(capacity)
        cdef uint32_t shift = as_shift(block, n)
        cdef int64_t low = as_int(first, 1, INT64_MAX - (n - 1), "first")
        if buffer is not None:
            view_memory(buffer, &self.memory, pool_size(n, shift))
        cdef bint used = holders is not None
        if used and buffer is None:
            raise error(INVALID_ARGUMENT, "holders needs a buffer: the memory of an earlier pool")
        if sealed and (shift or not used):
            raise error(INVALID_ARGUMENT, "sealed needs holders, and blocks of one ID")
        cdef int code = pool_init(&self.pool, n, low, shift, self.memory.buf, used)
        if code == INVALID_ARGUMENT:
            raise error(code, "buffer must be all zero: this one was used before")
        if code:
            raise MemoryError("not enough address space for the pool: use a smaller capacity")
        if ready is not None:
            self.pool.ready = as_int(ready, 0, self.pool.count, "ready")
        if used:
            recover(&self.pool, holders, as_time(latest, "latest"), reuse_at, live_snapshot,
                    sealed)
        guard_init(&self.guard, forks)
        self._line = WaitingLine()

    def __dealloc__(self):
        pool_free(&self.pool)
        PyBuffer_Release(&self.memory)

    @staticmethod
    def buffer_size(capacity, block=None):
        """Return the number of bytes that the `buffer` of such a pool needs. Constant time."""
        cdef int64_t n = as_capacity(capacity)
        return pool_size(n, as_shift(block, n))

    @staticmethod
    def sealed_blocks(first, n):
        """Return `n` blocks that no sealed pool has used, as bytes. Blocks count from 0.

        Block 0 belongs to no ID, and is all zero. O(n).
        """
        cdef uint64_t low = as_int(first, 0, <int64_t>1 << 38, "first")
        cdef uint64_t many = as_int(n, 0, <int64_t>1 << 38, "n")
        found = PyBytes_FromStringAndSize(NULL, many * sizeof(Block))
        fill_new(<Block *><char *>found, low, many)
        return found

    @cython.critical_section
    def acquire(self, owner=0, now=0):
        """Issue one ID, an int.

        Args:
            owner: the owner that will hold it.
            now: the time, in ticks. A time before the latest one seen counts as the latest.

        Raises `Exhausted`. Amortised constant time.
        """
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(now, "now")
        cdef uint64_t cid = 0
        if pool_acquire(in_turn(self, tick), own, tick, &cid):
            raise exhausted(&self.pool, "an ID")
        return <int64_t>cid

    @cython.critical_section
    def acquire_many(self, n, owner=0, now=0, out=None):
        """Issue `n` IDs, or none, as a uint64 array of shape (n,).

        Args:
            n: number of IDs.
            owner: the owner that will hold them.
            now: the time, in ticks. A time before the latest one seen counts as the latest.
            out: a writable contiguous uint64 array of length `n`, to fill and return.

        Raises `Exhausted`. O(n); if the pool is nearly exhausted, also linear in its cooling and
        idle blocks.
        """
        cdef uint64_t many = as_int(n, 0, INT64_MAX, "n")
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(now, "now")
        cdef Py_buffer view
        cdef int code
        cdef Pool *pool = alive(self)
        if many > pool.capacity - pool_held(pool):    # or too many for an array
            see(pool, tick)
            raise exhausted(pool, f"{many} IDs")
        ids = new_ids(many) if out is None else out
        if not view_ids(ids, &view, PyBUF_WRITABLE):
            raise error(INVALID_ARGUMENT, "out must be a writable contiguous uint64 array")
        try:
            if <uint64_t>view.shape[0] != many:
                raise error(INVALID_ARGUMENT, f"out has {view.shape[0]} elements, but n is {many}")
            in_turn(self, tick)
            if guard_enter(&self.guard, many):
                with nogil:
                    code = pool_acquire_many(pool, many, own, tick, <uint64_t *>view.buf)
                    guard_leave(&self.guard)
            else:
                code = pool_acquire_many(pool, many, own, tick, <uint64_t *>view.buf)
        finally:
            PyBuffer_Release(&view)
        if code:
            raise exhausted(alive(self), f"{many} IDs")
        return ids

    def acquire_wait(self, owner=0, now=0, timeout=math.inf):
        """Issue one ID; wait in this thread if none can be issued.

        Other threads or tasks end the wait when they release IDs, or make calls with a later `now`.
        Those that wait get IDs in the order in which they came.

        Args:
            owner: the owner that will hold it.
            now: the time, in ticks. A time before the latest one seen counts as the latest.
            timeout: seconds to wait, at least 0; without end by default.

        Raises `Exhausted` after the timeout. Amortised constant time.

        >>> import threading
        >>> pool = Allocator(1)
        >>> threading.Timer(0.01, pool.release, [pool.acquire()]).start()
        >>> pool.acquire_wait(timeout=5)
        1
        """
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(now, "now")
        cdef uint64_t cid = 0
        cdef int code
        check_timeout(timeout)
        with cython.critical_section(self):
            code = pool_acquire(in_turn(self, tick), own, tick, &cid)
        if code == OK:
            return <int64_t>cid
        return self._line.wait(self, owner, now, timeout)

    def acquire_async(self, owner=0, now=0, timeout=math.inf):
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
        check_timeout(timeout)
        return self._line.wait_async(self, owner, now, timeout)

    def lease(self, owner=0, now=0, reuse_at=0, timeout=None):
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
        cdef Lease lease = Lease.__new__(Lease)
        lease.pool, lease.owner, lease.now = self, owner, now
        lease.reuse_at, lease.timeout = reuse_at, timeout
        return lease

    @cython.critical_section
    def release(self, cid, owner=0, reuse_at=0):
        """Release one ID.

        Args:
            cid: the ID.
            owner: the owner that holds it.
            reuse_at: the time, in ticks, from which it may be issued again.

        Raises `OutOfRange`, `NotHeld`, `NotOwner`. Constant time.
        """
        cdef int64_t number = as_cid(cid)
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(reuse_at, "reuse_at")
        cdef int code = pool_release(alive(self), number, own, tick)
        if code:
            raise refusal(&self.pool, code, number)
        freed(self)

    @cython.critical_section
    def release_many(self, ids, owner=0, reuse_at=0):
        """Release IDs, all or none.

        Args:
            ids: a one-dimensional array of any integer type, or a sequence of ints. A contiguous
                uint64 array is fastest.
            owner: the owner that holds them.
            reuse_at: the time, in ticks, from which they may be issued again.

        Raises `OutOfRange`, `NotHeld`, `NotOwner` or `Duplicate`, with the index of the first wrong
        ID as `position`; `MemoryError` without memory for a log of the call. O(n).
        """
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(reuse_at, "reuse_at")
        cdef Py_buffer view
        cdef uint64_t at = 0
        cdef int code
        cdef Pool *pool
        if not view_ids(ids, &view, 0) and not view_ids(ids_array(ids), &view, 0):
            raise error(INVALID_ARGUMENT, "ids must be an array of integers")
        cdef const uint64_t *cids = <const uint64_t *>view.buf
        try:
            pool = alive(self)
            if guard_enter(&self.guard, view.shape[0]):
                with nogil:
                    code = pool_release_many(pool, cids, view.shape[0], own, tick, &at)
                    guard_leave(&self.guard)
            else:
                code = pool_release_many(pool, cids, view.shape[0], own, tick, &at)
            if code == INTERNAL:
                raise MemoryError("not enough memory to release the IDs")
            if code:
                raise refusal(pool, code, cids[at], at)
        finally:
            PyBuffer_Release(&view)
        freed(self)

    @cython.critical_section
    def release_owner(self, owner, reuse_at=0):
        """Release all IDs of an owner; return their number.

        Args:
            owner: the owner that holds them.
            reuse_at: the time, in ticks, from which they may be issued again.

        Linear in the owner's blocks.
        """
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(reuse_at, "reuse_at")
        cdef Pool *pool = alive(self)
        cdef object released = pool.owners[own].held  # made here, where a MemoryError does no harm
        if guard_enter(&self.guard, pool.owners[own].held >> pool.shift):
            with nogil:
                pool_release_owner(pool, own, tick)
                guard_leave(&self.guard)
        else:
            pool_release_owner(pool, own, tick)
        freed(self)
        return released

    @cython.critical_section
    def clear(self, reuse_at=0):
        """Release all IDs of all owners; return their number.

        Args:
            reuse_at: the time, in ticks, from which they may be issued again.

        Linear in the opened blocks.

        >>> pool = Allocator(100)
        >>> ids = pool.acquire_many(3)
        >>> pool.clear(), len(pool)
        (3, 0)
        """
        cdef int64_t tick = as_time(reuse_at, "reuse_at")
        cdef object released = pool_held(alive(self))   # as in release_owner()
        pool_clear(&self.pool, tick)
        freed(self)
        return released

    @cython.critical_section
    def reserve(self, ids, owner=0):
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
        cdef uint32_t own = as_owner(owner)
        cdef uint64_t at = 0
        refuse_sealed(self, "reserve")
        array, ascending, distinct = sorted_ids(ids)
        cdef const uint64_t[::1] given = array
        cdef const uint64_t[::1] cids = ascending
        cdef uint64_t n = given.shape[0], first_ones = distinct
        if not n:
            return
        cdef Pool *pool = alive(self)
        cdef int code = pool_can_reserve(pool, &given[0], first_ones, own, &at)
        if code or first_ones < n:
            raise unreservable(pool, code or DUPLICATE, given[at], at)
        if pool_reserve(pool, &cids[0], n, own):
            raise MemoryError("not enough memory to reserve the IDs")

    @cython.critical_section
    def resize(self, capacity):
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
        cdef Pool *pool = alive(self)
        cdef int64_t most = min(<int64_t>1 << 38, INT64_MAX - <int64_t>pool.first + 1)
        cdef int64_t n = as_int(capacity, pool.capacity, most, "capacity")
        cdef int code = pool_resize(alive(self), n)
        if code == INVALID_ARGUMENT:
            raise error(code, "a pool in given memory cannot grow, and none can shrink")
        if code:
            raise MemoryError("not enough address space for the pool: use a smaller capacity")
        freed(self)

    def snapshot(self):
        """Return the state of the pool as bytes for `restore`.

        It has the held IDs with their owners, the cooldowns and the order in which free IDs are
        reused. 32 bytes for each opened block, and 8 for each free one. Linear in the opened
        blocks.

        >>> pool = Allocator(100)
        >>> ids = pool.acquire_many(3)
        >>> Allocator.restore(pool.snapshot()).acquire()
        4
        """
        with cython.critical_section(self):
            refuse_sealed(self, "snapshot")
            state = save_state(alive(self))
        return snapshots.pack(snapshots.State._make(state))

    @classmethod
    def restore(cls, snapshot):
        """Return a new pool with the state of a snapshot.

        The pool of the snapshot must not be used any more: both would issue the same IDs. A free
        block that was left to its owner is free for all, after the cooldown of all its IDs.

        Args:
            snapshot: bytes from `snapshot`, of this version of the format.

        Raises `InvalidArgument` for another version, and for bytes that are damaged, cut short or
        no snapshot; `MemoryError` without address space. Linear in the opened blocks.

        >>> pool = Allocator(100)
        >>> pool.release(pool.acquire(), reuse_at=60)
        >>> Allocator.restore(pool.snapshot()).next_due
        60
        """
        state = snapshots.unpack(snapshot)
        cdef Allocator pool = cls(state.capacity, state.first, state.block, ready=state.ready)
        try:
            load_state(&pool.pool, state.blocks, state.order, state.now, state.last, state.peak)
        except RegistryCorrupt:
            raise InvalidArgument("the snapshot is damaged: no pool has such blocks") from None
        return pool

    @cython.critical_section
    def owner_of(self, cid):
        """Return the owner of an ID. Raises `OutOfRange`, `NotHeld`. Constant time."""
        cdef int64_t number = as_cid(cid)
        cdef uint32_t owner = 0
        cdef int code = pool_owner_of(alive(self), number, &owner)
        if code:
            raise refusal(&self.pool, code, number)
        return owner

    def held_by(self, owner, *, ordered=False):
        """Return the IDs of an owner as a uint64 array of shape (n,). O(n).

        They are in ascending order if `ordered` is true, which costs O(n log n).

        >>> pool = Allocator(100)
        >>> ids = pool.acquire_many(3, owner=7)
        >>> pool.held_by(7, ordered=True)
        array([1, 2, 3], dtype=uint64)
        """
        cdef uint32_t own = as_owner(owner)
        with cython.critical_section(self):
            ids = held_ids(&self.pool, &self.guard, &forks, own)
        if ordered:
            ids.sort()
        return ids

    @cython.critical_section
    def held(self):
        """Return all held IDs in ascending order, as a uint64 array of shape (n,).

        Linear in the opened blocks.

        >>> pool = Allocator(100)
        >>> ids = pool.acquire_many(3)
        >>> pool.held()
        array([1, 2, 3], dtype=uint64)
        """
        return held_ids(&self.pool, &self.guard, &forks, ALL)

    @cython.critical_section
    def held_count(self, owner):
        """Return the number of IDs that an owner holds. Constant time."""
        cdef uint32_t own = as_owner(owner)
        return alive(self).owners[own].held

    @cython.critical_section
    def __contains__(self, cid):
        """Return whether `cid` is held; False for any object that is not an ID. Constant time."""
        cdef int64_t value = 0
        cdef uint32_t owner = 0
        cdef int kind = read_int(cid, &value)
        cdef Pool *pool = alive(self)
        return kind == FITS and pool_owner_of(pool, value, &owner) == OK

    @cython.critical_section
    def __len__(self):
        """Return the number of held IDs. Constant time."""
        return pool_held(alive(self))

    @property
    @cython.critical_section
    def capacity(self):
        """Number of IDs in the pool."""
        return alive(self).capacity

    @property
    @cython.critical_section
    def first(self):
        """The lowest ID."""
        return alive(self).first

    @property
    @cython.critical_section
    def block(self):
        """Number of IDs in a block."""
        return 1 << alive(self).shift

    @property
    @cython.critical_section
    def active(self):
        """Number of held IDs."""
        return pool_held(alive(self))

    @property
    @cython.critical_section
    def free(self):
        """Number of IDs that any owner can get now, as of the latest `now` seen. Time as `cooling`.

        The owner of a block with a held ID can also get the IDs that are left in this block.

        >>> pool = Allocator(100)
        >>> pool.release(pool.acquire(), reuse_at=60)
        >>> pool.free, pool.cooling
        (99, 1)
        """
        cdef Pool *pool = alive(self)
        cdef Counts n = pool_count(pool)
        return pool_ids(pool, pool.ready) - pool_held(pool) - n.cooling - n.pinned

    @property
    @cython.critical_section
    def inactive(self):
        """Number of IDs that were issued at least once and are not held now."""
        cdef Pool *pool = alive(self)
        return pool.issued - pool_held(pool)

    @property
    @cython.critical_section
    def cooling(self):
        """Number of IDs that are not held and not due, as of the latest `now` seen.

        Linear in the queued blocks with a `reuse_at` close to `now`, and in the idle blocks.
        """
        return pool_count(alive(self)).cooling

    @property
    @cython.critical_section
    def pinned(self):
        """Number of IDs that are not held, in a block with a held ID. Time as `cooling`."""
        return pool_count(alive(self)).pinned

    @property
    @cython.critical_section
    def peak(self):
        """Highest number of IDs that were held at once."""
        return alive(self).peak

    @property
    @cython.critical_section
    def opened(self):
        """Number of blocks that were ever opened, in the order of their IDs."""
        return alive(self).opened

    @property
    @cython.critical_section
    def high_water(self):
        """Number of IDs in the blocks that were ever opened."""
        cdef Pool *pool = alive(self)
        return pool_ids(pool, pool.opened)

    @property
    @cython.critical_section
    def ready(self):
        """Number of blocks that may be opened so far. It can only be raised.

        The pool does not touch the memory of later blocks, so a file can grow before it is raised.
        """
        return alive(self).ready

    @ready.setter
    @cython.critical_section
    def ready(self, blocks):
        cdef int64_t value = as_int(blocks, alive(self).ready, alive(self).count, "ready")
        cdef Pool *pool = alive(self)
        pool.ready = max(pool.ready, <uint64_t>value)   # another thread may have raised it
        freed(self)

    @property
    @cython.critical_section
    def next_due(self):
        """Time at which the first queued block is or was due; None if no block is queued."""
        cdef int64_t due = 0
        return due if pool_next_due(alive(self), &due) else None

    def __iter__(self):
        """Iterate over the IDs that are held now, in ascending order.

        Linear in the opened blocks. The pool may be used and changed meanwhile.

        >>> pool = Allocator(100)
        >>> ids = pool.acquire_many(3)
        >>> [cid for cid in pool if cid > 1]
        [2, 3]
        """
        return iter(self.held().tolist())

    @cython.critical_section
    def __repr__(self):
        """Return the arguments of the pool and its number of held IDs."""
        cdef Pool *pool = alive(self)
        return (f"Allocator(capacity={pool.capacity}, first={pool.first}, "
                f"block={1 << pool.shift}): {pool_held(pool)} held")

    def __reduce__(self):
        """Raise TypeError: a copy would issue the same IDs."""
        raise TypeError("an Allocator cannot be pickled or copied: both would issue the same IDs")

    @cython.critical_section
    def _take(self, owner):
        # Issue an ID without regard to those that wait; return 0 if there is none.
        cdef uint32_t own = as_owner(owner)
        cdef uint64_t cid = 0
        cdef Pool *pool = alive(self)
        # One more call of pool_acquire() could end its inlining in acquire().
        pool_acquire_many(pool, 1, own, pool.now, &cid)
        return cid

    @cython.critical_section
    def _set_queued(self, queued):
        # Tell whether other callers wait for an ID.
        cdef bint value = queued
        alive(self)
        self.guard.queued = value
        self.guard.forks = ~forks if value else forks

    @cython.critical_section
    def _check(self):
        """Check every invariant; raises AssertionError. Linear in the opened blocks.

        No other thread may use the pool at the same time.
        """
        audit(alive(self))


# acquire() and release() once more, for calls without keywords and without an error. In the methods
# of the class Cython spends more time on the arguments than the pool spends on the ID. Every other
# call goes to these methods: the quick functions change nothing that they would have to undo.
cdef Method any_acquire, any_release


cdef PyObject *quick_acquire(PyObject *self, PyObject *const *args, Py_ssize_t n,
                             PyObject *names) noexcept:
    cdef Section section
    cdef int code = FORKED
    cdef uint64_t cid = 0
    cdef uint64_t owner = int_value(args[0]) if n > 0 else 0
    cdef int64_t now = int_value(args[1]) if n > 1 else 0
    if likely(names == NULL and n <= 2 and owner < MAX_OWNERS and now >= 0):
        enter_section(&section, self)
        if likely((<Allocator>self).guard.forks == forks):
            code = pool_acquire(&(<Allocator>self).pool, owner, now, &cid)
        leave_section(&section)
        if likely(code == OK):
            return new_int(cid)
    return any_acquire(self, args, n, names)


cdef PyObject *quick_release(PyObject *self, PyObject *const *args, Py_ssize_t n,
                             PyObject *names) noexcept:
    cdef Section section
    cdef int code = FORKED
    cdef uint64_t cid = int_value(args[0]) if n > 0 else 0
    cdef uint64_t owner = int_value(args[1]) if n > 1 else 0
    cdef int64_t reuse_at = int_value(args[2]) if n > 2 else 0
    if likely(names == NULL and n <= 3 and owner < MAX_OWNERS and reuse_at >= 0):
        enter_section(&section, self)
        if likely((<Allocator>self).guard.forks == forks):
            code = pool_release(&(<Allocator>self).pool, cid, owner, reuse_at)
        leave_section(&section)
        if likely(code == OK):
            Py_INCREF(None)
            return <PyObject *>None
    return any_release(self, args, n, names)


any_acquire = replace(Allocator, "acquire", quick_acquire)
any_release = replace(Allocator, "release", quick_release)
