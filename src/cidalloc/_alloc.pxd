# The C interface of the allocator core, for other Cython modules: cimport these names from here.
#
# The functions raise no exception. They need exclusive access to the pool, but not the GIL.
# _pool.pxd explains the structures; each function is described where it is defined. Functions are
# inlined into the module that cimports them: compile it again for each version of this package.

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

# Return the pool of a Python object. The caller needs the GIL, and may use the pool until other
# Python code runs. Waits for a call that uses the pool without the GIL; raises `Forked`.
cdef Pool *pool_of(Allocator self) except NULL
