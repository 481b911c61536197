"""Looking into a registry: its status, and a copy of one in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RegistryCorrupt
from .registry import Registry
from .settings import Settings
from .storage.drain import is_draining
from .storage.file import Storage
from .storage.file_format import Word

__all__ = ["SHOWN", "look", "status_of"]

SHOWN = 100
"""The most open sessions in a status, and the most expired ones."""

_LOOKS = 50  # tries to copy a file that changes meanwhile


def status_of(registry: Registry, now: int, sessions: int = SHOWN) -> dict[str, Any]:
    """Return the state of a registry at the time ``now``.

    It lists at most so many open sessions, those with the most IDs in use first, then those with
    the most held; and as many that expired in the last hour, the latest first.
    """
    pool, table = registry.tick(now), registry.sessions
    pool.acquire_many(0, now=registry.now)  # so that it knows the time
    cooling = pool.cooling
    largest = table.largest(SHOWN, registry.now)[:sessions] if sessions else []
    return {
        "pool": {"first": pool.first, "capacity": pool.capacity, "block": pool.block},
        "held": pool.active,
        "used": table.used,
        "cooling": cooling,
        "free": pool.capacity - pool.active - cooling,
        "inactive": pool.inactive,
        "peak": pool.peak,
        "high_water": pool.high_water,
        "issues_in_s": registry.issues_in_ms / 1000,
        "restored": registry.store.read(Word.COPY) != 0,
        "draining": is_draining(registry.store.header),
        "anonymous": registry.anonymous,
        "waiting": registry.waiting.count(registry.now),
        "sessions": [
            {
                "label": each.label,
                "held": pool.held_count(each.number),
                "used": each.used,
                "age_s": (registry.now - each.opened_at) / 1000,
                "expires_in_s": (each.expires - registry.now) / 1000,
            }
            for each in largest
        ],
        "sessions_total": len(table.named),
        "sessions_silent": table.silent,
        "sessions_expired": registry.expired.count,
        "sessions_expired_in_use": registry.expired.in_use,
        "dead": registry.dead.count(registry.now),
        "expired": registry.expired.latest(registry.now, sessions),
        "acquired": registry.acquired,
        "released": dict(registry.released),
        "uptime_s": (registry.now - registry.opened_at) / 1000,
        "registry": str(registry.uuid),
        "file": str(registry.store.path) if registry.store.path else None,
    }


def look(path: Path, now: int, boot: bytes) -> Registry:
    """Return a copy in memory of the registry in a file. The file is only read.

    A manager may write the file meanwhile. If the copy is inconsistent, another one is made. A
    large file at a busy manager never rests, so later copies may have IDs that were copied at
    another time than their session.
    """
    for attempt in range(_LOOKS):
        store = Storage.look(path)
        busy = store.header[Word.PID] != 0
        if busy:
            # Sessions may be opened meanwhile.
            store.write(Word.GENERATION, store.read(Word.GENERATION) | 2**32 - 1)
        settings = Settings(first=store.shape.first, capacity=store.shape.capacity)
        try:
            return Registry(settings, now, store, boot, busy and attempt >= _LOOKS // 10)
        except RegistryCorrupt:
            if attempt == _LOOKS - 1 or not busy:
                raise
    raise AssertionError("not reached")
