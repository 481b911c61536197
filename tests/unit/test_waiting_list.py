"""The manager's waiting list: who gets the IDs of an exhausted pool, beside a plain list."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cidalloc.errors import Exhausted, InvalidArgument, LimitExceeded
from cidalloc.manager.inspection import status_of
from cidalloc.manager.registry import Registry
from cidalloc.manager.settings import Settings
from cidalloc.protocol import MAX_WAIT_MS

TOKENS = [bytes([n] * 16) for n in range(4)]
A, B, C, D = TOKENS
TTL = 20_000


class Manager:
    """A registry with sessions that count their changes."""

    def __init__(self, capacity: int, cooldown_ms: int = 0, **values: Any) -> None:
        self.registry = Registry(
            Settings(
                first=1,
                capacity=capacity,
                cooldown_ms=cooldown_ms,
                unended_cooldown_ms=cooldown_ms,
                grace_ms=0,
                fresh=True,
                **values,
            ),
            now=0,
        )
        self.now = 0
        self.seq = 0
        self.held: dict[bytes, list[int]] = {}
        for token in TOKENS:
            self.open(token)

    def open(self, token: bytes) -> None:
        self.registry.open(token, self.now, ttl_ms=TTL)
        self.held[token] = []

    def acquire(self, token: bytes, count: int = 1, wait_ms: int | None = None) -> bool:
        """Whether a session gets its IDs."""
        self.seq += 1
        try:
            found = self.registry.acquire(
                count, self.now, token=token, seq=self.seq, wait_ms=wait_ms
            )
        except Exhausted:
            return False
        assert len(found) == count
        self.held[token] += found.tolist()
        return True

    def release(self, token: bytes, count: int = 1) -> None:
        self.seq += 1
        gone = [self.held[token].pop() for _ in range(count)]
        ids = np.array(gone, np.uint64)
        self.registry.release(ids, self.now, token=token, seq=self.seq, ended=True)


@pytest.fixture
def manager() -> Manager:
    """Its pool has two IDs, and A holds both."""
    manager = Manager(2)
    assert manager.acquire(A, 2)
    return manager


def test_sessions_are_served_in_the_order_in_which_they_came(manager: Manager) -> None:
    assert not manager.acquire(B, wait_ms=1000)
    assert not manager.acquire(C, wait_ms=1000)
    manager.release(A)
    assert not manager.acquire(C, wait_ms=1000), "the ID is for B"
    assert not manager.acquire(D), "and D does not even wait"
    assert manager.acquire(B, wait_ms=1000)
    manager.release(A)
    assert not manager.acquire(D, wait_ms=1000)
    assert manager.acquire(C, wait_ms=1000)


def test_all_places_before_a_request_count() -> None:
    manager = Manager(3)
    assert manager.acquire(A, 3)
    assert not manager.acquire(B, wait_ms=1000) and not manager.acquire(C, wait_ms=1000)
    manager.release(A, 2)
    assert not manager.acquire(D), "one is for B, one for C"
    assert manager.registry.waiting.any(manager.now)
    assert manager.acquire(B, wait_ms=1000) and manager.acquire(C, wait_ms=1000)
    assert not manager.registry.waiting.any(manager.now), "nobody waits any more"


def test_ids_that_are_enough_for_all_need_no_order(manager: Manager) -> None:
    assert not manager.acquire(B, wait_ms=1000)
    manager.release(A, 2)
    assert manager.acquire(D)
    assert not manager.acquire(D)
    assert manager.acquire(B, wait_ms=1000)


def test_ids_for_which_the_file_must_still_grow_count() -> None:
    """A registry without a past issues nothing for a while, so nobody has let it grow."""
    values = Settings(first=1, capacity=5_000, max_ttl_ms=TTL, grace_ms=0, cooldown_ms=0)
    registry = Registry(values, 0)
    for token in (A, B):
        registry.open(token, 0, ttl_ms=TTL)
    with pytest.raises(Exhausted, match="new or restored"):
        registry.acquire(3_500, TTL - 1, token=A, seq=1, wait_ms=1_000)
    assert registry.pool.ready < 3_500
    assert len(registry.acquire(1_500, TTL, token=B, seq=1)) == 1_500
    assert len(registry.acquire(3_500, TTL, token=A, seq=2, wait_ms=1_000)) == 3_500


def test_many_ids_do_not_starve_behind_single_ones(manager: Manager) -> None:
    assert not manager.acquire(B, 2, wait_ms=1000)
    for _ in range(5):
        manager.release(A)
        assert not manager.acquire(C, wait_ms=1000)
        assert not manager.acquire(D)
        if not manager.held[A]:
            break
    assert manager.acquire(B, 2, wait_ms=1000)


def test_a_place_is_for_its_time(manager: Manager) -> None:
    assert not manager.acquire(B, wait_ms=1000)
    manager.release(A)
    manager.now = 999
    assert not manager.acquire(C)
    manager.now = 1000
    assert manager.acquire(C)
    assert not manager.registry.waiting.places, "it takes no memory and no time any more"


def test_asking_again_keeps_the_place(manager: Manager) -> None:
    assert not manager.acquire(B, wait_ms=1000)
    assert not manager.acquire(C, wait_ms=MAX_WAIT_MS)
    manager.now = 900
    assert not manager.acquire(B, wait_ms=1000)
    manager.now = 1800
    manager.release(A)
    assert not manager.acquire(C, wait_ms=MAX_WAIT_MS)
    assert manager.acquire(B, wait_ms=1000)


def test_asking_too_late_is_asking_anew(manager: Manager) -> None:
    assert not manager.acquire(B, wait_ms=1000)
    assert not manager.acquire(C, wait_ms=MAX_WAIT_MS)
    manager.now = 1000
    assert not manager.acquire(B, wait_ms=1000)
    manager.release(A)
    assert not manager.acquire(B, wait_ms=1000)
    assert manager.acquire(C, wait_ms=1000)


def test_a_place_for_more_ids_is_the_last_one(manager: Manager) -> None:
    assert not manager.acquire(B, wait_ms=1000)
    assert not manager.acquire(C, wait_ms=1000)
    assert not manager.acquire(B, 2, wait_ms=1000)
    manager.release(A)
    assert not manager.acquire(B, wait_ms=1000)
    assert manager.acquire(C, wait_ms=1000)
    manager.release(A)
    assert manager.acquire(B, wait_ms=1000)


def test_a_place_is_not_for_more_ids(manager: Manager) -> None:
    assert not manager.acquire(B, wait_ms=1000)
    assert not manager.acquire(C, wait_ms=1000)
    manager.release(A, 2)
    assert not manager.acquire(B, 2, wait_ms=1000)
    assert manager.acquire(C, wait_ms=1000)


def test_asking_too_late_is_asking_anew_also_far_behind(manager: Manager) -> None:
    assert not manager.acquire(D, 2, wait_ms=MAX_WAIT_MS)
    assert not manager.acquire(B, wait_ms=1000)
    assert not manager.acquire(C, wait_ms=MAX_WAIT_MS)
    manager.now = 1000
    assert not manager.acquire(B, wait_ms=1000)
    manager.registry.close_session(D, manager.now)
    manager.release(A)
    assert not manager.acquire(B, wait_ms=1000)
    assert manager.acquire(C, wait_ms=1000)


def test_ids_that_have_become_due_count() -> None:
    manager = Manager(2, cooldown_ms=300)
    assert manager.acquire(A, 2)
    assert not manager.acquire(B, wait_ms=1000)
    manager.release(A, 2)
    manager.now = 299
    assert not manager.acquire(C)
    manager.now = 300
    assert manager.acquire(C), "there is one for B, too"
    assert manager.acquire(B, wait_ms=1000)


def test_a_place_for_fewer_ids_is_the_same_one(manager: Manager) -> None:
    assert not manager.acquire(B, 2, wait_ms=1000)
    assert not manager.acquire(C, wait_ms=1000)
    assert not manager.acquire(B, wait_ms=1000)
    manager.release(A)
    assert not manager.acquire(C, wait_ms=1000)
    assert manager.acquire(B, wait_ms=1000)


def test_nobody_keeps_a_place_for_long_without_asking(manager: Manager) -> None:
    assert not manager.acquire(B, wait_ms=3_600_000)
    manager.release(A)
    manager.now = MAX_WAIT_MS - 1
    assert not manager.acquire(C)
    manager.now = MAX_WAIT_MS
    assert manager.acquire(C)


def test_the_last_try_gives_up_the_place(manager: Manager) -> None:
    assert not manager.acquire(B, wait_ms=1000)
    assert not manager.acquire(B, wait_ms=0)
    manager.release(A)
    assert manager.acquire(C)


@pytest.mark.parametrize("how", ["closes", "expires"])
def test_a_session_that_ends_leaves_its_place(manager: Manager, how: str) -> None:
    brief = b"brief" + bytes(11)
    manager.registry.open(brief, 0, ttl_ms=1000)
    assert not manager.acquire(brief, wait_ms=MAX_WAIT_MS)
    manager.release(A)
    assert not manager.acquire(C)
    if how == "closes":
        manager.registry.close_session(brief, 0)
    else:
        manager.now = 1001
    assert manager.acquire(C)


def test_ids_beyond_its_place_are_for_the_others(manager: Manager) -> None:
    """As a client that fetches IDs ahead while one of its calls waits."""
    assert not manager.acquire(B, wait_ms=1000)
    manager.release(A)
    assert not manager.acquire(B), "without wait_ms it does not use its place"
    assert manager.acquire(B, wait_ms=1000)


def test_more_than_the_pool_has_is_not_waited_for(manager: Manager) -> None:
    assert not manager.acquire(B, 3, wait_ms=1000)
    manager.release(A)
    assert manager.acquire(C)


def test_a_refused_request_has_no_place() -> None:
    manager = Manager(2, max_count=1)
    for _ in range(2):
        assert manager.acquire(A)
    with pytest.raises(LimitExceeded):
        manager.acquire(B, 2, wait_ms=1000)
    with pytest.raises(InvalidArgument, match="only a session can wait"):
        manager.registry.acquire(1, manager.now, wait_ms=1000)
    manager.release(A)
    assert manager.acquire(C)


def test_another_process_knows_no_places(tmp_path: Path) -> None:
    limits, boot = Settings(first=1, capacity=2, cooldown_ms=0, fresh=True), bytes(16)
    registry = Registry.in_file(tmp_path / "registry", limits, 0, boot)
    for token in (A, B, C):
        registry.open(token, 0, ttl_ms=TTL)
    held = registry.acquire(2, 0, token=A, seq=1)
    for token in (B, C):
        with pytest.raises(Exhausted):
            registry.acquire(1, 0, token=token, seq=1, wait_ms=MAX_WAIT_MS)
    registry.close()
    registry = Registry.in_file(tmp_path / "registry", limits, 0, boot)
    assert status_of(registry, 0)["waiting"] == 0
    registry.release(held[:1], 0, token=A, seq=2, ended=True)
    assert len(registry.acquire(1, 0, token=C, seq=2, wait_ms=MAX_WAIT_MS)) == 1
    registry.close()


def test_what_the_error_says(manager: Manager) -> None:
    manager.registry.release(
        np.array([manager.held[A].pop()], np.uint64), 0, token=A, seq=50, cooldown_ms=4250
    )
    manager.seq = 50
    with pytest.raises(Exhausted) as first:
        manager.registry.acquire(1, 0, token=B, seq=1, wait_ms=1000)
    text = r"cannot issue 1 of \d IDs: \d are held, 1 are cooling; the next is due in 4.25 s"
    assert re.fullmatch(text, str(first.value))
    assert first.value.due_s == 4.25
    assert not first.value.others_wait
    with pytest.raises(Exhausted, match=f"{text}; others wait before this request") as second:
        manager.registry.acquire(1, 0, token=C, seq=1, wait_ms=1000)
    assert second.value.due_s == 4.25
    assert second.value.others_wait
    with pytest.raises(Exhausted) as again:
        manager.registry.acquire(1, 4249, token=B, seq=2, wait_ms=1000)
    assert again.value.due_s == 0.001


def test_the_time_of_a_check_does_not_grow_with_the_list() -> None:
    manager = Manager(3)
    assert manager.acquire(A, 3)
    waiting = manager.registry.waiting
    for n in range(10_000):
        token = n.to_bytes(16, "big")
        manager.registry.open(token, 0, ttl_ms=TTL)
        assert not manager.acquire(token, wait_ms=MAX_WAIT_MS)
    visited = 0

    class Counted(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            nonlocal visited
            for each in super().items():
                visited += 1
                yield each

    waiting.places = Counted(waiting.places)
    assert not manager.acquire(D)
    manager.release(A)
    assert not manager.acquire(D)
    assert visited < 10


@dataclass
class Place:
    """A place in the plain list."""

    token: bytes
    count: int
    until: int


class Lines(RuleBasedStateMachine):
    """Random requests. The model computes from the start what each may have."""

    @initialize(capacity=st.integers(1, 6), cooldown_ms=st.sampled_from([0, 300]))
    def begin(self, capacity: int, cooldown_ms: int) -> None:
        self.manager = Manager(capacity, cooldown_ms)
        self.capacity, self.cooldown = capacity, cooldown_ms
        self.line: list[Place] = []
        self.cooling: list[int] = []

    def free(self) -> int:
        self.cooling = [due for due in self.cooling if due > self.manager.now]
        held = sum(map(len, self.manager.held.values()))
        return self.capacity - held - len(self.cooling)

    @rule(
        token=st.sampled_from(TOKENS),
        count=st.one_of(st.integers(1, 2), st.integers(1, 7)),
        wait_ms=st.sampled_from([None, 0, 100, 1000, 1000, MAX_WAIT_MS + 1000]),
    )
    def acquire(self, token: bytes, count: int, wait_ms: int | None) -> None:
        now = self.manager.now
        self.line = [each for each in self.line if each.until > now]
        mine = [each for each in self.line if each.token == token]
        place = mine[0] if mine and wait_ms is not None and count <= mine[0].count else None
        before = self.line[: self.line.index(place)] if place else list(self.line)
        if wait_ms is not None:  # its own place does not stand in its way
            before = [each for each in before if each.token != token]
        fits = sum(each.count for each in before) + count <= self.free()
        assert self.manager.acquire(token, count, wait_ms) is fits
        if wait_ms is None:
            return
        if fits:
            self.line = [each for each in self.line if each.token != token]
        elif place is not None:
            place.count, place.until = count, now + min(wait_ms, MAX_WAIT_MS)
        else:
            self.line = [each for each in self.line if each.token != token]
            if count <= self.capacity:
                self.line.append(Place(token, count, now + min(wait_ms, MAX_WAIT_MS)))

    @rule(token=st.sampled_from(TOKENS), count=st.integers(1, 6))
    def release(self, token: bytes, count: int) -> None:
        count = min(count, len(self.manager.held[token]))
        if count:
            self.manager.release(token, count)
            self.cooling += [self.manager.now + self.cooldown] * count

    @rule(passed=st.sampled_from([1, 99, 100, 300, 900, 1000, MAX_WAIT_MS]))
    def time_passes(self, passed: int) -> None:
        self.manager.now += passed
        for token in TOKENS:
            self.manager.registry.renew(token, self.manager.now)

    @rule(token=st.sampled_from(TOKENS))
    def a_session_ends(self, token: bytes) -> None:
        count = self.manager.registry.close_session(token, self.manager.now, ended=True)
        self.cooling += [self.manager.now + self.cooldown] * count
        self.line = [each for each in self.line if each.token != token]
        self.manager.open(token)

    @rule(token=st.sampled_from(TOKENS))
    def a_session_expires(self, token: bytes) -> None:
        self.time_passes(0)
        for other in TOKENS:
            if other != token:
                self.manager.registry.renew(other, self.manager.now + TTL)
        self.manager.now += TTL + 1
        self.cooling += [self.manager.now + self.cooldown] * len(self.manager.held[token])
        self.manager.registry.tick(self.manager.now)
        self.manager.open(token)

    @invariant()
    def it_is_as_long_as_the_plain_one(self) -> None:
        if not hasattr(self, "manager"):
            return
        registry, now = self.manager.registry, self.manager.now
        left = sum(each.until > now for each in self.line)
        status = status_of(registry, now)
        assert status["waiting"] == left
        assert status["free"] == self.free()
        assert registry.waiting.any(now) or not left
        assert len(registry.waiting.places) <= len(TOKENS), "sessions that have ended are not kept"


TestLines = Lines.TestCase
TestLines.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
