# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: autotestdict=False
"""The allocator core: the Python face of the C functions, which _pool.pxi holds."""

from libc.stdint cimport INT64_MAX

import os

import numpy as np

from .errors import error_for

include "_queue.pxi"
include "_pool.pxi"
include "_recover.pxi"
include "_args.pxi"
include "_audit.pxi"


cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_trylock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef enum:
    # IDs from which on a call lets go of the GIL. Fewer are issued in about a microsecond, as long
    # as it takes to let go; and to get the GIL back may take until the other thread's turn ends.
    LARGE = 4096

cdef int forks = 0      # that lie between this process and the first one


def _forked():
    global forks
    forks += 1


os.register_at_fork(after_in_child=_forked)


# A pool belongs to whoever has the GIL, or to the one call that let go of it. That call locks
# `busy` and changes the pool's stamp, so the one test that every call makes anyway finds out both:
# a fork, and a call under way. It unlocks `busy` before it asks for the GIL, which it may never get
# back when Python ends; the next call puts the stamp right. As any Python code may let another
# thread in, nothing of Python stands between alive() and the work.

cdef inline Pool *alive(Allocator self) except NULL:
    if unlikely(self.forks != forks):
        wait(self)
    return &self.pool


cdef Pool *pool_of(Allocator self) except NULL:
    return alive(self)


cdef int wait(Allocator self) except -1:
    while self.forks != forks:
        if ~self.forks != forks:
            raise error_for(FORKED,
                            "this pool belongs to the parent process; make one after the fork")
        if pthread_mutex_trylock(&self.busy) == 0:
            self.forks = forks
            pthread_mutex_unlock(&self.busy)
        else:
            self.waiting += 1
            with nogil:
                pthread_mutex_lock(&self.busy)
                pthread_mutex_unlock(&self.busy)
            self.waiting -= 1
    return 0


cdef inline bint begin(Allocator self, uint64_t work) noexcept:
    # Tell whether to let go of the GIL; not while others wait, or they might do so for ever.
    if work < LARGE or self.waiting:
        return False
    pthread_mutex_lock(&self.busy)      # who may still have it needs no GIL to unlock it
    self.forks = ~self.forks
    return True


cdef object exhausted(Pool *pool, object what):
    cdef int64_t due = 0
    cdef bint queued = pool_next_due(pool, &due)
    cdef Counts n = pool_count(pool)
    cdef uint64_t held = pool_held(pool)
    when = f"the next is due at {due}" if queued else "none is due"
    pinned, remedy = "", "a larger pool"
    if n.pinned:
        pinned = f" and {n.pinned} are pinned by others in their block of {1 << pool.shift}"
        remedy = "a larger pool or narrower blocks (block=1 pins none)"
    return error_for(EXHAUSTED, (
        f"cannot issue {what}: of {pool.capacity} IDs {held} are held, {n.cooling} cool{pinned}; "
        f"{when}. Release some, wait, or use {remedy}"))


cdef object refusal(const Pool *pool, int code, object cid, object position=None):
    where = "" if position is None else f" at position {position}"
    high = pool.first + pool.capacity - 1
    error = error_for(code, {
        OUT_OF_RANGE: f"the ID{where} is outside the pool: {pool.first} to {high}",
        NOT_HELD: f"nobody holds ID {cid}{where}: it was released or never issued",
        NOT_OWNER: f"ID {cid}{where} belongs to another owner, who alone releases it",
        DUPLICATE: f"ID {cid}{where} stands twice in this call",
    }[code])
    error.position = position
    return error


cdef int recover(
    Pool *pool, object holders, int64_t latest, object reuse_at, bint live_snapshot
) except -1:
    cdef const uint8_t[::1] holds = holders
    cdef uint64_t at = 0
    cdef Past past
    past.holds, past.owners, past.latest = NULL, holds.shape[0], latest
    past.live_snapshot = live_snapshot
    if past.owners:
        past.holds = &holds[0]
    past.after_power_loss = reuse_at is not None
    past.reuse_at = as_time(reuse_at, "reuse_at") if past.after_power_loss else 0
    if pool_recover(pool, &past, &at):
        raise error_for(REGISTRY_CORRUPT,
                        f"the record of ID {pool.base + (at << pool.shift)} is damaged"
                        if at else "the records of IDs are damaged")
    return 0


cdef class Allocator:
    """A pool of integer IDs, each held by one owner at a time and reused when it has cooled.

    IDs belong to blocks. A block serves one owner at a time, and is used again when all of its IDs
    are free and the latest of their `reuse_at` has come. Of the free blocks the one due first goes
    first; a never-used one is opened only when none is due. Wide blocks are fast and small; blocks
    of 1 waste nothing and keep the order exact for every single ID.

    Times are integers of any unit and origin. Owners are integers below 2**24; 0 is nobody in
    particular, and an owner like any other. Methods are safe to call from several threads; a call
    for thousands of IDs lets other threads run, and those that use the same pool wait for it. After
    a fork the child's copy raises `Forked`. A wrong type or value raises `InvalidArgument`.

    Args:
        capacity: IDs in the pool, at most 2**38. Memory is only reserved: 32 bytes come into use
            for each block that does, and 32 for each owner.
        first: the lowest ID, at least 1; the highest is below 2**63.
        block: IDs in a block: 1, 2, 4, 8, 16, 32 or 64. By default 1 if the pool has fewer than
            2**16 IDs, so that all of them can be held, and 64 otherwise.
        buffer: memory to keep the blocks in, such as a bytearray or an mmap: writable, contiguous,
            8-byte aligned, at least `buffer_size(capacity, block)` bytes, all zero. The pool holds
            on to it; nobody else may write to it.
        ready: blocks that may be opened so far, as `ready` below; all of them if it is left out.
        holders: the buffer is not zero, but what an earlier pool of the same shape left in it,
            whose process may have died at any instruction. Bytes with one for each owner, not 0 if
            that one may still hold IDs.
        latest: with `holders`, a `reuse_at` beyond this is damage.
        reuse_at: with `holders`, some of the last stores may be missing, too, as after a power cut:
            only who holds what is believed, of the owners in `holders`, and every other ID of the
            ready blocks cools until this time.
        live_snapshot: with `holders`, the buffer is a copy, taken while the earlier pool was
            in use. IDs of owners that are not in `holders` are then free, and no damage.

    Raises `RegistryCorrupt` for a buffer that no pool leaves behind, and does not write to it then.
    """

    def __cinit__(self, capacity=(1 << 30) - 1, first=1, block=None, *, buffer=None, ready=None,
                  holders=None, latest=INT64_MAX, reuse_at=None, live_snapshot=False):
        cdef int64_t n = as_capacity(capacity)
        cdef uint32_t shift = as_shift(block, n)
        cdef int64_t low = as_int(first, 1, INT64_MAX - (n - 1), "first")
        if buffer is not None:
            view_memory(buffer, &self.memory, pool_size(n, shift))
        cdef bint used = holders is not None
        if used and buffer is None:
            raise error_for(INVALID_ARGUMENT, "holders goes with a buffer that was used")
        cdef int code = pool_init(&self.pool, n, low, shift, self.memory.buf, used)
        if code == INVALID_ARGUMENT:
            raise error_for(code, "buffer must be all zero: another pool may have used this one")
        if code:
            raise MemoryError("no address space for the pool; a smaller capacity needs less")
        if ready is not None:
            self.pool.ready = as_int(ready, 0, self.pool.count, "ready")
        if used:
            recover(&self.pool, holders, as_time(latest, "latest"), reuse_at, live_snapshot)
        pthread_mutex_init(&self.busy, NULL)
        self.forks = forks

    def __dealloc__(self):
        pool_free(&self.pool)
        PyBuffer_Release(&self.memory)

    @staticmethod
    def buffer_size(capacity, block=None):
        """Return how many bytes a `buffer` for such a pool has to have."""
        cdef int64_t n = as_capacity(capacity)
        return pool_size(n, as_shift(block, n))

    def acquire(self, owner=0, now=0):
        """Issue one ID.

        Args:
            owner: who will hold it.
            now: the time, in ticks; one before the latest seen counts as that one.

        Raises `Exhausted`. Constant time, amortised.
        """
        cdef uint32_t own
        cdef int64_t tick
        cdef uint64_t cid = 0
        cdef int code
        if owner is zero and now is zero:
            code = pool_acquire(alive(self), 0, 0, &cid)
        else:
            own, tick = as_owner(owner), as_time(now, "now")
            code = pool_acquire(alive(self), own, tick, &cid)
        if unlikely(code):
            raise exhausted(&self.pool, "an ID")
        return <int64_t>cid

    def acquire_many(self, n, owner=0, now=0, out=None):
        """Issue `n` IDs, or none, as an array of uint64.

        Args:
            n: how many.
            owner: who will hold them.
            now: the time, in ticks; one before the latest seen counts as that one.
            out: a writable contiguous uint64 array of length `n`, to be filled and returned.

        Raises `Exhausted`. Time in proportion to `n`; when the pool is nearly used up, also to the
        blocks that cool.
        """
        cdef uint64_t many = as_int(n, 0, INT64_MAX, "n")
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(now, "now")
        cdef Py_buffer view
        cdef int code
        cdef Pool *pool = alive(self)
        if many > pool.capacity - pool_held(pool):    # it may be too many for an array, too
            see(pool, tick)
            raise exhausted(pool, f"{many} IDs")
        ids = np.empty(many, np.uint64) if out is None else out
        if not view_ids(ids, &view, PyBUF_WRITABLE):
            raise error_for(INVALID_ARGUMENT, "out must be a writable contiguous uint64 array")
        try:
            if <uint64_t>view.shape[0] != many:
                raise error_for(INVALID_ARGUMENT, f"out has {view.shape[0]} elements, not {many}")
            alive(self)
            if begin(self, many):
                with nogil:
                    code = pool_acquire_many(pool, many, own, tick, <uint64_t *>view.buf)
                    pthread_mutex_unlock(&self.busy)
            else:
                code = pool_acquire_many(pool, many, own, tick, <uint64_t *>view.buf)
        finally:
            PyBuffer_Release(&view)
        if code:
            raise exhausted(alive(self), f"{many} IDs")
        return ids

    def release(self, cid, owner=0, reuse_at=0):
        """Take back one ID.

        Args:
            cid: the ID.
            owner: who holds it.
            reuse_at: the time, in ticks, from which it may be issued again.

        Raises `OutOfRange`, `NotHeld`, `NotOwner`. Constant time.
        """
        cdef int64_t number = 0
        if unlikely(not small_int(cid, &number)):
            number = as_cid(cid)
        cdef uint32_t own
        cdef int64_t tick
        cdef int code
        if owner is zero and reuse_at is zero:
            code = pool_release(alive(self), number, 0, 0)
        else:
            own, tick = as_owner(owner), as_time(reuse_at, "reuse_at")
            code = pool_release(alive(self), number, own, tick)
        if unlikely(code):
            raise refusal(&self.pool, code, number)

    def release_many(self, ids, owner=0, reuse_at=0):
        """Take back IDs, all or none.

        Args:
            ids: an array of any integer type or a sequence of ints; contiguous uint64 is fastest.
            owner: who holds them.
            reuse_at: the time, in ticks, from which they may be issued again.

        Raises `OutOfRange`, `NotHeld`, `NotOwner`, `Duplicate`. Time in proportion to their number.
        """
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(reuse_at, "reuse_at")
        cdef Py_buffer view
        cdef uint64_t at = 0
        cdef int code
        cdef Pool *pool
        if not view_ids(ids, &view, 0) and not view_ids(ids_array(ids), &view, 0):
            raise error_for(INVALID_ARGUMENT, "IDs come as an array of integers")
        cdef const uint64_t *cids = <const uint64_t *>view.buf
        try:
            pool = alive(self)
            if begin(self, view.shape[0]):
                with nogil:
                    code = pool_release_many(pool, cids, view.shape[0], own, tick, &at)
                    pthread_mutex_unlock(&self.busy)
            else:
                code = pool_release_many(pool, cids, view.shape[0], own, tick, &at)
            if code == INTERNAL:
                raise MemoryError("no memory to release IDs")
            if code:
                raise refusal(pool, code, cids[at], at)
        finally:
            PyBuffer_Release(&view)

    def release_owner(self, owner, reuse_at=0):
        """Take back all IDs of one owner; return how many.

        Args:
            owner: who holds them.
            reuse_at: the time, in ticks, from which they may be issued again.

        Time in proportion to the owner's blocks.
        """
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(reuse_at, "reuse_at")
        cdef uint64_t n
        cdef Pool *pool = alive(self)
        if not begin(self, pool.owners[own].held >> pool.shift):
            return pool_release_owner(pool, own, tick)
        with nogil:
            n = pool_release_owner(pool, own, tick)
            pthread_mutex_unlock(&self.busy)
        return n

    def owner_of(self, cid):
        """Return who holds an ID; raises `OutOfRange` and `NotHeld`. Constant time."""
        cdef int64_t number = as_cid(cid)
        cdef uint32_t owner = 0
        cdef int code = pool_owner_of(alive(self), number, &owner)
        if code:
            raise refusal(&self.pool, code, number)
        return owner

    def held_by(self, owner):
        """Return the IDs that `owner` holds, in no particular order. Time as their number."""
        cdef uint32_t own = as_owner(owner)
        cdef Py_buffer view
        cdef Pool *pool
        while True:
            ids = np.empty(alive(self).owners[own].held, np.uint64)
            view_ids(ids, &view, PyBUF_WRITABLE)
            try:
                pool = alive(self)
                if pool.owners[own].held != <uint64_t>view.shape[0]:
                    continue    # another thread was here
                if begin(self, view.shape[0]):
                    with nogil:
                        pool_held_by(pool, own, <uint64_t *>view.buf)
                        pthread_mutex_unlock(&self.busy)
                else:
                    pool_held_by(pool, own, <uint64_t *>view.buf)
                return ids
            finally:
                PyBuffer_Release(&view)

    def held_count(self, owner):
        """Return how many IDs `owner` holds. Constant time."""
        cdef uint32_t own = as_owner(owner)
        return alive(self).owners[own].held

    def __contains__(self, cid):
        """Tell whether anybody holds `cid`; False for whatever is no ID of this pool."""
        cdef int64_t value = 0
        cdef uint32_t owner = 0
        cdef int kind = read_int(cid, &value)
        cdef Pool *pool = alive(self)
        return kind == FITS and pool_owner_of(pool, value, &owner) == OK

    def __len__(self):
        """Return how many IDs are held."""
        return pool_held(alive(self))

    @property
    def capacity(self):
        """IDs in the pool."""
        return alive(self).capacity

    @property
    def first(self):
        """The lowest ID."""
        return alive(self).first

    @property
    def block(self):
        """IDs in a block."""
        return 1 << alive(self).shift

    @property
    def active(self):
        """IDs that are held."""
        return pool_held(alive(self))

    @property
    def inactive(self):
        """IDs that were issued at least once and are not held."""
        cdef Pool *pool = alive(self)
        return pool.issued - pool_held(pool)

    @property
    def cooling(self):
        """IDs that nobody holds and whose time has not come, as of the latest `now` seen.

        Time in proportion to the blocks that come due at about this time, and to idle owners.
        """
        return pool_count(alive(self)).cooling

    @property
    def pinned(self):
        """IDs that nobody holds, in blocks where another one is held. Time as `cooling`."""
        return pool_count(alive(self)).pinned

    @property
    def peak(self):
        """The most IDs that were held at once."""
        return alive(self).peak

    @property
    def high_water(self):
        """IDs in the blocks that were ever opened."""
        cdef Pool *pool = alive(self)
        return pool_ids(pool, pool.opened)

    @property
    def opened(self):
        """Blocks that were ever opened."""
        return alive(self).opened

    @property
    def ready(self):
        """Blocks that may be opened so far, of all; it can only be raised.

        Memory that is still to come, as that of a file which grows, is not touched before.
        """
        return alive(self).ready

    @ready.setter
    def ready(self, blocks):
        cdef int64_t value = as_int(blocks, alive(self).ready, alive(self).count, "ready")
        alive(self).ready = value

    @property
    def next_due(self):
        """The time at which the first free block is or was due; None if no block is free."""
        cdef int64_t due = 0
        return due if pool_next_due(alive(self), &due) else None

    def __repr__(self):
        """Describe the pool and how full it is."""
        cdef Pool *pool = alive(self)
        cdef uint64_t held = pool_held(pool)
        return (f"Allocator(capacity={pool.capacity}, first={pool.first}, "
                f"block={1 << pool.shift}): {held} held")

    def __reduce__(self):
        """Refuse to be copied: two pools would issue the same IDs."""
        raise TypeError("an Allocator cannot be pickled or copied: both would issue the same IDs")

    def _check(self):
        """Audit every structure; raises AssertionError. Time in proportion to the blocks opened.

        No other thread may use the pool meanwhile.
        """
        audit(alive(self))
