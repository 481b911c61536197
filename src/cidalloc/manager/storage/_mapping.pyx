# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: autotestdict=False
"""Address space of a fixed size, into which memory and parts of a file are put where they belong.

It is a buffer of that size from the start. What nothing was put into reads as zeros and cannot be
written to, so records that a file does not have yet look as if they were never used.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno
from libc.stdint cimport uint64_t
from posix.mman cimport (MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, PROT_READ,
                         PROT_WRITE, madvise, mmap, mprotect, munmap)
from posix.unistd cimport getpid

cdef extern from "<sys/mman.h>" nogil:
    int MAP_NORESERVE
    int MADV_DONTFORK


cdef int fail() except -1:
    raise OSError(errno, "no address space: " + strerror(errno).decode())


cdef extern from "<string.h>" nogil:
    const char *strerror(int number)


cdef class Mapping:
    """Address space of `size` bytes. Raises OSError if there is none.

    A forked child does not have it: the kernel gives it none of these pages.
    """

    cdef char *base
    cdef uint64_t size
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

    def put_memory(self, uint64_t place, uint64_t length):
        """Put zeros that can be written to at `place`; both in bytes, whole pages."""
        self.check(place, length)
        if mprotect(self.base + place, length, PROT_READ | PROT_WRITE):
            fail()

    def put_file(self, uint64_t place, uint64_t length, int fd, uint64_t offset):
        """Put `length` bytes of a file from `offset` on at `place`; all in bytes, whole pages."""
        self.check(place, length)
        got = mmap(self.base + place, length, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_SHARED, fd,
                   offset)
        if got == MAP_FAILED:
            fail()
        madvise(self.base + place, length, MADV_DONTFORK)

    cdef int check(self, uint64_t place, uint64_t length) except -1:
        if self.pid != getpid():
            raise ValueError("this mapping belongs to the parent process")
        if place > self.size or length > self.size - place:
            raise ValueError(f"{place} and {length} more bytes are not within {self.size}")
        return 0
