# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: autotestdict=False
"""The allocator as a Python class: arguments, exceptions, threads and forks around the C pool."""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.type cimport PyType_Modified
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t

import os

import numpy as np

from ._core.acquire cimport see
from ._core.args cimport (FITS, as_capacity, as_cid, as_int, as_owner, as_shift, as_time, ids_array,
                          int_value, read_int, sorted_ids, view_ids, view_memory)
from ._core.audit cimport audit
from ._core.guard cimport guard_enter, guard_init, guard_leave, guard_wait
from ._core.held cimport ALL, held_ids
from ._core.intrinsics cimport likely, unlikely
from ._core.messages cimport error, exhausted, refusal, unreservable
from ._core.methods cimport Method, replace
from ._core.past cimport recover
from ._core.reserve cimport pool_can_reserve, pool_clear, pool_reserve
from ._core.resize cimport pool_resize
from ._core.state cimport load_state, save_state

from .allocator import Methods
from .waiting_line import WaitingLine

cdef extern from *:
    ctypedef struct PyTypeObject:
        PyObject *tp_dict
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
    # Return the pool. No Python code may run between this call and the use of the pool.
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


cdef Pool *pool_of(Allocator self) except NULL:
    return alive(self)


cdef class Allocator:
    def __cinit__(self, capacity=(1 << 30) - 1, first=1, block=None, *, buffer=None, ready=None,
                  holders=None, latest=INT64_MAX, reuse_at=None, live_snapshot=False):
        cdef int64_t n = as_capacity(capacity)
        cdef uint32_t shift = as_shift(block, n)
        cdef int64_t low = as_int(first, 1, INT64_MAX - (n - 1), "first")
        if buffer is not None:
            view_memory(buffer, &self.memory, pool_size(n, shift))
        cdef bint used = holders is not None
        if used and buffer is None:
            raise error(INVALID_ARGUMENT, "holders needs a buffer: the memory of an earlier pool")
        cdef int code = pool_init(&self.pool, n, low, shift, self.memory.buf, used)
        if code == INVALID_ARGUMENT:
            raise error(code, "buffer must be all zero: this one was used before")
        if code:
            raise MemoryError("not enough address space for the pool: use a smaller capacity")
        if ready is not None:
            self.pool.ready = as_int(ready, 0, self.pool.count, "ready")
        if used:
            recover(&self.pool, holders, as_time(latest, "latest"), reuse_at, live_snapshot)
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
        ids = empty(many, UINT64) if out is None else out
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

    def release_owner(self, owner, reuse_at=0):
        """Release all IDs of an owner; return their number.

        Args:
            owner: the owner that holds them.
            reuse_at: the time, in ticks, from which they may be issued again.

        Linear in the owner's blocks.
        """
        cdef uint32_t own = as_owner(owner)
        cdef int64_t tick = as_time(reuse_at, "reuse_at")
        cdef uint64_t n
        cdef Pool *pool = alive(self)
        if guard_enter(&self.guard, pool.owners[own].held >> pool.shift):
            with nogil:
                n = pool_release_owner(pool, own, tick)
                guard_leave(&self.guard)
        else:
            n = pool_release_owner(pool, own, tick)
        freed(self)
        return n

    def _clear(self, reuse_at):
        cdef int64_t tick = as_time(reuse_at, "reuse_at")
        cdef uint64_t n = pool_clear(alive(self), tick)
        freed(self)
        return n

    def _reserve(self, ids, owner):
        cdef uint32_t own = as_owner(owner)
        cdef uint64_t at = 0
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
        """
        ids = held_ids(&self.pool, &self.guard, &forks, as_owner(owner))
        if ordered:
            ids.sort()
        return ids

    def _held(self):
        return held_ids(&self.pool, &self.guard, &forks, ALL)

    def held_count(self, owner):
        """Return the number of IDs that an owner holds. Constant time."""
        cdef uint32_t own = as_owner(owner)
        return alive(self).owners[own].held

    def __contains__(self, cid):
        """Return whether `cid` is held; False for any object that is not an ID. Constant time."""
        cdef int64_t value = 0
        cdef uint32_t owner = 0
        cdef int kind = read_int(cid, &value)
        cdef Pool *pool = alive(self)
        return kind == FITS and pool_owner_of(pool, value, &owner) == OK

    def __len__(self):
        """Return the number of held IDs. Constant time."""
        return pool_held(alive(self))

    @property
    def capacity(self):
        """Number of IDs in the pool."""
        return alive(self).capacity

    @property
    def first(self):
        """The lowest ID."""
        return alive(self).first

    @property
    def block(self):
        """Number of IDs in a block."""
        return 1 << alive(self).shift

    @property
    def inactive(self):
        """Number of IDs that were issued at least once and are not held now."""
        cdef Pool *pool = alive(self)
        return pool.issued - pool_held(pool)

    @property
    def cooling(self):
        """Number of IDs that are not held and not due, as of the latest `now` seen.

        Linear in the queued blocks with a `reuse_at` close to `now`, and in the idle blocks.
        """
        return pool_count(alive(self)).cooling

    @property
    def pinned(self):
        """Number of IDs that are not held, in a block with a held ID. Time as `cooling`."""
        return pool_count(alive(self)).pinned

    @property
    def peak(self):
        """Highest number of IDs that were held at once."""
        return alive(self).peak

    @property
    def opened(self):
        """Number of blocks that were ever opened, in the order of their IDs."""
        return alive(self).opened

    @property
    def ready(self):
        """Number of blocks that may be opened so far. It can only be raised.

        The pool does not touch the memory of later blocks, so a file can grow before it is raised.
        """
        return alive(self).ready

    @ready.setter
    def ready(self, blocks):
        cdef int64_t value = as_int(blocks, alive(self).ready, alive(self).count, "ready")
        alive(self).ready = value
        freed(self)

    @property
    def next_due(self):
        """Time at which the first queued block is or was due; None if no block is queued."""
        cdef int64_t due = 0
        return due if pool_next_due(alive(self), &due) else None

    def __iter__(self):
        """Iterate over the IDs that are held now, in ascending order.

        Linear in the opened blocks. The pool may be used and changed meanwhile.
        """
        return iter(self.held().tolist())

    def __repr__(self):
        """Return the arguments of the pool and its number of held IDs."""
        cdef Pool *pool = alive(self)
        return (f"Allocator(capacity={pool.capacity}, first={pool.first}, "
                f"block={1 << pool.shift}): {pool_held(pool)} held")

    def __reduce__(self):
        """Raise TypeError: a copy would issue the same IDs."""
        raise TypeError("an Allocator cannot be pickled or copied: both would issue the same IDs")

    def _resize(self, capacity):
        cdef Pool *pool = alive(self)
        cdef int64_t most = min(<int64_t>1 << 38, INT64_MAX - <int64_t>pool.first + 1)
        cdef int64_t n = as_int(capacity, pool.capacity, most, "capacity")
        cdef int code = pool_resize(alive(self), n)
        if code == INVALID_ARGUMENT:
            raise error(code, "a pool in given memory cannot grow, and none can shrink")
        if code:
            raise MemoryError("not enough address space for the pool: use a smaller capacity")
        freed(self)

    def _state(self):
        return save_state(alive(self))

    def _load(self, bytes blocks, bytes order, now, last, peak):
        load_state(alive(self), blocks, order, now, last, peak)

    def _take(self, owner):
        # Issue an ID without regard to those that wait; return 0 if there is none.
        cdef uint32_t own = as_owner(owner)
        cdef uint64_t cid = 0
        cdef Pool *pool = alive(self)
        # One more call of pool_acquire() could end its inlining in acquire().
        pool_acquire_many(pool, 1, own, pool.now, &cid)
        return cid

    def _set_queued(self, queued):
        # Tell whether other callers wait for an ID.
        cdef bint value = queued
        alive(self)
        self.guard.queued = value
        self.guard.forks = ~forks if value else forks

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
    cdef Pool *pool = &(<Allocator>self).pool
    cdef uint64_t cid = 0
    cdef uint64_t owner = int_value(args[0]) if n > 0 else 0
    cdef int64_t now = int_value(args[1]) if n > 1 else 0
    if likely(names == NULL and n <= 2 and owner < MAX_OWNERS and now >= 0
              and (<Allocator>self).guard.forks == forks
              and pool_acquire(pool, owner, now, &cid) == OK):
        return new_int(cid)
    return any_acquire(self, args, n, names)


cdef PyObject *quick_release(PyObject *self, PyObject *const *args, Py_ssize_t n,
                             PyObject *names) noexcept:
    cdef Pool *pool = &(<Allocator>self).pool
    cdef uint64_t cid = int_value(args[0]) if n > 0 else 0
    cdef uint64_t owner = int_value(args[1]) if n > 1 else 0
    cdef int64_t reuse_at = int_value(args[2]) if n > 2 else 0
    if likely(names == NULL and n <= 3 and owner < MAX_OWNERS and reuse_at >= 0
              and (<Allocator>self).guard.forks == forks
              and pool_release(pool, cid, owner, reuse_at) == OK):
        Py_INCREF(None)
        return <PyObject *>None
    return any_release(self, args, n, names)


any_acquire = replace(Allocator, "acquire", quick_acquire)
any_release = replace(Allocator, "release", quick_release)

for name, method in vars(Methods).items():
    if name == "__doc__" or not name.startswith("_"):
        (<dict>(<PyTypeObject *>Allocator).tp_dict)[name] = method
del name, method
PyType_Modified(Allocator)
