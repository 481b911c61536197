# Release IDs.
#
# `reuse_at` is always stored before the bit of an ID is cleared. If the process dies between the
# two stores, an ID stays held that could be free. In the other order it could be issued too early.

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from .intrinsics cimport keep_order, low_bit, prefetch, read_once, unlikely
from .owners cimport emptied, find, not_found
from .pool cimport DUPLICATE, INTERNAL, NOT_HELD, NOT_OWNER, OK, Block, Owner, Pool, bits
from .queue cimport enqueue
from .seal cimport held_word, release_sealed

cdef enum:
    AHEAD = 64      # IDs to prefetch ahead: the memory has time to answer, the cache has room
    CACHED = 2048   # blocks that the first caches hold: a smaller pool needs no prefetch
    RUN = 57        # an offset has fewer bits

cdef struct Change:     # an entry in the log of a bulk release, which keeps two lists
    uint64_t raised     # a block whose reuse_at was raised
    int64_t reuse_at    # its former value
    uint64_t emptied    # another block, whose last held ID was released

cdef struct Log:
    Change *changes
    uint64_t raised     # entries of each list
    uint64_t emptied
    uint64_t *runs      # released IDs: the offset of the first; from bit RUN, how many follow it
    uint64_t steps      # runs
    uint64_t refused    # the offset of the ID that was refused


cdef inline int pool_release(Pool *pool, uint64_t cid, uint32_t owner,
                             int64_t reuse_at) noexcept nogil:
    # Release one ID. Returns OK, OUT_OF_RANGE, NOT_HELD or NOT_OWNER. Constant time.
    cdef uint64_t offset = 0
    cdef Block *block = find(pool, cid, &offset)
    if unlikely(block == NULL):
        return not_found(pool, cid)
    if unlikely(block.owner != owner):
        return NOT_OWNER
    cdef Owner *own = &pool.owners[owner]
    cdef uint64_t left = block.used & ~bits(1, offset)
    own.held -= 1
    pool.below += 1
    if unlikely(pool.sealed):
        release_sealed(pool, offset, reuse_at)
        emptied(pool, own, block)
        return OK
    if reuse_at > block.reuse_at:
        block.reuse_at = reuse_at
    keep_order()
    block.used = left
    if not left:
        emptied(pool, own, block)
    return OK


cdef inline uint64_t run_length(const uint64_t *cids, uint64_t n) noexcept nogil:
    # Return n if these n IDs are consecutive and in order, else 1.
    cdef uint64_t i, wrong = 0
    if cids[n - 1] - cids[0] != n - 1:
        return 1
    for i in range(n):
        wrong |= cids[i] ^ (cids[0] + i)
    return 1 if wrong else n


cdef inline uint64_t held_run(const Block *block, uint64_t offset, const uint64_t *cids,
                              uint64_t n) noexcept nogil:
    # Return how many of the n IDs can be released at once; the first one, at `offset`, is held.
    cdef uint64_t some = run_length(cids, n)
    cdef uint64_t free_ones = bits(some, offset) & ~block.used
    return low_bit(free_ones) - (offset & 63) if free_ones else some


cdef inline int clear_bits(Pool *pool, const uint64_t *cids, uint64_t n, uint32_t owner,
                           int64_t reuse_at, Log *log, uint64_t *at) noexcept nogil:
    # Clear the bits of `n` IDs, and log it. Stops at the first that is refused, whose position
    # becomes `at`. A run of consecutive IDs in one block is cleared at once.
    #
    # The time of this loop is that of its instructions. So what an ID needs is in local variables,
    # for which there are just enough registers; the compiler reads the pool's again after a store.
    cdef const uint64_t *here = cids
    cdef const uint64_t *end = cids + n
    cdef const uint64_t *fetched = cids     # IDs before it have an ID that is AHEAD
    cdef uint64_t *run = log.runs
    cdef uint64_t base = pool.base, limit = pool.limit
    cdef uint32_t shift = pool.shift
    cdef Block *blocks = pool.blocks
    cdef Block *block
    cdef uint64_t i, some, cid, offset = 0, left, bit
    cdef int code = OK
    # Random IDs are in random blocks. A wrong ID does no harm: any address may be prefetched.
    if n > AHEAD and pool.opened > CACHED:
        fetched = end - AHEAD
        for i in range(AHEAD):
            prefetch(&blocks[(cids[i] - base) >> shift])
    while here < end:
        if here < fetched:
            prefetch(&blocks[(here[AHEAD] - base) >> shift])
        cid = read_once(here)
        offset = cid - base
        if unlikely(offset >= limit):
            code = not_found(pool, cid)
            break
        block = &blocks[offset >> shift]
        left, bit = block.used, bits(1, offset)
        if unlikely(not left & bit or block.owner != owner):
            code = NOT_OWNER if left & bit else not_found(pool, cid)
            break
        run[0] = offset
        here += 1
        if unlikely(here < end and here[0] == cid + 1):
            some = held_run(block, offset, here - 1,
                            min(<uint64_t>(end - here) + 1, block.end - (offset & pool.mask)))
            bit = bits(some, offset)
            run[0] |= (some - 1) << RUN
            here += some - 1
        run += 1
        if reuse_at > block.reuse_at:
            log.changes[log.raised].reuse_at = block.reuse_at
            log.changes[log.raised].raised = block - blocks
            log.raised += 1
            block.reuse_at = reuse_at
            keep_order()
        left &= ~bit
        block.used = left
        if unlikely(not left):
            log.changes[log.emptied].emptied = block - blocks
            log.emptied += 1
            prefetch(&blocks[block.next])   # for end_blocks()
            prefetch(&blocks[block.prev])
    log.steps = run - log.runs
    if code:
        log.refused, at[0] = offset, here - cids
    return code


cdef inline int clear_sealed(Pool *pool, const uint64_t *cids, uint64_t n, uint32_t owner,
                             int64_t reuse_at, Log *log, uint64_t *at) noexcept nogil:
    # The same for a sealed pool.
    cdef uint64_t cid, offset = 0
    cdef Block *block
    for at[0] in range(n):
        cid = read_once(&cids[at[0]])
        block = find(pool, cid, &offset)
        log.refused = offset
        if block == NULL:
            return not_found(pool, cid)
        if block.owner != owner:
            return NOT_OWNER
        log.runs[log.steps] = log.changes[log.emptied].emptied = offset
        log.steps += 1
        log.emptied += 1
        release_sealed(pool, offset, reuse_at)
    return OK


cdef inline bint undo(Pool *pool, const Log *log) noexcept nogil:
    # Undo the steps of a bulk release. Returns whether one of them released the refused ID.
    cdef uint64_t j, at, offset, some
    cdef bint found = False
    for j in range(log.steps):
        offset, some = log.runs[j] & (<uint64_t>1 << RUN) - 1, (log.runs[j] >> RUN) + 1
        found |= log.refused - offset < some
        at = offset >> pool.shift
        pool.blocks[at].used = held_word(pool, at, bits(some, offset))
    keep_order()
    for j in range(log.raised):
        pool.blocks[log.changes[j].raised].reuse_at = log.changes[j].reuse_at
    return found


cdef inline void end_blocks(Pool *pool, Owner *own, const Log *log) noexcept nogil:
    # Handle the blocks that became empty, in this order.
    cdef uint64_t i, n = log.emptied
    cdef Block *block
    for i in range(n):
        if n > AHEAD:   # the first ones may have left the cache; so may their neighbours
            prefetch(&pool.blocks[log.changes[min(i + AHEAD, n - 1)].emptied])
            block = &pool.blocks[log.changes[min(i + AHEAD // 2, n - 1)].emptied]
            prefetch(&pool.blocks[block.next])
            prefetch(&pool.blocks[block.prev])
        emptied(pool, own, &pool.blocks[log.changes[i].emptied])


cdef inline int pool_release_many(Pool *pool, const uint64_t *cids, uint64_t n, uint32_t owner,
                                  int64_t reuse_at, uint64_t *at) noexcept nogil:
    # Release `n` IDs, or none; then `at` is the position of the first that is refused. Returns OK,
    # OUT_OF_RANGE, NOT_HELD, NOT_OWNER, DUPLICATE, or INTERNAL without memory for the log. O(n).
    #
    # Bits are cleared until an ID is refused; then they are set again from the log. Lists and
    # counters change only after the last bit, in the order in which the blocks became empty.
    # Another thread may write to `cids` at the same time, so the log alone tells what was done.
    cdef Owner *own = &pool.owners[owner]
    cdef uint64_t changes = min(n, pool.opened) + 1, most = min(n, own.held)
    cdef int code
    cdef Log log
    log.changes = <Change *>malloc(changes * sizeof(Change) + most * sizeof(uint64_t))
    if log.changes == NULL:
        return INTERNAL
    log.runs = <uint64_t *>(log.changes + changes)
    log.raised = log.emptied = log.steps = 0
    if unlikely(pool.sealed):
        code = clear_sealed(pool, cids, n, owner, reuse_at, &log, at)
    else:
        code = clear_bits(pool, cids, n, owner, reuse_at, &log, at)
    if code:
        if undo(pool, &log) and code == NOT_HELD:
            code = DUPLICATE
    else:
        own.held -= n
        pool.below += n
        end_blocks(pool, own, &log)
    free(log.changes)
    return code


cdef inline uint64_t pool_release_owner(Pool *pool, uint32_t owner,
                                        int64_t reuse_at) noexcept nogil:
    # Release all IDs of `owner`; return how many. Linear in its blocks.
    cdef Owner *own = &pool.owners[owner]
    cdef uint64_t n = own.held
    cdef uint64_t at = own.head, following
    cdef Block *block
    while at:
        block = &pool.blocks[at]
        following = block.next
        if pool.sealed:
            release_sealed(pool, at, reuse_at)
        else:
            if block.used and reuse_at > block.reuse_at:
                block.reuse_at = reuse_at
            keep_order()
            block.used = 0
        enqueue(pool, at)
        at = following
    own.held, own.head, own.current = 0, 0, 0
    pool.below += n
    return n
