# The C interface of the allocator core: its structures, and functions that never raise.
#
# A pool is an array of blocks of 1, 2, 4 ... 64 IDs. A block that was never used is all zero. One
# that was is either *owned* (in its owner's list) or *queued* (all its IDs free, waiting for its
# reuse_at to come). An owner gets the IDs of its current block one after the other (`bump`); a
# released ID is not issued again before its whole block has been queued and has come due.
#
# Of its blocks an owner's current one alone may have unused room. It stays with its owner when the
# last held ID of it goes, so an owner that takes and gives back one ID in turn moves no lists. Such
# a block is *idle*; whoever needs a block may have it before a never-used one is opened.
#
# Every function needs the pool to itself, so a lock of the caller's, but no GIL. Times are ticks of
# any unit and origin. IDs that a function takes may have any value; an owner must be below
# MAX_OWNERS.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

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
    static_assert(sizeof(struct cidalloc_block) == 32, "what a block costs");
    """
    struct Block "cidalloc_block":
        uint64_t used       # the held IDs: bit i is the one i above a multiple of 64 from base
        int64_t reuse_at    # the latest of its IDs' reuse times; only ever rises
        uint64_t next       # in the owner's list or in the bucket; 0 ends both
        uint64_t owner      # whose it is, while it is not queued
        uint64_t prev       # in the owner's list; of the first one it means nothing
        uint8_t bump        # IDs issued since the block was last opened
        uint8_t end         # IDs in it: the width, or less in the pool's last block
        uint8_t seen        # IDs issued at least once, ever: bump or more

cdef struct Owner:
    uint64_t held       # IDs
    uint64_t head       # its blocks, the latest first
    uint64_t current    # the block that its next ID comes from, or 0
    uint32_t idle       # the next owner, plus 1, in the list of those that may have an idle block
    uint32_t listed     # whether it is in that list

cdef struct Bucket:     # blocks whose reuse_at differs from `last` in the same highest bit
    int64_t due         # the earliest reuse_at, while there is a block; not kept for [0]
    uint64_t ids        # IDs in its blocks
    uint64_t head       # the first to come is the first to go
    uint64_t tail

cdef struct Pool:
    Block *blocks       # [0] is none: it has no room, so an owner without a block needs no test
    Owner *owners
    uint64_t first      # the lowest ID
    uint64_t capacity   # IDs
    uint64_t base       # the first ID of blocks[0], if it had any
    uint64_t limit      # capacity and those
    uint64_t count      # blocks
    uint64_t ready      # blocks that may be opened so far: 1 to ready
    uint64_t mapped     # bytes of blocks to give back; 0 if they live in the caller's memory
    uint64_t opened     # blocks ever opened: 1 to opened
    uint64_t issued     # IDs issued at least once
    uint64_t peak       # the most IDs that were held at once
    int64_t below       # how many fewer are held now
    int64_t now         # the latest time seen
    int64_t last        # the reuse_at of the block that left the queue last; no queued one is below
    uint64_t filled     # bit i: bucket i + 1 is not empty
    uint32_t idle       # the first owner, plus 1, that may have an idle block
    uint32_t shift      # log2 of the block's width
    uint32_t mask       # the width less 1
    Bucket queue[BUCKETS]   # a radix heap: due first, then first come; [0] has reuse_at == last

cdef struct Counts:
    uint64_t cooling    # not held, and their time has not come
    uint64_t pinned     # not held, in a block where another one is

# How many IDs are held.
cdef inline uint64_t pool_held(const Pool *pool) noexcept nogil:
    return pool.peak - pool.below

# How many IDs the first n blocks have: the pool's last one may be short.
cdef inline uint64_t pool_ids(const Pool *pool, uint64_t n) noexcept nogil:
    return min(n << pool.shift, pool.capacity)

# The bytes that a pool of `capacity` IDs in blocks of 2**shift needs for its blocks.
cdef uint64_t pool_size(uint64_t capacity, uint32_t shift) noexcept nogil

# Make an empty pool. Its blocks live in `memory`, 8-byte aligned and all zero, or if that is NULL
# in some of its own. INTERNAL if memory cannot be had, INVALID_ARGUMENT if it was not zero where
# a look was taken and `used` does not allow for it: pool_free() then, too.
cdef int pool_init(Pool *pool, uint64_t capacity, uint64_t first, uint32_t shift,
                   void *memory, bint used=*) noexcept nogil

# What an earlier pool left in memory, and who may still hold an ID of it.
cdef struct Past:
    const uint8_t *holds    # not 0 where the owner of that number may
    uint64_t owners         # numbers in `holds`
    int64_t latest          # a later reuse_at than this is damage
    bint after_power_loss   # some stores may be missing: believe only who holds what, and let
    int64_t reuse_at        # every other ID of the ready blocks cool until then
    bint live_snapshot      # a copy, taken while that pool was in use: owners came and went

# Take over what an earlier pool of the same shape left in the memory of this one, which has issued
# nothing yet. Its process may have died between any two stores. OK, or REGISTRY_CORRUPT if no pool
# leaves such a state, and then nothing was written and `at` is the first block that shows it.
cdef int pool_recover(Pool *pool, const Past *past, uint64_t *at) noexcept nogil

# Give the memory back; a pool that is all zero is fine.
cdef void pool_free(Pool *pool) noexcept nogil

# Issue one ID to `owner`, or `n` or none. OK or EXHAUSTED.
cdef int pool_acquire(Pool *pool, uint32_t owner, int64_t now, uint64_t *cid) noexcept nogil
cdef int pool_acquire_many(Pool *pool, uint64_t n, uint32_t owner, int64_t now,
                           uint64_t *cids) noexcept nogil

# Take back one ID; or `n` or none, and then `at` is the place of the first that is refused.
# OK, OUT_OF_RANGE, NOT_HELD, NOT_OWNER; and for many DUPLICATE, or INTERNAL without memory.
cdef int pool_release(Pool *pool, uint64_t cid, uint32_t owner, int64_t reuse_at) noexcept nogil
cdef int pool_release_many(Pool *pool, const uint64_t *cids, uint64_t n, uint32_t owner,
                           int64_t reuse_at, uint64_t *at) noexcept nogil

# Take back all IDs of `owner`; returns how many.
cdef uint64_t pool_release_owner(Pool *pool, uint32_t owner, int64_t reuse_at) noexcept nogil

# Tell who holds an ID: OK, OUT_OF_RANGE or NOT_HELD.
cdef int pool_owner_of(const Pool *pool, uint64_t cid, uint32_t *owner) noexcept nogil

# Write the IDs that `owner` holds, pool.owners[owner].held of them.
cdef void pool_held_by(const Pool *pool, uint32_t owner, uint64_t *cids) noexcept nogil

# Count the IDs that neither are held nor may be issued to anybody else, as of pool.now.
cdef Counts pool_count(Pool *pool) noexcept nogil

# Tell when the first queued block is or was due; False if none is queued.
cdef bint pool_next_due(const Pool *pool, int64_t *due) noexcept nogil

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass

cdef class Allocator:
    cdef int forks      # behind this process when the pool was made; ~ of it after `busy` was taken
    cdef int waiting    # calls that wait for `busy`
    cdef Pool pool
    cdef Py_buffer memory           # the given one, if any
    cdef pthread_mutex_t busy       # held by a call that uses the pool without the GIL

# The pool of a Python object, for whoever has the GIL, until other Python code runs. Waits for a
# call that uses it; raises `Forked`.
cdef Pool *pool_of(Allocator self) except NULL
