# Write the state of a pool as bytes, and read it.

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport INT64_MAX, int64_t, uint64_t
from libc.string cimport memcpy, memset

from .messages cimport error
from .past cimport recover
from .pool cimport BUCKETS, REGISTRY_CORRUPT, Block, Pool, pool_held
from .queue cimport enqueue


cdef inline uint64_t queue_order(const Pool *pool, uint64_t *order) noexcept nogil:
    # Count the queued blocks; write their numbers in their order if `order` is not NULL.
    cdef uint64_t n = 0, at
    cdef int i
    for i in range(BUCKETS):
        at = pool.queue[i].head
        while at:
            if order != NULL:
                order[n] = at
            n += 1
            at = pool.blocks[at].next
    return n


cdef inline tuple save_state(const Pool *pool):
    # Return the fields of the `State` of a pool. No Python code runs meanwhile.
    blocks = PyBytes_FromStringAndSize(<char *>(pool.blocks + 1), pool.opened * sizeof(Block))
    order = PyBytes_FromStringAndSize(NULL, queue_order(pool, NULL) * sizeof(uint64_t))
    queue_order(pool, <uint64_t *><char *>order)
    return (pool.capacity, pool.first, pool.mask + 1, pool.ready, pool.now, pool.last, pool.peak,
            blocks, order)


cdef inline int load_state(Pool *pool, bytes blocks, bytes order, int64_t now, int64_t last,
                           uint64_t peak) except -1:
    # Give a new pool the state of an earlier one. Raises `RegistryCorrupt`: do not use it then.
    cdef const uint64_t *numbers = <const uint64_t *><const char *>order
    cdef uint64_t i, at, n = len(blocks) // sizeof(Block)
    cdef uint64_t owners = 0, ready = pool.ready
    if n > pool.ready or last > now:
        raise error(REGISTRY_CORRUPT, "the state is wrong")
    memcpy(pool.blocks + 1, <const char *>blocks, n * sizeof(Block))
    for at in range(1, n + 1):
        owners = max(owners, pool.blocks[at].owner + 1)
    pool.ready = n      # recover() visits all of these
    recover(pool, b"\1" * owners, INT64_MAX, None, False, False)
    pool.ready = ready
    if pool.opened != n or peak < pool_held(pool):
        raise error(REGISTRY_CORRUPT, "the state is wrong")
    pool.peak, pool.below = peak, peak - pool_held(pool)
    # The queue again, in its order; blocks that were idle come last. `prev` of a queued block is
    # free to note that it is in the queue.
    pool.now, pool.last, pool.filled = now, last, 0
    memset(pool.queue, 0, sizeof(pool.queue))
    for at in range(1, n + 1):
        if not pool.blocks[at].used:
            pool.blocks[at].prev = 0
    for i in range(len(order) // sizeof(uint64_t)):
        at = numbers[i]
        if not 0 < at <= n or pool.blocks[at].used or pool.blocks[at].prev:
            raise error(REGISTRY_CORRUPT, "the order of the queue is wrong")
        pool.blocks[at].prev = 1
        enqueue(pool, at)
    for at in range(1, n + 1):
        if not pool.blocks[at].used and not pool.blocks[at].prev:
            enqueue(pool, at)
    return 0
