"""Looks at a registry's file after each single store to it, as the next process would.

A child works the file and is stopped after each instruction that changes it. So each state is seen
in which SIGKILL can leave the file, of the very code that is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_model import (
    BOOT,
    ENDED,
    GRACE,
    LAST_BOOT,
    NEXT_BOOT,
    TTL,
    Facts,
    adopted,
    facts_of,
    facts_of_pool,
    judge,
    judge_reboot,
)
from stepped_child import MIDDLE, NOW, POOLS, SCENARIOS, SIX, TIMES, WIDE
from tracee import TRAPS, Snapshot, Tracee

from cidalloc.manager.storage.file_format import Word

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tracee() -> Iterator[Tracee]:
    tracee = Tracee()
    yield tracee
    tracee.kill()


@pytest.mark.parametrize("name", SCENARIOS)
def test_after_every_store(name: str, tracee: Tracee, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    shape = scenario.shape
    before, found = tracee.snapshots(name, tmp_path / "it")
    print(name, len(found), "snapshots")
    assert len(found) >= scenario.snapshots
    copy = tmp_path / "copy"

    def facts(snapshot: Snapshot) -> Facts:
        return facts_of(adopted(snapshot.put(copy, before)), shape, NOW, TIMES)

    was, will = facts(found[0]), facts(found[-1])
    for number, snapshot in enumerate(found):
        try:
            state = facts(snapshot)
            judge(state, was, will, scenario.under_way)
            judge_reboot(adopted(snapshot.put(copy, before)), shape, state)
        except Exception as error:
            raise AssertionError(f"after store {number} of {len(found) - 1}") from error


@pytest.mark.parametrize("name", POOLS)
def test_after_every_store_to_a_pool_of_wide_blocks(
    name: str, tracee: Tracee, tmp_path: Path
) -> None:
    """The registry's blocks have one ID each; those of other pools in a file may have more."""
    before, found = tracee.snapshots(f"pool: {name}", tmp_path / "it")
    print(name, len(found), "snapshots")
    assert len(found) >= 3

    def facts(snapshot: Snapshot) -> Facts:
        return facts_of_pool(snapshot.put(tmp_path / "copy", before).read_bytes(), WIDE, TIMES)

    was, will = facts(found[0]), facts(found[-1])
    under_way = dict.fromkeys(was.holds.keys() - will.holds.keys(), NOW + ENDED)
    for number, snapshot in enumerate(found):
        try:
            judge(facts(snapshot), was, will, under_way)
        except Exception as error:
            raise AssertionError(f"after store {number} of {len(found) - 1}") from error


@pytest.mark.parametrize("name", ["make", "make with a past"])
def test_a_file_that_is_being_made(name: str, tracee: Tracee, tmp_path: Path) -> None:
    before, found = tracee.snapshots(name, tmp_path / "it")
    print(name, len(found), "snapshots")
    assert len(found) >= 3, "the writer's name, and perhaps the boot"
    horizon = 0 if name == "make" else 601_000
    for snapshot in found:
        copy = adopted(snapshot.put(tmp_path / "copy", before))
        facts = facts_of(copy, SIX, NOW, [NOW, NOW + horizon - 1, NOW + horizon])
        assert not facts.sessions
        assert set(facts.first.values()) == {NOW + horizon}
        assert len(facts.first) == 6


@pytest.mark.parametrize("name", ["reopen", "reboot", "copy"])
def test_a_crash_amid_what_follows_a_crash(name: str, tracee: Tracee, tmp_path: Path) -> None:
    shape = SCENARIOS[MIDDLE].shape
    before, found = tracee.snapshots(MIDDLE, tmp_path / "it")
    boot = NEXT_BOOT if name == "reboot" else BOOT
    # An ID that was not yet let go, in the middle, and not all of the IDs.
    for number in {0, len(found) // 2, len(found) - 3}:
        path, copy = found[number].put(tmp_path / f"{number}", before), tmp_path / "copy"
        if name != "copy":
            adopted(path)
        then, states = tracee.snapshots(name, path)
        print(name, f"after store {number}:", len(states), "snapshots")
        assert len(states) >= (1 if name == "reopen" and number == 0 else 3)
        assert len(states) >= 15 or name == "reopen"
        horizon = int.from_bytes(before.bytes(Word.HORIZON * 8, 6), sys.byteorder)
        if name == "copy":  # it does not know the horizon of what was issued since
            horizon = max(horizon, TTL + GRACE)
        times = TIMES if name == "reopen" else [NOW, NOW + horizon - 1, NOW + horizon]
        every = []
        for state in states:
            put = adopted(state.put(copy, then), path)
            every.append(facts_of(put, shape, NOW, times, boot))
        assert (every[0].holds, every[0].first) == (every[-1].holds, every[-1].first)
        if name == "copy":
            assert set(every[0].first.values()) == {NOW + horizon}
            assert all(session.anonymous for session in every[0].sessions.values())
        for state, facts in zip(states, every, strict=True):
            judge(facts, every[0], every[-1], {})
            judge_reboot(adopted(state.put(copy, then)), shape, facts, LAST_BOOT)


@pytest.mark.skipif(not TRAPS, reason="here every instruction is looked at anyway")
@pytest.mark.parametrize("name", ["release one twice", "close"])
def test_nothing_slips_through(name: str, tracee: Tracee, tmp_path: Path) -> None:
    """Not a state is missing of those that are seen if every instruction is looked at."""
    slow = Tracee(traps=False)
    try:
        _, fast_found = tracee.snapshots(name, tmp_path / "it")
        _, slow_found = slow.snapshots(name, tmp_path / "other")
    finally:
        slow.kill()
    assert len(fast_found) == len(slow_found)
    assert slow.stops > 10_000
