# What must hold of every pool, whatever was done to it. _alloc.pyx includes this file.

cdef int audit(Pool *pool) except -1:
    cdef uint64_t ids, held = 0, issued = 0
    cdef uint64_t at, before, place
    cdef int i
    cdef Block *block
    cdef Bucket *bucket
    opened = range(1, pool.opened + 1)
    queued, listed, owned = set(), set(), {}
    for i in range(BUCKETS):
        bucket, ids, before, at, dues = &pool.queue[i], 0, 0, pool.queue[i].head, []
        assert not i or bool(at) == bool(pool.filled >> (i - 1) & 1), "filled"
        while at:
            block = &pool.blocks[at]
            assert at in opened and at not in queued and not block.used, "queued"
            assert bucket_of(pool, block.reuse_at) == i and block.reuse_at >= pool.last, "key"
            queued.add(at)
            dues.append(block.reuse_at)
            ids += block.end
            before, at = at, block.next
        assert not before or bucket.tail == before, "bucket's tail"
        assert not before or not i or bucket.due == min(dues), "bucket's due"
        assert ids == bucket.ids, "bucket's count"
    at = pool.idle
    while at:
        assert at not in listed and pool.owners[at - 1].listed, "list of idle ones"
        listed.add(at)
        at = pool.owners[at - 1].idle
    for at in opened:
        block = &pool.blocks[at]
        ids = min(<uint64_t>pool.mask + 1, pool.capacity - (<uint64_t>(at - 1) << pool.shift))
        place = at << pool.shift & 63
        assert block.end == ids and block.bump <= ids, "bounds"
        assert not block.used & ~bits(ids, place), "strange bits"
        held += count_bits(block.used)
        issued += block.seen
        if at not in queued:
            assert 0 < block.bump <= block.seen, "issued"
            assert not block.used & ~bits(block.bump, place), "issued above bump"
            assert block.used or is_idle(block), "empty, but not queued"
            assert not is_idle(block) or block.owner + 1 in listed, "idle, but not listed"
            assert block.bump == ids or pool.owners[block.owner].current == at, "room"
            owned.setdefault(block.owner, set()).add(at)
    for owner, blocks in owned.items():
        ids, before, at, chain = 0, 0, pool.owners[owner].head, set()
        while at:
            assert at not in chain, "owner's list"
            assert not before or pool.blocks[at].prev == before, "the way back"
            chain.add(at)
            ids += count_bits(pool.blocks[at].used)
            before, at = at, pool.blocks[at].next
        assert chain == blocks and pool.owners[owner].current in chain | {0}, "owner's blocks"
        assert ids == pool.owners[owner].held, "owner's count"
    assert held == pool_held(pool) <= pool.peak and issued == pool.issued, "counts"
    assert pool.opened <= pool.ready <= pool.count, "opened"
    assert pool.last <= pool.now, "time"
    return 0
