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

cdef enum:
    AHEAD = 12      # IDs to prefetch ahead: the memory has time to answer, the cache has room
    CACHED = 2048   # blocks that the first caches hold: a smaller pool needs no prefetch

cdef struct Change:     # an entry in the log of a bulk release, which keeps two lists
    uint64_t raised     # a block whose reuse_at was raised
    int64_t reuse_at    # its former value
    uint64_t emptied    # another block, whose last held ID was released


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
    if reuse_at > block.reuse_at:
        block.reuse_at = reuse_at
    keep_order()
    block.used = left
    own.held -= 1
    pool.below += 1
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


cdef inline bint undo(Pool *pool, const Change *log, uint64_t raised, const uint64_t *runs,
                      uint64_t steps, uint64_t refused) noexcept nogil:
    # Undo the steps of a bulk release. Returns whether one of them released the ID at offset
    # `refused`.
    cdef uint64_t j, offset, some
    cdef bint found = False
    for j in range(steps):
        offset, some = runs[j] >> 7, runs[j] & 127
        found |= refused - offset < some
        pool.blocks[offset >> pool.shift].used |= bits(some, offset)
    keep_order()
    for j in range(raised):
        pool.blocks[log[j].raised].reuse_at = log[j].reuse_at
    return found


cdef inline int pool_release_many(Pool *pool, const uint64_t *cids, uint64_t n, uint32_t owner,
                                  int64_t reuse_at, uint64_t *at) noexcept nogil:
    # Release `n` IDs, or none; then `at` is the position of the first that is refused. Returns OK,
    # OUT_OF_RANGE, NOT_HELD, NOT_OWNER, DUPLICATE, or INTERNAL without memory for the log. O(n).
    #
    # Bits are cleared until an ID is refused; then they are set again from the log. Lists and
    # counters change only after the last bit, in the order in which the blocks became empty.
    # Another thread may write to `cids` at the same time, so the log alone tells what was done.
    cdef uint64_t i = 0, j, some, cid, offset = 0, steps = 0, raised = 0, gone = 0
    cdef Owner *own = &pool.owners[owner]
    cdef Block *block = NULL
    cdef int code = OK
    cdef uint64_t changes = min(n, pool.opened) + 1, most = min(n, own.held)
    cdef Change *log = <Change *>malloc(changes * sizeof(Change) + most * sizeof(uint64_t))
    cdef uint64_t *runs = <uint64_t *>(log + changes)   # offset << 7 | how many IDs from there
    if log == NULL:
        return INTERNAL
    # Random IDs are in random blocks. A wrong ID does no harm: any address may be prefetched.
    cdef uint64_t fetched = n - AHEAD if n > AHEAD and pool.opened > CACHED else 0
    while i < n:
        if i < fetched:
            prefetch(&pool.blocks[(cids[i + AHEAD] - pool.base) >> pool.shift])
        cid = read_once(cids + i)
        block = find(pool, cid, &offset)
        if block == NULL or block.owner != owner:
            code = not_found(pool, cid) if block == NULL else NOT_OWNER
            break
        some = held_run(block, offset, cids + i, min(n - i, block.end - (offset & pool.mask)))
        if reuse_at > block.reuse_at:
            log[raised].reuse_at, log[raised].raised = block.reuse_at, block - pool.blocks
            raised += 1
            block.reuse_at = reuse_at
        keep_order()
        block.used &= ~bits(some, offset)
        runs[steps] = offset << 7 | some
        steps += 1
        if not block.used:
            log[gone].emptied = block - pool.blocks
            gone += 1
        i += some
    if code:
        at[0] = i
        if undo(pool, log, raised, runs, steps, offset) and code == NOT_HELD:
            code = DUPLICATE
    else:
        own.held -= n
        pool.below += n
        for j in range(gone):
            emptied(pool, own, &pool.blocks[log[j].emptied])
    free(log)
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
        if block.used and reuse_at > block.reuse_at:
            block.reuse_at = reuse_at
        keep_order()
        block.used = 0
        enqueue(pool, at)
        at = following
    own.held, own.head, own.current = 0, 0, 0
    pool.below += n
    return n
