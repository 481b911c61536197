# cython: language_level=3, binding=False, boundscheck=False, wraparound=False, cdivision=True
"""The allocator from C, next to a bump pointer and to malloc: loops without any Python.

Each loop acquires `at_once` numbers or addresses, 1 to 1000, and releases them in the same order,
until it did so `count` times. The compiler has to assume that each result is looked at, or it would
leave most of this out.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc

from cidalloc._alloc cimport OK, Allocator, Pool, pool_acquire, pool_of, pool_release

cdef extern from *:
    """
    #define LOOK_AT(it) __asm__ volatile("" : : "r"(it) : "memory")
    """
    void LOOK_AT(uint64_t it) nogil

cdef enum:
    MOST = 1000


cdef struct Bump:
    uint64_t next
    uint64_t end


cdef inline bint bump(Bump *range, uint64_t *number) noexcept nogil:
    if range.next == range.end:
        return False
    number[0] = range.next
    range.next += 1
    return True


def from_pool(Allocator allocator, int64_t count, int64_t at_once):
    """Issue IDs and release them; return how many calls were refused."""
    cdef Pool *pool = pool_of(allocator)
    cdef uint64_t[MOST] ids
    cdef int64_t turn, at, wrong = 0
    for turn in range(count // at_once):
        for at in range(at_once):
            wrong += pool_acquire(pool, 0, 0, &ids[at]) != OK
            LOOK_AT(ids[at])
        for at in range(at_once):
            wrong += pool_release(pool, ids[at], 0, 0) != OK
    return wrong


def from_bump(int64_t count, int64_t at_once):
    """Count up to an end; nothing is ever released. Return how many calls were refused."""
    cdef Bump range_ = Bump(1, 1 << 62)
    cdef uint64_t[MOST] numbers
    cdef int64_t turn, at, wrong = 0
    for turn in range(count // at_once):
        for at in range(at_once):
            wrong += not bump(&range_, &numbers[at])
            LOOK_AT(numbers[at])
    return wrong


def from_malloc(int64_t count, int64_t at_once):
    """Allocate 32 bytes and free them; return how many calls were refused."""
    cdef (void *)[MOST] addresses
    cdef int64_t turn, at, wrong = 0
    for turn in range(count // at_once):
        for at in range(at_once):
            addresses[at] = malloc(32)
            wrong += addresses[at] == NULL
            LOOK_AT(<uint64_t>addresses[at])
        for at in range(at_once):
            free(addresses[at])
    return wrong
