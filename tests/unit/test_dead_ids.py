"""Which IDs DEAD names, to whom and when: by examples, and against a simple model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cidalloc.errors import Exhausted, InvalidArgument, LimitExceeded, SessionUnknown
from cidalloc.manager import dead_ids, service
from cidalloc.manager.dead_ids import DeadIds
from cidalloc.manager.registry import Registry
from cidalloc.manager.settings import Settings
from cidalloc.protocol import DEAD_WINDOW_MS, END_WITHIN_MS, Request

LAST = DEAD_WINDOW_MS - END_WITHIN_MS
TTL, GRACE, COOLDOWN = 10_000, 2_000, 3_000
EXPIRY = TTL + GRACE + 1


def token(n: int) -> bytes:
    return n.to_bytes(16, "big")


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


@pytest.fixture
def registry() -> Registry:
    values = Settings(
        first=1, capacity=1000, cooldown_ms=1_000, grace_ms=GRACE, fresh=True, min_ttl_ms=TTL
    )
    return Registry(values, 0)


def die(registry: Registry, models: tuple[str, ...] = ("asr",), count: int = 3) -> list[int]:
    """Let a session expire that was opened at 0; return its IDs."""
    registry.open(token(1), 0, ttl_ms=TTL, cooldown_ms=COOLDOWN)
    held = registry.acquire(count, 0, token=token(1), seq=1, cooldown_ms=COOLDOWN).tolist()
    registry.renew(token(1), 0, models=models)
    registry.open(token(2), 0, ttl_ms=600_000)
    for model in models:
        dead(registry, 0, model)
    registry.tick(EXPIRY)
    return held


def dead(registry: Registry, now: int, model: str = "asr", asker: int = 2) -> list[int]:
    return sorted(registry.dead_ids(token(asker), now, model, 1000).tolist())


def test_the_window_after_the_least_cooldown_was_raised(registry: Registry) -> None:
    registry.open(token(1), 0, ttl_ms=TTL, cooldown_ms=COOLDOWN)
    (held,) = registry.acquire(1, 0, token=token(1), seq=1, cooldown_ms=COOLDOWN).tolist()
    registry.renew(token(1), 0, models=("asr",))
    registry.open(token(2), 0, ttl_ms=600_000)
    dead(registry, 0)
    registry.settings = replace(registry.settings, cooldown_ms=2 * COOLDOWN)
    registry.tick(EXPIRY)
    due = EXPIRY + 2 * (2 * COOLDOWN) + DEAD_WINDOW_MS
    assert dead(registry, EXPIRY + 2 * COOLDOWN - 1) == []
    assert dead(registry, EXPIRY + 2 * COOLDOWN) == [held]
    registry.tick(due - 1)
    assert registry.pool.cooling == 1
    registry.pool.acquire_many(0, now=due)
    assert registry.pool.cooling == 0


def test_the_window(registry: Registry) -> None:
    held = die(registry)
    assert registry.dead.count(EXPIRY) == 3
    assert dead(registry, EXPIRY + COOLDOWN - 1) == []
    assert dead(registry, EXPIRY + COOLDOWN) == held
    assert dead(registry, EXPIRY + COOLDOWN + 1) == [], "each once"
    assert dead(registry, EXPIRY + COOLDOWN + 15_000) == held, "END may have failed"
    assert dead(registry, EXPIRY + COOLDOWN + LAST) == held
    assert dead(registry, EXPIRY + COOLDOWN + LAST) == []
    assert registry.dead.count(EXPIRY + COOLDOWN + LAST) == 3
    assert registry.dead.count(EXPIRY + COOLDOWN + LAST + 1) == 0


def test_no_id_is_named_that_cannot_be_ended_in_time(registry: Registry) -> None:
    die(registry)
    assert dead(registry, EXPIRY + COOLDOWN + LAST + 1) == []


def test_they_are_issued_again_only_after_another_cooldown(registry: Registry) -> None:
    held = die(registry)
    end = EXPIRY + 2 * COOLDOWN + DEAD_WINDOW_MS
    registry.acquire(997, EXPIRY, token=token(2), seq=1)
    with pytest.raises(Exhausted):
        registry.acquire(1, end - 1, token=token(2), seq=2)
    assert sorted(registry.acquire(3, end, token=token(2), seq=3)) == held


def test_without_models_nothing_changes(registry: Registry) -> None:
    held = die(registry, ())
    assert registry.dead.count(EXPIRY) == 0
    issued = registry.acquire(1000, EXPIRY + COOLDOWN, token=token(2), seq=1).tolist()
    assert set(held) <= set(issued)


def test_models_stay_until_others_are_announced(registry: Registry) -> None:
    registry.open(token(1), 0, ttl_ms=TTL)
    registry.acquire(1, 0, token=token(1), seq=1)
    for models in (("old",), ("asr", "tts"), ()):
        registry.renew(token(1), 0, models=models)
    registry.open(token(2), 0, ttl_ms=600_000)
    for model in ("old", "asr", "tts"):
        dead(registry, 0, model)
    registry.tick(EXPIRY)
    assert registry.dead.count(EXPIRY) == 2


def test_nothing_changes_if_nobody_asks(registry: Registry) -> None:
    """Its IDs cool no longer, and nobody who comes later gets them."""
    registry.open(token(1), 0, ttl_ms=TTL, cooldown_ms=COOLDOWN)
    held = registry.acquire(3, 0, token=token(1), seq=1, cooldown_ms=COOLDOWN).tolist()
    registry.renew(token(1), 0, models=("asr",))
    registry.open(token(2), 0, ttl_ms=600_000)
    dead(registry, 0, "other")
    registry.tick(EXPIRY)
    assert not dead(registry, EXPIRY + COOLDOWN)
    issued = registry.acquire(1000, EXPIRY + COOLDOWN, token=token(2), seq=1).tolist()
    assert set(held) <= set(issued)


def test_who_has_stopped_asking_counts_no_more() -> None:
    found = DeadIds()
    found.name("asr", 1, 10, 0)
    assert found.asked_for(("tts", "asr"), 25_000) == ["asr"]
    assert found.asked_for(("tts", "asr"), 25_001) == []
    found.name("asr", 1, 10, 25_001)
    found.leave(1)
    assert found.asked_for(("asr",), 25_001) == []


def test_who_has_stopped_asking_may_leave() -> None:
    found = DeadIds()
    found.name("asr", 1, 10, 0)
    found.name("tts", 1, 10, 0)
    found.name("asr", 2, 10, 25_001)
    assert found.asked_for(("tts", "asr"), 25_001) == ["asr"]
    found.leave(1)
    assert found.asked_for(("tts", "asr"), 25_001) == ["asr"]


def test_high_ids_have_shares_as_well() -> None:
    found = DeadIds()
    for asker in (1, 2):
        found.name("asr", asker, 10, 0)
    found.add(ids(2**63, 2**63 + 1), ["asr"], since=0, now=0)
    assert sorted(len(found.name("asr", asker, 10, 0)) for asker in (1, 2)) == [1, 1]


def test_each_model_has_its_own(registry: Registry) -> None:
    held = die(registry, ("asr", "tts"))
    now = EXPIRY + COOLDOWN
    assert dead(registry, now, "asr") == held
    assert dead(registry, now, "asr") == []
    assert dead(registry, now, "tts") == held
    assert dead(registry, now, "other") == []


def test_sessions_that_ask_share_them(registry: Registry) -> None:
    registry.open(token(3), 0, ttl_ms=600_000)
    dead(registry, 0, asker=3)
    held = die(registry, count=10)
    now = EXPIRY + COOLDOWN
    some = registry.dead_ids(token(2), now, "asr", 2).tolist()
    assert len(some) == 2
    others = dead(registry, now, asker=3)
    assert len(others) == 5
    assert sorted(some + dead(registry, now) + others) == held


def test_those_whose_window_is_over_make_room(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_ids, "_MOST", 3)
    die(registry)
    over = EXPIRY + COOLDOWN + LAST + 1
    opened = over - EXPIRY + 10
    registry.open(token(4), opened, ttl_ms=TTL, cooldown_ms=COOLDOWN)
    held = registry.acquire(3, opened, token=token(4), seq=1, cooldown_ms=COOLDOWN).tolist()
    registry.renew(token(4), opened, models=("asr",))
    dead(registry, over - 1)
    registry.tick(opened + EXPIRY)
    assert dead(registry, opened + EXPIRY + COOLDOWN) == held


def test_a_session_that_is_closed_is_not_dead(registry: Registry) -> None:
    registry.open(token(1), 0, ttl_ms=TTL)
    registry.acquire(1, 0, token=token(1), seq=1)
    registry.renew(token(1), 0, models=("asr",))
    registry.open(token(2), 0, ttl_ms=600_000)
    dead(registry, 0)
    registry.close_session(token(1), 0)
    assert registry.dead.count(0) == 0


def test_only_a_session_may_ask(registry: Registry) -> None:
    die(registry)
    with pytest.raises(SessionUnknown):
        dead(registry, EXPIRY, asker=9)
    with pytest.raises(SessionUnknown):
        dead(registry, EXPIRY, asker=1)


def test_the_horizon_counts_the_window_before_models_are_known(registry: Registry) -> None:
    registry.open(token(1), 0, ttl_ms=TTL, cooldown_ms=COOLDOWN)
    registry.acquire(1, 0, token=token(1), seq=1, cooldown_ms=COOLDOWN)
    registry.renew(token(1), 0, models=("asr",))
    assert registry._horizon >= TTL + GRACE + 2 * COOLDOWN + DEAD_WINDOW_MS
    registry.renew(token(1), 0, cooldown_ms=400_000)
    assert registry._horizon >= TTL + GRACE + 800_000 + DEAD_WINDOW_MS


def test_a_power_cut_does_not_forget_the_window(tmp_path: Path) -> None:
    """Whoever was told an ID before it may send END for half a minute, and that may come late."""
    values = Settings(
        first=1, capacity=1000, cooldown_ms=1_000, grace_ms=GRACE, fresh=True, min_ttl_ms=TTL
    )
    registry = Registry.in_file(tmp_path / "r", values, 0, b"a" * 16)
    registry.open(token(1), 0, ttl_ms=TTL, cooldown_ms=COOLDOWN)
    held = registry.acquire(3, 0, token=token(1), seq=1, cooldown_ms=COOLDOWN).tolist()
    registry.renew(token(1), 0, models=("asr",))
    registry.open(token(2), 0, ttl_ms=TTL)
    for now in (0, EXPIRY - 1, EXPIRY, EXPIRY + COOLDOWN - 1):
        assert dead(registry, now) == []
    assert dead(registry, EXPIRY + COOLDOWN) == held
    registry.close()
    registry = Registry.in_file(tmp_path / "r", values, 0, b"b" * 16)  # another boot of the machine
    with pytest.raises(Exhausted):
        registry.acquire(1, END_WITHIN_MS + COOLDOWN)


class TestShares:
    def test_askers_share(self) -> None:
        found = DeadIds()
        found.add(np.arange(100, dtype=np.uint64), ("asr",), 1_000, 0)
        for asker in range(4):
            assert not len(found.name("asr", asker, 1000, 0))
        shares = [set(found.name("asr", asker, 1000, 1_000).tolist()) for asker in range(4)]
        assert [len(each) for each in shares] == [25] * 4
        assert len(set.union(*shares)) == 100

    @pytest.mark.parametrize("strangers", [1, 2])
    def test_a_stranger_in_a_loop_changes_nothing(self, strangers: int) -> None:
        """Whatever it asks, a client that tidies gets every ID in time."""
        found, got = DeadIds(), set()
        found.add(np.arange(100, dtype=np.uint64), ("asr",), 5_000, 0)
        for now in range(0, 5_000 + LAST, 500):
            for stranger in range(strangers):
                for _ in range(5):
                    found.name("asr", 1000 + stranger, 100_000, now)
            if not now % 5_000:
                got |= set(found.name("asr", 1, 1000, now).tolist())
        assert got == set(range(100))

    def test_an_asker_that_has_died_gets_no_share(self) -> None:
        found = DeadIds()
        found.add(ids(2, 3), ("asr",), 30_000, 0)
        for asker in (1, 2):
            found.name("asr", asker, 10, 0)
        assert found.name("asr", 2, 10, 30_000).tolist() == [2, 3]

    def test_a_session_that_has_ended_gets_no_share(self, registry: Registry) -> None:
        held = die(registry)
        registry.open(token(3), EXPIRY, ttl_ms=600_000)
        dead(registry, EXPIRY, asker=3)
        registry.close_session(token(3), EXPIRY)
        assert dead(registry, EXPIRY + COOLDOWN) == held

    def test_other_models_have_other_askers(self) -> None:
        found = DeadIds()
        found.add(ids(2, 3), ("asr", "tts"), 0, 0)
        assert not len(found.name("asr", 1, 0, 0))
        assert found.name("tts", 2, 10, 0).tolist() == [2, 3]

    def test_a_session_asks_for_a_few_models(self) -> None:
        found = DeadIds()
        for n in range(16):
            found.name(f"model {n}", 1, 10, n)
        with pytest.raises(LimitExceeded, match="16 models at most"):
            found.name("model 16", 1, 10, 16)
        found.name("model 3", 1, 10, 17)
        assert len(found._asked) == 16
        found.leave(1)
        assert not found._asked and not found._models and not found._rows


def test_no_more_than_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    found = DeadIds()
    for n in range(5):
        found.add(np.arange(60_000, dtype=np.uint64), (f"m{n}",), 0, 0)
    assert (
        found.count(0)
        == dead_ids._MOST
        == len(found.name("m0", 1, 10**6, 0)) + len(found.name("m1", 1, 10**6, 0))
    )
    assert [each.message for each in caplog.records] == [
        "more than 100000 IDs of expired sessions: some get no END"
    ]
    found.add(ids(7), ("m9",), LAST + 1, LAST + 1)
    assert found.name("m9", 1, 10, LAST + 1).tolist() == [7], "the others' time is over"


@pytest.mark.parametrize(
    "models",
    [
        "asr",
        '"asr"',
        '{"asr": 1}',
        "[1]",
        '[""]',
        "[null]",
        '["' + "x" * 257 + '"]',
        '["' + "é" * 129 + '"]',
        str(["m"] * 17).replace("'", '"'),
        "[" * 100_000,
        "",
    ],
)
def test_models_that_are_none(models: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^models is not a JSON list of at most 16 names"):
        decode(models=models)


def test_a_request_without_a_count_gets_all_of_a_few(registry: Registry) -> None:
    held = die(registry, count=12)
    request = decode(session=token(2).hex(), model="asr")
    assert sorted(service._dead(registry, request, EXPIRY + COOLDOWN).tolist()) == held


def test_models_that_are_some() -> None:
    names = ["x" * 256, "é" * 128, "\ud800", *(f"m{n}" for n in range(13))]
    assert decode(models=json.dumps(names)).models == tuple(names)
    assert decode(models="[]").models == ()
    assert decode().models is None


@pytest.mark.parametrize("model", ["", "x" * 257])
def test_a_model_that_is_none(model: str) -> None:
    with pytest.raises(InvalidArgument, match="model is not a name of 1 to 256 bytes"):
        decode(model=model)


@pytest.mark.parametrize("name", ["model", "models"])
def test_no_text(name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name} is not a text"):
        decode(**{name: 1})


def decode(**parameters: object) -> Request:
    return Request.decode(np.array([[10]], np.int8), None, json.dumps(parameters))


class Against(RuleBasedStateMachine):
    """Sets of IDs per model, one list of times: what is named, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.now, self.next = DeadIds(), 0, 1
        self.since: dict[tuple[str, int], int] = {}
        self.times: dict[tuple[str, int], list[int]] = {}

    @rule(ms=st.sampled_from([1, 999, 5_000, 15_000, 30_000, 90_000]))
    def wait(self, ms: int) -> None:
        self.now += ms

    @rule(
        count=st.integers(0, 5),
        models=st.sets(st.sampled_from("abc")),
        cooldown=st.sampled_from([0, 1_000, 40_000]),
    )
    def expire(self, count: int, models: set[str], cooldown: int) -> None:
        mine = range(self.next, self.next + count)
        self.next += count
        self.found.add(ids(*mine), sorted(models), self.now + cooldown, self.now)
        for model in models:
            for cid in mine:
                self.since[model, cid] = self.now + cooldown

    @rule(model=st.sampled_from("abcd"), asker=st.integers(1, 3), count=st.integers(0, 4))
    def ask(self, model: str, asker: int, count: int) -> None:
        named = self.found.name(model, asker, count, self.now).tolist()
        assert len(named) <= count and len(set(named)) == len(named)
        for cid in named:
            assert 0 <= self.now - self.since[model, cid] <= LAST
            self.times.setdefault((model, cid), []).append(self.now)

    @rule(model=st.sampled_from("abc"))
    def all_ask(self, model: str) -> None:
        """Whoever asks: what is due is named to one of them."""
        for asker in (1, 2, 3, 1, 2, 3):  # the second time all have come
            self.ask(model, asker, 1000)
        shares = dead_ids._SHARES_AT_MS
        for (name, cid), since in self.since.items():
            age = self.now - since
            if name == model and 0 <= age <= LAST:
                first = int(shares[shares <= age].max()) + since
                assert max(self.times.get((name, cid), [-1])) >= first

    @invariant()
    def is_bounded(self) -> None:
        for times in self.times.values():
            assert len(times) <= len(dead_ids._SHARES_AT_MS)
        due = [since for since in self.since.values() if self.now <= since + LAST]
        assert self.found.count(self.now) == len(due)


TestAgainst = Against.TestCase
TestAgainst.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_list_that_is_just_full_is_not_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dead_ids, "_MOST", 10)
    found = DeadIds()
    assert found.name("asr", 1, 10, 0).dtype == np.uint64, "also without IDs"
    found.add(ids(*range(10)), ["asr"], since=0, now=0)
    assert found.count(0) == 10 and not caplog.records
    DeadIds().add(ids(*range(11)), ["asr"], since=0, now=0)
    assert len(caplog.records) == 1
