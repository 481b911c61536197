# The memory of a pool, and the queue of its free blocks. _alloc.pyx includes this file.

from libc.stdint cimport INT64_MIN, UINT64_MAX
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

cdef extern from *:
    """
    #define high_bit(x) (63 - __builtin_clzll(x))
    #define low_bit(x) __builtin_ctzll(x)
    #define count_bits(x) ((uint64_t)__builtin_popcountll(x))
    #define read_once(p) __atomic_load_n(p, __ATOMIC_RELAXED)
    #define prefetch(p) __builtin_prefetch(p, 1)
    #define keep_order() __atomic_signal_fence(__ATOMIC_SEQ_CST)
    #define keep_order_of(block) __asm__ volatile("" : "+m"(*(block)))
    static __attribute__((cold, noinline)) void new_peak(uint64_t *peak, int64_t *below) {
        *peak -= *below;
        *below = 0;
    }
    static inline void count_up(uint64_t *out, uint64_t from, uint64_t n) {
        #pragma GCC unroll 8  /* twice as fast */
        for (uint64_t i = 0; i < n; i++) out[i] = from + i;
    }
    """
    void prefetch(const void *p) noexcept nogil
    int high_bit(uint64_t x) noexcept nogil
    int low_bit(uint64_t x) noexcept nogil
    uint64_t count_bits(uint64_t x) noexcept nogil
    uint64_t read_once(const uint64_t *p) noexcept nogil
    void new_peak(uint64_t *peak, int64_t *below) noexcept nogil
    bint likely(bint x) noexcept nogil
    bint unlikely(bint x) noexcept nogil
    void keep_order() noexcept nogil    # no store moves across, in the machine code
    void keep_order_of(Block *block) noexcept nogil     # the same, of stores to this block alone
    void count_up(uint64_t *out, uint64_t start, uint64_t n) noexcept nogil

cdef extern from "<sys/mman.h>" nogil:
    int MAP_NORESERVE

# ---- Memory

cdef void *map_zeros(uint64_t size) noexcept nogil:
    # Pages come into being when they are first touched.
    cdef void *got = mmap(NULL, size, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    return NULL if got == MAP_FAILED else got


cdef uint64_t pool_size(uint64_t capacity, uint32_t shift) noexcept nogil:
    return (((capacity - 1) >> shift) + 2) * sizeof(Block)


cdef inline bint is_blank(const Block *block) noexcept nogil:
    cdef Block blank
    memset(&blank, 0, sizeof(Block))
    return memcmp(block, &blank, sizeof(Block)) == 0


cdef int pool_init(Pool *pool, uint64_t capacity, uint64_t first, uint32_t shift,
                   void *memory, bint used=False) noexcept nogil:
    cdef uint64_t width = <uint64_t>1 << shift
    memset(pool, 0, sizeof(Pool))
    pool.first, pool.capacity, pool.shift, pool.mask = first, capacity, shift, width - 1
    pool.base, pool.limit = first - width, capacity + width
    pool.count = pool.ready = ((capacity - 1) >> shift) + 1
    pool.now = pool.last = INT64_MIN
    pool.mapped = 0 if memory != NULL else pool_size(capacity, shift)
    pool.blocks = <Block *>(memory if memory != NULL else map_zeros(pool.mapped))
    pool.owners = <Owner *>map_zeros(MAX_OWNERS * sizeof(Owner))
    if pool.blocks == NULL or pool.owners == NULL:
        return INTERNAL
    if not used and not (is_blank(pool.blocks) and is_blank(&pool.blocks[1])):
        return INVALID_ARGUMENT
    return OK


cdef void pool_free(Pool *pool) noexcept nogil:
    if pool.blocks != NULL and pool.mapped:
        munmap(pool.blocks, pool.mapped)
    if pool.owners != NULL:
        munmap(pool.owners, MAX_OWNERS * sizeof(Owner))
    pool.blocks, pool.owners = NULL, NULL


# ---- The queue of free blocks

cdef inline int bucket_of(const Pool *pool, int64_t key) noexcept nogil:
    cdef uint64_t change = <uint64_t>key ^ <uint64_t>pool.last
    return high_bit(change) + 1 if change else 0


cdef inline void enqueue(Pool *pool, uint64_t at) noexcept nogil:
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
    # The block due first, or 0 if none is due. Sharing a bucket out empties it, and sends each of
    # its blocks to a lower one: all buckets below are empty then, so equals stay in their order.
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


cdef uint64_t count_due(const Pool *pool, uint64_t enough) noexcept nogil:
    # The queued IDs that are due, in whole buckets but for the one that `now` itself falls into;
    # counting stops at `enough`.
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


cdef bint pool_next_due(const Pool *pool, int64_t *due) noexcept nogil:
    if pool.queue[0].head:
        due[0] = pool.last
    elif pool.filled:
        due[0] = pool.queue[low_bit(pool.filled) + 1].due
    else:
        return False
    return True
