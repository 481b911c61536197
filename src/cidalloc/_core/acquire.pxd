# Issue IDs.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from .intrinsics cimport count_up, new_peak
from .owners cimport count_idle, open_block
from .pool cimport EXHAUSTED, OK, Block, Owner, Pool, bits, is_idle, pool_ids
from .queue cimport count_due
from .seal cimport held_word


cdef inline void see(Pool *pool, int64_t now) noexcept nogil:
    if now > pool.now:
        pool.now = now


cdef inline uint64_t take(Pool *pool, Owner *own, Block *block, uint64_t n,
                          bint sealed) noexcept nogil:
    # Issue the next n IDs of the owner's current block, which has them; return the first.
    cdef uint64_t offset = (own.current << pool.shift) + block.bump
    if sealed:
        block.used = held_word(pool, own.current, 0)
    else:
        block.used |= bits(n, offset)
    block.bump += n
    own.held += n
    pool.below -= n
    if pool.below < 0:
        new_peak(&pool.peak, &pool.below)
    return pool.base + offset


cdef inline void count_issued(Pool *pool, Block *block) noexcept nogil:
    # Count the IDs of a block that were issued for the first time.
    if block.bump > block.seen:
        pool.issued += block.bump - block.seen
        block.seen = block.bump


cdef inline int acquire_first(Pool *pool, uint32_t owner, uint64_t *cid) noexcept nogil:
    # Issue an ID if the owner's current block is full, or has not issued its next ID before.
    cdef Owner *own = &pool.owners[owner]
    cdef Block *block = &pool.blocks[own.current]
    if block.bump == block.end:
        block = open_block(pool, owner)
        if block == NULL:
            return EXHAUSTED
    cid[0] = take(pool, own, block, 1, pool.sealed)
    count_issued(pool, block)
    return OK


cdef inline int pool_acquire(Pool *pool, uint32_t owner, int64_t now, uint64_t *cid) noexcept nogil:
    # Issue one ID to `owner`. Returns OK or EXHAUSTED. Amortised constant time.
    see(pool, now)
    cdef Owner *own = &pool.owners[owner]
    cdef Block *block = &pool.blocks[own.current]
    if block.bump == block.seen:
        return acquire_first(pool, owner, cid)
    cid[0] = take(pool, own, block, 1, False)     # blocks of one ID never come here
    return OK


cdef inline bint can_issue(Pool *pool, const Block *current, uint64_t n) noexcept nogil:
    # The cheapest counts come first. Blocks are visited only if the pool is nearly exhausted.
    cdef uint64_t total = pool_ids(pool, pool.ready) - pool_ids(pool, pool.opened)
    if current.used:
        total += current.end - current.bump
    if total < n:
        total += count_due(pool, n - total)
    if total < n:
        total += count_idle(pool).ready
    return total >= n


cdef inline int pool_acquire_many(Pool *pool, uint64_t n, uint32_t owner, int64_t now,
                                  uint64_t *cids) noexcept nogil:
    # Issue `n` IDs to `owner`, or none. Returns OK or EXHAUSTED. O(n); if the pool is nearly
    # exhausted, also linear in its cooling and idle blocks.
    see(pool, now)
    cdef Owner *own = &pool.owners[owner]
    cdef Block *block = &pool.blocks[own.current]
    cdef uint64_t some
    if n > <uint64_t>(block.end - block.bump):
        if not can_issue(pool, block, n):
            return EXHAUSTED
        if is_idle(block) and block.reuse_at <= pool.now:
            block.bump = 0
    while n:
        if block.bump == block.end:
            block = open_block(pool, owner)
        some = min(n, <uint64_t>(block.end - block.bump))
        count_up(cids, take(pool, own, block, some, pool.sealed), some)
        count_issued(pool, block)
        cids += some
        n -= some
    return OK
