# The exceptions of the allocator and their messages.
#
# A .pxd has no imports of Python modules, so error() imports its function when it is called.

from libc.stdint cimport int64_t, uint64_t

from .owners cimport Counts, pool_count
from .pool cimport DUPLICATE, EXHAUSTED, NOT_HELD, NOT_OWNER, OUT_OF_RANGE, Pool, pool_held
from .queue cimport pool_next_due


cdef inline object error(int code, object message):
    from cidalloc.errors import error_for
    return error_for(code, message)


cdef inline object at_position(object position):
    return "" if position is None else f" at position {position}"


cdef inline object exhausted(Pool *pool, object what):
    cdef int64_t due = 0
    cdef bint queued = pool_next_due(pool, &due)
    cdef Counts n = pool_count(pool)
    cdef uint64_t held = pool_held(pool)
    when = f"the next is due at {due}" if queued else "none is due"
    pinned, remedy = "", "a larger pool"
    if n.pinned:
        pinned = f", {n.pinned} are pinned by a held ID in their block of {1 << pool.shift}"
        remedy = "a larger pool, or narrower blocks (block=1 pins none)"
    return error(EXHAUSTED, (
        f"cannot issue {what}: {held} of {pool.capacity} IDs are held, {n.cooling} are cooling"
        f"{pinned}; {when}. Release IDs, wait, or use {remedy}"))


cdef inline object refusal(const Pool *pool, int code, object cid, object position=None):
    where = at_position(position)
    high = pool.first + pool.capacity - 1
    found = error(code, {
        OUT_OF_RANGE: f"the ID{where} is outside the pool, whose IDs are {pool.first} to {high}",
        NOT_HELD: f"ID {cid}{where} is not held: it was released, or was never issued",
        NOT_OWNER: f"ID {cid}{where} is held by another owner: only that owner can release it",
        DUPLICATE: f"ID {cid}{where} is a duplicate: each ID may be given once in a call",
    }[code])
    found.cid, found.position = cid or None, position
    return found


cdef inline object unreservable(const Pool *pool, int code, object cid, object position):
    if code == OUT_OF_RANGE:
        return refusal(pool, code, cid, position)
    where = at_position(position)
    found = error(code, {
        DUPLICATE: f"ID {cid}{where} is a duplicate: it is held, or was given before",
        NOT_OWNER: f"ID {cid}{where} is in a block with IDs of another owner: use block=1",
        EXHAUSTED: f"ID {cid}{where} is in a block that is not ready, or too far above the others",
    }[code])
    found.cid, found.position = cid, position
    return found
