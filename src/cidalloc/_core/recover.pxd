# Make a pool from the memory of an earlier one. Its process may have died between any two stores.
#
# Only `used`, `owner`, `reuse_at`, `end`, `bump` and `seen` of a block count. Lists, counters and
# the queue are built again. The blocks of a sealed pool must be as seal.pxd says. The order of
# stores in other files keeps these fields consistent:
# - `end` is stored first in a new block, and blocks are opened in order: those with an `end` come
#   first, and the others are blank;
# - `owner` is stored before the first bit of `used`, so the owner of a held ID is always known;
# - `reuse_at` is raised before a bit of `used` is cleared, so a free ID is never issued too early;
# - `bump` may be one store behind `used`; then the highest bit of `used` corrects it.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from .intrinsics cimport count_bits, high_bit, keep_order
from .pool cimport OK, REGISTRY_CORRUPT, Block, Owner, Pool, bits, is_blank, pool_held, room_of
from .queue cimport enqueue
from .seal cimport free_word, is_new, is_sealed, new_word, used_of

cdef struct Past:
    const uint8_t *holds    # not 0 for each owner that may hold IDs
    uint64_t owners         # the length of `holds`
    int64_t latest          # a later reuse_at than this is damage
    bint after_power_loss   # some stores may be missing: keep the IDs of those owners, and let
    int64_t reuse_at        # every other ID of the ready blocks cool until this time
    bint live_snapshot      # a copy, taken while that pool was in use: owners came and went
    bint sealed             # the pool was sealed, and is again


cdef inline bint may_hold(const Past *past, uint32_t owner) noexcept nogil:
    return owner < past.owners and past.holds[owner] != 0


cdef inline bint is_sound(const Pool *pool, uint64_t at, const Past *past) noexcept nogil:
    # Tell whether a pool may have left this block behind.
    cdef const Block *block = &pool.blocks[at]
    cdef uint64_t room = room_of(pool, at), used = used_of(pool, at)
    if block.bump > room or block.seen > room or block.end not in (0, room):
        return False
    if pool.sealed:
        if not past.live_snapshot and not is_sealed(pool, at):
            return False
    elif block.used & ~bits(room, at << pool.shift):
        return False
    if past.after_power_loss:
        return True
    if block.reuse_at > past.latest and not (pool.sealed and used):
        return False
    return past.live_snapshot or not used or may_hold(past, block.owner)


cdef inline void link_recovered(Pool *pool, Owner *own, uint64_t at) noexcept nogil:
    # Link a block to its owner. A block with room becomes the current one. A field that has its
    # value already is not stored: the first write to a page of a file costs a page fault.
    cdef Block *block = &pool.blocks[at]
    if block.next != own.head:
        block.next = own.head
    if own.head and pool.blocks[own.head].prev != at:
        pool.blocks[own.head].prev = at
    own.head = at
    if block.bump < block.end or not own.current:
        own.current = at


cdef inline void correct_bump(Pool *pool, const Owner *own, Block *block, uint64_t above,
                              const Past *past) noexcept nogil:
    # Set the bump of a block with held IDs; `above` has their bits from bit 0.
    if past.after_power_loss:
        block.bump = block.end      # the other IDs of the block may have been issued: they cool
        return
    if block.bump <= high_bit(above):
        block.bump = high_bit(above) + 1
    # Only one block of an owner may have IDs left to issue.
    if (block.bump < block.end and own.current
            and pool.blocks[own.current].bump < pool.blocks[own.current].end):
        block.bump = block.end


cdef inline void take_over(Pool *pool, uint64_t at, const Past *past) noexcept nogil:
    # Count a sound block, and link it to its owner or queue it.
    cdef Block *block = &pool.blocks[at]
    cdef Owner *own = &pool.owners[block.owner]
    cdef uint64_t used = used_of(pool, at)
    if past.after_power_loss or past.live_snapshot:
        block.end = room_of(pool, at)
        if not may_hold(past, block.owner):
            used = 0
        if pool.sealed and not used:
            block.used = new_word(pool, at)     # in which reuse_at does not count
            keep_order()
        if past.after_power_loss:
            block.reuse_at = past.reuse_at
        keep_order()
        if not used:
            block.used = free_word(pool, at)
    elif pool.sealed and block.used == new_word(pool, at):
        block.reuse_at = pool.last      # it was about to be issued for the first time
    if used:
        correct_bump(pool, own, block, used >> (at << pool.shift & 63), past)
    if block.bump > block.seen and (used or not pool.sealed):
        block.seen = block.bump
    pool.issued += block.seen
    if used:
        link_recovered(pool, own, at)
        own.held += count_bits(used)
        pool.below -= count_bits(used)
    else:
        enqueue(pool, at)


cdef inline int pool_recover(Pool *pool, const Past *past, uint64_t *at) noexcept nogil:
    # Take over the blocks in this pool's memory; the pool has issued nothing yet, and has the shape
    # of the earlier one. Returns OK; or REGISTRY_CORRUPT if no pool leaves such blocks behind: then
    # `at` is the first wrong block, and nothing was written. Linear in the ready blocks.
    cdef uint64_t i, opened = 0
    at[0] = 0
    pool.sealed = past.sealed
    if not is_blank(pool.blocks):
        return REGISTRY_CORRUPT
    for i in range(1, pool.ready + 1):
        at[0] = i
        if not pool.blocks[i].end and not past.after_power_loss:
            if not is_new(pool, i):
                return REGISTRY_CORRUPT
        elif not is_sound(pool, i, past) or (i > opened + 1 and not past.live_snapshot):
            return REGISTRY_CORRUPT
        else:
            opened = i
    pool.opened = opened
    for i in range(1, opened + 1):
        take_over(pool, i, past)
    pool.peak, pool.below = pool_held(pool), 0
    return OK
