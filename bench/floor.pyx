# cython: language_level=3, binding=False
"""The floor: methods that do nothing, called as those of the allocator are.

What a call costs that no allocator with these signatures can save: finding the method, passing the
arguments, making the int that is returned.
"""

from libc.stdint cimport int64_t

import numpy as np


cdef class Floor:
    """The allocator's signatures. `acquire` makes a fresh int from a counter in C."""

    cdef int64_t count
    cdef object empty

    def __cinit__(self, int64_t first=1000):
        self.count = first
        self.empty = np.empty

    def acquire(self, owner=0, now=0):
        """Return the next number."""
        self.count += 1
        return self.count

    def release(self, cid, owner=0, reuse_at=0):
        """Do nothing."""

    def acquire_many(self, n, owner=0, now=0, out=None):
        """Return an array that nobody filled."""
        return self.empty(n, np.uint64) if out is None else out

    def release_many(self, ids, owner=0, reuse_at=0):
        """Do nothing."""


cdef class NoArguments:
    """The same without optional arguments, which is another calling convention."""

    cdef int64_t count

    def __cinit__(self, int64_t first=1000):
        self.count = first

    def acquire(self):
        """Return the next number."""
        self.count += 1
        return self.count

    def release(self, cid):
        """Do nothing."""


cdef class Existing:
    """The allocator's signatures, but nothing is made: `acquire` returns the same int each time."""

    cdef object cid

    def __cinit__(self, first=1000):
        self.cid = first

    def acquire(self, owner=0, now=0):
        """Return the one int."""
        return self.cid

    def release(self, cid, owner=0, reuse_at=0):
        """Do nothing."""
