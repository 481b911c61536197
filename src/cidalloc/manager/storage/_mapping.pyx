# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: autotestdict=False, freethreading_compatible=True
"""Memory at a fixed address, which a file may lie under, and of which more and more can be used.

Python's own mmap cannot do that: it moves when it grows.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno
from libc.stdint cimport uint64_t
from posix.mman cimport (MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, PROT_READ,
                         PROT_WRITE, madvise, mmap, mprotect, munmap)
from posix.unistd cimport getpid

import os

cdef extern from "<sys/mman.h>" nogil:
    int MAP_NORESERVE
    int MADV_DONTFORK


cdef int fail() except -1:
    raise OSError(errno, "no address space: " + os.strerror(errno))


cdef class Mapping:
    """A buffer of `size` bytes, of which `extend` lets more and more be written.

    What lies beyond reads as zeros, so records that a file does not have yet look unused. A forked
    child does not have the memory: the kernel gives it none of these pages.

    Raises OSError if there is no address space.
    """

    cdef char *base
    cdef uint64_t size
    cdef uint64_t length
    cdef int pid

    def __cinit__(self, uint64_t size):
        cdef void *got = mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                              -1, 0)
        if got == MAP_FAILED:
            fail()
        self.base, self.size, self.pid = <char *>got, size, getpid()
        madvise(self.base, size, MADV_DONTFORK)

    def __dealloc__(self):
        if self.base != NULL and self.pid == getpid():
            munmap(self.base, self.size)

    def __len__(self):
        return self.size

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.base, self.size, 0, flags)

    @cython.critical_section
    def extend(self, uint64_t length, int fd=-1, uint64_t offset=0):
        """Let the first `length` bytes be written, which are whole pages.

        With an open file they are its bytes from `offset` on; it must be as long as that.
        """
        cdef uint64_t have = self.length
        if self.pid != getpid():
            raise ValueError("this mapping belongs to the parent process")
        if length > self.size:
            raise ValueError(f"{length} bytes are more than {self.size}")
        if length <= have:
            return
        if fd < 0:
            if mprotect(self.base, length, PROT_READ | PROT_WRITE):
                fail()
        else:
            if mmap(self.base + have, length - have, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_SHARED,
                    fd, offset + have) == MAP_FAILED:
                fail()
            madvise(self.base + have, length - have, MADV_DONTFORK)
        self.length = length
