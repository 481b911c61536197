"""The registry: the rules by which sessions are opened and end, and IDs are issued and released.

It has no clock: every call takes ``now``, in milliseconds since the machine was started. It has no
lock: its caller lets one thread at a time use it. `docs/design.md` says what always holds, and why
no fault can break it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import numpy as np

from .._alloc import Allocator
from ..errors import (
    Duplicate,
    Exhausted,
    InvalidArgument,
    LimitExceeded,
    NotHeld,
    NotOwner,
    Repeated,
    SessionUnknown,
    Unavailable,
)
from ..protocol import DEAD_WINDOW_MS, IDs
from .dead_ids import DeadIds
from .expired import ExpiredSessions
from .recovery import recover, shape_for, storage_in_memory, waiting_for
from .sessions import Session
from .settings import Settings
from .stamps import Stamps
from .storage.file import Storage
from .storage.file_format import Part, Word
from .waiting_list import WaitingList, exhausted

__all__ = ["Grant", "Registry"]

_LABEL_BYTES = 64
_SHARE = 8  # anonymous IDs of this part of their age share a session
_ANY_BOOT = b"\xff" * 16


class Grant(NamedTuple):
    """The generation of a session, and for how many milliseconds a renewal lasts."""

    generation: int
    ttl_ms: int


class Registry:
    """A pool and its sessions under `Settings`.

    A session is named by its token, 16 bytes that its client made. The registry keeps only a digest
    of it. Every call with a known token renews the session's lease, except `open`. Changes carry
    ``seq``, which rises within a session. A change whose ``seq`` is not above the last one is
    refused, so a request that the network repeats or delays acts once at most.

    Args:
        settings: what the operator chose.
        now: the time.
        store: where the records are; in memory by default.
        boot: 16 bytes that identify this boot of the machine.
        live_snapshot: the records are a copy that was taken while another process changed them.

    Attributes:
        settings, store, uuid: what they are called.
        pool, sessions: the IDs and who holds them.
        waiting: the sessions that wait for IDs.
        stamps: what clients prove with that they have seen its state.
        now: the latest time seen.
        opened_at: the time at which this object was made.
        acquired, released: IDs since then.
        expired: the sessions that expired since then.
        dead: those of their IDs that may need END.

    Of each call, ``token`` is the session's and ``now`` the time; the token of no open session
    raises `SessionUnknown`. Any call may raise `Forked` in a child process, and `Unavailable` after
    `close`.
    """

    def __init__(
        self,
        settings: Settings,
        now: int,
        store: Storage | None = None,
        boot: bytes = _ANY_BOOT,
        live_snapshot: bool = False,
    ) -> None:
        self.settings = settings
        self.expired = ExpiredSessions()
        self.dead = DeadIds()
        # No Counter, which needs memory to set a number.
        self.released = {"ended": 0, "cooled": 0, "expired": 0}
        self.acquired = 0
        self.store = store or storage_in_memory(settings, now, boot)
        self.pool, self.sessions, ending = recover(self.store, settings, now, boot, live_snapshot)
        self.waiting = WaitingList(self.pool)
        self.stamps = Stamps(self.store)
        self.uuid: UUID = self.store.uuid  # a forked child has no header to read it from
        self._horizon = self.store.read(Word.HORIZON)
        self._issues_from = self.store.read(Word.ISSUES_FROM)
        self._secret = self.store.secret
        self.now = self.opened_at = now
        for session in ending:
            self._end(session, session.cooldown)
        self._closed = False

    @classmethod
    def in_file(cls, path: Path, settings: Settings, now: int, boot: bytes) -> Registry:
        """Return the registry in the file at `path`, which is made if it does not exist.

        Raises what `Storage.open` does.
        """
        wait_ms = waiting_for(settings)
        store = Storage.open(path, shape_for(settings), boot=boot, now=now, wait_ms=wait_ms)
        try:
            return cls(settings, now, store, boot)
        except BaseException:
            store.close()
            raise

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
        """Open a session. If it is open already, return what was granted; its lease stays.

        Args:
            token: 16 random bytes.
            now: the time.
            ttl_ms: for how long a renewal lasts; the grace time comes on top.
            cooldown_ms: for how long its IDs cool, at least, if it expires; see `acquire`.
            label: its name in the status: at most 64 bytes of printable text in UTF-8.

        Raises:
            LimitExceeded: a time outside what the settings allow, or too many sessions.
            InvalidArgument: a label that is not allowed.
        """
        self._advance(now)
        digest = self._digest(token)
        session = self.sessions.named.get(digest)
        if session is not None:
            return Grant(session.generation, session.ttl)
        limits = self.settings
        limits.check_ttl(ttl_ms)
        name = label.encode("utf-8", "surrogatepass")
        if len(name) > _LABEL_BYTES or not label.isprintable():
            raise InvalidArgument(
                f"label={label!r} is not at most {_LABEL_BYTES} bytes of printable text"
            )
        if len(self.sessions.named) >= limits.max_sessions:
            raise LimitExceeded(
                f"{limits.max_sessions} sessions are open, as many as max_sessions allows"
            )
        cooldown = self.settings.cooldown(cooldown_ms if cooldown_ms is not None else 0)
        expires = self.now + ttl_ms + limits.grace_ms
        self._reckon(expires - self.now + cooldown)
        self.stamps.count()
        session = self.sessions.open(
            digest, self.now, expires, ttl=ttl_ms, cooldown=cooldown, label=label
        )
        return Grant(session.generation, ttl_ms)

    def renew(
        self,
        token: bytes,
        now: int,
        *,
        cooldown_ms: int | None = None,
        used: int | None = None,
        models: tuple[str, ...] = (),
    ) -> Grant:
        """Renew a session's lease. Constant time.

        Args:
            token: the session.
            now: the time.
            cooldown_ms: as for `acquire`.
            used: as for `acquire`.
            models: the models on which its IDs are used, if that is known. If it expires,
                `dead_ids` names its IDs for each of them.

        Raises:
            LimitExceeded: too long a time.
        """
        session = self._renewed(token, now)
        if models and not session.models:
            self._reckon_session(session, session.cooldown, True)
        session.models = models or session.models
        if cooldown_ms is not None:
            self._raise_cooldown(session, cooldown_ms)
        self.sessions.set_used(session, used)
        return Grant(session.generation, session.ttl)

    def close_session(self, token: bytes, now: int, *, ended: bool = False) -> int:
        """End a session and return how many IDs it held. They cool as if it had expired.

        If ``ended``, no sequence uses any of its IDs, and they cool for the shortest time.
        """
        session = self._renewed(token, now)
        cooldown = self.settings.cooldown_ms if ended else session.cooldown
        self.released["ended" if ended else "cooled"] += self.pool.held_count(session.number)
        return self._end(session, cooldown)

    def held(self, token: bytes, now: int, *, seq: int | None = None) -> IDs:
        """Return the IDs that a session holds, sorted. With ``seq``, no earlier change may follow.

        Raises:
            Repeated: ``seq`` is not above the last one.
        """
        session = self._renewed(token, now, seq)
        return np.sort(self.store.shape.ids(self.pool.held_by(session.number)))

    # ---- IDs

    def acquire(
        self,
        count: int,
        now: int,
        *,
        token: bytes | None = None,
        seq: int = 0,
        cooldown_ms: int | None = None,
        wait_ms: int | None = None,
        used: int | None = None,
    ) -> IDs:
        """Issue ``count`` IDs, all or none. IDs that waiting sessions need are not issued.

        Args:
            count: how many.
            now: the time.
            token: the session that will hold them. Without one they are anonymous: any client may
                release them.
            seq: with a token: rises with each change of that session.
            cooldown_ms: for how long, at least, all IDs of the session cool if it expires: after
                that Triton has certainly forgotten these sequences. By default
                ``unended_cooldown_ms``.
            wait_ms: with a token: the session uses its place among those that wait. If this raises
                `Exhausted`, it keeps its place for so long, or gets the last one.
            used: with a token: how many IDs of the session are in use after this, if that is known.

        Raises:
            InvalidArgument: ``wait_ms`` without a token.
            Repeated: ``seq`` is not above the last one.
            LimitExceeded: more than a setting allows.
            Exhausted: the pool cannot give so many now, maybe since the disk is full.
            Unavailable: the disk fails.
        """
        limits = self.settings
        if token is not None:
            session = self._renewed(token, now, seq)
            held, most = self.pool.held_count(session.number), limits.max_held
            whose, which = "by this session", f"max_held={most}"
        elif wait_ms is not None:
            raise InvalidArgument("wait_ms needs the parameter session: only a session can wait")
        else:
            session = self._anonymous_session(now)
            held, most = self.anonymous, limits.max_anonymous
            whose, which = "without a session", f"max_anonymous={most}: open a session"
        if count > limits.max_count:
            raise LimitExceeded(
                f"count={count} is more than one request may take: max_count={limits.max_count}"
            )
        if held + count > most:
            raise LimitExceeded(
                f"{held} IDs are held {whose}, and {count} more would be more than {which}"
            )
        if token is not None:
            self._raise_cooldown(session, cooldown_ms)
        acquired = self.acquired + count
        try:
            numbers = self._issue(count, session, wait_ms is not None)
        except Exhausted:
            if wait_ms is not None:
                self.waiting.keep(session, count, self.now, wait_ms)
            raise
        try:
            ids = self.store.shape.ids(numbers)
        except BaseException:  # nobody has seen them
            self.pool.release_many(numbers, session.number, self.now)
            raise
        if token is not None:
            self.sessions.set_used(session, used)
            if wait_ms is not None:
                self.waiting.leave(session)
        self.acquired = acquired
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
        used: int | None = None,
    ) -> int:
        """Take ``ids`` back, all or none, and return how many they were.

        Args:
            ids: held IDs, each once.
            now: the time.
            token: the session that holds them; none for anonymous IDs.
            seq: with a token: rises with each change of that session.
            ended: END was answered for each sequence, so the IDs cool for the shortest time.
            cooldown_ms: otherwise, the time after which Triton has certainly forgotten these
                sequences. By default ``unended_cooldown_ms``.
            used: as for `acquire`.

        Raises:
            InvalidArgument: no IDs.
            LimitExceeded: more than ``max_count``, or too long a time.
            Repeated: ``seq`` is not above the last one.
            OutOfRange, NotHeld, NotOwner, Duplicate: an ID that cannot be released.
        """
        session = None
        if token is not None:
            session = self._renewed(token, now, seq)
        else:
            self._advance(now)
        if len(ids) == 0:
            raise InvalidArgument("no correlation IDs to release: say which")
        if len(ids) > self.settings.max_count:
            raise LimitExceeded(
                f"{len(ids)} IDs are more than one request may release:"
                f" max_count={self.settings.max_count}"
            )
        cooldown = self.settings.cooldown_ms if ended else self.settings.cooldown(cooldown_ms)
        numbers = self.store.shape.numbers(ids)
        how = "ended" if ended else "cooled"
        count, released = len(ids), self.released[how] + len(ids)
        self._reckon(cooldown)
        try:
            if session is None:
                self._release_anonymous(numbers, self.now + cooldown)
            else:
                self.pool.release_many(numbers, session.number, self.now + cooldown)
                self.sessions.set_used(session, used)
        except (NotHeld, NotOwner, Duplicate) as error:
            raise self.store.shape.with_id(error) from None
        self.released[how] = released
        return count

    def dead_ids(self, token: bytes, now: int, model: str, count: int) -> IDs:
        """Return at most ``count`` IDs of expired sessions that need END on a model.

        Nobody uses these, and they cool. END has to be sent within `END_WITHIN_MS` from when this
        was asked for. The sessions that ask share the IDs among themselves. Changes nothing else.
        """
        session = self._renewed(token, now)
        return self.dead.name(model, session.generation, count, self.now)

    # ---- The whole

    def tick(self, now: int) -> Allocator:
        """Let time pass: end the sessions whose lease has ended. Returns the pool."""
        self._advance(now)
        return self.pool

    @property
    def issues_in_ms(self) -> int:
        """For how many milliseconds it issues nothing yet, since it has no past."""
        return max(self._issues_from - self.now, 0)

    @property
    def anonymous(self) -> int:
        """How many IDs are held without a session."""
        return sum(self.pool.held_count(number) for number in self.sessions.anonymous)

    def close(self) -> None:
        """Let go of the file: another process may write it from now on. Nothing is released."""
        self.store.close()
        self._closed = True

    def _check(self) -> None:
        """Audit everything; raises AssertionError. Time in proportion to what was ever opened."""
        self.pool._check()
        held = sum(self.pool.held_count(session.number) for session in self.sessions)
        assert held == self.pool.active, "IDs are held that no session holds"

    # ---- Inside

    def _advance(self, now: int) -> None:
        if self._closed:
            raise Unavailable("this registry is closed")
        _ = self.pool.active  # raises `Forked`, before the child touches memory it does not have
        self.now = max(self.now, now)
        while session := self.sessions.due(self.now):
            models = self.dead.asked_for(session.models, self.now)
            if models:
                ids = self.store.shape.ids(self.pool.held_by(session.number))
            held = self._end(session, self._silence(session.cooldown, bool(models)))
            if models:
                # The dead client's last requests are over when Triton has forgotten them.
                since = self.now + self._silence(session.cooldown, False)
                self.dead.add(ids, models, since, self.now)
            self.released["expired"] += held
            if not session.anonymous:
                self.expired.add(session.label, held, session.used, self.now)

    def _digest(self, token: bytes) -> bytes:
        """Return what the registry keeps of a session's token."""
        return hashlib.blake2b(token, digest_size=16, key=self._secret).digest()

    def _silence(self, cooldown: int, named: bool) -> int:
        """Return for how long IDs of an expired session cool; `dead_ids` may have ``named`` them.

        Then there is a window for END, with a cooldown before it and another one after it.
        """
        cooldown = max(cooldown, self.settings.cooldown_ms)
        return 2 * cooldown + DEAD_WINDOW_MS if named else cooldown

    def _end(self, session: Session, cooldown: int) -> int:
        self.waiting.leave(session)
        self.dead.leave(session.generation)
        reuse_at = self.now + max(cooldown, self.settings.cooldown_ms)
        return self.sessions.end(session, max(reuse_at, session.floor))

    def _renewed(self, token: bytes, now: int, seq: int | None = None) -> Session:
        """Return a session after its lease was renewed. With ``seq``, check it and note it.

        So also what is then refused is never applied if it comes again, when nobody expects it.
        """
        self._advance(now)
        session = self.sessions.named.get(self._digest(token))
        if session is None:
            raise SessionUnknown(
                "no such session: it was closed, has expired, or is one of another registry"
            )
        expires = self.now + session.ttl + self.settings.grace_ms
        session.expires = max(expires, session.expires)
        if seq is not None:
            if seq <= session.seq:
                raise Repeated(f"seq={seq} is not above {session.seq}, the last one")
            self.sessions.set_seq(session, seq)
        return session

    def _raise_cooldown(self, session: Session, asked: int | None) -> None:
        """Let the IDs of a session cool for at least so long if it expires."""
        cooldown = self.settings.cooldown(asked)
        if cooldown > session.cooldown:
            self._reckon_session(session, cooldown, bool(session.models))
            self.stamps.count()
            self.sessions.raise_cooldown(session, cooldown)

    def _reckon_session(self, session: Session, cooldown: int, named: bool) -> None:
        """Note on the disk for how long IDs may be in use and cool after the last renewal."""
        lease = session.ttl + self.settings.grace_ms
        self._reckon(lease + self._silence(cooldown, named))

    def _reckon(self, time_ms: int) -> None:
        """Note on the disk that IDs may be in use for so long from now on, before they are."""
        if time_ms > self._horizon:
            horizon = 1 << (time_ms - 1).bit_length()  # a power of two, so that syncs are rare
            self.store.write(Word.HORIZON, horizon)
            self.store.sync()
            self._horizon = horizon

    def _issue(self, count: int, session: Session, waits: bool) -> IDs:
        """Issue the allocator's numbers of so many IDs, all or none.

        If the session ``waits``, it uses its place among those that wait.
        """
        pool, full = self.pool, None
        if waits_ms := self.issues_in_ms:
            raise Exhausted(
                f"cannot issue {count} of {pool.capacity} IDs: this registry is new or restored,"
                " and clients may still use IDs from before it;"
                f" the next is due in {waits_ms / 1e3:.12g} s"
            )
        if self._issues_from:
            self._issues_from = 0
            self.store.write(Word.ISSUES_FROM, 0)
        self.stamps.count()
        if pool.opened + count > pool.ready < pool.capacity:
            try:
                self.store.grow(Part.RECORDS, count)
            except Unavailable as error:
                full = error  # what was released may be enough
            pool.ready = self.store.ready_ids
        if self.waiting.places:  # else nobody waits
            room = pool.capacity if full is None else pool.ready
            self.waiting.check(session if waits else None, count, self.now, room)
        try:
            return pool.acquire_many(count, session.number, self.now)
        except Exhausted:
            if full is not None and not self.store.is_full:
                raise full from None
            why = f"; {full}" if full else ""
            raise exhausted(pool, count, self.now, why) from None

    def _anonymous_session(self, now: int) -> Session:
        """Return the session that holds what is acquired without one at about this time."""
        self._advance(now)
        age = self.settings.anonymous_age_ms
        latest = next(reversed(self.sessions.anonymous.values()), None)
        # Not by when it was opened, which may have been before a reboot.
        if latest is not None and latest.expires - self.now >= age:
            return latest
        lease = age + age // _SHARE
        cooldown = self.settings.cooldown(None)
        # For how long these are in use is not known. If a power cut makes the registry forget one,
        # it cools for at least as long as an ID of a session.
        self._reckon(self.settings.max_ttl_ms + self.settings.grace_ms + cooldown)
        return self.sessions.open(
            b"", self.now, self.now + lease, ttl=lease, cooldown=cooldown, label=""
        )

    def _release_anonymous(self, numbers: IDs, reuse_at: int) -> None:
        listed = numbers.tolist()
        owners = [self.pool.owner_of(number) for number in listed]
        due: dict[int, int] = {}  # by owner
        for number, owner in zip(listed, owners, strict=True):
            session = self.sessions.anonymous.get(owner)
            if session is None:
                cid = int(self.store.shape.ids(np.array([number], np.uint64))[0])
                raise NotOwner(f"ID {cid} is held by a session: only that session can release it")
            due[owner] = max(reuse_at, session.floor)
        if len(due) == 1:
            self.pool.release_many(numbers, owner, due[owner])
            return
        if len(set(listed)) < len(listed):
            raise Duplicate("an ID is given twice in this call")
        times = [due[owner] for owner in owners]
        for _ in map(self.pool.release, listed, owners, times):  # needs no memory: none fails
            pass
