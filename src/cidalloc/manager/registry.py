"""The registry: the rules by which IDs and sessions come and go.

It has no clock: every call takes ``now``, in milliseconds since the machine was started. It does
not take turns either: whoever has several threads sees to that. `docs/design.md` says what always
holds, and why no fault can undo it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from .._alloc import Allocator
from ..errors import (
    Duplicate,
    InvalidArgument,
    LimitExceeded,
    NotOwner,
    RegistryCorrupt,
    Repeated,
    SessionUnknown,
    Unavailable,
)
from ..protocol import IDs
from .records import NO_BOOT, Records, shape_for, waiting_for
from .settings import Settings
from .storage.file import Storage
from .storage.file_format import Word

__all__ = ["SHOWN", "Grant", "Registry"]

_SLICES = 8  # anonymous IDs of so much of their age share a session
_LABEL_BYTES = 64
_LOOKS = 50  # at a file that somebody writes
SHOWN = 100  # sessions in a status


@dataclass(frozen=True, slots=True)
class Grant:
    """What OPEN grants: the session's generation, and for how many milliseconds it lives."""

    generation: int
    ttl_ms: int


class Registry:
    """A pool and its sessions under `Settings`, in memory.

    A session is named by its token, 16 bytes that its client made; the registry keeps only a
    digest. Every call with a token that the registry knows renews the session's lease, but for
    `open`. Changes carry ``seq``, which rises within a session: a change that was applied already,
    or that comes after a later one, is refused, whatever the network did to it.

    Args:
        settings: what the operator chose.
        now: the time.
        store: where the records are; in memory if it is left out.
        boot: the 16 bytes that tell this boot of the machine from others.
        live_snapshot: the records are a copy that was taken while another process changed them.

    Any call may raise `Forked` in a child process, and `Unavailable` after `close`.
    """

    def __init__(
        self,
        settings: Settings,
        now: int,
        store: Storage | None = None,
        boot: bytes = NO_BOOT,
        live_snapshot: bool = False,
    ) -> None:
        self.settings = settings
        self.expired = 0
        self.released: Counter[str] = Counter()
        self.acquired = 0
        self._records = records = Records(settings, now, store, boot, live_snapshot)
        self.store, self.pool, self.sessions = records.store, records.pool, records.sessions
        self._now = self._opened_at = now
        self._closed = False
        for at in records.ending:
            self._end(at, self.sessions.cooldown(at))
        self._anonymous = [at for at in self.sessions.numbers() if self.sessions.anonymous(at)]

    @classmethod
    def in_file(cls, path: Path, settings: Settings, now: int, boot: bytes) -> Registry:
        """Return the registry in the file at `path`, which is made if it is not there.

        Raises what `Storage.open` does.
        """
        store = Storage.open(path, shape_for(settings), boot=boot, waiting_ms=waiting_for(settings))
        try:
            return cls(settings, now, store, boot)
        except BaseException:
            store.close()
            raise

    @classmethod
    def look(cls, path: Path, now: int, boot: bytes) -> Registry:
        """Return a copy in memory of the registry in a file, which is only read.

        A manager may be writing the file; a look that falls into a change of it is repeated. As a
        large file at a busy manager never rests, later looks do not mind when IDs and the session
        that holds them were copied at different times.
        """
        for attempt in range(_LOOKS):
            store = Storage.look(path)
            busy = store.header[Word.PID] != 0
            if busy:
                store.header[Word.GENERATION] |= 2**32 - 1  # sessions may be opened meanwhile
            settings = Settings(first=store.shape.first, capacity=store.shape.capacity)
            try:
                return cls(settings, now, store, boot, busy and attempt >= _LOOKS // 10)
            except RegistryCorrupt:
                if attempt == _LOOKS - 1 or not busy:
                    raise
        raise AssertionError("not reached")

    # ---- Sessions

    def open(
        self,
        token: bytes,
        now: int,
        *,
        ttl_ms: int,
        cooldown_ms: int | None = None,
        label: str = "",
    ) -> Grant:
        """Open a session, or return what was granted when this token opened it: no renewal.

        Args:
            token: 16 bytes, random.
            now: the time.
            ttl_ms: the session ends when nothing was heard of it for so long and the grace time.
            cooldown_ms: for how long its IDs cool then, at least; see `acquire`.
            label: what people see in a status: at most 64 bytes of UTF-8 that can be printed.

        Raises:
            LimitExceeded: a time outside what the settings allow, or too many sessions.
            InvalidArgument: a label that is none.
        """
        self._advance(now)
        digest = self._records.digest(token)
        at = self.sessions.find(digest)
        if at:
            return Grant(self.sessions.generation(at), self.sessions.ttl(at))
        limits = self.settings
        if not limits.min_ttl_ms <= ttl_ms <= limits.max_ttl_ms:
            raise LimitExceeded(
                f"ttl_ms={ttl_ms} is not within {limits.min_ttl_ms} to {limits.max_ttl_ms}, the"
                " settings min_ttl_ms and max_ttl_ms"
            )
        name = label.encode("utf-8", "surrogatepass")
        if len(name) > _LABEL_BYTES or not label.isprintable():
            raise InvalidArgument(
                f"label={label!r} is not at most {_LABEL_BYTES} bytes of printable text"
            )
        if len(self.sessions) - len(self._anonymous) >= limits.max_sessions:
            raise LimitExceeded(
                f"{limits.max_sessions} sessions are open, as many as max_sessions allows"
            )
        cooldown = self._cooldown(cooldown_ms if cooldown_ms is not None else 0)
        self._records.reckon(ttl_ms + limits.grace_ms + cooldown)
        at = self._records.open(digest, self._now, ttl_ms, ttl_ms + limits.grace_ms, cooldown, name)
        return Grant(self.sessions.generation(at), ttl_ms)

    def renew(self, token: bytes, now: int, *, cooldown_ms: int | None = None) -> Grant:
        """Renew a session's lease. Constant time.

        Args:
            token: the session's.
            now: the time.
            cooldown_ms: for how long, at least, all its IDs cool if it expires; as for `acquire`.

        Raises:
            SessionUnknown: it was closed, has expired, or never was.
            LimitExceeded: too long a time.
        """
        at = self._renewed(token, now)
        if cooldown_ms is not None:
            self._raise_cooldown(at, cooldown_ms)
        return Grant(self.sessions.generation(at), self.sessions.ttl(at))

    def close_session(self, token: bytes, now: int, *, ended: bool = False) -> int:
        """End a session and return how many IDs it held; they cool as if it had expired.

        Args:
            token: the session's.
            now: the time.
            ended: nothing uses any of them, so only the least cooldown is due.

        Raises:
            SessionUnknown: it has ended already, or never was.
        """
        at = self._renewed(token, now)
        cooldown = self.settings.cooldown_ms if ended else self.sessions.cooldown(at)
        released = self._end(at, cooldown)
        self.released["ended" if ended else "cooled"] += released
        return released

    def held(self, token: bytes, now: int, *, seq: int | None = None) -> IDs:
        """Return the IDs that a session holds, in order. With ``seq``, none before may come later.

        Raises:
            SessionUnknown: no such session.
            Repeated: ``seq`` is not above the last one.
        """
        at = self._renewed(token, now)
        if seq is not None:
            self._check_seq(at, seq)
            self.sessions.set_seq(at, seq)
        return np.sort(self.pool.held_by(at))

    # ---- IDs

    def acquire(
        self,
        count: int,
        now: int,
        *,
        token: bytes | None = None,
        seq: int = 0,
        cooldown_ms: int | None = None,
    ) -> IDs:
        """Issue ``count`` IDs, all or none.

        Args:
            count: how many.
            now: the time.
            token: the session that will hold them; without one nobody does, and anybody may
                release them.
            seq: with a token: rises with each change of that session.
            cooldown_ms: for how long, at least, all IDs of the session cool if it expires: after
                that Triton has certainly forgotten these sequences. ``unended_cooldown_ms`` if it
                is not said.

        Raises:
            SessionUnknown: no such session.
            Repeated: ``seq`` is not above the last one.
            LimitExceeded: more than a setting allows.
            Exhausted: the pool cannot give so many now.
            Unavailable: the disk is full.
        """
        limits = self.settings
        at = self._renewed(token, now) if token is not None else self._anonymous_session(now)
        if token is not None:
            self._check_seq(at, seq)
        if count > limits.max_count:
            raise LimitExceeded(
                f"count={count} is more than one request may take: max_count={limits.max_count}"
            )
        if token is None and self.anonymous + count > limits.max_anonymous:
            raise LimitExceeded(
                f"{self.anonymous} IDs are held without a session, and {count} more would be more"
                f" than max_anonymous={limits.max_anonymous}: open a session"
            )
        if token is not None and self.pool.held_count(at) + count > limits.max_held:
            raise LimitExceeded(
                f"this session holds {self.pool.held_count(at)} IDs, and {count} more would be"
                f" more than max_held={limits.max_held}"
            )
        if token is not None:
            self._raise_cooldown(at, cooldown_ms)
        ids = self._records.issue(count, at, self._now)
        if token is not None:
            self.sessions.set_seq(at, seq)
        self.acquired += count
        return ids

    def release(
        self,
        ids: IDs,
        now: int,
        *,
        token: bytes | None = None,
        seq: int = 0,
        ended: bool = False,
        cooldown_ms: int | None = None,
    ) -> int:
        """Take ``ids`` back, all or none, and return how many they were.

        Args:
            ids: held IDs, each once.
            now: the time.
            token: the session that holds them; without one they are IDs that nobody's session does.
            seq: with a token: rises with each change of that session.
            ended: every sequence's END was answered, so only the least cooldown is due.
            cooldown_ms: else, the time after which Triton has certainly forgotten these sequences;
                ``unended_cooldown_ms`` if it is not said.

        Raises:
            InvalidArgument: no IDs.
            LimitExceeded: more than ``max_count``, or too long a time.
            SessionUnknown: no such session.
            Repeated: ``seq`` is not above the last one.
            OutOfRange, NotHeld, NotOwner, Duplicate: an ID that cannot be given back.
        """
        at = 0
        if token is not None:
            at = self._renewed(token, now)
            self._check_seq(at, seq)
        else:
            self._advance(now)
        if len(ids) == 0:
            raise InvalidArgument("no correlation IDs to release: say which")
        if len(ids) > self.settings.max_count:
            raise LimitExceeded(
                f"{len(ids)} IDs are more than one request may release:"
                f" max_count={self.settings.max_count}"
            )
        cooldown = self._cooldown(cooldown_ms)
        if ended:
            cooldown = self.settings.cooldown_ms
        if token is not None:
            self._records.reckon(cooldown)
            self.pool.release_many(ids, at, self._now + cooldown)
            self.sessions.set_seq(at, seq)
        else:
            self._release_anonymous(ids, cooldown)
        self.released["ended" if ended else "cooled"] += len(ids)
        return len(ids)

    # ---- The whole

    def tick(self, now: int) -> Allocator:
        """Let time pass: end the sessions whose lease has run out. Returns the pool."""
        self._advance(now)
        return self.pool

    @property
    def anonymous(self) -> int:
        """How many IDs are held without a session."""
        return sum(self.pool.held_count(at) for at in self._anonymous)

    @property
    def uuid(self) -> UUID:
        """The registry's identity, which it keeps for as long as its file."""
        return self._records.uuid

    def status(self, now: int, sessions: int = SHOWN) -> dict[str, Any]:
        """Return what a person or a program wants to know, with at most so many sessions."""
        self._advance(now)
        pool, shape = self.pool, self.store.shape
        pool.acquire_many(0, now=self._now)  # so that it knows the time
        cooling = pool.cooling
        return {
            "pool": {"first": shape.first, "capacity": shape.capacity, "block": shape.block},
            "held": pool.active,
            "cooling": cooling,
            "free": shape.capacity - pool.active - cooling,
            "inactive": pool.inactive,
            "peak": pool.peak,
            "high_water": pool.high_water,
            "anonymous": self.anonymous,
            "sessions": self.session_list(sessions),
            "sessions_total": len(self.sessions) - len(self._anonymous),
            "sessions_expired": self.expired,
            "acquired": self.acquired,
            "released": {how: self.released[how] for how in ("ended", "cooled", "expired")},
            "uptime_s": (self._now - self._opened_at) / 1000,
            "registry": str(self.uuid),
            "file": str(self.store.path) if self.store.path else None,
        }

    def session_list(self, most: int) -> list[dict[str, Any]]:
        """Return what is known of at most so many sessions; those with an owner come first."""
        table, found = self.sessions, []
        for at in table.numbers(most + len(self._anonymous)):
            if not table.anonymous(at):
                found.append(
                    {
                        "label": table.label(at),
                        "held": self.pool.held_count(at),
                        "age_s": (self._now - table.opened_at(at)) / 1000,
                        "expires_in_s": (table.expires(at) - self._now) / 1000,
                    }
                )
        return found[:most]

    def close(self) -> None:
        """Let go of the file: another process may write it from now on. Nothing is given back."""
        if not self._closed:
            self._closed = True
            self.store.close()

    def _check(self) -> None:
        """Audit everything; raises AssertionError. Time in proportion to what was ever opened."""
        self.pool._check()
        held = sum(self.pool.held_count(at) for at in self.sessions.numbers())
        assert held == self.pool.active, "somebody holds IDs who is no session"

    # ---- Inside

    def _advance(self, now: int) -> None:
        if self._closed:
            raise Unavailable("this registry is closed")
        self._now = max(self._now, now)
        while at := self.sessions.due(self._now):
            anonymous = self.sessions.anonymous(at)
            self.released["expired"] += self._end(at, self.sessions.cooldown(at))
            self.expired += not anonymous
            if anonymous:
                self._anonymous.remove(at)

    def _end(self, at: int, cooldown: int) -> int:
        return self.sessions.end(at, self._now + max(cooldown, self.settings.cooldown_ms))

    def _renewed(self, token: bytes, now: int) -> int:
        """Return the number of a session after its lease was renewed."""
        self._advance(now)
        at = self.sessions.find(self._records.digest(token))
        if not at:
            raise SessionUnknown(
                "no such session: it was closed, has expired, or is one of another registry"
            )
        self.sessions.renew(at, self._now + self.sessions.ttl(at) + self.settings.grace_ms)
        return at

    def _check_seq(self, at: int, seq: int) -> None:
        last = self.sessions.seq(at)
        if seq <= last:
            raise Repeated(f"seq={seq} is not above {last}, the last one that was applied")

    def _raise_cooldown(self, at: int, asked: int | None) -> None:
        """See that the IDs of a session cool for at least so long if it expires."""
        cooldown = self._cooldown(asked)
        if cooldown > self.sessions.cooldown(at):
            ttl = self.sessions.ttl(at)
            self._records.reckon(ttl + self.settings.grace_ms + cooldown)
            self.sessions.raise_cooldown(at, cooldown)

    def _cooldown(self, asked: int | None) -> int:
        if asked is None:
            asked = self.settings.unended_cooldown_ms
        if asked > self.settings.max_cooldown_ms:
            raise LimitExceeded(
                f"cooldown_ms={asked} is more than {self.settings.max_cooldown_ms}, the setting"
                " max_cooldown_ms"
            )
        return max(asked, self.settings.cooldown_ms)

    def _anonymous_session(self, now: int) -> int:
        """Return the session that holds what is taken without one at about this time."""
        self._advance(now)
        age = self.settings.anonymous_age_ms
        if self._anonymous:
            at = self._anonymous[-1]
            # Not by when it was opened, which may have been before a reboot.
            if self.sessions.expires(at) - self._now >= age:
                return at
        lease = age + age // _SLICES
        cooldown = self._cooldown(None)
        # Nobody knows for how long these are in use. If a power cut makes us forget one, it cools
        # for no shorter than if it had been a session's.
        self._records.reckon(self.settings.max_ttl_ms + self.settings.grace_ms + cooldown)
        at = self._records.open(b"", self._now, lease, lease, cooldown, b"")
        self._anonymous.append(at)
        return at

    def _release_anonymous(self, ids: IDs, cooldown: int) -> None:
        owners = [self.pool.owner_of(cid) for cid in ids.tolist()]
        for cid, owner in zip(ids.tolist(), owners, strict=True):
            if owner not in self._anonymous:
                raise NotOwner(f"ID {cid} belongs to a session, which alone releases it")
        reuse_at = self._now + cooldown
        self._records.reckon(cooldown)  # not before it is known that they can be released
        if len(set(owners)) == 1:
            self.pool.release_many(ids, owners[0], reuse_at)
            return
        if len(np.unique(ids)) < len(ids):
            raise Duplicate("an ID stands twice in this call")
        for owner in set(owners):
            part = np.array([owner == each for each in owners])
            self.pool.release_many(ids[part], owner, reuse_at)
