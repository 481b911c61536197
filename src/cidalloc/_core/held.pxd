# The held IDs as an array.

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release
from libc.stdint cimport int64_t, uint64_t

from .args cimport view_ids
from .guard cimport Guard, guard_enter, guard_leave, guard_wait
from .owners cimport write_held
from .pool cimport Pool, pool_held

cdef enum:
    ALL = -1    # the owners


cdef inline uint64_t count_held(const Pool *pool, int64_t owner) noexcept:
    return pool_held(pool) if owner == ALL else pool.owners[owner].held


cdef inline object held_ids(Pool *pool, Guard *guard, const int *forks, int64_t owner):
    # Return the IDs of an owner, or, for ALL, the held IDs in order. Raises `Forked`.
    import numpy as np
    cdef Py_buffer view
    while True:
        guard_wait(guard, forks[0])
        ids = np.empty(count_held(pool, owner), np.uint64)
        view_ids(ids, &view, PyBUF_WRITABLE)
        try:
            guard_wait(guard, forks[0])
            if count_held(pool, owner) != <uint64_t>view.shape[0]:
                continue    # another thread used the pool meanwhile
            if guard_enter(guard, pool.opened if owner == ALL else view.shape[0]):
                with nogil:
                    write_held(pool, owner, <uint64_t *>view.buf)
                    guard_leave(guard)
            else:
                write_held(pool, owner, <uint64_t *>view.buf)
            return ids
        finally:
            PyBuffer_Release(&view)
