# Who owns which blocks, and how IDs come out of them and back. _alloc.pyx includes this file.

# ---- Owned blocks

cdef inline void link(Pool *pool, uint32_t owner, uint64_t at) noexcept nogil:
    cdef Owner *own = &pool.owners[owner]
    cdef Block *block = &pool.blocks[at]
    block.owner, block.next, block.prev = owner, own.head, 0
    if own.head:
        pool.blocks[own.head].prev = at
    own.head = own.current = at


cdef void unlink(Pool *pool, uint64_t at) noexcept nogil:
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


cdef inline bint is_idle(const Block *block) noexcept nogil:
    return block.used == 0 and block.bump < block.end


cdef void close_block(Pool *pool, Block *block) noexcept nogil:
    unlink(pool, block - pool.blocks)
    enqueue(pool, block - pool.blocks)


cdef inline void emptied(Pool *pool, Owner *own, Block *block) noexcept nogil:
    # The last held ID of an owned block is gone: queue it, or list its owner if it has room. The
    # list may name owners that have taken an ID since; whoever walks it drops those.
    if block.bump == block.end:
        close_block(pool, block)
    elif not own.listed:
        own.idle, own.listed, pool.idle = pool.idle, True, block.owner + 1


cdef uint64_t take_idle(Pool *pool) noexcept nogil:
    # An idle block, taken from its owner, or 0. Unless it is due, IDs below its bump go on cooling.
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


cdef struct Idle:
    uint64_t ids        # in idle blocks
    uint64_t ready      # of them, may be issued now


cdef Idle count_idle(Pool *pool) noexcept nogil:
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


cdef Counts pool_count(Pool *pool) noexcept nogil:
    cdef Idle idle = count_idle(pool)
    cdef uint64_t queued = 0
    cdef int i
    for i in range(BUCKETS):
        queued += pool.queue[i].ids
    return [queued - count_due(pool, UINT64_MAX) + idle.ids - idle.ready,
            pool_ids(pool, pool.opened) - pool_held(pool) - queued - idle.ids]


# ---- Acquire

cdef inline void see(Pool *pool, int64_t now) noexcept nogil:
    if now > pool.now:
        pool.now = now


cdef inline uint64_t room_of(const Pool *pool, uint64_t at) noexcept nogil:
    # How many IDs are in a block: the pool's last one may be short.
    return min(<uint64_t>pool.mask + 1, pool.capacity - (at - 1 << pool.shift))


cdef uint64_t unqueued_block(Pool *pool) noexcept nogil:
    # An idle block, or else one that was never used; 0 if there is none.
    cdef uint64_t at = take_idle(pool)
    cdef Block *block
    if not at and pool.opened < pool.ready:
        at = pool.opened + 1
        block = &pool.blocks[at]
        block.end = room_of(pool, at)
        keep_order()    # by this one the block is known to be in use
        block.reuse_at = pool.last
        pool.opened = at
    return at


cdef inline Block *open_block(Pool *pool, uint32_t owner) noexcept nogil:
    # Give the owner a block with room: one that is due, an idle one, a new one; NULL if none is.
    # Whose it is, is stored before any bit of it is set.
    cdef uint64_t at = dequeue(pool)
    if at:
        pool.blocks[at].bump = 0
    else:
        at = unqueued_block(pool)
        if not at:
            return NULL
    link(pool, owner, at)
    keep_order_of(&pool.blocks[at])
    return &pool.blocks[at]


cdef inline uint64_t bits(uint64_t n, uint64_t offset) noexcept nogil:
    return UINT64_MAX >> (64 - n) << (offset & 63)


cdef inline uint64_t take(Pool *pool, Owner *own, Block *block, uint64_t n) noexcept nogil:
    # Issue the next n IDs of the owner's current block, which has them; returns the first.
    cdef uint64_t offset = (own.current << pool.shift) + block.bump
    block.used |= bits(n, offset)
    block.bump += n
    own.held += n
    pool.below -= n
    if pool.below < 0:
        new_peak(&pool.peak, &pool.below)
    return pool.base + offset


cdef inline void issued(Pool *pool, Block *block) noexcept nogil:
    # Count those of a block's IDs that were never issued before.
    if block.bump > block.seen:
        pool.issued += block.bump - block.seen
        block.seen = block.bump


cdef int acquire_first(Pool *pool, uint32_t owner, uint64_t *cid) noexcept nogil:
    # Issue an ID where the owner's block is full, or has never issued its next one before.
    cdef Owner *own = &pool.owners[owner]
    cdef Block *block = &pool.blocks[own.current]
    if block.bump == block.end:
        block = open_block(pool, owner)
        if block == NULL:
            return EXHAUSTED
    cid[0] = take(pool, own, block, 1)
    issued(pool, block)
    return OK


cdef inline int pool_acquire(Pool *pool, uint32_t owner, int64_t now, uint64_t *cid) noexcept nogil:
    see(pool, now)
    cdef Owner *own = &pool.owners[owner]
    cdef Block *block = &pool.blocks[own.current]
    if block.bump == block.seen:
        return acquire_first(pool, owner, cid)
    cid[0] = take(pool, own, block, 1)
    return OK


cdef bint can_issue(Pool *pool, const Block *current, uint64_t n) noexcept nogil:
    # Cheapest first: only near the end of the pool is anything counted.
    cdef uint64_t total = pool_ids(pool, pool.ready) - pool_ids(pool, pool.opened)
    if current.used:
        total += current.end - current.bump
    if total < n:
        total += count_due(pool, n - total)
    if total < n:
        total += count_idle(pool).ready
    return total >= n


cdef int pool_acquire_many(Pool *pool, uint64_t n, uint32_t owner, int64_t now,
                           uint64_t *cids) noexcept nogil:
    see(pool, now)
    cdef Owner *own = &pool.owners[owner]
    cdef Block *block = &pool.blocks[own.current]
    cdef uint64_t some
    if n > <uint64_t>(block.end - block.bump):
        if not can_issue(pool, block, n):
            return EXHAUSTED
        if is_idle(block) and block.reuse_at <= pool.now:
            block.bump = 0
    while n:
        if block.bump == block.end:
            block = open_block(pool, owner)
        some = min(n, <uint64_t>(block.end - block.bump))
        count_up(cids, take(pool, own, block, some), some)
        issued(pool, block)
        cids += some
        n -= some
    return OK


# ---- Release: reuse_at is stored before the bit is cleared, always. Should the stores end between
# the two, an ID is held that could be free; in the other order it could be issued too early.

cdef inline Block *find(const Pool *pool, uint64_t cid, uint64_t *offset) noexcept nogil:
    # The block of an ID and its offset from blocks[0], if it is held; else NULL.
    cdef Block *block
    offset[0] = cid - pool.base
    if offset[0] >= pool.limit:
        return NULL
    block = &pool.blocks[offset[0] >> pool.shift]
    return block if block.used >> (offset[0] & 63) & 1 else NULL


cdef int not_found(const Pool *pool, uint64_t cid) noexcept nogil:
    return NOT_HELD if cid - pool.first < pool.capacity else OUT_OF_RANGE


cdef int pool_owner_of(const Pool *pool, uint64_t cid, uint32_t *owner) noexcept nogil:
    cdef uint64_t offset = 0
    cdef const Block *block = find(pool, cid, &offset)
    if block == NULL:
        return not_found(pool, cid)
    owner[0] = block.owner
    return OK


cdef inline int pool_release(Pool *pool, uint64_t cid, uint32_t owner,
                             int64_t reuse_at) noexcept nogil:
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


cdef enum:
    AHEAD = 12  # IDs: far enough for memory to answer, near enough to stay in the cache

cdef struct Change:     # to a block, in a bulk release
    int64_t reuse_at    # before it was raised
    uint64_t raised     # that block
    uint64_t emptied    # another one, that lost its last held ID


cdef inline uint64_t run(const uint64_t *cids, uint64_t n) noexcept nogil:
    # n if that many consecutive IDs stand here in order, else 1.
    cdef uint64_t i, wrong = 0
    if cids[n - 1] - cids[0] != n - 1:
        return 1
    for i in range(n):
        wrong |= cids[i] ^ (cids[0] + i)
    return 1 if wrong else n


cdef int pool_release_many(Pool *pool, const uint64_t *cids, uint64_t n, uint32_t owner,
                           int64_t reuse_at, uint64_t *at) noexcept nogil:
    # Clear bits until one is not set; then set the former ones again. Lists and counters change
    # only after the last bit, in the order in which the blocks became empty. Somebody else may be
    # writing to `cids` all the while: what was done is known from the log alone.
    cdef uint64_t i = 0, j, some, mask, cid, offset = 0, bad, steps = 0, raised = 0, gone = 0
    cdef Owner *own = &pool.owners[owner]
    cdef Block *block = NULL
    cdef int code = OK
    cdef uint64_t changes = min(n, pool.opened) + 1, most = min(n, own.held)
    cdef Change *log = <Change *>malloc(changes * sizeof(Change) + most * sizeof(uint64_t))
    cdef uint64_t *runs = <uint64_t *>(log + changes)   # an offset, and how many from there
    if log == NULL:
        return INTERNAL
    # Random IDs lie in random blocks: fetch those that are wanted soon, if the records are too many
    # for the first caches. A wrong ID does no harm: any address may be fetched.
    cdef uint64_t fetched = n - AHEAD if n > AHEAD and pool.opened > 2048 else 0
    while i < n:
        if i < fetched:
            prefetch(&pool.blocks[(cids[i + AHEAD] - pool.base) >> pool.shift])
        cid = read_once(cids + i)
        block = find(pool, cid, &offset)
        if block == NULL or block.owner != owner:
            code = not_found(pool, cid) if block == NULL else NOT_OWNER
            break
        some = run(cids + i, min(n - i, block.end - (offset & pool.mask)))
        mask = bits(some, offset) & ~block.used
        if mask:
            some = low_bit(mask) - (offset & 63)
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
        at[0], bad = i, offset
        for j in range(steps):
            offset, some = runs[j] >> 7, runs[j] & 127
            if code == NOT_HELD and bad - offset < some:
                code = DUPLICATE
            pool.blocks[offset >> pool.shift].used |= bits(some, offset)
        keep_order()
        for j in range(raised):
            pool.blocks[log[j].raised].reuse_at = log[j].reuse_at
    else:
        own.held -= n
        pool.below += n
        for j in range(gone):
            emptied(pool, own, &pool.blocks[log[j].emptied])
    free(log)
    return code


cdef uint64_t pool_release_owner(Pool *pool, uint32_t owner, int64_t reuse_at) noexcept nogil:
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


cdef void pool_held_by(const Pool *pool, uint32_t owner, uint64_t *cids) noexcept nogil:
    cdef uint64_t at = pool.owners[owner].head
    cdef uint64_t used, base
    while at:
        used = pool.blocks[at].used
        base = pool.base + (at << pool.shift & ~<uint64_t>63)
        while used:
            cids[0] = base + low_bit(used)
            cids += 1
            used &= used - 1
        at = pool.blocks[at].next
