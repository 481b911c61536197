# Read the Python arguments of a pool that takes over the memory of an earlier one.

from libc.stdint cimport int64_t, uint8_t, uint64_t

from .args cimport as_time
from .messages cimport error
from .pool cimport REGISTRY_CORRUPT, Pool
from .recover cimport Past, pool_recover


cdef inline int recover(
    Pool *pool, object holders, int64_t latest, object reuse_at, bint live_snapshot, bint sealed
) except -1:
    # Take over the blocks in the pool's memory. Raises `RegistryCorrupt`.
    cdef const uint8_t[::1] holds = holders
    cdef uint64_t at = 0
    cdef Past past
    past.holds, past.owners, past.latest = NULL, holds.shape[0], latest
    past.live_snapshot, past.sealed = live_snapshot, sealed
    if past.owners:
        past.holds = &holds[0]
    past.after_power_loss = reuse_at is not None
    past.reuse_at = as_time(reuse_at, "reuse_at") if past.after_power_loss else 0
    if pool_recover(pool, &past, &at):
        found = error(REGISTRY_CORRUPT, "the records of IDs are damaged")
        if at:
            cid = pool.base + (at << pool.shift)
            found = error(REGISTRY_CORRUPT, f"the record of ID {cid} is damaged")
            found.cid = cid
        raise found
    return 0
