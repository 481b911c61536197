# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: autotestdict=False
"""The allocator core: the Python face of the C functions, which _pool.pxi holds."""

from cpython.buffer cimport (PyBUF_FORMAT, PyBUF_ND, PyBUF_WRITABLE, PyBuffer_Release,
                             PyObject_CheckBuffer, PyObject_GetBuffer)
from cpython.long cimport PyLong_CheckExact
from cpython.number cimport PyNumber_Index
from cpython.sequence cimport PySequence_Check
from libc.stdint cimport INT64_MAX, uintptr_t

import os

import numpy as np

from .errors import error_for

include "_pool.pxi"


cdef extern from *:
    """
    /* The value of a positive int of one digit, without a call; some others may be read, too. */
    static inline int small_int(PyObject *x, int64_t *value) {
        if (!PyLong_CheckExact(x)) return 0;
    #if PY_VERSION_HEX >= 0x030C0000
        if (!PyUnstable_Long_IsCompact((PyLongObject *)x)) return 0;
        *value = PyUnstable_Long_CompactValue((PyLongObject *)x);
    #else
        if (Py_SIZE(x) != 1) return 0;
        *value = ((PyLongObject *)x)->ob_digit[0];
    #endif
        return 1;
    }
    """
    bint small_int(object x, int64_t *value) noexcept

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object x, int *overflow) except? -1


cdef object zero = 0    # what a caller left out: needs no reading
cdef int forks = 0      # that lie between this process and the first one


def _forked():
    global forks
    forks += 1


os.register_at_fork(after_in_child=_forked)

cdef enum:  # what read_int found
    FITS = 0
    TOO_LARGE = 1
    NO_INT = 2


cdef int read_int(object x, int64_t *value) except -1:
    cdef int overflow = 0
    if small_int(x, value):
        return FITS
    if not PyLong_CheckExact(x):
        if isinstance(x, (bool, np.bool_)):
            return NO_INT
        try:
            x = PyNumber_Index(x)
        except TypeError:
            return NO_INT
    value[0] = PyLong_AsLongLongAndOverflow(x, &overflow)
    return TOO_LARGE if overflow else FITS


cdef int64_t as_int(object x, int64_t low, int64_t high, const char *name) except? -1:
    cdef int64_t value = 0
    cdef int kind = read_int(x, &value)
    if kind == NO_INT:
        raise error_for(INVALID_ARGUMENT, f"{name.decode()} must be an int, not {type(x).__name__}")
    if kind == TOO_LARGE or not low <= value <= high:
        raise error_for(INVALID_ARGUMENT, f"{name.decode()} must be between {low} and {high}")
    return value


cdef inline int64_t as_time(object x, const char *name) except? -1:
    return 0 if likely(x is zero) else as_int(x, INT64_MIN, INT64_MAX, name)


cdef inline uint32_t as_owner(object x) except? 0xFFFFFFFF:
    return 0 if likely(x is zero) else <uint32_t>as_int(x, 0, MAX_OWNERS - 1, "owner")


cdef int64_t as_cid(object x, object where="") except? 0:
    # 0 stands for whatever does not fit: no pool has it.
    cdef int64_t value = 0
    cdef int kind = read_int(x, &value)
    if kind == NO_INT:
        raise error_for(INVALID_ARGUMENT,
                        f"a correlation ID is an int, not {type(x).__name__}{where}")
    return value if kind == FITS else 0


cdef bint view_ids(object array, Py_buffer *view, int flags) except -1:
    # Open a view of an aligned one-dimensional C-contiguous uint64 array; False if it is not one.
    try:
        PyObject_GetBuffer(array, view, flags | PyBUF_FORMAT | PyBUF_ND)
    except (BufferError, TypeError, ValueError):
        return False
    if (view.ndim == 1 and view.itemsize == 8 and view.format != NULL
            and view.format[0] in b"LQ" and view.format[1] == 0 and not <uintptr_t>view.buf & 7):
        return True
    PyBuffer_Release(view)
    return False


cdef object ids_array(object ids):
    # Any other form of IDs as such an array. Numbers that fit no ID become 0, which no pool has.
    if not PyObject_CheckBuffer(ids):
        if not PySequence_Check(ids):
            raise error_for(INVALID_ARGUMENT, f"IDs come as an array or a sequence of ints, "
                                              f"not as {type(ids).__name__}")
        ids = [max(as_cid(cid, f" at position {i}"), 0) for i, cid in enumerate(ids)]
        return np.array(ids, np.uint64)
    array = np.asarray(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise error_for(INVALID_ARGUMENT, f"IDs come as a one-dimensional array of integers, "
                                          f"not as {array.ndim}-dimensional {array.dtype}")
    if array.dtype.kind == "i":
        array = np.where(array < 0, 0, array)
    return np.require(array, np.uint64, "CA")


cdef int refuse_fork() except -1:
    raise error_for(FORKED, "this pool belongs to the parent process; make one after the fork")


cdef inline Pool *alive(Allocator self) except NULL:
    if self.forks != forks:
        refuse_fork()
    return &self.pool


cdef object exhausted(Pool *pool, object what):
    cdef Counts n = pool_count(pool)
    cdef int64_t due = 0
    when = f"the next is due at {due}" if pool_next_due(pool, &due) else "none is due"
    return error_for(EXHAUSTED, (
        f"cannot issue {what}: of {pool.capacity} IDs {pool_held(pool)} are held, {n.cooling} cool "
        f"and {n.pinned} are pinned by others in their block; {when}. Release some, wait, or use a "
        f"larger pool or narrower blocks"))


cdef object refusal(const Pool *pool, int code, object cid, object where=""):
    if code == OUT_OF_RANGE:
        high = pool.first + pool.capacity - 1
        return error_for(code, f"the ID{where} is outside the pool: {pool.first} to {high}")
    if code == NOT_HELD:
        return error_for(code, f"nobody holds ID {cid}{where}: it was released or never issued")
    if code == NOT_OWNER:
        return error_for(code, f"ID {cid}{where} belongs to another owner, who alone releases it")
    return error_for(code, f"ID {cid}{where} stands twice in this call")


cdef class Allocator:
    """A pool of integer IDs, each held by one owner at a time and reused when it has cooled.

    IDs belong to blocks. A block serves one owner at a time, and is used again when all of its IDs
    are free and the latest of their `reuse_at` has come. Of the free blocks the one due first goes
    first; a never-used one is opened only when none is due. Wide blocks are fast and small; blocks
    of 1 waste nothing and keep the order exact for every single ID.

    Times are integers of any unit and origin. Owners are integers below 2**24; 0 is nobody in
    particular, and an owner like any other. Methods are safe to call from several threads. After
    a fork the child's copy raises `Forked`. A wrong type or value raises `InvalidArgument`.

    Args:
        capacity: IDs in the pool, at most 2**38. Memory is only reserved: 32 bytes come into use
            for each block that does, and 32 for each owner.
        first: the lowest ID, at least 1; the highest is below 2**63.
        block: IDs in a block: 1, 2, 4, 8, 16, 32 or 64.
        start: the ID whose block is issued first; those above follow, then those below.
    """

    def __cinit__(self, capacity=(1 << 30) - 1, first=1, block=64, *, start=None):
        cdef int64_t width = as_int(block, 1, 64, "block")
        if width & (width - 1):
            raise error_for(INVALID_ARGUMENT, "block must be 1, 2, 4, 8, 16, 32 or 64")
        cdef int64_t n = as_int(capacity, 1, <int64_t>1 << 38, "capacity")
        cdef int64_t low = as_int(first, 1, INT64_MAX - (n - 1), "first")
        cdef int64_t begin = low if start is None else as_int(start, low, low + (n - 1), "start")
        if pool_init(&self.pool, n, low, high_bit(width), begin):
            raise MemoryError("no address space for the pool; a smaller capacity needs less")
        self.forks = forks

    def __dealloc__(self):
        pool_free(&self.pool)

    def acquire(self, owner=0, now=0):
        """Issue one ID.

        Args:
            owner: who will hold it.
            now: the time, in ticks; one before the latest seen counts as that one.

        Raises `Exhausted`. Constant time, amortised.
        """
        cdef Pool *pool = alive(self)
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(now, "now")
        cdef uint64_t cid = 0
        if pool_acquire(pool, own, tick, &cid):
            raise exhausted(pool, "an ID")
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
        cdef Pool *pool = alive(self)
        cdef uint64_t many = as_int(n, 0, INT64_MAX, "n")
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(now, "now")
        cdef Py_buffer view
        cdef int code
        if many > pool.capacity - pool_held(pool):    # it may be too many for an array, too
            see(pool, tick)
            raise exhausted(pool, f"{many} IDs")
        ids = np.empty(many, np.uint64) if out is None else out
        if not view_ids(ids, &view, PyBUF_WRITABLE):
            raise error_for(INVALID_ARGUMENT, "out must be a writable contiguous uint64 array")
        try:
            if <uint64_t>view.shape[0] != many:
                raise error_for(INVALID_ARGUMENT, f"out has {view.shape[0]} elements, not {many}")
            code = pool_acquire_many(pool, many, own, tick, <uint64_t *>view.buf)
        finally:
            PyBuffer_Release(&view)
        if code:
            raise exhausted(pool, f"{many} IDs")
        return ids

    def release(self, cid, owner=0, reuse_at=0):
        """Take back one ID.

        Args:
            cid: the ID.
            owner: who holds it.
            reuse_at: the time, in ticks, from which it may be issued again.

        Raises `OutOfRange`, `NotHeld`, `NotOwner`. Constant time.
        """
        cdef Pool *pool = alive(self)
        cdef int64_t number = 0
        if unlikely(not small_int(cid, &number)):
            number = as_cid(cid)
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(reuse_at, "reuse_at")
        cdef int code = pool_release(pool, number, own, tick)
        if code:
            raise refusal(pool, code, number)

    def release_many(self, ids, owner=0, reuse_at=0):
        """Take back IDs, all or none.

        Args:
            ids: an array of any integer type or a sequence of ints; contiguous uint64 is fastest.
            owner: who holds them.
            reuse_at: the time, in ticks, from which they may be issued again.

        Raises `OutOfRange`, `NotHeld`, `NotOwner`, `Duplicate`. Time in proportion to their number.
        """
        cdef Pool *pool = alive(self)
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(reuse_at, "reuse_at")
        cdef Py_buffer view
        cdef uint64_t at = 0
        cdef int code
        if not view_ids(ids, &view, 0) and not view_ids(ids_array(ids), &view, 0):
            raise error_for(INVALID_ARGUMENT, "IDs come as an array of integers")
        cdef const uint64_t *cids = <const uint64_t *>view.buf
        try:
            code = pool_release_many(pool, cids, view.shape[0], own, tick, &at)
            if code == INTERNAL:
                raise MemoryError("no memory to release IDs")
            if code:
                raise refusal(pool, code, cids[at], f" at position {at}")
        finally:
            PyBuffer_Release(&view)

    def release_owner(self, owner, reuse_at=0):
        """Take back all IDs of one owner; return how many.

        Args:
            owner: who holds them.
            reuse_at: the time, in ticks, from which they may be issued again.

        Time in proportion to the owner's blocks.
        """
        cdef Pool *pool = alive(self)
        return pool_release_owner(pool, as_owner(owner), as_time(reuse_at, "reuse_at"))

    def owner_of(self, cid):
        """Return who holds an ID; raises `OutOfRange` and `NotHeld`. Constant time."""
        cdef Pool *pool = alive(self)
        cdef int64_t number = as_cid(cid)
        cdef uint32_t owner = 0
        cdef int code = pool_owner_of(pool, number, &owner)
        if code:
            raise refusal(pool, code, number)
        return owner

    def held_by(self, owner):
        """Return the IDs that `owner` holds, in no particular order. Time as their number."""
        cdef Pool *pool = alive(self)
        cdef uint32_t own = as_owner(owner)
        cdef Py_buffer view
        ids = None
        while ids is None or <uint64_t>len(ids) != pool.owners[own].held:
            ids = np.empty(pool.owners[own].held, np.uint64)    # other threads may run here
        view_ids(ids, &view, PyBUF_WRITABLE)
        pool_held_by(pool, own, <uint64_t *>view.buf)
        PyBuffer_Release(&view)
        return ids

    def held_count(self, owner):
        """Return how many IDs `owner` holds. Constant time."""
        return alive(self).owners[as_owner(owner)].held

    def __contains__(self, cid):
        """Tell whether anybody holds `cid`; False for whatever is no ID of this pool."""
        cdef Pool *pool = alive(self)
        cdef int64_t value = 0
        cdef uint32_t owner = 0
        return read_int(cid, &value) == FITS and pool_owner_of(pool, value, &owner) == OK

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
        return alive(self).high_water

    @property
    def next_due(self):
        """The time at which the first free block is or was due; None if no block is free."""
        cdef int64_t due = 0
        return due if pool_next_due(alive(self), &due) else None

    def __repr__(self):
        """Describe the pool and how full it is."""
        cdef Pool *pool = alive(self)
        return (f"Allocator(capacity={pool.capacity}, first={pool.first}, "
                f"block={1 << pool.shift}): {pool_held(pool)} held")

    def __reduce__(self):
        """Refuse to be copied: two pools would issue the same IDs."""
        raise TypeError("an Allocator cannot be pickled or copied: both would issue the same IDs")

    def _check(self):
        """Audit every structure; raises AssertionError. Time in proportion to the blocks opened."""
        audit(alive(self))


cdef int audit(Pool *pool) except -1:
    cdef uint64_t ids, held = 0, issued = 0, high_water = 0
    cdef uint64_t at, before, place
    cdef int i
    cdef Block *block
    cdef Bucket *bucket
    opened = {1 + (pool.start + n) % pool.count for n in range(pool.opened)}
    queued, listed, owned = set(), set(), {}
    for i in range(BUCKETS):
        bucket, ids, before, at, dues = &pool.queue[i], 0, 0, pool.queue[i].head, []
        assert not i or bool(at) == bool(pool.filled >> (i - 1) & 1), "filled"
        while at:
            block = &pool.blocks[at]
            assert at in opened and at not in queued and not block.used, "queued"
            assert bucket_of(pool, block.reuse_at) == i and block.reuse_at >= pool.last, "key"
            queued.add(at)
            dues.append(block.reuse_at)
            ids += block.end
            before, at = at, block.next
        assert not before or bucket.tail == before, "bucket's tail"
        assert not before or not i or bucket.due == min(dues), "bucket's due"
        assert ids == bucket.ids, "bucket's count"
    at = pool.idle
    while at:
        assert at not in listed and pool.owners[at - 1].listed, "list of idle ones"
        listed.add(at)
        at = pool.owners[at - 1].idle
    for at in opened:
        block = &pool.blocks[at]
        ids = min(<uint64_t>pool.mask + 1, pool.capacity - (<uint64_t>(at - 1) << pool.shift))
        place = at << pool.shift & 63
        assert block.end == ids and block.bump <= ids, "bounds"
        assert not block.used & ~bits(ids, place), "strange bits"
        held += count_bits(block.used)
        issued += block.seen
        high_water += ids
        if at not in queued:
            assert 0 < block.bump <= block.seen, "issued"
            assert not block.used & ~bits(block.bump, place), "issued above bump"
            assert block.used or is_idle(block), "empty, but not queued"
            assert not is_idle(block) or block.owner + 1 in listed, "idle, but not listed"
            assert block.bump == ids or pool.owners[block.owner].current == at, "room"
            owned.setdefault(block.owner, set()).add(at)
    for owner, blocks in owned.items():
        ids, before, at, chain = 0, 0, pool.owners[owner].head, set()
        while at:
            assert at not in chain and pool.blocks[at].prev == before, "owner's list"
            chain.add(at)
            ids += count_bits(pool.blocks[at].used)
            before, at = at, pool.blocks[at].next
        assert chain == blocks and pool.owners[owner].current in chain | {0}, "owner's blocks"
        assert ids == pool.owners[owner].held, "owner's count"
    assert held == pool_held(pool) <= pool.peak and issued == pool.issued, "counts"
    assert high_water == pool.high_water <= pool.capacity and pool.last <= pool.now, "totals"
    return 0
