# Check the invariants of a pool. Each function raises AssertionError if one is broken.

from libc.stdint cimport uint64_t

from .intrinsics cimport count_bits
from .pool cimport BUCKETS, Block, Bucket, Pool, bits, is_idle, pool_held, room_of
from .queue cimport bucket_of
from .seal cimport is_sealed, used_of


cdef inline set check_bucket(Pool *pool, int i):
    # Check one bucket of the queue; return its blocks.
    cdef Bucket *bucket = &pool.queue[i]
    cdef uint64_t at = bucket.head, tail = 0, ids = 0
    cdef Block *block
    found, dues = set(), []
    assert not i or bool(at) == bool(pool.filled >> (i - 1) & 1), "filled"
    while at:
        block = &pool.blocks[at]
        assert 0 < at <= pool.opened and at not in found and not used_of(pool, at), "queued block"
        assert bucket_of(pool, block.reuse_at) == i and block.reuse_at >= pool.last, "bucket"
        found.add(at)
        dues.append(block.reuse_at)
        ids += block.end
        tail, at = at, block.next
    assert not tail or bucket.tail == tail, "bucket's tail"
    assert not tail or not i or bucket.due == min(dues), "bucket's due"
    assert ids == bucket.ids, "bucket's count"
    return found


cdef inline set check_queue(Pool *pool):
    # Check the queue; return its blocks.
    cdef int i
    queued = set()
    for i in range(BUCKETS):
        found = check_bucket(pool, i)
        assert not found & queued, "block in two buckets"
        queued |= found
    assert pool.last <= pool.now, "time"
    return queued


cdef inline set check_idle_owners(Pool *pool):
    # Check the list of owners that may have an idle block; return their numbers.
    cdef uint64_t at = pool.idle
    listed = set()
    while at:
        assert at - 1 not in listed and pool.owners[at - 1].listed, "list of idle owners"
        listed.add(at - 1)
        at = pool.owners[at - 1].idle
    return listed


cdef inline int check_owned_block(Pool *pool, uint64_t at, set listed) except -1:
    cdef Block *block = &pool.blocks[at]
    cdef uint64_t used = used_of(pool, at)
    assert 0 < block.bump <= block.seen, "issued"
    assert not used & ~bits(block.bump, at << pool.shift), "issued above bump"
    assert used or is_idle(block), "empty, but not queued"
    assert not is_idle(block) or block.owner in listed, "idle, but not listed"
    assert block.bump == block.end or pool.owners[block.owner].current == at, "room"
    return 0


cdef inline dict check_blocks(Pool *pool, set queued, set listed):
    # Check each opened block, and the pool's counts of IDs; return the blocks of each owner.
    cdef uint64_t at, held = 0, issued = 0, used
    cdef Block *block
    owned = {}
    assert pool.opened <= pool.ready <= pool.count, "opened"
    for at in range(1, pool.opened + 1):
        block = &pool.blocks[at]
        assert block.end == room_of(pool, at) and block.bump <= block.end, "bounds"
        used = used_of(pool, at)
        assert not pool.sealed or is_sealed(pool, at), "seal"
        assert pool.sealed or used == block.used, "wrong bits"
        assert not used & ~bits(block.end, at << pool.shift), "wrong bits"
        held += count_bits(used)
        issued += block.seen
        if at not in queued:
            check_owned_block(pool, at, listed)
            owned.setdefault(block.owner, set()).add(at)
    assert held == pool_held(pool) <= pool.peak and issued == pool.issued, "counts"
    return owned


cdef inline int check_owner(Pool *pool, uint64_t owner, set blocks) except -1:
    # Check the list of one owner's blocks, and its count of IDs.
    cdef uint64_t at = pool.owners[owner].head, before = 0, held = 0
    found = set()
    while at:
        assert at not in found, "owner's list"
        assert not before or pool.blocks[at].prev == before, "link to the previous block"
        found.add(at)
        held += count_bits(used_of(pool, at))
        before, at = at, pool.blocks[at].next
    assert found == blocks and pool.owners[owner].current in found | {0}, "owner's blocks"
    assert held == pool.owners[owner].held, "owner's count"
    return 0


cdef inline int audit(Pool *pool) except -1:
    queued, listed = check_queue(pool), check_idle_owners(pool)
    for owner, blocks in check_blocks(pool, queued, listed).items():
        check_owner(pool, owner, blocks)
    return 0
