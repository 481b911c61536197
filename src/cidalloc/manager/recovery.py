"""Recovery: a new pool and a new table of sessions over what is in a storage.

The storage may be new, or what a process left behind that was killed, or what is on the disk after
a power cut, of which any store since the last sync may be missing; or a copy of a file, or an older
content of it that was put back, which lacks all that was stored after it was made.
"""

from __future__ import annotations

import secrets

from .._alloc import Allocator
from ..errors import RegistryCorrupt
from ..protocol import MAX_COOLDOWN_MS
from . import slices
from .sessions import Session, Sessions
from .settings import Settings
from .storage.file import Storage
from .storage.file_format import VALUE_BITS, Shape, Word

__all__ = ["recover", "shape_for", "storage_in_memory", "waiting_for"]

_SMALL = 2**24  # with fewer IDs, a random place to begin at is likely to meet IDs in use


def shape_for(settings: Settings) -> Shape:
    """Return the pool for the settings. Without a known past it begins at a random place.

    Args:
        settings: those on this host; see `Settings.on_host`.
    """
    first, capacity = slices.pool(settings.slice, settings.first, settings.capacity)
    offset = 0 if settings.fresh or capacity < _SMALL else secrets.randbelow(capacity)
    return Shape(first, capacity, offset=offset, slice=settings.slice)


def waiting_for(settings: Settings) -> int:
    """Return for how many milliseconds a new registry issues nothing.

    A slice may have had another registry before. A random one that was just drawn has not.
    """
    fixed = settings.slice not in ("", slices.RANDOM)
    if settings.fresh or not (fixed or settings.capacity < _SMALL):
        return 0
    return settings.max_ttl_ms + settings.grace_ms


def storage_in_memory(settings: Settings, now: int, boot: bytes) -> Storage:
    """Return a new storage in memory."""
    store = Storage.memory(shape_for(settings))
    store.boot = boot
    store.wait(now, waiting_for(settings))
    return store


def recover(
    store: Storage, settings: Settings, now: int, boot: bytes, live_snapshot: bool
) -> tuple[Allocator, Sessions, list[Session]]:
    """Return the pool and the sessions in a storage, and the sessions to end first of all.

    Args:
        store: the storage.
        settings: what the operator chose.
        now: the time.
        boot: 16 bytes that identify this boot of the machine.
        live_snapshot: the storage is a copy that was taken while another process wrote it.

    Raises:
        RegistryCorrupt: the records are damaged. Then nothing was written.
    """
    generation, horizon = store.read(Word.GENERATION), store.read(Word.HORIZON)
    is_copy = store.is_copy
    after_power_loss = is_copy or store.boot != boot
    if after_power_loss:
        # The times are of another clock, and the last stores may be lost. Generations leap, so that
        # none comes twice, and so does the number of changes. All IDs that sessions may have had
        # cool for long enough.
        generation = (generation | 2**32 - 1) + 1
    shape, floor = store.shape, 0
    if after_power_loss:
        floor = now + max(horizon, settings.cooldown_ms)
    try:
        rows = Sessions.read(store, generation, after_power_loss)
        pool = Allocator(
            shape.capacity,
            shape.first,
            1,  # each ID is a block of its own: none has to wait for others
            buffer=store.records,
            ready=store.ready_ids,
            holders=rows.holders,
            latest=now + max(MAX_COOLDOWN_MS, horizon),
            reuse_at=floor if after_power_loss else None,
            live_snapshot=live_snapshot,
            sealed=True,
        )
    except RegistryCorrupt as error:
        raise RegistryCorrupt(f"{store.path}: {shape.with_id(error)}") from None
    store.write(Word.GENERATION, generation)
    if after_power_loss:
        store.write(Word.CHANGES, (store.read(Word.CHANGES) | 2**32 - 1) + 1)
    if is_copy:  # what was issued since it was made is unknown
        store.write(Word.COPY, secrets.randbits(VALUE_BITS) | 1)
        store.wait(now, max(horizon, settings.max_ttl_ms + settings.grace_ms))
    elif after_power_loss and store.read(Word.ISSUES_FROM):
        store.wait(now, store.read(Word.WAIT))
    sessions = Sessions(store, pool)
    store.sign()
    ending = sessions.recover(rows, now, settings.grace_ms, floor)
    if after_power_loss:
        store.sync()
        store.boot = boot
        store.adopt()  # last: until then it is known as a copy
    return pool, sessions, ending
