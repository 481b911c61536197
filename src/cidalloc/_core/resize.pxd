# Make a pool larger.

from libc.stdint cimport uint64_t
from posix.mman cimport MAP_FAILED, mremap

from .acquire cimport count_issued
from .pool cimport INTERNAL, INVALID_ARGUMENT, OK, Block, Pool, pool_size, room_of
from .queue cimport bucket_of
from .reserve cimport is_owned

cdef extern from "<sys/mman.h>" nogil:
    int MREMAP_MAYMOVE


cdef inline void widen(Pool *pool, uint64_t at) noexcept nogil:
    # Give an opened block the room that it has now; it was short.
    cdef Block *block = &pool.blocks[at]
    cdef uint64_t more = room_of(pool, at) - block.end
    cdef bint owned = is_owned(pool, at)
    block.end += more
    if not owned:
        pool.queue[bucket_of(pool, block.reuse_at)].ids += more
    elif pool.owners[block.owner].current != at:
        block.bump = block.end      # only the current block may have IDs left to issue
        count_issued(pool, block)


cdef inline int pool_resize(Pool *pool, uint64_t capacity) noexcept nogil:
    # Give the pool more IDs, above those that it has. Returns OK; INTERNAL without memory; or
    # INVALID_ARGUMENT if its blocks are in given memory, or it has more IDs. Constant time.
    cdef uint64_t size = pool_size(capacity, pool.shift)
    cdef uint64_t before = pool.count
    cdef void *got
    if not pool.mapped or capacity < pool.capacity:
        return INVALID_ARGUMENT
    got = mremap(pool.blocks, pool.mapped, size, MREMAP_MAYMOVE)
    if got == MAP_FAILED:
        return INTERNAL
    pool.blocks, pool.mapped = <Block *>got, size
    pool.capacity, pool.limit = capacity, capacity + pool.mask + 1
    pool.count = ((capacity - 1) >> pool.shift) + 1
    if pool.ready == before:
        pool.ready = pool.count
    if pool.opened == before:
        widen(pool, before)
    return OK
