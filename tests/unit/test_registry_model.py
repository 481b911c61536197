"""Runs random histories of the registry beside a plain-Python model, amid crashes and reboots."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cidalloc import errors
from cidalloc.manager.inspection import status_of
from cidalloc.manager.registry import Grant, Registry
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file_format import Word
from cidalloc.protocol import MAX_COOLDOWN_MS

TOKENS = [bytes([n] * 16) for n in range(3)]
LARGE = 2**30

tokens = st.sampled_from(TOKENS)
cooldowns = st.sampled_from([None, 0, 10, 700, 20_000, 400_000])
uses = st.sampled_from([None, 0, 1, 2, 1000])
steps = st.sampled_from(
    [1, 49, 50, 51, 127, 128, 129, 700, 1000, 5000, 10_000, 60_000, 120_000, 500_000]
)
jumps = st.sampled_from([2**21 - 1, 2**21, 2**21 + 129, 90_000_000, 2**38])
choices = st.fixed_dictionaries(
    {
        "first": st.sampled_from([1, 1000, 2**30]),
        "slice": st.sampled_from(["", "", "0/1"]),
        "capacity": st.one_of(st.integers(1, 130), st.integers(1, 9), st.just(LARGE)),
        "cooldown_ms": st.sampled_from([0, 50, 5_000]),
        "unended_cooldown_ms": st.sampled_from([0, 700, 120_000]),
        "min_ttl_ms": st.sampled_from([1, 1_000]),
        "max_ttl_ms": st.sampled_from([5_000, 60_000, 2_500_000]),
        "grace_ms": st.sampled_from([0, 100, 10_000]),
        "max_count": st.sampled_from([3, 140]),
        "max_sessions": st.sampled_from([1, 3, 10]),
        "max_held": st.sampled_from([2, 140]),
        "max_anonymous": st.sampled_from([0, 3, 140]),
        "anonymous_age_ms": st.sampled_from([1_000, 100_000, 86_400_000]),
        "fresh": st.sampled_from([True, True, True, False]),
    }
)


@dataclass
class Session:
    """What a client may rely on."""

    grant: Grant
    cooldown: int
    expires: int  # not before this
    seq: int = 0
    held: set[int] = field(default_factory=set)
    used: int | None = None

    def say(self, used: int | None) -> None:
        if used is not None:
            self.used = min(used, len(self.held))


class Histories(RuleBasedStateMachine):
    """Random calls, allowed and not.

    The model follows the registry only where it has a choice: which IDs it issues, and when within
    a tick or a slice it sees that a time is over.
    """

    @initialize(
        values=choices,
        in_file=st.booleans(),
        now=st.sampled_from([0, 1, 1_000_000, 2**40 + 77]),
    )
    def make(self, values: dict[str, Any], in_file: bool, now: int) -> None:
        self.limits = Settings(**values)
        self.now = now
        self.boots = 0
        self.folder = Path(tempfile.mkdtemp(prefix="cidalloc-")) if in_file else None
        self.registry = self.started()
        self.opened_at = now
        self.sessions: dict[bytes, Session] = {}
        self.anonymous: dict[int, int] = {}  # of each such ID, since when
        self.slices_from = now
        self.due: dict[int, int] = {}  # of each ID that was issued and is not held
        self.ever: set[int] = set()
        self.marked, self.marked_until = 0, 0  # so many IDs from the start on are not issued before
        self.most = self.peak = self.expired = self.expired_in_use = 0
        self.generations: set[int] = set()
        self.issues_from = self.begins() if self.waits() else 0
        self.shape = self.registry.store.shape
        self.open(TOKENS[0], ttl=5_000, cooldown=None)

    def started(self) -> Registry:
        if self.folder is None:
            return Registry(self.limits, self.now)
        boot = bytes([1 + self.boots]) * 16
        return Registry.in_file(self.folder / "registry", self.limits, self.now, boot)

    def waits(self) -> bool:
        """Whether a registry without a past waits before it issues IDs."""
        return not self.limits.fresh and bool(self.limits.slice or self.limits.capacity < LARGE)

    def begins(self) -> int:
        return self.now + self.limits.max_ttl_ms + self.limits.grace_ms

    def teardown(self) -> None:
        if hasattr(self, "registry"):
            self.registry.close()
            del self.registry  # Hypothesis keeps machines for a while
            if self.folder is not None:
                shutil.rmtree(self.folder)

    # ---- The model

    @property
    def held(self) -> set[int]:
        return set(self.anonymous).union(*(each.held for each in self.sessions.values()))

    def due_of(self, cid: int) -> int:
        return max(self.due.get(cid, 0), self.marked_until if self.is_marked(cid) else 0)

    def is_marked(self, cid: int) -> bool:
        number = self.shape.numbers(np.array([cid], np.uint64))[0]
        return int(number) < self.limits.first + self.marked

    def cooling(self) -> int:
        waits = self.marked_until > self.now
        cool = {cid for cid in self.due if self.due_of(cid) > self.now}
        if waits:
            inside = {cid for cid in self.held | cool if self.is_marked(cid)}
            return len(cool) + self.marked - len(inside)
        return len(cool)

    def free(self) -> int:
        return self.limits.capacity - len(self.held) - self.cooling()

    def cooldown(self, asked: int | None) -> int:
        asked = self.limits.unended_cooldown_ms if asked is None else asked
        return max(asked, self.limits.cooldown_ms)

    def let_go(self, cids: set[int], cooldown: int) -> None:
        self.due.update(dict.fromkeys(cids, self.now + max(cooldown, self.limits.cooldown_ms)))

    def issued(self, cids: list[int]) -> set[int]:
        got = set(cids)
        high = self.limits.first + self.limits.capacity
        assert len(got) == len(cids)
        assert all(self.limits.first <= cid < high for cid in got)
        assert not got & self.held, "U: issued twice"
        assert all(self.due_of(cid) <= self.now for cid in got), "F: issued too early"
        for cid in got:
            self.due.pop(cid, None)
        self.ever |= got
        return got

    def ordered(self, got: set[int], known: dict[int, int]) -> None:
        reused = [known[cid] for cid in got if cid in known]
        rest = [due for cid, due in known.items() if cid not in got]
        assert not reused or not rest or max(reused) <= min(rest), "not the one due first"
        if len(reused) < len(got):
            assert all(due > self.now for due in rest), "B: a new one, though an old one was due"

    def pass_time(self) -> None:
        """Let the registry see the time, and follow it."""
        self.registry.tick(self.now)
        pool, table = self.registry.pool, self.registry.sessions
        for token, session in list(self.sessions.items()):
            if self.registry._digest(token) in table.named:
                assert self.now <= session.expires, "L: expired, and still there"
            else:
                assert self.now > session.expires, "L: expired too early"
                self.let_go(session.held, session.cooldown)
                self.expired += 1
                self.expired_in_use += bool(session.used)
                del self.sessions[token]
        age = self.limits.anonymous_age_ms
        latest = age + age // 8 + self.limits.grace_ms
        for cid, since in list(self.anonymous.items()):
            if self.shape.numbers(np.array([cid], np.uint64))[0] in pool:
                assert self.now <= max(since, self.slices_from) + latest, "kept for too long"
            else:
                assert self.now > since + age, "taken back too early"
                self.let_go({cid}, self.cooldown(None))
                del self.anonymous[cid]

    def session(self, token: bytes) -> Session | None:
        """The session, which the call that is about to come will renew."""
        self.pass_time()
        session = self.sessions.get(token)
        if session is not None:
            limits = self.limits
            session.expires = self.now + session.grant.ttl_ms + limits.grace_ms
        return session

    def seq_for(self, session: Session | None, ahead: int) -> int:
        return max(1, (session.seq if session else 0) + ahead)

    # ---- Time

    @rule(passed=st.one_of(steps, steps, steps, jumps))
    def time_passes(self, passed: int) -> None:
        self.now += passed

    @rule(eighths=st.sampled_from([1, 4, 8, 9]))
    def ids_without_a_session_grow_old(self, eighths: int) -> None:
        self.now += self.limits.anonymous_age_ms * eighths // 8

    @rule()
    def a_session_is_about_to_expire(self) -> None:
        if self.sessions:
            self.now = max(self.now, min(each.expires for each in self.sessions.values()))

    @rule()
    def an_id_is_about_to_be_due(self) -> None:
        coming = [due for due in self.due.values() if due > self.now]
        if coming:
            self.now = min(coming) - 1

    @rule(back=st.sampled_from([1, 128, 5_000, 10**6]))
    def a_clock_goes_back(self, back: int) -> None:
        self.pass_time()
        for token in self.sessions:
            self.session(token)
            self.registry.renew(token, max(0, self.now - back))

    # ---- Sessions

    @rule(
        token=tokens,
        ttl=st.sampled_from([0, 1, 1_000, 5_000, 60_000, 2_500_000, 2**70]),
        cooldown=cooldowns,
    )
    def open(self, token: bytes, ttl: int, cooldown: int | None) -> None:
        self.pass_time()
        limits = self.limits

        def call() -> Grant:
            return self.registry.open(
                token, self.now, ttl_ms=ttl, cooldown_ms=cooldown, label=f"of {token[0]}"
            )

        if token in self.sessions:
            assert call() == self.sessions[token].grant, "and no renewal"
        elif not limits.min_ttl_ms <= ttl <= limits.max_ttl_ms:
            with pytest.raises(errors.LimitExceeded, match="ttl_ms"):
                call()
        elif len(self.sessions) == limits.max_sessions:
            with pytest.raises(errors.LimitExceeded, match="max_sessions"):
                call()
        else:
            grant = call()
            assert grant.ttl_ms == ttl
            assert grant.generation > max(self.generations, default=0)
            self.generations.add(grant.generation)
            expires = self.now + ttl + limits.grace_ms
            self.sessions[token] = Session(grant, self.cooldown(cooldown or 0), expires)

    @rule(token=tokens, cooldown=st.one_of(cooldowns, st.just(MAX_COOLDOWN_MS + 1)), used=uses)
    def renew(self, token: bytes, cooldown: int | None, used: int | None) -> None:
        session = self.session(token)

        def call() -> Grant:
            return self.registry.renew(token, self.now, cooldown_ms=cooldown, used=used)

        if session is None:
            with pytest.raises(errors.SessionUnknown):
                call()
        elif cooldown is not None and cooldown > self.limits.max_cooldown_ms:
            with pytest.raises(errors.LimitExceeded, match="cooldown_ms"):
                call()
        else:
            assert call() == session.grant
            session.say(used)
            if cooldown is not None:
                session.cooldown = max(session.cooldown, self.cooldown(cooldown))

    @rule(token=tokens, ended=st.booleans())
    def close(self, token: bytes, ended: bool) -> None:
        session = self.session(token)
        if session is None:
            with pytest.raises(errors.SessionUnknown):
                self.registry.close_session(token, self.now, ended=ended)
            return
        done = self.registry.close_session(token, self.now, ended=ended)
        assert done == len(session.held)
        self.let_go(session.held, 0 if ended else session.cooldown)
        del self.sessions[token]

    @rule(token=tokens, ahead=st.sampled_from([None, -1, 0, 1, 1000]))
    def ask_what_is_held(self, token: bytes, ahead: int | None) -> None:
        session = self.session(token)
        seq = None if ahead is None else self.seq_for(session, ahead)
        if session is None:
            with pytest.raises(errors.SessionUnknown):
                self.registry.held(token, self.now, seq=seq)
        elif seq is not None and seq <= session.seq:
            with pytest.raises(errors.Repeated, match=f"{session.seq}"):
                self.registry.held(token, self.now, seq=seq)
        else:
            ids = self.registry.held(token, self.now, seq=seq)
            assert ids.dtype == np.uint64
            assert ids.tolist() == sorted(session.held)
            session.seq = session.seq if seq is None else seq

    # ---- IDs

    @rule(
        token=tokens,
        count=st.one_of(st.integers(1, 5), st.integers(1, 150)),
        ahead=st.sampled_from([1, 1, 1, 1, 2, 2**40, 0, -1]),
        cooldown=st.one_of(cooldowns, st.just(MAX_COOLDOWN_MS + 1)),
        used=uses,
    )
    def acquire(
        self, token: bytes, count: int, ahead: int, cooldown: int | None, used: int | None
    ) -> None:
        session, limits = self.session(token), self.limits
        seq = self.seq_for(session, ahead)

        def call() -> list[int]:
            ids = self.registry.acquire(
                count, self.now, token=token, seq=seq, cooldown_ms=cooldown, used=used
            )
            return [int(cid) for cid in ids]

        if session is None:
            with pytest.raises(errors.SessionUnknown):
                call()
            return
        if seq <= session.seq:
            with pytest.raises(errors.Repeated):
                call()
            return
        session.seq = seq
        if count > limits.max_count or len(session.held) + count > limits.max_held:
            with pytest.raises(errors.LimitExceeded, match="max_"):
                call()
        elif cooldown is not None and cooldown > limits.max_cooldown_ms:
            with pytest.raises(errors.LimitExceeded, match="cooldown_ms"):
                call()
        else:
            session.cooldown = max(session.cooldown, self.cooldown(cooldown))
            if got := self.taken(count, call):
                session.held |= got
                session.say(used)

    @rule(count=st.one_of(st.integers(1, 5), st.integers(1, 150)))
    def acquire_without_a_session(self, count: int) -> None:
        self.pass_time()
        limits = self.limits

        def call() -> list[int]:
            return [int(cid) for cid in self.registry.acquire(count, self.now)]

        if count > limits.max_count or len(self.anonymous) + count > limits.max_anonymous:
            with pytest.raises(errors.LimitExceeded, match="max_"):
                call()
        else:
            self.anonymous.update(dict.fromkeys(self.taken(count, call), self.now))

    def taken(self, count: int, call: Any) -> set[int]:
        """What the call got: just as many as there are."""
        if self.now < self.issues_from:
            with pytest.raises(errors.Exhausted, match="this registry is new"):
                call()
            return set()
        self.issues_from = 0
        if count > self.free():
            with pytest.raises(errors.Exhausted):
                call()
            return set()
        known = {cid: self.due_of(cid) for cid in self.due}
        got = self.issued(call())
        if not self.marked:  # else there are some that wait, though they were never issued
            self.ordered(got, known)
            self.most = max(self.most, len(self.held | got) + self.cooling())
        self.peak = max(self.peak, len(self.held | got))
        return got

    @rule(
        data=st.data(),
        token=st.one_of(st.none(), tokens),
        ahead=st.sampled_from([1, 1, 1, 1, 2, 0, -1]),
        ended=st.booleans(),
        cooldown=cooldowns,
        used=uses,
    )
    def release(
        self,
        data: st.DataObject,
        token: bytes | None,
        ahead: int,
        ended: bool,
        cooldown: int | None,
        used: int | None,
    ) -> None:
        session = None
        if token is None:
            self.pass_time()
        else:
            session = self.session(token)
        mine = set(self.anonymous) if token is None else session.held if session else set()
        ids = self.some(data, mine)
        seq = self.seq_for(session, ahead)

        def call() -> int:
            array = np.array(ids, np.uint64)
            return self.registry.release(
                array,
                self.now,
                token=token,
                seq=seq,
                ended=ended,
                cooldown_ms=cooldown,
                used=used,
            )

        expected = self.refusal(ids, mine)
        if token is not None and session is None:
            expected = {errors.SessionUnknown}
        elif session is not None and seq <= session.seq:
            expected = {errors.Repeated}
        elif session is not None:
            session.seq = seq
        if expected:
            with pytest.raises(errors.CidError) as caught:
                call()
            assert type(caught.value) in expected
            return
        assert call() == len(ids)
        self.let_go(set(ids), 0 if ended else self.cooldown(cooldown))
        if session is None:
            for cid in ids:
                del self.anonymous[cid]
        else:
            session.held -= set(ids)
            session.say(used)

    def some(self, data: st.DataObject, mine: set[int]) -> list[int]:
        """IDs to give back: mostly right ones; or with a foreign, strange or repeated one."""
        ids = data.draw(st.lists(st.sampled_from(sorted(mine)), unique=True)) if mine else []
        limits = self.limits
        wrong = [0, limits.first - 1, limits.first + limits.capacity, 2**64 - 1, *ids]
        wrong += [*sorted(self.ever)[:20], limits.first + limits.capacity - 1]
        foreign = sorted(self.held - mine)
        if foreign and data.draw(st.sampled_from([False, False, True])):
            ids = [*ids, data.draw(st.sampled_from(foreign))]
        elif not ids or data.draw(st.sampled_from([False, False, True])):
            more = data.draw(st.lists(st.sampled_from(wrong), max_size=2))
            ids = data.draw(st.permutations(ids + more))
        return list(ids)

    def refusal(self, ids: list[int], mine: set[int]) -> set[type]:
        """Which errors are true of such a release."""
        limits, found = self.limits, set()
        if not ids:
            return {errors.InvalidArgument}
        if len(ids) > limits.max_count:
            return {errors.LimitExceeded}
        for cid in ids:
            if not limits.first <= cid < limits.first + limits.capacity:
                found.add(errors.OutOfRange)
            elif cid not in self.held:
                found.add(errors.NotHeld)
            elif cid not in mine:
                found.add(errors.NotOwner)
            elif ids.count(cid) > 1:
                found.add(errors.Duplicate)
        return found

    # ---- Crashes

    @precondition(lambda self: self.folder is not None)
    @rule(down=st.sampled_from([0, 1, 1_000, 10_000_000]))
    def crash(self, down: int) -> None:
        """As SIGKILL does it: the lock goes, and whoever could have renewed could not meanwhile."""
        self.registry.store.close()
        self.now += down
        for session in self.sessions.values():
            session.expires = self.now + session.grant.ttl_ms + self.limits.grace_ms
        self.reopened()

    @precondition(lambda self: self.folder is not None)
    @rule(now=st.sampled_from([0, 1, 30_000]))
    def reboot(self, now: int) -> None:
        self.pass_time()
        store = self.registry.store
        self.marked, horizon = store.ready_ids, store.read(Word.HORIZON)
        waits = [self.due_of(cid) - self.now for cid in self.due] + [
            session.expires - self.now + session.cooldown for session in self.sessions.values()
        ]
        assert horizon >= max(waits, default=0), "F: the reboot would cut a cooldown short"
        store.close()
        self.boots += 1
        self.now, self.marked_until = now, now + horizon
        self.issues_from = self.begins() if self.issues_from else 0
        self.due = dict.fromkeys(self.ever - set(self.anonymous), self.marked_until)
        self.sessions.clear()
        self.anonymous = dict.fromkeys(self.anonymous, now)
        self.reopened()

    def reopened(self) -> None:
        uuid = self.registry.uuid
        self.registry = self.started()
        assert self.registry.uuid == uuid
        self.opened_at = self.slices_from = self.now
        self.expired, self.expired_in_use, self.peak = 0, 0, len(self.held)

    # ---- What always holds

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "registry"):
            return
        self.pass_time()
        registry, table = self.registry, self.registry.sessions
        registry._check()
        for token, session in self.sessions.items():
            found = table.named[registry._digest(token)]
            held = self.shape.ids(registry.pool.held_by(found.number))
            assert set(held.tolist()) == session.held, "O"
            assert found.seq == session.seq
            assert found.generation == session.grant.generation
            assert found.expires == session.expires
            assert found.cooldown == session.cooldown
        numbers = self.shape.numbers(np.array([*self.anonymous], np.uint64))
        for number in numbers.tolist():
            assert registry.pool.owner_of(number) in table.anonymous
        if not self.marked:
            assert len(self.ever) <= self.most, "B: more IDs than were ever in use at once"
        status = status_of(registry, self.now)
        left_ms = max(self.issues_from - self.now, 0)
        assert status["issues_in_s"] * 1000 == pytest.approx(left_ms)
        assert status["held"] == len(self.held)
        assert status["cooling"] == self.cooling()
        assert status["free"] == self.free()
        assert status["inactive"] == len(self.ever - self.held)
        assert status["peak"] == self.peak
        assert status["anonymous"] == len(self.anonymous)
        assert status["sessions_total"] == len(self.sessions)
        assert status["sessions_expired"] == self.expired
        assert status["sessions_expired_in_use"] == self.expired_in_use
        told = [each.used for each in self.sessions.values() if each.used is not None]
        assert status["used"] == sum(told)
        assert status["sessions_silent"] == len(self.sessions) - len(told)
        assert status["uptime_s"] * 1000 == pytest.approx(self.now - self.opened_at)
        shown = {each["label"]: (each["held"], each["used"]) for each in status["sessions"]}
        assert shown == {f"of {t[0]}": (len(s.held), s.used) for t, s in self.sessions.items()}


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
