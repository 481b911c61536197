# Mark given IDs as held, and release all.
#
# A block with a reserved ID issues no other IDs until all of its held IDs are released: which of
# them were issued before is not known.

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from .acquire cimport count_issued
from .intrinsics cimport keep_order
from .owners cimport link, unlink
from .pool cimport (BUCKETS, DUPLICATE, EXHAUSTED, INTERNAL, NOT_OWNER, OK, OUT_OF_RANGE, Block,
                    Owner, Pool, bits, room_of)
from .queue cimport enqueue
from .release cimport pool_release_owner
from .seal cimport used_of

cdef enum:
    MOST_OPENED = 1 << 26   # blocks that one call may open: 2 GiB


cdef inline bint is_owned(const Pool *pool, uint64_t at) noexcept nogil:
    # Tell whether an opened block is in its owner's list, and not queued.
    return used_of(pool, at) or pool.owners[pool.blocks[at].owner].current == at


cdef inline int can_reserve(const Pool *pool, uint64_t cid, uint32_t owner) noexcept nogil:
    # Returns OK, OUT_OF_RANGE, EXHAUSTED for a block that is not ready, DUPLICATE for a held ID, or
    # NOT_OWNER for an ID in a block of another owner.
    cdef uint64_t offset = cid - pool.base
    cdef uint64_t at = offset >> pool.shift
    cdef const Block *block
    if cid - pool.first >= pool.capacity:
        return OUT_OF_RANGE
    if at > pool.ready or (at > pool.opened and at - pool.opened > MOST_OPENED):
        return EXHAUSTED
    block = &pool.blocks[at]
    if block.used >> (offset & 63) & 1:
        return DUPLICATE
    return NOT_OWNER if block.used and block.owner != owner else OK


cdef inline int pool_can_reserve(const Pool *pool, const uint64_t *cids, uint64_t n,
                                 uint32_t owner, uint64_t *at) noexcept nogil:
    # Check `n` IDs up to the first that cannot be reserved; `at` is its position, or n.
    cdef int code
    at[0] = 0
    while at[0] < n:
        code = can_reserve(pool, cids[at[0]], owner)
        if code:
            return code
        at[0] += 1
    return OK


cdef inline void open_up_to(Pool *pool, uint64_t last) noexcept nogil:
    # Open all blocks up to this one, and queue them.
    cdef uint64_t at
    for at in range(pool.opened + 1, last + 1):
        pool.blocks[at].end = room_of(pool, at)
        pool.blocks[at].reuse_at = pool.last
        enqueue(pool, at)
    pool.opened = max(pool.opened, last)


cdef inline void drop_used(Pool *pool) noexcept nogil:
    # Remove the blocks with a held ID from the queue; the others keep their order.
    cdef int i
    cdef uint64_t at, following
    pool.filled = 0
    for i in range(BUCKETS):
        at, pool.queue[i].head, pool.queue[i].ids = pool.queue[i].head, 0, 0
        while at:
            following = pool.blocks[at].next
            if not pool.blocks[at].used:
                enqueue(pool, at)
            at = following


cdef inline int pool_reserve(Pool *pool, const uint64_t *cids, uint64_t n,
                             uint32_t owner) noexcept nogil:
    # Mark `n` IDs as held: in ascending order, none twice, and can_reserve() allows each. n is not
    # 0. Returns OK, or INTERNAL without memory: then nothing was changed. Linear in the opened
    # blocks.
    cdef uint64_t i, at, before = 0, found = 0, room
    cdef Owner *own = &pool.owners[owner]
    cdef Block *block
    cdef uint64_t *fresh    # blocks that get their first held ID
    fresh = <uint64_t *>malloc(n * sizeof(uint64_t))
    if fresh == NULL:
        return INTERNAL
    open_up_to(pool, (cids[n - 1] - pool.base) >> pool.shift)
    for i in range(n):
        at = (cids[i] - pool.base) >> pool.shift
        block = &pool.blocks[at]
        if at != before:
            if not block.used:
                if is_owned(pool, at):      # it is idle
                    unlink(pool, at)
                    enqueue(pool, at)
                fresh[found] = at
                found += 1
                block.owner = owner
            block.bump = block.end
            count_issued(pool, block)
            before = at
            keep_order()    # a held ID always has its owner
        block.used |= bits(1, cids[i] - pool.base)
    drop_used(pool)
    room = own.current      # only the current block may have IDs left to issue
    for i in range(found):
        link(pool, owner, fresh[i])
    if room:
        own.current = room
    free(fresh)
    own.held += n
    pool.below -= n
    if pool.below < 0:
        pool.peak -= pool.below
        pool.below = 0
    return OK


cdef inline uint64_t pool_clear(Pool *pool, int64_t reuse_at) noexcept nogil:
    # Release all IDs of all owners; return how many. Linear in the opened blocks.
    cdef uint64_t at, n = 0
    for at in range(1, pool.opened + 1):
        if is_owned(pool, at):
            n += pool_release_owner(pool, pool.blocks[at].owner, reuse_at)
    return n
