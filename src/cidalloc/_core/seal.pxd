# Sealed blocks: damage to the memory of a pool is noticed when it is taken over.
#
# The blocks of a sealed pool have one ID each, so one bit of `used` counts. The other 63 are a
# pattern of the block's number and state: *new*; *free*, with reuse_at and `seen`; or *held*, with
# the owner. Any two patterns differ in about half of their bits. So a flipped bit, zeros, and a
# block from another place all show, and one store still changes the state.
#
# What a pattern covers is stored before it, and does not change while it is there. So reuse_at
# counts only in a free block, and is what its release was given.

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp, memset

from .intrinsics cimport keep_order
from .pool cimport Block, Pool, bits

cdef enum:
    NEW = 1
    FREE = 2
    HELD = 3


cdef inline uint64_t mixed(uint64_t x) noexcept nogil:
    # Return a number each bit of which depends on each bit of x: the end of splitmix64.
    x = (x ^ x >> 30) * <uint64_t>0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * <uint64_t>0x94D049BB133111EB
    return x ^ x >> 31


cdef inline uint64_t pattern(uint64_t at, uint64_t state, uint64_t detail) noexcept nogil:
    cdef uint64_t found = mixed(mixed(at << 2 | state) + detail)
    return found | bits(1, at) if state == HELD else found & ~bits(1, at)


cdef inline uint64_t new_word(const Pool *pool, uint64_t at) noexcept nogil:
    # Return `used` of a block that was never opened.
    return pattern(at, NEW, 0) if pool.sealed else 0


cdef inline uint64_t free_word(const Pool *pool, uint64_t at) noexcept nogil:
    # Return `used` of a block with no held ID.
    cdef const Block *block = &pool.blocks[at]
    return pattern(at, FREE, mixed(block.reuse_at) + block.seen) if pool.sealed else 0


cdef inline uint64_t held_word(const Pool *pool, uint64_t at, uint64_t more) noexcept nogil:
    # Return `used` of a block when these IDs of it are held, too.
    cdef const Block *block = &pool.blocks[at]
    return pattern(at, HELD, block.owner) if pool.sealed else block.used | more


cdef inline uint64_t used_of(const Pool *pool, uint64_t at) noexcept nogil:
    # Return the bits of a block's held IDs alone.
    return pool.blocks[at].used & bits(<uint64_t>pool.mask + 1, at << pool.shift)


cdef inline void fill_new(Block *blocks, uint64_t first, uint64_t n) noexcept nogil:
    # Write the blocks from this number on as those of a sealed pool that were never opened.
    cdef uint64_t i
    memset(blocks, 0, n * sizeof(Block))
    for i in range(n):
        blocks[i].used = pattern(first + i, NEW, 0) if first + i else 0


cdef inline bint is_new(const Pool *pool, uint64_t at) noexcept nogil:
    # Tell whether a block looks as if it had never been opened.
    cdef Block blank
    memset(&blank, 0, sizeof(Block))
    blank.used = new_word(pool, at)
    return memcmp(&pool.blocks[at], &blank, sizeof(Block)) == 0


cdef inline bint is_sealed(const Pool *pool, uint64_t at) noexcept nogil:
    # Tell whether the pattern of a block of a sealed pool is the right one.
    return pool.blocks[at].used in (held_word(pool, at, 0) if used_of(pool, at)
                                    else free_word(pool, at), new_word(pool, at))


cdef inline void release_sealed(Pool *pool, uint64_t at, int64_t reuse_at) noexcept nogil:
    # Let a held block of a sealed pool be free.
    cdef Block *block = &pool.blocks[at]
    block.reuse_at = max(reuse_at, pool.last)   # as enqueue() does
    keep_order()
    block.used = free_word(pool, at)
