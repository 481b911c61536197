# Owners: the blocks of each, and the IDs that it holds.

from libc.stdint cimport UINT64_MAX, int64_t, uint32_t, uint64_t

from .intrinsics cimport keep_order, keep_order_of, low_bit
from .pool cimport (NOT_HELD, OK, OUT_OF_RANGE, Block, Owner, Pool, is_idle, pool_held, pool_ids,
                    room_of)
from .queue cimport count_due, count_queued, dequeue, enqueue
from .seal cimport used_of

# ---- The list of an owner's blocks

cdef inline void link(Pool *pool, uint32_t owner, uint64_t at) noexcept nogil:
    cdef Owner *own = &pool.owners[owner]
    cdef Block *block = &pool.blocks[at]
    block.owner, block.next, block.prev = owner, own.head, 0
    if own.head:
        pool.blocks[own.head].prev = at
    own.head = own.current = at


cdef inline void unlink(Pool *pool, uint64_t at) noexcept nogil:
    cdef Block *block = &pool.blocks[at]
    cdef Owner *own = &pool.owners[block.owner]
    if block.next:
        pool.blocks[block.next].prev = block.prev
    if own.head == at:
        own.head = block.next
    else:
        pool.blocks[block.prev].next = block.next
    if own.current == at:
        own.current = 0


cdef inline void emptied(Pool *pool, Owner *own, Block *block) noexcept nogil:
    # Handle a block whose last held ID was released: queue it, or list its owner if it has room.
    # An owner stays in that list after it acquires again; the functions below drop it.
    if block.bump == block.end:
        unlink(pool, block - pool.blocks)
        enqueue(pool, block - pool.blocks)
    elif not own.listed:
        own.idle, own.listed, pool.idle = pool.idle, True, block.owner + 1


# ---- A block for an owner

cdef inline uint64_t take_idle(Pool *pool) noexcept nogil:
    # Unlink an idle block from its owner; return 0 if there is none. If the block is not due, the
    # IDs below its bump go on cooling.
    cdef Owner *own
    cdef Block *block
    cdef uint64_t at
    while pool.idle:
        own = &pool.owners[pool.idle - 1]
        pool.idle, own.listed, at = own.idle, False, own.current
        block = &pool.blocks[at]
        if is_idle(block):
            unlink(pool, at)
            if block.reuse_at <= pool.now:
                block.bump = 0
            return at
    return 0


cdef inline uint64_t take_new(Pool *pool) noexcept nogil:
    # Open a never-used block; return 0 if none is ready.
    if pool.opened == pool.ready:
        return 0
    cdef uint64_t at = pool.opened + 1
    cdef Block *block = &pool.blocks[at]
    block.end = room_of(pool, at)
    keep_order()    # `end` marks the block as used: it is stored first
    block.reuse_at = pool.last
    pool.opened = at
    return at


cdef inline Block *open_block(Pool *pool, uint32_t owner) noexcept nogil:
    # Link a block with room to the owner: one that is due, else an idle one, else a new one.
    # Returns NULL if there is none. The owner is stored before any bit of `used`.
    cdef uint64_t at = dequeue(pool)
    if at:
        pool.blocks[at].bump = 0
    else:
        at = take_idle(pool) or take_new(pool)
        if not at:
            return NULL
    link(pool, owner, at)
    keep_order_of(&pool.blocks[at])
    return &pool.blocks[at]


# ---- Held IDs

cdef inline Block *find(const Pool *pool, uint64_t cid, uint64_t *offset) noexcept nogil:
    # Return the block of a held ID, and its offset from the pool's base; NULL if it is not held.
    cdef Block *block
    offset[0] = cid - pool.base
    if offset[0] >= pool.limit:
        return NULL
    block = &pool.blocks[offset[0] >> pool.shift]
    return block if block.used >> (offset[0] & 63) & 1 else NULL


cdef inline int not_found(const Pool *pool, uint64_t cid) noexcept nogil:
    return NOT_HELD if cid - pool.first < pool.capacity else OUT_OF_RANGE


cdef inline int pool_owner_of(const Pool *pool, uint64_t cid, uint32_t *owner) noexcept nogil:
    # Tell who holds an ID. Returns OK, OUT_OF_RANGE or NOT_HELD.
    cdef uint64_t offset = 0
    cdef const Block *block = find(pool, cid, &offset)
    if block == NULL:
        return not_found(pool, cid)
    owner[0] = block.owner
    return OK


cdef inline uint64_t *write_block(const Pool *pool, uint64_t at, uint64_t *cids) noexcept nogil:
    # Write the held IDs of a block in order; return the place behind them.
    cdef uint64_t used = used_of(pool, at)
    cdef uint64_t base = pool.base + (at << pool.shift & ~<uint64_t>63)
    while used:
        cids[0] = base + low_bit(used)
        cids += 1
        used &= used - 1
    return cids


cdef inline void pool_held_by(const Pool *pool, uint32_t owner, uint64_t *cids) noexcept nogil:
    # Write the IDs that `owner` holds: pool.owners[owner].held of them.
    cdef uint64_t at = pool.owners[owner].head
    while at:
        cids = write_block(pool, at, cids)
        at = pool.blocks[at].next


cdef inline void write_held(const Pool *pool, int64_t owner, uint64_t *cids) noexcept nogil:
    # Write the IDs of an owner, or, for -1, all held IDs in order.
    cdef uint64_t at
    if owner >= 0:
        pool_held_by(pool, owner, cids)
        return
    for at in range(1, pool.opened + 1):
        cids = write_block(pool, at, cids)


# ---- Counts

cdef struct Idle:
    uint64_t ids        # in idle blocks
    uint64_t ready      # those of them that may be issued now

cdef struct Counts:
    uint64_t cooling    # not held, and not due
    uint64_t pinned     # not held, in a block with a held ID


cdef inline Idle count_idle(Pool *pool) noexcept nogil:
    cdef Idle idle = [0, 0]
    cdef uint32_t *place = &pool.idle
    cdef Owner *own
    cdef Block *block
    while place[0]:
        own = &pool.owners[place[0] - 1]
        block = &pool.blocks[own.current]
        if is_idle(block):
            idle.ids += block.end
            idle.ready += block.end - (0 if block.reuse_at <= pool.now else block.bump)
            place = &own.idle
        else:
            place[0], own.listed = own.idle, False
    return idle


cdef inline Counts pool_count(Pool *pool) noexcept nogil:
    # Count the IDs that are not held and that not every owner may get, as of pool.now.
    cdef Idle idle = count_idle(pool)
    cdef uint64_t queued = count_queued(pool)
    return [queued - count_due(pool, UINT64_MAX) + idle.ids - idle.ready,
            pool_ids(pool, pool.opened) - pool_held(pool) - queued - idle.ids]
