"""The client's core against a plain model: lost, late and repeated messages, frozen clients.

Two sessions share a manager. Whatever happens on the way, an ID is used by one of them at a time,
is not used again before its cooldown, and nothing is leaked for ever.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)
from simulation import World

from cidalloc.client.core.id_cache import ENDED
from cidalloc.client.core.lease import Lease
from cidalloc.client.core.session import Session
from cidalloc.codes import Operation
from cidalloc.errors import Exhausted, SequenceLost, SessionExpired, Unavailable
from cidalloc.manager.settings import Settings
from cidalloc.protocol import Request

TTL = 20.0
SETTINGS = Settings(
    first=1,
    capacity=64,
    cooldown_ms=2_000,
    unended_cooldown_ms=9_000,
    grace_ms=3_000,
    max_sessions=100_000,
    fresh=True,
)
WORLD = World(SETTINGS)  # making one takes long; time only goes on, and each run has new sessions
CLIENTS = st.integers(0, 1)


class Clients(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.world = WORLD
        self.world.fates.clear()
        self.world.late.clear()
        # What a run before held has expired and cooled.
        self.world.now = float(int(self.world.now) + 1000)
        assert self.world.held() == 0
        self.sessions = [self.world.session(TTL, 4.0, seed + each) for each in range(2)]
        # What the application believes: who uses an ID, since when, in which session of theirs.
        self.used: dict[tuple[int, int], Lease] = {}
        self.free_from: dict[int, float] = {}
        self.random = random.Random(seed)

    def valid(self, who: int, cid: int) -> bool:
        """Whether a client may send a request with this ID now."""
        try:
            self.used[who, cid].check(cid, self.world.now)
        except (SequenceLost, SessionExpired):
            return False
        return True

    @rule(who=CLIENTS, count=st.integers(1, 20), need=st.sampled_from([None, 5_000, 15_000]))
    def acquire(self, who: int, count: int, need: int | None) -> None:
        try:
            cids = self.world.acquire(self.sessions[who], count, need)
        except (Exhausted, Unavailable, SessionExpired):
            return
        session = self.sessions[who]
        assert session.lease.announced_ms >= (
            need if need is not None else SETTINGS.unended_cooldown_ms
        )
        assert len(set(cids)) == count
        for cid in cids:
            for other in range(2):
                if (other, cid) in self.used:
                    assert not self.valid(other, cid), f"{cid} is used twice"
                    if other == who:
                        del self.used[who, cid]
            assert self.world.now >= self.free_from.pop(cid, 0.0), f"{cid} has not cooled"
            self.used[who, cid] = session.lease

    # What is drawn must not depend on the world, which each run finds in another state.
    @rule(
        who=CLIENTS,
        how=st.sampled_from([ENDED, None, 4_000, 12_000]),
        which=st.lists(st.integers(0, 63), min_size=1, max_size=10),
    )
    def release(self, who: int, how: int | None, which: list[int]) -> None:
        mine = [cid for client, cid in self.used if client == who]
        if not mine:
            return
        cids = list(dict.fromkeys(mine[each % len(mine)] for each in which))
        for cid in cids:
            lease = self.used.pop((who, cid))
            session = self.sessions[who]
            # What nobody announced does not hold if we die before the manager hears of it.
            default = SETTINGS.unended_cooldown_ms if how is None else how
            cooldown = min(default, session.lease.announced_ms)
            # Also with a lease that has run out: if it is renewed, nothing was lost.
            ours = cid in lease.cache.used
            lapsed = session.now() >= session.lease.deadline
            announced = session.lease.announced_ms
            lease.release_from(cid, ENDED if how == ENDED else cooldown)
            if ours:
                wait = SETTINGS.cooldown_ms if how == ENDED else cooldown
                free_from = self.world.now + wait / 1000
                if lapsed:  # not used since; if it is not renewed, it cools for what was announced
                    free_from = min(free_from, session.lease.deadline + announced / 1000)
                self.free_from[cid] = free_from

    @rule(fates=st.lists(st.sampled_from(["ok", "lost", "unanswered", "late"]), max_size=4))
    def trouble_on_the_way(self, fates: list[str]) -> None:
        self.world.fates = fates

    @rule(again=st.booleans())
    def a_late_message_arrives(self, again: bool) -> None:
        if not self.world.late:
            return
        request = self.world.late[0] if again else self.world.late.pop(0)
        self.world.apply(request)

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 8.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        until = self.world.now + seconds
        while self.world.now < until:
            step = min(until, self.world.now + 1.0)
            for session in self.sessions:
                self.world.keep(session, self.world.now)
            self.world.now = max(self.world.now, step)

    @rule(seconds=st.sampled_from([1.0, 10.0, 19.0, 21.0, 24.0, 60.0]))
    def all_are_frozen(self, seconds: float) -> None:
        self.world.now += seconds
        self.note_the_lost()

    @rule(who=CLIENTS)
    def a_client_is_killed(self, who: int) -> None:
        self.note_the_lost()
        announced = self.sessions[who].lease.announced_ms / 1000
        for client, cid in list(self.used):
            if client == who:
                if self.valid(who, cid):
                    self.free_from[cid] = self.world.now + max(announced, 2.0)
                del self.used[client, cid]
        self.sessions[who] = self.world.session(TTL, 4.0, self.random.getrandbits(32))

    def note_the_lost(self) -> None:
        """An ID whose lease ran out was used until then, and cools from then on at least."""
        for (who, cid), lease in self.used.items():
            if cid in lease.cache.used and self.sessions[who].now() >= lease.deadline:
                cooled = lease.deadline + lease.announced_ms / 1000
                self.free_from[cid] = max(self.free_from.get(cid, 0.0), cooled)

    @invariant()
    def nobody_shares_an_id(self) -> None:
        now: set[int] = set()
        for who, cid in self.used:
            if self.valid(who, cid):
                assert cid not in now, f"{cid} is used by both"
                now.add(cid)

    @invariant()
    def an_id_is_in_one_place(self) -> None:
        for session in self.sessions:
            cache = session.lease.cache
            places = [cache.used, cache.fresh, [cid for _, cid in cache.cooling], cache.releasing]
            places += cache.to_release.values()
            assert sum(len(place) for place in places) == len(cache.known())

    @rule(who=CLIENTS)
    def in_the_end_both_agree(self, who: int) -> None:
        """Without trouble, the client knows of every ID that its session holds."""
        self.world.fates.clear()
        session = self.sessions[who]
        self.world.keep(session, self.world.now + 5.0)
        if session.lease.opened:
            held = self.world.apply(self.held_request(session))
            if held.error is None:
                assert set(held.output.tolist()) == session.lease.cache.known()

    @staticmethod
    def held_request(session: Session) -> Request:
        return Request(Operation.HELD, parameters={"session": session.lease.token})


Clients.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestClients = pytest.mark.timeout(300)(Clients.TestCase)
