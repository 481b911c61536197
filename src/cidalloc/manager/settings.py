"""The settings of a registry: their defaults and bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InvalidArgument, LimitExceeded
from ..protocol import MAX_COOLDOWN_MS
from . import slices

__all__ = ["Settings"]

_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a registry. Times are milliseconds.

    Args:
        first: the lowest ID of the pool. The default pool, 2³⁰ … 2³¹-1, fits every data type of
            CORRID, and has none of the small numbers that clients without a manager choose.
        capacity: the number of IDs in the pool.
        slice: the part of the pool that this registry has, so that several servers share no ID;
            empty for all of it. "3/64" is the fourth of 64 equal parts, "auto/64" the one that the
            host name's ordinal says, as in a StatefulSet (see `on_host`). "random" is one of 2³⁸
            pools of 2²⁴ IDs from 2⁶² on, drawn when the file is made.
        cooldown_ms: the shortest time between the release of an ID and its next use. Late and
            duplicated packets of its former user must have died out.
        unended_cooldown_ms: the same for an ID that is released without ``ended`` and without a
            cooldown. Most models must have forgotten an idle sequence.
        max_cooldown_ms: the longest cooldown that a client may ask for. After a power cut all IDs
            that were in use cool for the longest time that any client asked for, at most this.
        min_ttl_ms, max_ttl_ms: the times to live that a session may ask for.
        grace_ms: for how much longer a silent session is kept.
        max_count: the most IDs that one request may acquire or release.
        max_sessions: the most open sessions.
        max_held: the most IDs that one session may hold.
        max_anonymous: the most IDs that may be held without a session.
        anonymous_age_ms: the time after which an ID that is held without a session is released; it
            may be an eighth later.
        state: the folder of the registry's file. If it is empty, the registry is in memory and ends
            with its process.
        fresh: no ID of this pool was ever issued, so issuing begins at ``first``. Otherwise a new
            registry does not know which IDs are in use. It begins at a random place of its pool, or
            waits for as long as a session may live, if the pool is small or a slice. With an
            existing file, which knows its past, this setting has no effect.

    Raises:
        InvalidArgument: a value is out of its bounds; the message names it.
    """

    first: int = 2**30
    capacity: int = 2**30
    slice: str = ""
    cooldown_ms: int = 5_000
    unended_cooldown_ms: int = 120_000
    max_cooldown_ms: int = MAX_COOLDOWN_MS
    min_ttl_ms: int = 1_000
    max_ttl_ms: int = 600_000
    grace_ms: int = 10_000
    max_count: int = 100_000
    max_sessions: int = 1_000_000
    max_held: int = 1_000_000
    max_anonymous: int = 100_000
    anonymous_age_ms: int = _DAY_MS
    state: str = ""
    fresh: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("first", 1, 2**63 - 1),
            ("capacity", 1, 2**38),
            ("cooldown_ms", 0, MAX_COOLDOWN_MS),
            ("unended_cooldown_ms", 0, MAX_COOLDOWN_MS),
            ("max_cooldown_ms", 0, MAX_COOLDOWN_MS),
            ("min_ttl_ms", 1, 30 * _DAY_MS),
            ("max_ttl_ms", 1, 30 * _DAY_MS),
            ("grace_ms", 0, _DAY_MS),
            ("max_count", 1, 1_000_000),
            ("max_sessions", 1, 1_000_000),
            ("max_held", 1, 2**38),
            ("max_anonymous", 0, 2**38),
            ("anonymous_age_ms", 1_000, 365 * _DAY_MS),
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
        slices.check(self.slice, self.capacity)
        if self.slice == slices.RANDOM and (self.first, self.capacity) != (2**30, 2**30):
            raise InvalidArgument(
                f"slice=random has a pool of its own: first={self.first} and"
                f" capacity={self.capacity} must have their defaults, {2**30} and {2**30}"
            )
        if self.min_ttl_ms > self.max_ttl_ms:
            raise InvalidArgument(
                f"min_ttl_ms={self.min_ttl_ms} is more than max_ttl_ms={self.max_ttl_ms}"
            )
        for name in ("cooldown_ms", "unended_cooldown_ms"):
            if getattr(self, name) > self.max_cooldown_ms:
                raise InvalidArgument(
                    f"{name}={getattr(self, name)} is more than"
                    f" max_cooldown_ms={self.max_cooldown_ms}"
                )
        if type(self.state) is not str or (self.state and not Path(self.state).is_absolute()):
            raise InvalidArgument(f"state={self.state!r} is not the absolute path of a folder")

    def on_host(self, host: str) -> Settings:
        """Return the settings on the host of this name, where ``auto/N`` becomes ``K/N``.

        Raises:
            InvalidArgument: the name has no ordinal below N.
        """
        return replace(self, slice=slices.on_host(self.slice, host))

    def cooldown(self, asked_ms: int | None) -> int:
        """Return for how long an ID cools if a client asks for ``asked_ms``; None asks for nothing.

        Raises:
            LimitExceeded: it asks for more than ``max_cooldown_ms``.
        """
        asked = self.unended_cooldown_ms if asked_ms is None else asked_ms
        if asked > self.max_cooldown_ms:
            raise LimitExceeded(
                f"cooldown_ms={asked} is more than {self.max_cooldown_ms}, the setting"
                " max_cooldown_ms"
            )
        return max(asked, self.cooldown_ms)

    def check_ttl(self, ttl_ms: int) -> None:
        """Raise `LimitExceeded` if no session may have this time to live."""
        if not self.min_ttl_ms <= ttl_ms <= self.max_ttl_ms:
            raise LimitExceeded(
                f"ttl_ms={ttl_ms} is not within {self.min_ttl_ms} to {self.max_ttl_ms}, the"
                " settings min_ttl_ms and max_ttl_ms"
            )
