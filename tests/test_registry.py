"""The registry: settings, cooldowns and limits, with time passed in."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cidalloc.errors import Exhausted, InvalidArgument, LimitExceeded, NotHeld
from cidalloc.registry import Registry
from cidalloc.settings import Settings


def small(**values: Any) -> Registry:
    defaults: dict[str, Any] = {"first": 1, "capacity": 3, "cooldown_ms": 5000, "fresh": True}
    return Registry(Settings(**{**defaults, **values}), now=0)


def ids(*numbers: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.array(numbers, np.uint64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first", 0),
        ("first", -1),
        ("first", 2**63),
        ("first", 1.5),
        ("first", True),
        ("capacity", 0),
        ("capacity", 2**40),
        ("cooldown_ms", -1),
        ("cooldown_ms", 10**12),
        ("max_count", 0),
        ("max_count", 10**9),
        ("fresh", 1),
    ],
)
def test_settings_out_of_bounds(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=name):
        Settings(**{name: value})


def test_a_pool_that_grpc_cannot_carry() -> None:
    with pytest.raises(InvalidArgument, match="gRPC"):
        Settings(first=2**63 - 5, capacity=6)
    Settings(first=2**63 - 5, capacity=5)


def test_the_default_pool_fits_every_corrid_type() -> None:
    values = Settings()
    assert values.first == 2**30
    assert values.first + values.capacity - 1 == 2**31 - 1


def test_a_fresh_registry_starts_at_first() -> None:
    assert small().acquire(3, 0).tolist() == [1, 2, 3]


def test_a_registry_without_a_past_starts_anywhere() -> None:
    starts = {int(small(capacity=2**24, fresh=False).acquire(1, 0)[0]) for _ in range(8)}
    assert len(starts) > 1
    assert all(1 <= start <= 2**24 for start in starts)


def test_a_registry_touches_no_memory_before_it_is_needed() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    registry = Registry(Settings(), now=0)
    registry.open(bytes(16), 0, ttl_ms=10_000)
    registry.acquire(1000, 0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 5_000, "pages"


def test_ended_ids_cool_for_the_least_time() -> None:
    registry = small(capacity=1)
    registry.acquire(1, now=0)
    registry.release(ids(1), now=100, ended=True, cooldown_ms=60_000)
    with pytest.raises(Exhausted, match=r"due in 0\.0 s"):
        registry.acquire(1, now=5099)
    assert registry.acquire(1, now=5100).tolist() == [1]


@pytest.mark.parametrize(
    ("asked", "due"), [(60_000, 60_100), (10, 5_100), (0, 5_100), (None, 120_100)]
)
def test_others_cool_as_long_as_their_caller_says(asked: int | None, due: int) -> None:
    registry = small(capacity=1)
    registry.acquire(1, now=0)
    registry.release(ids(1), now=100, cooldown_ms=asked)
    with pytest.raises(Exhausted):
        registry.acquire(1, now=due - 1)
    assert registry.acquire(1, now=due).tolist() == [1]


def test_limits() -> None:
    registry = small(capacity=1000, max_count=10)
    with pytest.raises(LimitExceeded, match="10"):
        registry.acquire(11, 0)
    taken = [registry.acquire(10, 0) for _ in range(2)]
    with pytest.raises(LimitExceeded, match="10"):
        registry.release(np.concatenate(taken), 0)
    assert registry.pool.active == 20


def test_a_cooldown_beyond_all_bounds() -> None:
    registry = small()
    registry.acquire(1, 0)
    with pytest.raises(LimitExceeded, match="cooldown_ms"):
        registry.release(ids(1), 0, cooldown_ms=10**12)
    assert registry.pool.active == 1


def test_exhaustion_says_how_long_to_wait() -> None:
    registry = small(capacity=2)
    with pytest.raises(Exhausted, match=r"2 are held, 0 are cooling; none"):
        registry.acquire(2, 0)
        registry.acquire(1, 0)
    registry.release(ids(2), 1_000, ended=True)
    with pytest.raises(Exhausted, match=r"1 are held, 1 are cooling; the next is due in 4\.2 s"):
        registry.acquire(1, 1_800)


def test_a_status_knows_what_has_cooled_meanwhile() -> None:
    registry = small()
    registry.acquire(1, 0)
    registry.release(ids(1), 0, ended=True)
    assert registry.status(4_999)["cooling"] == 1
    assert registry.status(5_000)["cooling"] == 0
    assert registry.status(5_000)["free"] == 3


BOOTS = [bytes([n] * 16) for n in range(1, 4)]


def rebooted(path: Path, values: Settings, now: int, boot: int) -> Registry:
    return Registry.in_file(path, values, now, BOOTS[boot])


def test_a_reboot_cuts_no_cooldown_of_an_anonymous_id_short(tmp_path: Path) -> None:
    values = Settings(first=1, capacity=1, anonymous_age_ms=1_000, fresh=True)
    registry = rebooted(tmp_path / "r", values, 0, boot=0)
    registry.acquire(1, 0)
    registry.tick(10_000)  # it was taken back, and cools
    assert len(registry.pool) == 0
    registry.close()
    registry = rebooted(tmp_path / "r", values, 0, boot=1)
    with pytest.raises(Exhausted):
        registry.acquire(1, values.unended_cooldown_ms - 1)


def test_a_reboot_cuts_no_cooldown_short_that_was_made_longer(tmp_path: Path) -> None:
    values = Settings(first=1, capacity=1, cooldown_ms=10, unended_cooldown_ms=10, fresh=True)
    registry = rebooted(tmp_path / "r", values, 0, boot=0)
    registry.acquire(1, 0)
    registry.release(ids(1), 0, ended=True)
    registry.close()
    longer = replace(values, cooldown_ms=100_000)
    registry = rebooted(tmp_path / "r", longer, 0, boot=1)
    with pytest.raises(Exhausted):
        registry.acquire(1, 99_999)
    assert registry.acquire(1, 100_000).tolist() == [1]


def test_an_anonymous_id_keeps_its_age_after_a_reboot(tmp_path: Path) -> None:
    day = Settings().anonymous_age_ms
    values = Settings(first=1, capacity=10, fresh=True)
    registry = rebooted(tmp_path / "r", values, 30 * day, boot=0)
    registry.acquire(1, 30 * day)
    registry.close()
    registry = rebooted(tmp_path / "r", values, 0, boot=1)
    late = registry.acquire(1, day + 1000)
    registry.tick(2 * day)
    assert late[0] in registry.pool, "held for less than a day"
    registry.tick(3 * day)
    assert late[0] not in registry.pool


def test_releasing_nothing_is_a_mistake() -> None:
    with pytest.raises(InvalidArgument, match="say which"):
        small().release(ids(), 0)


class RegistryMachine(RuleBasedStateMachine):
    """The registry against a dict of IDs and the times from which they may be issued."""

    COOLDOWN = 50

    def __init__(self) -> None:
        super().__init__()
        self.registry = small(capacity=5, cooldown_ms=self.COOLDOWN)
        self.due = dict.fromkeys(range(1, 6), 0)
        self.held: set[int] = set()
        self.now = 0

    @rule(passed=st.integers(0, 120))
    def time_passes(self, passed: int) -> None:
        self.now += passed

    @rule(count=st.integers(1, 6))
    def acquire(self, count: int) -> None:
        may = {cid for cid, due in self.due.items() if due <= self.now} - self.held
        if count > len(may):
            with pytest.raises(Exhausted):
                self.registry.acquire(count, self.now)
            return
        got = set(self.registry.acquire(count, self.now).tolist())
        assert len(got) == count
        assert got <= may
        self.held |= got

    @precondition(lambda self: self.held)
    @rule(data=st.data(), ended=st.booleans(), cooldown=st.integers(0, 200))
    def release(self, data: st.DataObject, ended: bool, cooldown: int) -> None:
        some = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, unique=True))
        done = self.registry.release(ids(*some), self.now, ended=ended, cooldown_ms=cooldown)
        assert done == len(some)
        self.held -= set(some)
        wait = self.COOLDOWN if ended else max(self.COOLDOWN, cooldown)
        self.due.update(dict.fromkeys(some, self.now + wait))

    @precondition(lambda self: len(self.held) < 5)
    @rule(data=st.data())
    def release_what_is_not_held(self, data: st.DataObject) -> None:
        cid = data.draw(st.sampled_from(sorted(set(self.due) - self.held)))
        with pytest.raises(NotHeld):
            self.registry.release(ids(*self.held, cid), self.now)

    @invariant()
    def counts(self) -> None:
        assert self.registry.pool.active == len(self.held)
        assert all(cid in self.registry.pool for cid in self.held)


RegistryMachine.TestCase.settings = hypothesis_settings(max_examples=60, deadline=None)
TestRegistryMachine = RegistryMachine.TestCase
