"""The registry: settings, cooldowns and limits, with time passed in."""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cidalloc.errors import (
    CidError,
    Duplicate,
    Exhausted,
    InvalidArgument,
    LimitExceeded,
    NotHeld,
    NotOwner,
    OutOfRange,
    RegistryCorrupt,
    Repeated,
    SessionUnknown,
    Unavailable,
)
from cidalloc.manager import sessions
from cidalloc.manager.inspection import status_of
from cidalloc.manager.registry import Grant, Registry
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file_format import Word
from cidalloc.protocol import MAX_COOLDOWN_MS


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


@pytest.mark.parametrize("capacity", [3, 2**24])
def test_a_fresh_registry_starts_at_first(capacity: int) -> None:
    assert small(capacity=capacity).acquire(3, 0).tolist() == [1, 2, 3]


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
    with pytest.raises(Exhausted, match=r"due in 0\.001 s"):
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
    assert status_of(registry, 4_999)["cooling"] == 1
    assert status_of(registry, 5_000)["cooling"] == 0
    assert status_of(registry, 5_000)["free"] == 3


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
    short = {"cooldown_ms": 10, "unended_cooldown_ms": 10, "max_ttl_ms": 1_000, "grace_ms": 0}
    values = Settings(first=1, capacity=1, fresh=True, **short)
    registry = rebooted(tmp_path / "r", values, 0, boot=0)
    registry.acquire(1, 0)
    registry.release(ids(1), 0, ended=True)
    registry.close()
    longer = replace(values, cooldown_ms=100_000)
    registry = rebooted(tmp_path / "r", longer, 0, boot=1)
    with pytest.raises(Exhausted):
        registry.acquire(1, 99_999)
    assert registry.acquire(1, 100_000).tolist() == [1]


def test_an_anonymous_id_that_is_released_after_a_reboot_cools_for_the_horizon(
    tmp_path: Path,
) -> None:
    """Another client may have had it, of which the last stores are lost."""
    values = Settings(first=1, capacity=1, cooldown_ms=0, fresh=True)
    registry = rebooted(tmp_path / "r", values, 0, boot=0)
    taken, horizon = registry.acquire(1, 0), registry.store.read(Word.HORIZON)
    for _ in range(2):  # and a later process knows it, too
        registry.close()
        registry = rebooted(tmp_path / "r", values, 0, boot=1)
    assert registry.release(taken, 0, ended=True) == 1
    with pytest.raises(Exhausted):
        registry.acquire(1, horizon - 1)
    assert registry.acquire(1, horizon).tolist() == taken.tolist()


def test_anonymous_ids_of_several_ages_survive_each_reboot(tmp_path: Path) -> None:
    """The clock begins anew, so their rows are written."""
    values = Settings(first=1, capacity=10, anonymous_age_ms=8_000, fresh=True)
    registry = rebooted(tmp_path / "r", values, 10**6, boot=0)
    registry.acquire(1, 10**6)
    registry.acquire(1, 10**6 + 5_000)
    for now, boot in ((1_000, 1), (2_000, 1), (0, 2), (0, 2)):
        assert (registry.anonymous, len(registry.sessions)) == (2, 2)
        registry._check()
        registry.close()
        registry = rebooted(tmp_path / "r", values, now, boot)
    registry.close()


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


A, B = b"a" * 16, b"b" * 16


def test_what_open_grants() -> None:
    registry = small()
    assert registry.open(A, 0, ttl_ms=5_000) == Grant(1, 5_000)
    assert registry.open(A, 9, ttl_ms=9_000) == Grant(1, 5_000), "it lives"
    assert registry.open(B, 0, ttl_ms=2_000) == Grant(2, 2_000)
    assert registry.renew(B, 0) == Grant(2, 2_000)
    registry.close_session(A, 0)
    assert registry.open(A, 0, ttl_ms=9_000) == Grant(3, 9_000)


def test_open_renews_nothing_and_all_else_does() -> None:
    registry = small(grace_ms=1_000, capacity=100)
    calls: list[Callable[[int], object]] = [
        lambda now: registry.renew(A, now),
        lambda now: registry.held(A, now),
        lambda now: registry.acquire(1, now, token=A, seq=now),
        lambda now: registry.release(ids(), now, token=A, seq=now),
        lambda now: registry.acquire(10**9, now, token=A, seq=now),
        lambda now: registry.acquire(1, now, token=A, seq=1),
        lambda now: registry.release(ids(99), now, token=A, seq=now),
    ]
    registry.open(A, 0, ttl_ms=5_000)
    now = 0
    for call in calls:
        now += 6_000
        with suppress(CidError):
            call(now)
    for _ in range(2):
        now += 3_000
        assert registry.open(A, now, ttl_ms=5_000) == Grant(1, 5_000)
    with pytest.raises(SessionUnknown):
        registry.renew(A, now + 128)
    assert registry.expired.count == 1 and registry.released["expired"] == 1


def test_a_renewal_may_ask_for_a_longer_cooldown_and_never_for_a_shorter_one() -> None:
    registry = small(capacity=1, grace_ms=0)
    registry.open(A, 0, ttl_ms=1_000)
    (cid,) = registry.acquire(1, 0, token=A, seq=1, cooldown_ms=7_000)
    for cooldown_ms in (None, 30_000, 0, None):
        assert registry.renew(A, 500, cooldown_ms=cooldown_ms) == Grant(1, 1_000)
    with pytest.raises(LimitExceeded, match="max_cooldown_ms"):
        registry.renew(A, 600, cooldown_ms=2**40)
    registry.open(B, 2_000, ttl_ms=60_000)  # it has expired by now
    with pytest.raises(Exhausted):
        registry.acquire(1, 31_999, token=B, seq=1)
    assert registry.acquire(1, 32_000 + 128, token=B, seq=2) == [cid]


def test_a_session_that_expires_lets_its_ids_cool_as_long_as_it_said() -> None:
    registry = small(capacity=2, grace_ms=0)
    registry.open(A, 0, ttl_ms=1_000, cooldown_ms=7_000)
    registry.acquire(1, 0, token=A, seq=1, cooldown_ms=30_000)
    registry.acquire(1, 0, token=A, seq=2, cooldown_ms=0)
    registry.tick(1_100)
    assert len(registry.pool) == 0
    with pytest.raises(Exhausted, match=r"0 are held, 2 are cooling; the next is due in 1 s"):
        registry.acquire(1, 30_100)
    assert len(registry.acquire(2, 31_100)) == 2


def test_the_next_process_lets_them_cool_as_long_as_that(tmp_path: Path) -> None:
    settings = Settings(first=1, capacity=1, cooldown_ms=0, grace_ms=1_000, fresh=True)
    registry = Registry.in_file(tmp_path / "it", settings, 0, bytes(16))
    registry.open(bytes(16), 0, ttl_ms=10_000)
    registry.acquire(1, 0, token=bytes(16), seq=1, cooldown_ms=60_000)
    registry.close()
    registry = Registry.in_file(tmp_path / "it", settings, 100, bytes(16))
    end = 100 + 10_000 + 1_000 + 1
    registry.tick(end)
    assert not registry.sessions.named
    with pytest.raises(Exhausted):
        registry.acquire(1, end + 59_999)
    assert registry.acquire(1, end + 60_000).tolist() == [1]
    registry.close()


def test_limits_say_which_setting_they_are() -> None:
    registry = small(capacity=100, max_sessions=1, max_held=5, max_anonymous=3, max_count=6)
    for ttl in (0, 999, 600_001, -5):
        with pytest.raises(LimitExceeded, match=f"ttl_ms={ttl} is not within 1000 to 600000"):
            registry.open(A, 0, ttl_ms=ttl)
    registry.open(A, 0, ttl_ms=1_000)
    with pytest.raises(LimitExceeded, match="1 sessions are open, as many as max_sessions allows"):
        registry.open(B, 0, ttl_ms=1_000)
    registry.acquire(4, 0, token=A, seq=1)
    with pytest.raises(
        LimitExceeded,
        match="4 IDs are held by this session, and 2 more would be more than max_held=5",
    ):
        registry.acquire(2, 0, token=A, seq=2)
    with pytest.raises(LimitExceeded, match=r"count=7 is more than .* max_count=6"):
        registry.acquire(7, 0, token=A, seq=3)
    registry.acquire(2, 0)
    with pytest.raises(LimitExceeded, match=r"2 IDs are held without a session, and 2 more .*=3"):
        registry.acquire(2, 0)
    registry.acquire(1, 0, token=A, seq=4)
    assert registry.pool.active == 7, "what was refused took no ID"


def test_what_was_refused_is_not_applied_later() -> None:
    """A network that repeats a request may bring it when the client has gone on."""
    registry = small(capacity=2, max_held=2)
    registry.open(A, 0, ttl_ms=60_000)
    taken = registry.acquire(2, 0, token=A, seq=1)
    with pytest.raises(LimitExceeded):
        registry.acquire(1, 0, token=A, seq=2)
    with pytest.raises(OutOfRange):
        registry.release(ids(99), 0, token=A, seq=3)
    assert registry.release(taken, 0, token=A, seq=4, ended=True) == 2
    with pytest.raises(Exhausted):  # they cool
        registry.acquire(1, 0, token=A, seq=5)
    with pytest.raises(Repeated, match="seq=5 is not above 5"):
        registry.acquire(1, 50_000, token=A, seq=5)
    assert registry.acquire(1, 50_000, token=A, seq=6) == [1]


@pytest.mark.parametrize("label", ["X" * 64, "ü" * 32, " ", ""])
def test_a_label(tmp_path: Path, label: str) -> None:
    registry = rebooted(tmp_path / "r", Settings(fresh=True), 0, 0)
    registry.open(A, 0, ttl_ms=10_000, label=label)
    registry.open(B, 0, ttl_ms=10_000)
    for _ in range(2):
        assert [each["label"] for each in status_of(registry, 0)["sessions"]] == [label, ""]
        registry.close()
        registry = rebooted(tmp_path / "r", Settings(fresh=True), 0, 0)
    registry.close()


@pytest.mark.parametrize("label", ["x" * 65, "ü" * 33, "a\n", "\0", "\ud800", "\x7f"])
def test_a_label_that_is_none(label: str) -> None:
    registry = small()
    with pytest.raises(InvalidArgument, match="not at most 64 bytes of printable text"):
        registry.open(A, 0, ttl_ms=1_000, label=label)
    assert status_of(registry, 0)["sessions_total"] == 0


@pytest.mark.parametrize("in_file", [False, True])
def test_a_small_pool_without_a_past_waits(tmp_path: Path, in_file: bool) -> None:
    values = Settings(first=1, capacity=3, max_ttl_ms=20_000, grace_ms=5_000)
    registry = rebooted(tmp_path / "r", values, 7, 0) if in_file else Registry(values, 7)
    with pytest.raises(Exhausted, match=r"this registry is new.* due in 25 s"):
        registry.acquire(1, 7)
    if in_file:
        registry.close()
        registry = rebooted(tmp_path / "r", values, 20_000, 0)
    with pytest.raises(Exhausted, match=r"due in 0\.001 s"):
        registry.acquire(1, 25_006)
    assert registry.acquire(3, 25_007).tolist() == [1, 2, 3]


def test_after_a_reboot_fresh_ids_come_from_above_the_mark(tmp_path: Path) -> None:
    values = Settings(first=1, capacity=10**6, fresh=True)
    registry = rebooted(tmp_path / "r", values, 0, 0)
    registry.open(A, 0, ttl_ms=60_000)
    registry.acquire(10, 0, token=A, seq=1, cooldown_ms=100_000)
    anonymous = registry.acquire(1, 0)
    mark, horizon = registry.pool.ready, registry.store.read(Word.HORIZON)
    assert 730_000 <= horizon < 2 * 730_000, "a session could have lived for so long, and cooled"
    registry.close()
    registry = rebooted(tmp_path / "r", values, 5, 1)
    with pytest.raises(SessionUnknown):
        registry.renew(A, 5)
    assert registry.pool.held_count(registry.pool.owner_of(int(anonymous[0]))) == 1
    assert registry.open(A, 5, ttl_ms=1_000).generation == 2**32 + 1
    assert registry.acquire(3, 5).tolist() == [mark + 1, mark + 2, mark + 3]
    assert min(registry.acquire(1, 4 + horizon)) > mark
    assert max(registry.acquire(1, 5 + horizon)) <= mark


def test_what_is_new_after_a_reboot_outlives_the_next_process(tmp_path: Path) -> None:
    values = Settings(first=1, capacity=10**6, fresh=True)
    rebooted(tmp_path / "r", values, 0, 0).close()
    for _ in range(2):
        registry = rebooted(tmp_path / "r", values, 5, 1)
        assert registry.open(A, 5, ttl_ms=60_000).generation == 2**32 + 1
        registry.close()


def test_a_retry_does_not_act_in_the_next_process(tmp_path: Path) -> None:
    values = Settings(first=1, capacity=100, fresh=True)
    registry = rebooted(tmp_path / "r", values, 0, 0)
    registry.open(A, 0, ttl_ms=60_000)
    taken = registry.acquire(2, 0, token=A, seq=1)
    changes: list[Callable[[], object]] = [
        lambda: registry.acquire(1, 0, token=A, seq=3),
        lambda: registry.release(taken[:1], 0, token=A, seq=4, ended=True),
        lambda: registry.held(A, 0, seq=7),
    ]
    for change in changes:
        change()
        registry.close()
        registry = rebooted(tmp_path / "r", values, 0, 0)
        with pytest.raises(Repeated):
            change()
    assert len(registry.held(A, 0)) == 2


def test_after_a_power_cut_the_numbers_of_changes_leap(tmp_path: Path) -> None:
    """Over all that may be lost, so that no stamp of a client is ahead of the file."""
    for boot in range(3):
        registry = rebooted(tmp_path / "r", Settings(), 0, boot)
        assert registry.store.read(Word.CHANGES) == boot * 2**32
        for changes in range(1, 11):
            registry.stamps.count()
            assert registry.store.read(Word.CHANGES) == boot * 2**32 + changes
        registry.close()


def test_the_next_process_uses_the_rows_of_ended_sessions_again(tmp_path: Path) -> None:
    for _ in range(3):
        registry = rebooted(tmp_path / "r", Settings(fresh=True), 0, 0)
        registry.open(A, 0, ttl_ms=10_000)
        assert registry.sessions._rows_used == 2
        registry.close_session(A, 0)
        registry.close()


def test_more_sessions_than_the_file_had_room_for_at_first(tmp_path: Path) -> None:
    registry = rebooted(tmp_path / "r", Settings(fresh=True), 0, 0)
    room = registry.store.ready_rows
    tokens = [n.to_bytes(16, "big") for n in range(room + 10)]
    held = []
    for each in tokens:
        registry.open(each, 0, ttl_ms=10_000)
        held.append(registry.acquire(1, 0, token=each, seq=1).tolist())
    registry.close()
    registry = rebooted(tmp_path / "r", Settings(fresh=True), 0, 0)
    assert registry.store.ready_rows > room
    assert [registry.held(each, 0).tolist() for each in tokens] == held
    registry.close()


def test_an_id_that_cools_for_longer_than_any_is_damage(tmp_path: Path) -> None:
    registry = rebooted(tmp_path / "r", Settings(fresh=True), 0, 0)
    (cid,) = registry.acquire(1, 0).tolist()
    registry.pool.release(cid, registry.pool.owner_of(cid), 2 * MAX_COOLDOWN_MS)
    registry.close()
    with pytest.raises(RegistryCorrupt, match=f"ID {cid} is damaged"):
        rebooted(tmp_path / "r", Settings(fresh=True), 0, 0)


def test_the_horizon_is_for_how_long_ids_may_be_in_use_and_cool() -> None:
    """In powers of two: a little more than one of them is the next one."""
    registry = small(
        capacity=100, grace_ms=5_000, max_ttl_ms=2**20 - 10_999, unended_cooldown_ms=6_000
    )
    now, silence = 10**9, 2**16 + 1 - 15_000

    def horizon() -> int:
        return registry.store.read(Word.HORIZON)

    registry.open(B, now, ttl_ms=10_000, cooldown_ms=silence - 1)
    assert horizon() == 2**16
    registry.open(A, now, ttl_ms=10_000, cooldown_ms=silence)
    assert horizon() == 2**17
    registry.renew(A, now)
    registry.acquire(1, now, token=A, seq=1, cooldown_ms=silence)
    assert horizon() == 2**17
    registry.acquire(1, now, token=A, seq=2, cooldown_ms=silence + 2**17)
    assert horizon() == 2**18
    registry.renew(A, now, cooldown_ms=silence + 2**17 + 2**16)
    assert horizon() == 2**19
    registry.acquire(1, now)
    assert horizon() == 2**21


@pytest.mark.parametrize("how", ["NEW", "RENEW", "DELETE"])
def test_whoever_asks_for_a_longer_cooldown_raises_the_horizon(how: str) -> None:
    """Or a power cut would cut it short."""
    registry = small(capacity=100)
    registry.open(A, 0, ttl_ms=1_000)
    taken = registry.acquire(1, 0, token=A, seq=1)
    long_ms = 40 * registry.store.read(Word.HORIZON)
    if how == "NEW":
        registry.acquire(1, 0, token=A, seq=2, cooldown_ms=long_ms)
    elif how == "RENEW":
        registry.renew(A, 0, cooldown_ms=long_ms)
    else:
        registry.release(taken, 0, token=A, seq=2, cooldown_ms=long_ms)
    assert registry.store.read(Word.HORIZON) >= long_ms


@pytest.mark.parametrize("ended", [False, True])
def test_the_end_of_a_session_keeps_to_the_least_cooldown(ended: bool) -> None:
    registry = small(capacity=1, unended_cooldown_ms=0, cooldown_ms=5_000)
    registry.open(A, 0, ttl_ms=1_000)
    registry.open(B, 0, ttl_ms=60_000)
    registry.acquire(1, 0, token=A, seq=1, cooldown_ms=0)
    registry.close_session(A, 100, ended=ended)
    with pytest.raises(Exhausted):
        registry.acquire(1, 5_099, token=B, seq=1)
    assert registry.acquire(1, 5_100, token=B, seq=2).tolist() == [1]


@pytest.mark.parametrize(("closing", "due"), [({}, 60_100), ({"ended": True}, 5_100)])
def test_ids_of_a_closed_session_cool_as_if_it_had_expired(closing: Any, due: int) -> None:
    """Unless its client says that all sequences have ended."""
    registry = small(capacity=1, unended_cooldown_ms=0)
    registry.open(A, 0, ttl_ms=1_000)
    registry.acquire(1, 0, token=A, seq=1, cooldown_ms=60_000)
    registry.close_session(A, 100, **closing)
    with pytest.raises(Exhausted):
        registry.acquire(1, due - 1)
    assert registry.acquire(1, due).tolist() == [1]


def test_the_end_of_a_session_keeps_to_a_cooldown_that_was_raised(tmp_path: Path) -> None:
    """By an operator, in the settings of the next process."""
    settings = Settings(first=1, capacity=1, cooldown_ms=1_000, fresh=True)
    registry = Registry.in_file(tmp_path / "it", settings, 0, bytes(16))
    registry.open(A, 0, ttl_ms=1_000)
    registry.acquire(1, 0, token=A, seq=1, cooldown_ms=0)
    registry.close()
    settings = replace(settings, cooldown_ms=5_000)
    registry = Registry.in_file(tmp_path / "it", settings, 0, bytes(16))
    registry.close_session(A, 100)
    with pytest.raises(Exhausted):
        registry.acquire(1, 5_099)
    assert registry.acquire(1, 5_100).tolist() == [1]
    registry.close()


def test_a_session_that_ended_halfway_cools_for_its_whole_time(tmp_path: Path) -> None:
    """The process died before it released the IDs."""
    settings = Settings(first=1, capacity=1, cooldown_ms=0, fresh=True)
    registry = Registry.in_file(tmp_path / "it", settings, 0, bytes(16))
    registry.open(A, 0, ttl_ms=1_000)
    registry.acquire(1, 0, token=A, seq=1, cooldown_ms=60_000)
    (session,) = registry.sessions
    place = session.number * sessions._WORDS
    word = sessions._word(place, session.generation << 2 | sessions.ENDING)
    registry.sessions._words[place] = word
    registry.close()
    registry = Registry.in_file(tmp_path / "it", settings, 100, bytes(16))
    assert not registry.sessions.named
    with pytest.raises(Exhausted):
        registry.acquire(1, 60_099)
    assert registry.acquire(1, 60_100).tolist() == [1]
    registry.close()


def test_anonymous_ids_are_taken_back_in_slices() -> None:
    registry = small(capacity=100, anonymous_age_ms=8_000, max_anonymous=50, unended_cooldown_ms=0)
    taken = {now: int(registry.acquire(1, now)[0]) for now in range(0, 8_001, 500)}
    assert registry.anonymous == len(taken)
    assert len(registry.sessions) <= 9
    assert status_of(registry, 8_000)["sessions_total"] == 0
    for now in range(8_000, 20_000, 100):
        registry.tick(now)
        for since, cid in taken.items():
            if cid in registry.pool:
                assert now <= since + 9_000 + 128
            else:
                assert now > since + 8_000
    assert registry.anonymous == len(registry.sessions) == 0
    assert registry.expired.count == 0, "none of them was a session"


def test_anonymous_ids_that_are_taken_back_cool_as_without_end() -> None:
    registry = small(capacity=1, anonymous_age_ms=8_000)
    registry.acquire(1, 0)
    registry.tick(9_001)
    with pytest.raises(Exhausted, match=r"due in 0\.001 s"):
        registry.acquire(1, 9_001 + 119_999)
    assert registry.acquire(1, 9_001 + 120_000).tolist() == [1]


def test_anonymous_ids_of_several_slices_go_back_together_or_not_at_all() -> None:
    registry = small(capacity=6, anonymous_age_ms=8_000)
    one, two = registry.acquire(2, 0), registry.acquire(2, 5_000)
    registry.open(A, 5_000, ttl_ms=5_000)
    mine = registry.acquire(1, 5_000, token=A, seq=1)
    for wrong, error, words in (
        (ids(6), NotHeld, "ID 6"),
        (ids(7), OutOfRange, "outside"),
        (mine, NotOwner, "ID 5 is held by a session"),
        (one[:1], Duplicate, "twice"),
        (two[:1], Duplicate, "twice"),
    ):
        with pytest.raises(error, match=words):
            registry.release(np.concatenate([one, two, wrong]), 5_000)
        assert registry.anonymous == 4
    assert registry.release(np.concatenate([two[:1], one, two[1:]]), 5_000, ended=True) == 4
    assert registry.anonymous == 0 and registry.pool.active == 1
    assert registry.acquire(1, 9_999).tolist() == [6]
    with pytest.raises(Exhausted, match=r"due in 0\.001 s"):
        registry.acquire(1, 9_999)
    assert registry.acquire(4, 10_000).tolist() == [3, 1, 2, 4]


def test_a_registry_that_is_closed() -> None:
    registry = small()
    registry.close()
    with pytest.raises(Unavailable, match="closed"):
        registry.acquire(1, 0)
    registry.close()


def test_a_file_does_not_tell_the_tokens(tmp_path: Path) -> None:
    """And the digest of a token is another one in each registry."""
    digests = set()
    for name in ("one", "two"):
        registry = rebooted(tmp_path / name, Settings(fresh=True), 0, 0)
        registry.open(A, 0, ttl_ms=5_000)
        digests |= set(registry.sessions.named)
        registry.close()
        assert A not in (tmp_path / name).read_bytes()[: 2**17]
    assert len(digests) == 2


def test_releases_are_counted_by_their_kind() -> None:
    registry = small(capacity=100, grace_ms=0)
    for number, ended in enumerate((True, False)):
        token = bytes([number] * 16)
        registry.open(token, 0, ttl_ms=1_000)
        taken = registry.acquire(5, 0, token=token, seq=1)
        registry.release(taken[:2], 0, token=token, seq=2, ended=ended)
        registry.close_session(token, 0, ended=ended)
    for token in (A, B):
        registry.open(token, 0, ttl_ms=1_000)
        registry.acquire(3, 0, token=token, seq=1)
    registry.tick(1_001)
    assert registry.acquired == 16
    assert registry.released == {"ended": 5, "cooled": 5, "expired": 6}


def test_releasing_nothing_is_a_mistake() -> None:
    with pytest.raises(InvalidArgument, match="say which"):
        small().release(ids(), 0)
