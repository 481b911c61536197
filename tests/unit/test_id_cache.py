"""The ID cache alone: which IDs it takes, keeps and gives back, and when, at each edge."""

from __future__ import annotations

import pytest

from cidalloc.client.core.effects import NEVER
from cidalloc.client.core.id_cache import ENDED, IdCache
from cidalloc.errors import Duplicate, NotHeld

FOREVER = float("inf")


def test_what_the_manager_does_not_count_is_in_no_place() -> None:
    cache = IdCache(cooldown=5.0, ahead=100)
    cache.refill(range(1, 4), range(4, 13), 0.0)
    for cid in (4, 5):
        assert cache.recycle(cid, 0.0)
    cache.give_back([6, 7, 8], 60_000)
    cache.await_model(9, "model", 1.0, 1.0, 0.0)
    cache.await_model(10, "model", 1.0, 1.0, 0.0)
    held = {1, 4, 6, 9, 11, 50}
    assert cache.reconcile(held) == [12]
    assert cache.known() == held
    assert list(cache.fresh) == [1, 50] and cache.used == {11}
    assert [cid for _, cid in cache.cooling] == [4]
    assert {cooldown: list(cids) for cooldown, cids in cache.to_release.items()} == {60_000: [6]}
    assert list(cache.awaiting_model["model"]) == [9]


def test_fresh_ids_beyond_the_demand_go_back_although_some_are_used() -> None:
    cache = IdCache(ahead=100)
    cache.plan(10.0, 0)
    cache.refill(range(1, 11), (), 10.0)
    assert cache.take(39.0)
    cache.trim(39.9)
    assert len(cache.fresh) == 9
    cache.trim(40.0)
    assert len(cache.fresh) == cache.target_size == 1 and cache.outgoing


def test_releases_wait_for_each_other() -> None:
    cache = IdCache(ahead=1000)
    cache.refill((), range(1, 5), 0.0)
    cache.give_back([1], 60_000)
    assert cache.send(1000, 100.0) == [1]
    cache.releasing = []
    cache.give_back([2, 3], 60_000)
    assert 100.0 < cache.due(100.0) <= 100.1


def test_a_refill_is_due_when_less_than_half_is_left() -> None:
    cache = IdCache(ahead=100)
    cache.target_size = 8
    cache.refill(range(1, 7), (), 0.0)
    assert [cache.take(0.0), cache.take(0.0)] == [1, 2]
    assert not cache.needs_refill and not cache.needs_maintenance
    cache.take(0.0)
    assert cache.needs_refill and cache.needs_maintenance
    assert cache.due(0.0) == NEVER
    cache.refill_failed(0.0)
    assert cache.due(9.9) == FOREVER and cache.due(10.0) == NEVER


def test_nothing_is_taken_in_a_drain() -> None:
    cache = IdCache(ahead=100)
    cache.refill([1], [2], 0.0)
    cache.recycle(2, 0.0)
    assert cache.ready(0.0, 9) == 2
    cache.drain(True)
    assert cache.take(0.0) == 0 and cache.ready(0.0, 9) == 0
    cache.drain(None)
    assert cache.draining, "nothing was said"
    cache.drain(False)
    assert cache.take(0.0) == 2


@pytest.mark.parametrize(("fresh", "cooling"), [(1, 0), (0, 1)])
def test_in_a_drain_unused_ids_go_at_once(fresh: int, cooling: int) -> None:
    cache = IdCache(cooldown=5.0, ahead=100)
    cache.refill([1] * fresh, [2] * cooling, 0.0)
    if cooling:
        cache.recycle(2, 0.0)
    assert cache.due(0.0) == FOREVER
    cache.drain(True)
    assert cache.due(0.0) == NEVER
    cache.trim(0.0)
    assert cache.to_release.keys() == {ENDED} and not cache.fresh and not cache.cooling


def test_in_a_drain_nothing_comes_in() -> None:
    cache = IdCache(cooldown=5.0, ahead=100)
    cache.refill([], [1], 0.0)
    cache.needs_refill = True
    cache.drain(True)
    assert cache.due(0.0) == FOREVER, "to fetch more would be refused"
    cache.recycle(1, 0.0)
    assert not cache.cooling and list(cache.to_release[ENDED]) == [1]


def test_in_a_drain_after_a_pause_all_go() -> None:
    cache = IdCache(cooldown=100.0, ahead=100)
    cache.refill([1, 2], [3], 0.0)
    cache.recycle(3, 0.0)
    cache.drain(True)
    cache.trim(60.0)
    assert list(cache.to_release[ENDED]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("ahead", "target", "room"), [(0, 0, 0), (1, 1, 1), (2, 1, 1), (10, 4, 6), (10, 1, 9)]
)
def test_what_cools_leaves_room_for_fresh_ids(ahead: int, target: int, room: int) -> None:
    cache = IdCache(cooldown=5.0, ahead=ahead)
    cache.target_size = target
    cache.refill((), range(1, 21), 0.0)
    for cid in range(1, 21):
        assert cache.recycle(cid, 0.0)
    assert len(cache.cooling) == room and len(cache.to_release[ENDED]) == 20 - room
    assert not cache.recycle(1, 0.0), "it is not used"


def test_ids_go_to_the_manager_while_calls_wait() -> None:
    cache = IdCache(cooldown=5.0, ahead=100)
    cache.refill((), [1, 2], 0.0)
    cache.share(0.0)
    cache.recycle(1, 9.9)
    cache.recycle(2, 10.0)
    assert list(cache.to_release[ENDED]) == [1] and list(cache.cooling) == [(15.0, 2)]


def test_when_ids_are_ready() -> None:
    cache = IdCache(cooldown=5.0, ahead=100)
    cache.refill([1], [2, 3], 0.0)
    cache.recycle(2, 0.0)
    cache.recycle(3, 2.0)
    assert [cache.ready_at(count) for count in (1, 2, 3, 4)] == [NEVER, 5.0, 7.0, FOREVER]
    assert [cache.ready(now, 9) for now in (4.9, 5.0, 7.0)] == [1, 2, 3]
    assert cache.ready(7.0, 1) == 1, "enough"


def test_an_id_that_waits_for_its_model() -> None:
    cache = IdCache(ahead=100)
    cache.refill((), [1, 2], 0.0)
    cache.await_model(1, "model", 1.0, 2.0, 7.0)
    assert cache.needs_maintenance and cache.outgoing and cache.due(7.0) == NEVER
    assert cache.await_until == {"model": 67.0}
    cache.await_model(2, "model", 9.0, 2.0, 8.0)
    assert cache.await_until == {"model": 67.0}
    cache.model_was_read("model", 3.0)
    assert cache.to_release == {5_000: {1: None}, 11_000: {2: None}}
    assert not cache.awaiting_model


def test_what_is_on_its_way_is_known_and_outgoing() -> None:
    cache = IdCache(ahead=100)
    cache.refill((), [1], 0.0)
    cache.give_back([1], 7)
    assert cache.send(9, 0.0) == [1]
    assert cache.outgoing and cache.known() == {1} and not cache.to_release
    cache.requeue()
    assert cache.to_release == {7: {1: None}}


@pytest.mark.parametrize(
    ("ahead", "targets"), [(1, [1, 1, 1, 1]), (5, [1, 2, 2, 2]), (100, [1, 2, 4, 8])]
)
def test_a_cache_that_is_empty_again_soon_was_too_small(ahead: int, targets: list[int]) -> None:
    cache = IdCache(ahead=ahead)
    found = []
    for turn in range(4):
        cache.plan(turn * 0.9, 0)
        found.append(cache.target_size)
    assert found == targets
    cache.plan(2.7 + 1.0, 0)
    assert cache.target_size == targets[-1], "a second later is not soon"


def test_how_many_are_fetched_ahead() -> None:
    cache = IdCache(ahead=10)
    cache.target_size = 8
    cache.refill(range(1, 7), (), 0.0)
    assert cache.plan(0.0, 5) == 8
    assert cache.plan(5.0, 0) == 4
    cache.refill_failed(5.0)
    assert cache.plan(14.9, 5) == 0
    assert cache.plan(15.0, 5) == 8


def test_the_target_falls_without_demand() -> None:
    cache = IdCache(ahead=100)
    cache.target_size, cache.refilled_at = 8, 100.0
    targets = []
    for now in (159.9, 160.0, 189.9, 190.0, 1000.0):
        cache.trim(now)
        targets.append(cache.target_size)
        assert cache.trim_at == now + 30.0
    assert targets == [8, 4, 4, 2, 1]


def test_ids_that_are_ready_for_long_go_back_down_to_the_target() -> None:
    cache = IdCache(cooldown=5.0, ahead=100)
    cache.refill((), range(1, 4), 0.0)
    cache.refilled_at = 20.0
    for cid in (1, 2, 3):
        cache.recycle(cid, 0.0)
    cache.taken_at = 34.0
    cache.trim(34.9)
    assert not cache.to_release
    cache.trim(35.0)
    assert list(cache.to_release[ENDED]) == [1, 2] and list(cache.cooling) == [(5.0, 3)]


@pytest.mark.parametrize(("others_wait", "pause"), [(False, 60.0), (True, 5.0)])
def test_without_demand_all_that_are_ready_go_back(others_wait: bool, pause: float) -> None:
    cache = IdCache(cooldown=pause, ahead=100)
    cache.refill([1000], [2000, 3000], 0.0)
    cache.recycle(2000, 0.0)
    cache.recycle(3000, 0.1)
    cache.refilled_at = pause - 1.0
    cache.trim(pause - 0.1, others_wait)
    assert not cache.to_release
    cache.trim(pause, others_wait)
    assert list(cache.to_release[ENDED]) == [1000, 2000]
    assert [cid for _, cid in cache.cooling] == [3000]


def test_what_is_not_used_is_named() -> None:
    cache = IdCache(ahead=100)
    cache.refill([1], [2, 3], 0.0)
    cache.check_used([2, 3])
    with pytest.raises(Duplicate, match="ID 2 is given twice"):
        cache.check_used([2, 3, 2])
    with pytest.raises(NotHeld, match="does not hold ID 1: it was released, or was never acq"):
        cache.check_used([2, 1])


def test_an_id_in_two_places_leaves_the_used_ones() -> None:
    cache = IdCache(ahead=100)
    cache.refill((), [1, 2, 3], 0.0)
    cache.give_back([1], 60_000)
    cache.await_model(2, "model", 1.0, 1.0, 0.0)
    cache.used |= {1, 2}  # an exception was raised in the middle
    assert cache.reconcile({1, 2, 3}) == []
    assert cache.used == {3} and cache.known() == {1, 2, 3}


def test_ids_that_nobody_saw_are_the_next() -> None:
    cache = IdCache(ahead=100)
    cache.refill([1], [2, 3], 0.0)
    cache.take_back([2, 9])
    assert cache.used == {3} and list(cache.fresh) == [2, 1]
