# cython: language_level=3, freethreading_compatible=True
"""An extension module of somebody else's, on the C functions of cidalloc._alloc alone."""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from cidalloc._alloc cimport (DUPLICATE, EXHAUSTED, MAX_OWNERS, NOT_HELD, NOT_OWNER, OK,
                              OUT_OF_RANGE, Allocator, Block, Pool, pool_acquire,
                              pool_acquire_many, pool_count, pool_free, pool_held, pool_held_by,
                              pool_init, pool_next_due, pool_of, pool_owner_of, pool_release,
                              pool_release_many, pool_release_owner, pool_size)


cdef int life(Pool *pool) noexcept nogil:
    # Every function once; the number of the step that went wrong, or 0.
    cdef uint64_t cid = 0, at = 0
    cdef uint64_t[100] cids
    cdef uint32_t owner = 0
    cdef int64_t due = 0
    if pool_acquire(pool, 7, 0, &cid) != OK or cid != 1:
        return 1
    if pool_owner_of(pool, 1, &owner) != OK or owner != 7:
        return 2
    if pool_owner_of(pool, 0, &owner) != OUT_OF_RANGE:
        return 3
    if pool_release(pool, 1, 8, 0) != NOT_OWNER or pool_release(pool, 2, 7, 0) != NOT_HELD:
        return 4
    if pool_acquire_many(pool, 99, MAX_OWNERS - 1, 0, cids) != OK or pool_held(pool) != 100:
        return 5
    if pool_acquire(pool, 7, 0, &cid) != EXHAUSTED:
        return 6
    cids[98] = cids[0]
    if pool_release_many(pool, cids, 99, MAX_OWNERS - 1, 5, &at) != DUPLICATE or at != 98:
        return 7
    if pool_release_many(pool, cids, 98, MAX_OWNERS - 1, 5, &at) != OK:
        return 8
    pool_held_by(pool, MAX_OWNERS - 1, cids)
    if cids[0] != 100 or pool.owners[MAX_OWNERS - 1].held != 1:
        return 9
    if pool_release_owner(pool, MAX_OWNERS - 1, 9) != 1 or not pool_next_due(pool, &due):
        return 10
    if due != 5 or pool_count(pool).cooling != 99 or pool.blocks[1].owner != 7:
        return 11
    return 0


def run(bint given):
    """Go through the life of a pool without the GIL, its blocks in given memory or in its own."""
    cdef Pool pool
    cdef int code
    cdef int step = 0
    cdef void *memory = calloc(1, pool_size(100, 0)) if given else NULL
    with nogil:
        code = pool_init(&pool, 100, 1, 0, memory)
        if code == OK:
            step = life(&pool)
        pool_free(&pool)
        free(memory)
    assert code == OK and step == 0, f"code {code}, step {step}"
    assert sizeof(Block) == 32


def held(Allocator pool):
    """Look into a Python object's pool."""
    with cython.critical_section(pool):
        return pool_held(pool_of(pool))
