# The queue of free blocks: a radix heap by reuse_at; equals leave it in the order of arrival.

from libc.stdint cimport int64_t, uint64_t

from .intrinsics cimport high_bit, low_bit
from .pool cimport BUCKETS, Block, Bucket, Pool


cdef inline int bucket_of(const Pool *pool, int64_t key) noexcept nogil:
    cdef uint64_t change = <uint64_t>key ^ <uint64_t>pool.last
    return high_bit(change) + 1 if change else 0


cdef inline void enqueue(Pool *pool, uint64_t at) noexcept nogil:
    # Append a block to its bucket. Constant time.
    cdef Block *block = &pool.blocks[at]
    cdef int i = 0
    if block.reuse_at <= pool.last:
        block.reuse_at = pool.last
    else:
        i = bucket_of(pool, block.reuse_at)
    cdef Bucket *bucket = &pool.queue[i]
    if not bucket.head:
        bucket.head, bucket.due = at, block.reuse_at
        if i:
            pool.filled |= <uint64_t>1 << (i - 1)
    else:
        pool.blocks[bucket.tail].next = at
        if block.reuse_at < bucket.due:
            bucket.due = block.reuse_at
    bucket.tail, block.next = at, 0
    bucket.ids += block.end


cdef inline uint64_t dequeue(Pool *pool) noexcept nogil:
    # Remove the block that is due first; return 0 if none is due. Amortised constant time.
    #
    # If bucket 0 is empty, the lowest filled bucket is distributed: each of its blocks goes to a
    # lower bucket. All of those are empty at first, so blocks with equal times keep their order.
    cdef Bucket *ready = &pool.queue[0]
    cdef Bucket *bucket
    cdef uint64_t at, following
    if not ready.head:
        if not pool.filled:
            return 0
        bucket = &pool.queue[low_bit(pool.filled) + 1]
        if bucket.due > pool.now:
            return 0
        pool.last = bucket.due
        pool.filled &= pool.filled - 1
        at, bucket.head, bucket.ids = bucket.head, 0, 0
        while at:
            following = pool.blocks[at].next
            enqueue(pool, at)
            at = following
    at = ready.head
    ready.head = pool.blocks[at].next
    ready.ids -= pool.blocks[at].end
    return at


cdef inline uint64_t count_queued(const Pool *pool) noexcept nogil:
    # Count the IDs in queued blocks.
    cdef uint64_t total = 0
    cdef int i
    for i in range(BUCKETS):
        total += pool.queue[i].ids
    return total


cdef inline uint64_t count_due(const Pool *pool, uint64_t enough) noexcept nogil:
    # Count the IDs in queued blocks that are due; stop when there are `enough`. Lower buckets than
    # that of `now` are due, and higher ones are not. Only the blocks of that bucket are visited.
    cdef int i, here = bucket_of(pool, pool.now)
    cdef uint64_t total = pool.queue[0].ids
    for i in range(1, here):
        total += pool.queue[i].ids
    cdef uint64_t at = pool.queue[here].head if here else 0
    if at and pool.queue[here].due <= pool.now:
        while at and total < enough:
            if pool.blocks[at].reuse_at <= pool.now:
                total += pool.blocks[at].end
            at = pool.blocks[at].next
    return total


cdef inline bint pool_next_due(const Pool *pool, int64_t *due) noexcept nogil:
    # Tell when the first queued block is or was due; return False if none is queued.
    if pool.queue[0].head:
        due[0] = pool.last
    elif pool.filled:
        due[0] = pool.queue[low_bit(pool.filled) + 1].due
    else:
        return False
    return True
