# What a pool makes of the memory that an earlier one left. _alloc.pyx includes this file.
#
# The truth is in `used`, `owner`, `reuse_at` and `end` of the blocks, and any prefix of the stores
# that an operation makes leaves it sound:
# - a block that was opened has its `end`, and those that were not are blank and come last;
# - `owner` is stored before the first bit of `used`, so whose a held ID is, is always known;
# - `reuse_at` is raised before a bit goes, so a free ID is never issued before its time;
# - `bump` may be one store behind `used`, and then the highest bit tells.
# Lists, counters and the queue are made anew.

cdef bint is_sound(const Pool *pool, uint64_t at, const Past *past) noexcept nogil:
    cdef const Block *block = &pool.blocks[at]
    cdef uint64_t room = room_of(pool, at)
    if (block.bump > room or block.seen > room or block.end not in (0, room)
            or block.used & ~bits(room, at << pool.shift)):
        return False
    if past.after_power_loss:
        return True
    if block.reuse_at > past.latest:
        return False
    return past.live_snapshot or not block.used or is_known(block.owner, past)


cdef inline bint is_known(uint32_t owner, const Past *past) noexcept nogil:
    return owner < past.owners and past.holds[owner] != 0


cdef int pool_recover(Pool *pool, const Past *past, uint64_t *at) noexcept nogil:
    cdef uint64_t i, opened = 0
    # Look first, so that nothing is written to memory that is none of ours.
    at[0] = 0
    if not is_blank(pool.blocks):
        return REGISTRY_CORRUPT
    for i in range(1, pool.ready + 1):
        at[0] = i
        if not pool.blocks[i].end and not past.after_power_loss:
            if not is_blank(&pool.blocks[i]):
                return REGISTRY_CORRUPT
        elif not is_sound(pool, i, past) or (i > opened + 1 and not past.live_snapshot):
            return REGISTRY_CORRUPT
        else:
            opened = i
    pool.opened = opened
    for i in range(1, opened + 1):
        take_over(pool, i, past)
    pool.peak = pool.peak - pool.below
    pool.below = 0
    return OK


cdef inline void take_over(Pool *pool, uint64_t at, const Past *past) noexcept nogil:
    cdef Block *block = &pool.blocks[at]
    cdef uint32_t owner = block.owner
    cdef Owner *own = &pool.owners[owner]
    cdef uint64_t above = block.used >> (at << pool.shift & 63)
    if past.after_power_loss or past.live_snapshot:
        block.end = room_of(pool, at)
        if past.after_power_loss:
            block.reuse_at = past.reuse_at
        keep_order()
        if not is_known(owner, past):
            above = block.used = 0
    if above and past.after_power_loss:
        block.bump = block.end      # whatever else is in it may have been issued, and has to cool
    elif above and block.bump <= high_bit(above):
        block.bump = high_bit(above) + 1
    # The current block alone may have unused room. One that was is current again.
    if (above and block.bump < block.end and own.current
            and pool.blocks[own.current].bump < pool.blocks[own.current].end):
        block.bump = block.end
    if block.bump > block.seen:
        block.seen = block.bump
    pool.issued += block.seen
    if not above:
        enqueue(pool, at)
        return
    link_recovered(pool, own, at)
    own.held += count_bits(block.used)
    pool.below -= count_bits(block.used)


cdef inline void link_recovered(Pool *pool, Owner *own, uint64_t at) noexcept nogil:
    # As link(), but a block with room stays the current one. What a record says already is not
    # stored: a page of a file costs a fault when it is first written to.
    cdef Block *block = &pool.blocks[at]
    if block.next != own.head:
        block.next = own.head
    if own.head and pool.blocks[own.head].prev != at:
        pool.blocks[own.head].prev = at
    own.head = at
    if block.bump < block.end or not own.current:
        own.current = at
