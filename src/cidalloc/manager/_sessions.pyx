# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic
# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: autotestdict=False
"""The table of sessions: each is a pool's owner of that number, with a lease that must be renewed.

A session has a row, which may live in a file, and a lease beside it, which does not outlive the
process: who may hold IDs is kept, and when they last said so is not.

A row is *free*, *open* or *ending*; its `life` holds that and the generation. When a session is
opened, `life` is stored last. Its end is stored first; then its IDs go, and only when the pool has
none of them left is the row free for another: whatever the process dies at, no ID goes to the next
session of that number, and a session of which some IDs are gone is never open again.

Leases are scheduled on a wheel of lists, one slot for each tick. To renew a lease is to store a
number: it is looked at only when the wheel comes to its slot, and scheduled anew if it was renewed.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from cpython.buffer cimport (PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer)
from posix.mman cimport (MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap,
                         munmap)

from .._alloc cimport MAX_OWNERS, Allocator, Pool, pool_of, pool_release_owner

from ..codes import Code
from ..errors import error_for

cdef extern from *:
    """
    #include <assert.h>
    #include <stdint.h>
    struct cidalloc_row {
        uint64_t life, seq, digest[2];
        int64_t ttl, cooldown, opened_at;
        uint64_t anonymous;
        uint8_t label[64];
    };
    static_assert(sizeof(struct cidalloc_row) == 128, "what a session costs in the file");
    #define keep_order() __atomic_signal_fence(__ATOMIC_SEQ_CST)
    """
    struct Row "cidalloc_row":
        uint64_t life       # generation << 2, and the state
        uint64_t seq        # of the last change that was applied
        uint64_t digest[2]  # of the token
        int64_t ttl
        int64_t cooldown    # of the IDs that it holds when it expires
        int64_t opened_at
        uint64_t anonymous  # 1: has no token, and cannot be renewed
        uint8_t label[64]   # UTF-8, filled up with zeros
    void keep_order() noexcept nogil    # no store moves across, in the machine code

cdef extern from "<sys/mman.h>" nogil:
    int MAP_NORESERVE

cdef enum:
    FREE = 0
    OPEN = 1
    ENDING = 2
    TICK = 7            # log2 of a tick in milliseconds: an expiry may be seen so much later
    LONGEST = 0x10000000000   # milliseconds: no time in a row is as long
    SLOTS = 1 << 14    # lists on the wheel: a lease may schedule for half an hour without a look

cdef struct Lease:
    int64_t expires
    uint32_t next       # in the same slot, or the next free row; 0 ends both
    uint32_t prev
    uint32_t slot      # of the wheel in which it is
    uint32_t chain      # the next with the same hash


cdef inline uint64_t state_of(const Row *row) noexcept nogil:
    return row.life & 3


cdef bint is_sound(const Row *row, uint64_t generation) noexcept nogil:
    return (state_of(row) in (OPEN, ENDING) and row.anonymous <= 1 and row.life >> 2 <= generation
            and 0 <= row.ttl < LONGEST and 0 <= row.cooldown < LONGEST)


cdef Row *view_rows(object buffer, Py_buffer *view, int flags) except NULL:
    PyObject_GetBuffer(buffer, view, flags)
    return <Row *>view.buf


cdef class Sessions:
    """Sessions that own IDs of `pool`. Times are milliseconds, counted as the pool's ticks.

    Args:
        pool: the pool; a session's number is an owner of it.
        rows: memory for 128 bytes for each session and one more, as `pool` has it for its blocks.
        ready: rows that may be used so far; as `ready` below.

    Takes over what is in `rows`: see `recover`. A number that is no open session is a bug of the
    caller, and an AssertionError.
    """

    cdef Allocator pool
    cdef Py_buffer memory
    cdef Row *rows          # [0] is none
    cdef Lease *leases
    cdef uint32_t *slots
    cdef uint32_t *heads    # of the chains, by hash
    cdef uint32_t mask      # heads less 1
    cdef readonly uint32_t ready
    cdef readonly uint32_t opened       # rows that were ever used
    cdef readonly uint32_t count        # sessions that are open
    cdef uint32_t unused    # the first free row below `opened`
    cdef int64_t tick       # the first that the wheel has not passed

    def __cinit__(self, Allocator pool, rows, uint32_t ready):
        self.pool = pool
        self.rows = view_rows(rows, &self.memory, PyBUF_WRITABLE)
        got = mmap(NULL, MAX_OWNERS * sizeof(Lease), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        self.leases = NULL if got == MAP_FAILED else <Lease *>got
        self.slots = <uint32_t *>calloc(SLOTS, sizeof(uint32_t))
        if self.leases == NULL or self.slots == NULL:
            raise MemoryError("no address space for sessions")
        self.ready = ready
        self.grow_heads(1024)

    def __dealloc__(self):
        if self.leases != NULL:
            munmap(self.leases, MAX_OWNERS * sizeof(Lease))
        free(self.slots)
        free(self.heads)
        PyBuffer_Release(&self.memory)

    @staticmethod
    def size(uint64_t sessions):
        """Return the bytes that so many sessions need."""
        return (sessions + 1) * sizeof(Row)

    @staticmethod
    def holders(rows, uint32_t ready, uint64_t generation, bint anonymous_only=False):
        """Return a byte for each number below `ready`: whether that session may hold IDs.

        Raises `RegistryCorrupt` for a row that no session leaves behind, all of whose generations
        are at most `generation`. Writes nothing.
        """
        cdef Py_buffer view
        cdef Row *table = view_rows(rows, &view, PyBUF_SIMPLE)
        cdef uint32_t at
        holders = bytearray(ready)
        cdef uint8_t[::1] holds = holders
        try:
            for at in range(1, ready):
                if state_of(&table[at]) != FREE:
                    if not is_sound(&table[at], generation):
                        raise error_for(Code.REGISTRY_CORRUPT,
                                        f"the record of session {at} is damaged")
                    holds[at] = table[at].anonymous or not anonymous_only
            return holders
        finally:
            PyBuffer_Release(&view)

    def recover(self, holders, int64_t now, int64_t grace):
        """Take over the rows; of those in `holders` each open one gets its whole time again.

        The others are freed. Returns the numbers of those whose end was under way: `end` them.
        """
        cdef const uint8_t[::1] holds = holders
        cdef uint32_t at
        cdef Row *row
        ending = []
        self.live()
        self.tick = now >> TICK
        for at in range(1, self.ready):
            row = &self.rows[at]
            if row.life:
                self.opened = at
        for at in range(self.opened, 0, -1):    # so that the lowest free row is taken first
            row = &self.rows[at]
            if not holds[at] or state_of(row) == FREE:
                row.life = row.life & ~<uint64_t>3
                self.free_row(at)
            elif state_of(row) == ENDING:
                ending.append(at)
                self.start(at, now)
            else:
                if row.opened_at > now:     # by the clock of another boot
                    row.opened_at = now
                self.start(at, now + row.ttl + grace)
        return ending

    cdef Pool *live(self) except NULL:
        return pool_of(self.pool)   # raises in a forked child

    cdef Row *row(self, uint32_t at) except NULL:
        self.live()
        if not 0 < at <= self.opened or state_of(&self.rows[at]) == FREE:
            raise AssertionError(f"{at} is no session")
        return &self.rows[at]

    def set_ready(self, uint32_t rows):
        """Let so many rows in all be used, the one that is none included."""
        self.live()
        self.ready = max(rows, self.ready)

    def open(self, const uint8_t[::1] digest, uint64_t generation, int64_t expires, int64_t ttl,
             int64_t cooldown, int64_t now, const uint8_t[::1] label):
        """Open a session and return its number, or 0 if no row is free.

        Args:
            digest: 16 bytes that stand for its token; none for an anonymous one.
            generation: a number that no session had before.
            expires: when its lease runs out.
            ttl: for how long it may be renewed at once.
            cooldown: for how long its IDs cool when it expires; it can be raised.
            now: the time.
            label: at most 64 bytes.
        """
        cdef uint32_t at = self.unused
        cdef Row *row
        self.live()
        if at:
            self.unused = self.leases[at].next
        elif self.opened + 1 < self.ready:
            at = self.opened + 1
            self.opened = at
        else:
            return 0
        row = &self.rows[at]
        row.seq, row.ttl, row.cooldown, row.opened_at = 0, ttl, cooldown, now
        memset(row.digest, 0, sizeof(row.digest))
        memset(row.label, 0, sizeof(row.label))
        if label.shape[0]:
            memcpy(row.label, &label[0], min(<size_t>label.shape[0], sizeof(row.label)))
        row.anonymous = digest.shape[0] == 0
        if not row.anonymous:
            assert digest.shape[0] == sizeof(row.digest)
            memcpy(row.digest, &digest[0], sizeof(row.digest))
        keep_order()
        row.life = generation << 2 | OPEN
        self.start(at, expires)
        return at

    def find(self, const uint8_t[::1] digest):
        """Return the number of the open session with this digest, or 0. Constant time."""
        cdef uint64_t[2] wanted
        cdef uint32_t at
        self.live()
        assert digest.shape[0] == sizeof(wanted)
        memcpy(wanted, &digest[0], sizeof(wanted))
        at = self.heads[wanted[0] & self.mask]
        while at and (self.rows[at].digest[0] != wanted[0] or self.rows[at].digest[1] != wanted[1]):
            at = self.leases[at].chain
        return at

    def renew(self, uint32_t at, int64_t expires):
        """Let the lease run until `expires`, if that is later. Constant time."""
        self.row(at)
        self.leases[at].expires = max(expires, self.leases[at].expires)

    def due(self, int64_t now):
        """Return a session whose lease has run out, or 0; `end` it, or it is returned again.

        It is seen up to 128 ms later than it is due. Amortised constant time.
        """
        cdef int64_t passed = now >> TICK   # ticks before this one are over
        cdef uint32_t at, following
        self.live()
        if passed - self.tick > SLOTS:
            self.tick = passed - SLOTS     # a full turn sees every lease
        while self.tick < passed:
            at = self.slots[self.tick & (SLOTS - 1)]
            while at:
                following = self.leases[at].next
                if self.leases[at].expires >> TICK < passed:
                    return at
                if (self.leases[at].expires ^ self.tick << TICK) >> TICK & (SLOTS - 1):
                    self.unhang(at)
                    self.schedule(at, self.leases[at].expires)
                at = following
            self.tick += 1
        return 0

    def end(self, uint32_t at, int64_t reuse_at):
        """End a session: all its IDs cool until `reuse_at`, then its number is free.

        Returns how many IDs that were. Time in proportion to them.
        """
        cdef Row *row = self.row(at)
        cdef uint64_t released
        row.life = row.life & ~<uint64_t>3 | ENDING
        keep_order()
        released = pool_release_owner(self.live(), at, reuse_at)
        keep_order()
        row.life = row.life & ~<uint64_t>3 | FREE
        self.unhang(at)
        self.unchain(at)
        self.free_row(at)
        return released

    def raise_cooldown(self, uint32_t at, int64_t cooldown):
        """Let the IDs cool for at least so long when the session expires."""
        cdef Row *row = self.row(at)
        row.cooldown = max(row.cooldown, cooldown)

    def set_seq(self, uint32_t at, uint64_t seq):
        """Note the number of the last change that was applied."""
        self.row(at).seq = seq

    def seq(self, uint32_t at):
        """Return the number of the last change that was applied."""
        return self.row(at).seq

    def generation(self, uint32_t at):
        """Return the session's generation."""
        return self.row(at).life >> 2

    def ttl(self, uint32_t at):
        """Return for how long the session may be renewed at once."""
        return self.row(at).ttl

    def cooldown(self, uint32_t at):
        """Return for how long its IDs cool when it expires."""
        return self.row(at).cooldown

    def opened_at(self, uint32_t at):
        """Return when it was opened."""
        return self.row(at).opened_at

    def expires(self, uint32_t at):
        """Return when its lease runs out."""
        self.row(at)
        return self.leases[at].expires

    def label(self, uint32_t at):
        """Return its label."""
        cdef Row *row = self.row(at)
        cdef const uint8_t[:] label = row.label
        return bytes(label).rstrip(b"\0").decode("utf-8", "replace")

    def anonymous(self, uint32_t at):
        """Tell whether it is an anonymous one."""
        return self.row(at).anonymous == 1

    def numbers(self, uint32_t most=0xFFFFFFFF, uint32_t after=0):
        """Return the numbers of open sessions above `after`, at most `most`, in order."""
        cdef uint32_t at
        found = []
        self.live()
        for at in range(after + 1, self.opened + 1):
            if len(found) == most:
                break
            if state_of(&self.rows[at]) != FREE:
                found.append(at)
        return found

    def __len__(self):
        """Return how many sessions are open, anonymous ones included."""
        return self.count

    cdef int start(self, uint32_t at, int64_t expires) except -1:
        self.schedule(at, expires)
        self.chain(at)
        return 0

    cdef void free_row(self, uint32_t at) noexcept:
        self.leases[at].next, self.unused = self.unused, at

    # ---- The wheel

    cdef void schedule(self, uint32_t at, int64_t expires) noexcept:
        cdef Lease *lease = &self.leases[at]
        lease.expires = expires
        lease.slot = max(expires >> TICK, self.tick) & (SLOTS - 1)
        lease.prev, lease.next = 0, self.slots[lease.slot]
        if lease.next:
            self.leases[lease.next].prev = at
        self.slots[lease.slot] = at

    cdef void unhang(self, uint32_t at) noexcept:
        cdef Lease *lease = &self.leases[at]
        if lease.next:
            self.leases[lease.next].prev = lease.prev
        if lease.prev:
            self.leases[lease.prev].next = lease.next
        else:
            self.slots[lease.slot] = lease.next

    # ---- The chains: a hash table of tokens

    cdef int chain(self, uint32_t at) except -1:
        self.count += 1
        if self.rows[at].anonymous:
            return 0
        if self.count > self.mask:
            self.grow_heads(2 * (<uint64_t>self.mask + 1))
        self.insert(at)
        return 0

    cdef void insert(self, uint32_t at) noexcept:
        cdef uint32_t *head = &self.heads[self.rows[at].digest[0] & self.mask]
        self.leases[at].chain, head[0] = head[0], at

    cdef void unchain(self, uint32_t at) noexcept:
        cdef uint32_t *place
        self.count -= 1
        if not self.rows[at].anonymous:
            place = &self.heads[self.rows[at].digest[0] & self.mask]
            while place[0] != at:
                place = &self.leases[place[0]].chain
            place[0] = self.leases[at].chain

    cdef int grow_heads(self, uint64_t n) except -1:
        cdef uint32_t *old = self.heads
        cdef uint64_t was = <uint64_t>self.mask + 1 if old != NULL else 0
        cdef uint64_t i
        cdef uint32_t at, following
        self.heads = <uint32_t *>calloc(n, sizeof(uint32_t))
        if self.heads == NULL:
            self.heads = old
            raise MemoryError("no memory for sessions")
        self.mask = n - 1
        for i in range(was):
            at = old[i]
            while at:
                following = self.leases[at].chain
                self.insert(at)
                at = following
        free(old)
        return 0
