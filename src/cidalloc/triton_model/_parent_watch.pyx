# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: autotestdict=False, freethreading_compatible=True
"""End this process when its parent has ended, whatever its Python code is doing."""

from libc.errno cimport EAGAIN
from posix.time cimport nanosleep, timespec
from posix.unistd cimport _exit, getpid, getppid

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    int pthread_create(pthread_t *thread, const void *attributes, void *(*start)(void *) noexcept,
                       void *argument)
    int pthread_detach(pthread_t thread)

cdef int parent = 0
# The process that a thread watches over; a forked child has none. Without a GIL two threads may
# both begin to watch: that does no harm.
cdef int watching = 0


cdef void *watch(void *argument) noexcept nogil:
    cdef timespec pause
    pause.tv_sec, pause.tv_nsec = 0, 20_000_000
    while getppid() == parent:
        nanosleep(&pause, NULL)
    _exit(1)


def end_with_parent(int pid):
    """Let a thread without Python end this process, without more ado, once its parent has ended.

    A Python thread would not do: if the server of a model's process is killed at the wrong moment,
    that process waits for it for ever, and does not let go of the GIL meanwhile.

    Args:
        pid: the parent's process ID. If the parent is another process by now, it has ended.
    """
    global parent, watching
    cdef pthread_t thread
    if watching == getpid():
        return
    parent = pid
    if pthread_create(&thread, NULL, watch, NULL):
        raise OSError(EAGAIN, "no thread can be made")
    pthread_detach(thread)
    watching = getpid()
