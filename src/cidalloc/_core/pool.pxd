# The pool of IDs: its structures and its memory.
#
# A pool is an array of blocks of 1, 2, 4 ... 64 IDs. A never-used block is all zero. A used block
# is either *owned* (linked in its owner's list) or *queued* (all its IDs are free, and it waits for
# its reuse_at). An owner gets the IDs of its current block one after the other (`bump`). A released
# ID is issued again only after its whole block was queued and came due.
#
# Only the current block of an owner may have IDs left to issue. It stays with its owner when its
# last held ID is released, so an owner that acquires and releases one ID in turn changes no list.
# Such a block is *idle*. An owner that needs a block takes an idle one before it opens a new one.
#
# Every function needs exclusive access to its pool, but not the GIL. Times are ticks of any unit
# and origin. An ID that a function takes may have any value; an owner must be below MAX_OWNERS.

from libc.stdint cimport INT64_MIN, UINT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

cdef extern from "<sys/mman.h>" nogil:
    int MAP_NORESERVE

cdef enum:
    MAX_OWNERS = 1 << 24
    BUCKETS = 65

cdef enum:  # The codes of codes.py that the core returns.
    OK = 0
    EXHAUSTED = 1
    NOT_HELD = 2
    NOT_OWNER = 3
    OUT_OF_RANGE = 4
    DUPLICATE = 5
    INVALID_ARGUMENT = 6
    REGISTRY_CORRUPT = 12
    INTERNAL = 16
    FORKED = 19

cdef extern from *:
    """
    #include <assert.h>
    #include <stdint.h>
    struct cidalloc_block {
        uint64_t used;
        int64_t reuse_at;
        uint64_t next : 40, owner : 24;
        uint64_t prev : 40;
        uint8_t bump, end, seen;
    };
    static_assert(sizeof(struct cidalloc_block) == 32, "the size of a block in memory and files");
    """
    struct Block "cidalloc_block":
        uint64_t used       # the held IDs: bit i is the ID i above a multiple of 64 from base
        int64_t reuse_at    # the latest of its IDs' reuse times; only ever rises
        uint64_t next       # in the owner's list or in the bucket; 0 ends both
        uint64_t owner      # valid while the block is not queued
        uint64_t prev       # in the owner's list; undefined in the first block
        uint8_t bump        # IDs issued since the block was last opened
        uint8_t end         # IDs in the block: its width, or less in the pool's last block
        uint8_t seen        # IDs issued at least once, ever: bump or more

cdef struct Owner:
    uint64_t held       # IDs
    uint64_t head       # its list of blocks, the latest first
    uint64_t current    # the block that its next ID comes from, or 0
    uint32_t idle       # the next owner, plus 1, in the list of those that may have an idle block
    uint32_t listed     # 1 if it is in that list

cdef struct Bucket:     # blocks whose reuse_at differs from `last` in the same highest bit
    int64_t due         # the earliest reuse_at, if there is a block; not kept for bucket 0
    uint64_t ids        # IDs in its blocks
    uint64_t head       # first in, first out
    uint64_t tail

cdef struct Pool:
    Block *blocks       # 1 to count; blocks[0] has no room: the current block of a new owner
    Owner *owners
    uint64_t first      # the lowest ID
    uint64_t capacity   # IDs
    uint64_t base       # the first ID that blocks[0] would have
    uint64_t limit      # capacity and the width of blocks[0]
    uint64_t count      # blocks
    uint64_t ready      # blocks that may be opened so far: 1 to ready
    uint64_t opened     # blocks ever opened: 1 to opened
    uint64_t mapped     # bytes of blocks to unmap; 0 if they are in the caller's memory
    uint64_t issued     # IDs issued at least once
    uint64_t peak       # the most IDs that were held at once
    int64_t below       # peak less the IDs held now
    int64_t now         # the latest time seen
    int64_t last        # reuse_at of the block that left the queue last; no queued one is earlier
    uint64_t filled     # bit i: bucket i + 1 is not empty
    uint32_t idle       # the first owner, plus 1, that may have an idle block
    uint32_t shift      # log2 of the width of a block
    uint32_t mask       # the width less 1
    uint32_t sealed     # 1: `used` of its blocks is as seal.pxd says
    Bucket queue[BUCKETS]   # a radix heap by reuse_at, stable; bucket 0: reuse_at == last


cdef inline uint64_t pool_held(const Pool *pool) noexcept nogil:
    # Count the held IDs.
    return pool.peak - pool.below


cdef inline uint64_t pool_ids(const Pool *pool, uint64_t blocks) noexcept nogil:
    # Count the IDs in the first blocks; the pool's last block may be short.
    return min(blocks << pool.shift, pool.capacity)


cdef inline uint64_t room_of(const Pool *pool, uint64_t at) noexcept nogil:
    # Count the IDs in one block.
    return min(<uint64_t>pool.mask + 1, pool.capacity - (at - 1 << pool.shift))


cdef inline uint64_t bits(uint64_t n, uint64_t offset) noexcept nogil:
    # The bits in `used` of n IDs, 1 to 64, whose first is at this offset from the pool's base.
    return UINT64_MAX >> (64 - n) << (offset & 63)


cdef inline bint is_idle(const Block *block) noexcept nogil:
    return block.used == 0 and block.bump < block.end


cdef inline bint is_blank(const Block *block) noexcept nogil:
    cdef Block blank
    memset(&blank, 0, sizeof(Block))
    return memcmp(block, &blank, sizeof(Block)) == 0


cdef inline void *map_zeros(uint64_t size) noexcept nogil:
    # Reserve zeroed memory, or return NULL. A page is allocated when it is first written to.
    cdef void *got = mmap(NULL, size, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    return NULL if got == MAP_FAILED else got


cdef inline uint64_t pool_size(uint64_t capacity, uint32_t shift) noexcept nogil:
    # Return the bytes that `capacity` IDs in blocks of 2**shift need for their blocks.
    return (((capacity - 1) >> shift) + 2) * sizeof(Block)


cdef inline int pool_init(Pool *pool, uint64_t capacity, uint64_t first, uint32_t shift,
                          void *memory, bint used=False) noexcept nogil:
    # Make an empty pool. Its blocks are in `memory`, which is 8-byte aligned and all zero, unless
    # `used` is set. If `memory` is NULL, the pool maps its own. Returns OK; INTERNAL without
    # memory; INVALID_ARGUMENT if the first two blocks are not zero. Call pool_free() in any case.
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


cdef inline void pool_free(Pool *pool) noexcept nogil:
    # Unmap the pool's memory. A pool that is all zero is accepted.
    if pool.blocks != NULL and pool.mapped:
        munmap(pool.blocks, pool.mapped)
    if pool.owners != NULL:
        munmap(pool.owners, MAX_OWNERS * sizeof(Owner))
    pool.blocks, pool.owners = NULL, NULL
