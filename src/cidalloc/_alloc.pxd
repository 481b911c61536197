# The C interface of the allocator core, for other Cython modules: cimport these names from here.
#
# Every function needs exclusive access to its pool, but not the GIL, and raises no exception. Those
# that return an int return a code: OK, or why nothing was changed. Times are ticks of any unit and
# origin; a time before the latest one seen counts as the latest. An owner is below MAX_OWNERS. An
# ID that a function takes may have any value. Functions are inlined into the module that cimports
# them: compile it again for each version of this package.
#
# Make a pool
#
#   uint64_t pool_size(uint64_t capacity, uint32_t shift)
#       The bytes that `capacity` IDs in blocks of 2**shift need; shift is 0 to 6.
#   int pool_init(Pool *pool, uint64_t capacity, uint64_t first, uint32_t shift, void *memory,
#                 bint used=False)
#       An empty pool of the IDs `first` to `first + capacity - 1`, at most 2**38, in blocks of
#       2**shift. `memory` has pool_size() bytes, is 8-byte aligned and all zero, unless `used` is
#       set; NULL: the pool maps its own. INTERNAL without memory; INVALID_ARGUMENT if the first two
#       blocks are not zero.
#   int pool_recover(Pool *pool, const Past *past, uint64_t *at)
#       After pool_init() with `used`: take over what an earlier pool of this shape left in the
#       memory, also if its process died at any instruction. REGISTRY_CORRUPT if no pool leaves such
#       blocks behind: `at` is the first wrong one. Linear in the ready blocks.
#   void pool_free(Pool *pool)
#       Unmap what the pool has mapped. Call it also if pool_init() failed.
#
# Issue and release IDs
#
#   int pool_acquire(Pool *pool, uint32_t owner, int64_t now, uint64_t *cid)
#       Issue an ID. EXHAUSTED. Amortised constant time.
#   int pool_acquire_many(Pool *pool, uint64_t n, uint32_t owner, int64_t now, uint64_t *cids)
#       Issue n IDs, or none. EXHAUSTED. O(n); if the pool is nearly exhausted, also linear in its
#       cooling and idle blocks.
#   int pool_release(Pool *pool, uint64_t cid, uint32_t owner, int64_t reuse_at)
#       Release an ID. OUT_OF_RANGE, NOT_HELD, NOT_OWNER. Constant time.
#   int pool_release_many(Pool *pool, const uint64_t *cids, uint64_t n, uint32_t owner,
#                         int64_t reuse_at, uint64_t *at)
#       Release n IDs, or none: then `at` is the position of the first that is refused.
#       OUT_OF_RANGE, NOT_HELD, NOT_OWNER, DUPLICATE; INTERNAL without memory for a log. O(n).
#   uint64_t pool_release_owner(Pool *pool, uint32_t owner, int64_t reuse_at)
#       Release all IDs of an owner; return how many. Linear in its blocks.
#
# Ask
#
#   int pool_owner_of(const Pool *pool, uint64_t cid, uint32_t *owner)
#       Who holds an ID. OUT_OF_RANGE, NOT_HELD. Constant time.
#   void pool_held_by(const Pool *pool, uint32_t owner, uint64_t *cids)
#       Write the IDs that an owner holds: pool.owners[owner].held of them. O(n).
#   uint64_t pool_held(const Pool *pool)
#       How many IDs are held. Constant time.
#   uint64_t pool_ids(const Pool *pool, uint64_t blocks)
#       How many IDs the first `blocks` have. Constant time.
#   Counts pool_count(Pool *pool)
#       How many IDs are cooling or pinned, as of pool.now. Linear in the queued blocks that are due
#       at about that time, and in the idle ones.
#   bint pool_next_due(const Pool *pool, int64_t *due)
#       When the first queued block is or was due; False if none is queued. Constant time.

from ._core.acquire cimport pool_acquire, pool_acquire_many
from ._core.guard cimport Guard
from ._core.owners cimport Counts, pool_count, pool_held_by, pool_owner_of
from ._core.pool cimport (DUPLICATE, EXHAUSTED, FORKED, INTERNAL, INVALID_ARGUMENT, MAX_OWNERS,
                          NOT_HELD, NOT_OWNER, OK, OUT_OF_RANGE, REGISTRY_CORRUPT, Block, Bucket,
                          Owner, Pool, pool_free, pool_held, pool_ids, pool_init, pool_size)
from ._core.queue cimport pool_next_due
from ._core.recover cimport Past, pool_recover
from ._core.release cimport pool_release, pool_release_many, pool_release_owner

cdef class Allocator:
    cdef Guard guard
    cdef Pool pool
    cdef Py_buffer memory           # the given buffer, if any
    cdef readonly object _line      # a WaitingLine: the callers that wait for an ID

# Return the pool of a Python object. The caller may use it until other Python code runs, or until
# it releases the GIL. On free-threaded Python both this call and the use of the pool must be in one
# critical section of the object: `with cython.critical_section(allocator)`. That costs next to
# nothing on other Pythons. Waits for a call that uses the pool without the GIL; raises `Forked`.
# Callers that wait in Python for an ID do not notice what is released through it.
cdef Pool *pool_of(Allocator self) except NULL
