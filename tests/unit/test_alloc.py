"""Tests the allocator core by example: its rules, its boundaries and every error."""

from __future__ import annotations

import doctest
from collections.abc import Callable

import numpy as np
import pytest

from cidalloc import Allocator, errors

WIDTHS = [1, 2, 4, 8, 16, 32, 64]


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest) -> int:
    return int(request.param)


# ---- Issuing


def test_the_default_pool() -> None:
    pool = Allocator()
    assert (pool.capacity, pool.first, pool.block) == (2**30 - 1, 1, 64)
    assert [pool.acquire() for _ in range(3)] == [1, 2, 3]
    assert len(pool) == pool.active == pool.peak == 3
    assert pool.inactive == pool.cooling == 0
    assert pool.next_due is None
    assert repr(pool) == "Allocator(capacity=1073741823, first=1, block=64): 3 held"


@pytest.mark.parametrize("capacity", [1, 2, 63, 64, 65, 127, 128, 129, 130])
def test_every_id_is_issued_once_and_then_none(capacity: int, width: int) -> None:
    pool = Allocator(capacity, 10, width)
    assert [pool.acquire() for _ in range(capacity)] == list(range(10, 10 + capacity))
    with pytest.raises(errors.Exhausted):
        pool.acquire()
    assert pool.high_water == capacity
    pool._check()


@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 130])
def test_a_bulk_takes_all_or_nothing(capacity: int, width: int) -> None:
    pool = Allocator(capacity, 1, width)
    with pytest.raises(errors.Exhausted, match=f"cannot issue {capacity + 1} IDs"):
        pool.acquire_many(capacity + 1)
    assert len(pool) == pool.high_water == 0
    assert pool.acquire_many(capacity).tolist() == list(range(1, capacity + 1))
    assert pool.acquire_many(0).tolist() == []
    pool._check()


def test_a_bulk_goes_on_where_single_ids_stopped(width: int) -> None:
    pool = Allocator(200, 1, width)
    assert pool.acquire() == 1
    assert pool.acquire_many(100).tolist() == list(range(2, 102))
    assert pool.acquire() == 102
    pool._check()


@pytest.mark.parametrize("first", [1, 64, 2**63 - 2**38])
def test_the_largest_pools_cost_only_what_is_used(first: int, width: int) -> None:
    last = first + 2**38 - 1
    pool = Allocator(2**38, first, width)
    cids = [pool.acquire() for _ in range(2 * width)]
    assert cids == list(range(first, first + 2 * width))
    for cid in (first, *cids[:width:-1]):
        pool.release(cid)
    pool._check()
    again = pool.acquire_many(3 * width, owner=2**24 - 1).tolist()
    assert {pool.owner_of(cid) for cid in again} == {2**24 - 1}
    for outside in (first - 1, last + 1):
        assert outside not in pool
    pool._check()


def test_the_highest_id_of_all() -> None:
    pool = Allocator(2, 2**63 - 2)
    assert pool.acquire_many(2).tolist() == [2**63 - 2, 2**63 - 1]
    pool.release(2**63 - 1)
    assert 2**63 - 1 not in pool
    assert 2**63 not in pool


# ---- Owners


def test_only_its_owner_releases_an_id(width: int) -> None:
    pool = Allocator(1000, 1, width)
    mine, nobodys = pool.acquire(7), pool.acquire()
    for cid, owner in ((mine, 0), (mine, 8), (nobodys, 7)):
        with pytest.raises(errors.NotOwner):
            pool.release(cid, owner)
        with pytest.raises(errors.NotOwner, match="position 0"):
            pool.release_many([cid], owner)
    assert pool.owner_of(mine) == 7
    assert pool.owner_of(nobodys) == 0
    pool.release(mine, 7)
    pool.release(nobodys)
    assert len(pool) == 0
    pool._check()


def test_a_small_pool_can_be_held_whole_and_by_anybody() -> None:
    pool = Allocator(capacity=1000)
    assert pool.block == 1
    ids = np.random.default_rng(0).permutation(pool.acquire_many(1000))
    pool.release_many(ids[:900])
    owners = {pool.owner_of(pool.acquire(owner)) for owner in range(1, 901)}
    assert len(owners) == 900 and len(pool) == 1000
    with pytest.raises(errors.Exhausted, match="1000 of 1000 IDs are held, 0 are cooling; none"):
        pool.acquire()


@pytest.mark.parametrize(("capacity", "block"), [(2**16 - 1, 1), (2**16, 64), (2**30 - 1, 64)])
def test_the_width_of_blocks_if_it_is_not_said(capacity: int, block: int) -> None:
    assert Allocator(capacity).block == block
    assert Allocator(capacity, block=8).block == 8


def test_a_block_serves_one_owner_at_a_time() -> None:
    pool = Allocator(128, 1, 64)
    assert (pool.acquire(1), pool.acquire(2), pool.acquire(1)) == (1, 65, 2)
    words = r"125 are pinned by a held ID in their block of 64; .*narrower blocks \(block=1 pins"
    with pytest.raises(errors.Exhausted, match=words):
        pool.acquire(3)
    assert (len(pool), pool.pinned, pool.cooling) == (3, 125, 0)


def test_held_by_lists_an_owners_ids(width: int) -> None:
    pool = Allocator(1000, 1, width)
    mine = set(pool.acquire_many(70, 3).tolist())
    pool.acquire_many(70, 4)
    released = sorted(mine)[::3]
    pool.release_many(released, 3)
    held = pool.held_by(3)
    assert held.dtype == np.uint64
    assert sorted(held.tolist()) == sorted(mine - set(released))
    assert pool.held_count(3) == len(held)
    assert pool.held_by(5).tolist() == []
    assert pool.held_count(2**24 - 1) == 0


def test_release_owner_takes_back_all_of_one_owner(width: int) -> None:
    pool = Allocator(1000, 1, width)
    pool.acquire_many(70, 3)
    others = pool.acquire_many(70, 4)
    assert pool.release_owner(3, 10) == 70
    assert pool.release_owner(3, 10) == 0
    assert sorted(pool.held_by(4).tolist()) == others.tolist()
    assert pool.cooling >= 70
    assert pool.next_due == 10
    pool._check()


# ---- Cooling and order


def test_at_width_1_ids_come_back_when_due_and_in_order() -> None:
    pool = Allocator(4, 1, 1)
    pool.acquire_many(4)
    for cid, due in ((3, 20), (1, 10), (4, 20), (2, 10)):
        pool.release(cid, reuse_at=due)
    assert (pool.cooling, pool.next_due) == (4, 10)
    with pytest.raises(errors.Exhausted, match=r"4 are cooling; the next is due at 10"):
        pool.acquire(now=9)
    assert [pool.acquire(now=10), pool.acquire(now=10)] == [1, 2]
    with pytest.raises(errors.Exhausted):
        pool.acquire(now=19)
    assert [pool.acquire(now=99), pool.acquire(now=99)] == [3, 4]
    pool._check()


def test_one_that_cools_long_hides_none_that_is_ready() -> None:
    pool = Allocator(3, 1, 1)
    pool.acquire_many(3)
    pool.release(1, reuse_at=3600)
    pool.release(2, reuse_at=1)
    pool.release(3)
    assert [pool.acquire(), pool.acquire(now=1)] == [3, 2]
    assert pool.cooling == 1


def test_a_due_id_is_issued_before_a_new_one() -> None:
    pool = Allocator(100, 1, 1)
    pool.acquire_many(3)
    pool.release(2, reuse_at=5)
    assert pool.acquire(now=4) == 4
    assert pool.acquire(now=5) == 2
    assert pool.acquire(now=5) == 5


def test_a_block_waits_for_its_latest_id() -> None:
    pool = Allocator(4, 1, 4)
    pool.acquire_many(4)
    pool.release(1, reuse_at=50)
    pool.release_many([2, 3, 4], reuse_at=10)
    assert pool.next_due == 50
    with pytest.raises(errors.Exhausted):
        pool.acquire(now=49)
    assert pool.acquire(now=50) == 1


def test_time_never_goes_back() -> None:
    pool = Allocator(2, 1, 1)
    pool.acquire_many(2, now=100)
    pool.release(1, reuse_at=50)
    assert pool.cooling == 0
    assert pool.acquire(now=-5) == 1


def test_a_refused_call_still_tells_the_time() -> None:
    pool = Allocator(2, 1, 1)
    pool.acquire_many(2)
    pool.release(1, reuse_at=50)
    for n in (2, 3):
        with pytest.raises(errors.Exhausted):
            pool.acquire_many(n, now=50)
        assert pool.cooling == 0


@pytest.mark.parametrize("now", [-(2**63), 0, 2**63 - 1])
def test_times_may_be_any_64_bit_integer(now: int) -> None:
    pool = Allocator(1, 1, 1)
    for _ in range(3):
        assert pool.acquire(now=now) == 1
        pool.release(1, reuse_at=-(2**63))
        assert pool.acquire(now=now) == 1
        pool.release(1, reuse_at=now)
        pool._check()
    pool.acquire(now=now)
    pool.release(1, reuse_at=2**63 - 1)
    assert pool.next_due == 2**63 - 1


# ---- Idle blocks


def test_an_owner_in_turn_uses_up_its_block_before_reuse() -> None:
    pool = Allocator(block=8)
    seen = []
    for _ in range(10):
        seen.append(pool.acquire())
        pool.release(seen[-1])
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    assert pool.high_water == 8
    assert pool.inactive == 8


def test_owners_in_turn_share_a_block_that_nobody_needs() -> None:
    pool = Allocator(block=64)
    for owner in range(100):
        cid = pool.acquire(owner)
        pool.release(cid, owner)
        pool._check()
    assert pool.high_water == 64


def test_ids_of_an_idle_block_go_on_cooling_with_its_next_owner() -> None:
    pool = Allocator(4, 1, 4)
    pool.release(pool.acquire(1), 1, reuse_at=10)
    assert pool.cooling == 1
    assert [pool.acquire(2), pool.acquire(2), pool.acquire(2)] == [2, 3, 4]
    with pytest.raises(errors.Exhausted):
        pool.acquire(2)
    with pytest.raises(errors.Exhausted):
        pool.acquire_many(1, 1)
    pool.release_owner(2)
    assert (pool.next_due, pool.cooling) == (10, 4)
    pool._check()


def test_a_bulk_leaves_what_cools_in_its_own_idle_block() -> None:
    pool = Allocator(8, 1, 4)
    pool.release(pool.acquire(), reuse_at=10)
    assert pool.acquire_many(4).tolist() == [2, 3, 4, 5]
    pool._check()


def test_a_bulk_may_use_all_of_its_own_idle_block() -> None:
    pool = Allocator(8, 1, 8)
    pool.release(pool.acquire())
    assert sorted(pool.acquire_many(8).tolist()) == list(range(1, 9))
    pool._check()


# ---- Refusals


@pytest.mark.parametrize(
    "cid", [0, -1, 9, 111, 2**63, 2**64, -(2**64), 1 << 50_000], ids=lambda cid: hex(cid)[:20]
)
def test_an_id_outside_the_pool(cid: int) -> None:
    pool = Allocator(100, 10, 4)
    calls: list[Callable[[], object]] = [
        lambda: pool.release(cid),
        lambda: pool.release_many([cid]),
        lambda: pool.release_many((cid,)),
        lambda: pool.owner_of(cid),
    ]
    for call in calls:
        with pytest.raises(errors.OutOfRange, match="10 to 109"):
            call()
    assert cid not in pool


def test_an_id_that_nobody_holds(width: int) -> None:
    pool = Allocator(1000, 1, width)
    cid = pool.acquire()
    pool.release(cid)
    for free in (cid, 2, 500, 1000):
        assert free not in pool
        with pytest.raises(errors.NotHeld, match=f"ID {free}"):
            pool.release(free)
        with pytest.raises(errors.NotHeld, match=f"ID {free}"):
            pool.owner_of(free)
        with pytest.raises(errors.NotHeld, match=f"ID {free} at position 0"):
            pool.release_many([free])


@pytest.mark.parametrize(
    ("bad", "error", "place"),
    [
        (0, errors.OutOfRange, 70),
        (501, errors.OutOfRange, 70),
        (300, errors.NotHeld, 70),
        (101, errors.NotOwner, 70),
        (64, errors.Duplicate, 70),
    ],
)
def test_a_refused_bulk_changes_nothing(
    bad: int, error: type[Exception], place: int, width: int
) -> None:
    pool = Allocator(500, 1, width)
    pool.acquire_many(128, 1)
    pool.acquire_many(64, 2)
    bad = pool.held_by(2).tolist()[0] if error is errors.NotOwner else bad
    before = (len(pool), pool.next_due, pool.cooling, pool.pinned, pool.inactive)
    ids = [*range(1, 71), bad, *range(71, 129)]
    with pytest.raises(error, match=f"position {place}") as caught:
        pool.release_many(ids, 1, reuse_at=10**6)
    assert caught.value.position == place
    assert before == (len(pool), pool.next_due, pool.cooling, pool.pinned, pool.inactive)
    pool._check()
    pool.release_many(range(1, 129), 1, reuse_at=5)
    assert pool.next_due == 5, "the refused call's reuse_at left a trace"
    pool._check()


# ---- Looking


def test_iteration_is_over_what_was_held_when_it_began(width: int) -> None:
    pool = Allocator(1000, 5, width)
    pool.acquire_many(130, 1)
    pool.acquire_many(130, 2)
    pool.release_many(pool.held_by(1)[::2], 1)
    assert sorted(pool) == list(pool) == pool.held().tolist()
    assert len(list(pool)) == len(pool) == 195
    assert all(type(cid) is int and cid in pool for cid in pool)
    for cid in pool:
        pool.release(cid, pool.owner_of(cid))
    assert list(pool) == []


def test_free_is_what_any_owner_can_get(width: int) -> None:
    pool = Allocator(256, 1, width, ready=128 // width)
    assert pool.free == 128
    pool.acquire(1)
    assert pool.free == 128 - width
    assert len(pool.acquire_many(pool.free, 2)) == 128 - width
    assert pool.free == 0
    pool.ready = 256 // width
    assert pool.free == 128


def test_doctests() -> None:
    result = doctest.DocTestRunner()
    globs = {"Allocator": Allocator}
    tests = 0
    for name in {name for each in Allocator.__mro__ for name in vars(each)}:
        text = getattr(Allocator, name).__doc__ or ""
        if ">>>" in text:
            result.run(doctest.DocTestParser().get_doctest(text, dict(globs), name, None, 0))
            tests += 1
    assert tests >= 2
    assert result.summarize().failed == 0
