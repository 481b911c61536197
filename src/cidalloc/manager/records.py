"""The records of a registry: a pool and a table of sessions over one store.

Here is what a registry does whatever its rules are: it begins, it goes on after any fault, it grows
before it uses what it grew into, and it notes for how long an ID may be in use before it is.
"""

from __future__ import annotations

import hashlib

from .._alloc import Allocator
from ..errors import Exhausted, RegistryCorrupt, Unavailable
from ..protocol import MAX_COOLDOWN_MS, IDs
from ._sessions import Sessions
from .settings import Settings
from .storage.file import Storage
from .storage.file_format import Kind, Shape, Word

__all__ = ["NO_BOOT", "Records", "shape_for", "waiting_for"]

NO_BOOT = bytes(16)
_SMALL = 2**24  # a pool of fewer IDs has no place where nobody is likely to be


class Records:
    """A pool and its sessions; see `Registry` for the arguments.

    Attributes:
        store: where they are.
        pool, sessions: over the memory of `store`.
        uuid: the registry's identity; a forked child has no header to read it from.
        ending: the sessions whose end a process before had begun. To be ended first of all.
    """

    def __init__(
        self, settings: Settings, now: int, store: Storage | None, boot: bytes, live_snapshot: bool
    ) -> None:
        waiting = 0
        if store is None:
            store = Storage.memory(shape_for(settings))
            store.boot, waiting = boot, waiting_for(settings)
        self.store = store
        shape, reuse_at = store.shape, None
        generation = store.header[Word.GENERATION]
        if waiting:
            store.grow(Kind.BLOCKS, shape.count)
            reuse_at = now + waiting
        elif store.boot != boot:
            # The times are of another clock, and the last stores may be lost. Generations leap, so
            # that none comes twice; then whatever a session may have had cools for long enough.
            generation = (generation | 2**32 - 1) + 1
            reuse_at = now + max(store.header[Word.HORIZON], settings.cooldown_ms)
        after_power_loss = reuse_at is not None
        try:
            holders = Sessions.holders(store.rows, store.ready_rows, generation, after_power_loss)
            self.pool = Allocator(
                shape.capacity,
                shape.first,
                shape.block,
                start=shape.start,
                buffer=store.blocks,
                ready=store.ready_blocks,
                holders=holders,
                latest=now + max(MAX_COOLDOWN_MS, store.header[Word.HORIZON]),
                reuse_at=reuse_at,
                live_snapshot=live_snapshot,
            )
        except RegistryCorrupt as error:
            raise RegistryCorrupt(f"{store.path}: {error}") from None
        store.header[Word.GENERATION] = generation
        self.sessions = Sessions(self.pool, store.rows, store.ready_rows)
        store.sign()
        self.uuid = store.uuid
        self._horizon: int = store.header[Word.HORIZON]
        self.ending = self.sessions.recover(holders, now, settings.grace_ms)
        if after_power_loss and not waiting:
            store.sync()
            store.boot = boot

    def digest(self, token: bytes) -> bytes:
        """Return what is kept of a session's token."""
        return hashlib.blake2b(token, digest_size=16, key=self.store.secret).digest()

    def reckon(self, time_ms: int) -> None:
        """Note on the disk for how long an ID may be in use from now on, before it is."""
        if time_ms > self._horizon:
            horizon = 1 << (time_ms - 1).bit_length()  # seldom, since each one is a sync
            self.store.header[Word.HORIZON] = horizon
            self.store.sync()
            self._horizon = horizon

    def open(
        self, digest: bytes, now: int, ttl: int, lease: int, cooldown: int, label: bytes
    ) -> int:
        """Return the number of a new session; all times in milliseconds."""
        header = self.store.header
        header[Word.GENERATION] += 1
        arguments = (digest, header[Word.GENERATION], now + lease, ttl, cooldown, now, label)
        at = self.sessions.open(*arguments)
        if not at:
            self.store.grow(Kind.ROWS, 1)
            self.sessions.set_ready(self.store.ready_rows)
            at = self.sessions.open(*arguments)
        assert at, "a row for every session that the settings allow"
        return at

    def issue(self, count: int, at: int, now: int) -> IDs:
        """Issue so many IDs to a session, all or none.

        Raises:
            Exhausted: the pool cannot give so many now.
            Unavailable: the disk is full.
        """
        pool, full = self.pool, None
        need = count // pool.block + 1
        # Once more if it came to the end of the pool, to go on at its beginning.
        while not full and pool.opened + need > pool.ready and pool.ready < self.store.shape.count:
            try:
                self.store.grow(Kind.BLOCKS, need)
            except Unavailable as error:
                full = error  # what was given back may do
            pool.ready = self.store.ready_blocks
        try:
            return pool.acquire_many(count, at, now)
        except Exhausted:
            raise full or Exhausted(self._why_exhausted(count, now)) from None

    def _why_exhausted(self, count: int, now: int) -> str:
        pool, due = self.pool, self.pool.next_due
        when = "none is cooling"
        if due is not None:
            when = f"the next is due in {max(due - now, 0) / 1e3:.1f} s"
        return (
            f"cannot issue {count} of {pool.capacity} IDs: {pool.active} are held,"
            f" {pool.cooling} are cooling; {when}"
        )


def shape_for(settings: Settings) -> Shape:
    """Return the pool for the settings, which begins at a random place if it has a past.

    Its blocks have a width of 1: every ID for itself, so that nothing is pinned. The manager's cost
    is the round trip, not the allocator.
    """
    if settings.fresh or settings.capacity < _SMALL:
        return Shape(settings.first, settings.capacity, 1)
    return Shape.anywhere(settings.first, settings.capacity, 1)


def waiting_for(settings: Settings) -> int:
    """Return for how many milliseconds a new registry issues nothing."""
    if settings.fresh or settings.capacity >= _SMALL:
        return 0
    return settings.max_ttl_ms + settings.grace_ms
