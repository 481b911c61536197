"""The registry: the pool of a manager and the rules by which its IDs come and go.

It has no clock: every call that depends on time takes ``now``, in milliseconds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ._alloc import Allocator
from .errors import Exhausted, InvalidArgument, LimitExceeded
from .wire import MAX_COOLDOWN_MS, IDs

__all__ = ["Registry", "Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator may choose.

    Args:
        first: the lowest ID of the pool. The default pool, 2³⁰ … 2³¹-1, fits every type that a
            model's CORRID control may have, and stays clear of the small numbers that
            unmanaged clients pick by hand.
        capacity: how many IDs the pool has.
        cooldown_ms: the least time in milliseconds for which an ID that was given back is not
            issued again: late and duplicated packets of its former user must have died out.
        unended_cooldown_ms: the same for an ID that comes back without a word on END or on a time
            that would do: long enough for most models to forget an idle sequence.
        max_count: the most IDs that one request may take or give back.
        fresh: there is no past: no ID of this pool was ever issued. Issuing then begins at
            ``first``, otherwise at a random place, since a registry that has just started does
            not know which IDs are still in use.

    Raises:
        InvalidArgument: a value out of its bounds; the message names it.
    """

    first: int = 2**30
    capacity: int = 2**30
    cooldown_ms: int = 5_000
    unended_cooldown_ms: int = 120_000
    max_count: int = 100_000
    fresh: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("first", 1, 2**63 - 1),
            ("capacity", 1, 2**38),
            ("cooldown_ms", 0, MAX_COOLDOWN_MS),
            ("unended_cooldown_ms", 0, MAX_COOLDOWN_MS),
            ("max_count", 1, 1_000_000),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise InvalidArgument(f"{name}={value!r} is not an integer of {low} to {high}")
        if type(self.fresh) is not bool:
            raise InvalidArgument(f"fresh={self.fresh!r} is neither true nor false")
        if self.first + self.capacity > 2**63:
            raise InvalidArgument(
                f"first={self.first} and capacity={self.capacity} reach beyond 2**63-1, the"
                " highest ID that gRPC carries"
            )


class Registry:
    """A pool under `Settings`, in memory."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        start = settings.first
        if not settings.fresh:
            start += random.SystemRandom().randrange(settings.capacity)
        # Width 1: every ID for itself, so that nothing is pinned. The manager's cost is the
        # round trip, not the allocator.
        self.pool = Allocator(settings.capacity, settings.first, block=1, start=start)

    def acquire(self, count: int, now: int) -> IDs:
        """Issue ``count`` IDs, all or none.

        Raises:
            LimitExceeded: more than ``max_count``.
            Exhausted: the pool cannot give so many now.
        """
        if count > self.settings.max_count:
            raise LimitExceeded(
                f"count={count} is more than one request may take: {self.settings.max_count}"
            )
        try:
            return self.pool.acquire_many(count, now=now)
        except Exhausted:
            raise Exhausted(self._why_exhausted(count, now)) from None

    def _why_exhausted(self, count: int, now: int) -> str:
        pool, due = self.pool, self.pool.next_due
        when = "none is cooling" if due is None else f"the next is due in {(due - now) / 1e3:.1f} s"
        return (
            f"cannot issue {count} of {pool.capacity} IDs: {pool.active} are held,"
            f" {pool.cooling} are cooling; {when}"
        )

    def release(
        self, ids: IDs, now: int, *, ended: bool = False, cooldown_ms: int | None = None
    ) -> int:
        """Take ``ids`` back, all or none, and return how many they were.

        Args:
            ids: held IDs, each once.
            now: the time in milliseconds.
            ended: every sequence's END was answered, so only the least cooldown is due.
            cooldown_ms: else, the time in milliseconds after which Triton has certainly
                forgotten these sequences; ``unended_cooldown_ms`` if it is not said.

        Raises:
            InvalidArgument: no IDs.
            LimitExceeded: more than ``max_count``, or too long a time.
            OutOfRange, NotHeld, Duplicate: an ID that cannot be given back.
        """
        if len(ids) == 0:
            raise InvalidArgument("no correlation IDs to release: say which")
        if len(ids) > self.settings.max_count:
            raise LimitExceeded(
                f"{len(ids)} IDs are more than one request may release: {self.settings.max_count}"
            )
        if cooldown_ms is None:
            cooldown_ms = self.settings.unended_cooldown_ms
        if cooldown_ms > MAX_COOLDOWN_MS:
            raise LimitExceeded(f"cooldown_ms={cooldown_ms} is more than {MAX_COOLDOWN_MS}")
        cooldown = self.settings.cooldown_ms
        if not ended:
            cooldown = max(cooldown, cooldown_ms)
        self.pool.release_many(ids, reuse_at=now + cooldown)
        return len(ids)
