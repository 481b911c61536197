# Guard a pool: one call at a time uses it, and none in a forked child.
#
# A pool is used by the thread that has the GIL, or by the one call that released it. Such a call
# locks `busy` and changes `forks`. So one comparison, which every call makes, detects both a fork
# and a call under way. The call unlocks `busy` before it asks for the GIL, which it may never get
# when Python ends; the next call restores `forks`. Any Python code may let another thread run, so
# there must be none between the comparison and the use of the pool.
#
# Free-threaded Python has no GIL. There each method runs in a critical section of its object, which
# is like a GIL of this pool alone: `with nogil` leaves it, and any Python code may leave it for a
# while. All that is said of the GIL here holds for it.
#
# While other threads or tasks wait for an ID (`queued`), `forks` stays changed, so that every call
# notices that, too, and no call releases the GIL.

from libc.stdint cimport uint64_t

from .messages cimport error
from .pool cimport FORKED

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_trylock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef enum:
    # A call for at least so many IDs releases the GIL. Fewer are issued in about a microsecond,
    # the time that a release takes; another thread may then keep the GIL for its whole turn.
    LARGE = 4096

cdef struct Guard:
    int forks               # of the process that made the pool; ~forks while a call holds `busy`
    bint queued             # callers wait for an ID: then `forks` is ~forks as well
    int waiting             # calls that wait for `busy`
    pthread_mutex_t busy    # held by a call that uses the pool without the GIL


cdef inline void guard_init(Guard *guard, int forks) noexcept:
    pthread_mutex_init(&guard.busy, NULL)
    guard.forks = forks


cdef inline int guard_wait(Guard *guard, int forks) except -1:
    # Wait until no call uses the pool without the GIL. Raises `Forked` in a child; `forks` is the
    # number of this process.
    while guard.forks != forks:
        if ~guard.forks != forks:
            raise error(FORKED, "this pool belongs to the parent process: "
                                "create a new one after the fork")
        if pthread_mutex_trylock(&guard.busy) == 0:
            guard.forks = ~forks if guard.queued else forks
            pthread_mutex_unlock(&guard.busy)
            if guard.queued:
                break
        else:
            guard.waiting += 1
            with nogil:
                pthread_mutex_lock(&guard.busy)
                pthread_mutex_unlock(&guard.busy)
            guard.waiting -= 1
    return 0


cdef inline bint guard_enter(Guard *guard, uint64_t work) noexcept:
    # Decide whether a call releases the GIL; if so, lock the pool until guard_leave(). The call
    # keeps the GIL while others wait for the pool, so that none waits for ever.
    if work < LARGE or guard.waiting or guard.queued:
        return False
    pthread_mutex_lock(&guard.busy)     # a thread that still has it unlocks it without the GIL
    guard.forks = ~guard.forks
    return True


cdef inline void guard_leave(Guard *guard) noexcept nogil:
    pthread_mutex_unlock(&guard.busy)
