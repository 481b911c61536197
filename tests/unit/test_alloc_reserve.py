"""Tests leases, and the calls that load an allocator or make it empty."""

from __future__ import annotations

import numpy as np
import pytest

from cidalloc import Allocator, errors


def test_a_lease_is_released_at_its_end() -> None:
    pool = Allocator(100)
    with pool.lease(7, reuse_at=50) as cid:
        assert pool.owner_of(cid) == 7
    assert pool.next_due == 50
    with pytest.raises(KeyError), pool.lease(reuse_at=lambda: 90) as cid:
        raise KeyError
    assert len(pool) == 0
    assert pool.cooling == 2
    with pytest.raises(errors.NotHeld), pool.lease() as cid:
        pool.release(cid)
    small = Allocator(1)
    with small.lease(), pytest.raises(errors.Exhausted), small.lease():
        pass
    assert len(small) == 0


@pytest.mark.parametrize("width", [1, 2, 8, 64])
def test_a_reserved_id_is_not_issued(width: int) -> None:
    pool = Allocator(1024, 1, width)
    ids = [5, 999, 3, 500]
    pool.reserve(ids, 4)
    assert sorted(ids) == list(pool)
    assert {pool.owner_of(cid) for cid in ids} == {4}
    assert pool.free == 1024 - len({(cid - 1) // width for cid in ids}) * width
    rest = pool.acquire_many(pool.free, 1).tolist()
    assert not set(rest) & set(ids)
    pool.release_many(ids, 4)
    pool.release_many(rest, 1)
    assert pool.free == 1024
    pool._check()


@pytest.mark.parametrize(
    ("ids", "error", "place"),
    [
        ([7, 8, 7], errors.Duplicate, 2),
        ([7, 1], errors.Duplicate, 1),
        ([7, 101, 7], errors.OutOfRange, 1),
        ([0], errors.OutOfRange, 0),
        ([60, 4], errors.NotOwner, 1),
        ([60, 97], errors.Exhausted, 1),
    ],
)
def test_a_refused_reservation_changes_nothing(
    ids: list[int], error: type[errors.CidError], place: int
) -> None:
    pool = Allocator(100, 1, 4, ready=24)
    pool.acquire(1)
    before = repr(pool), pool.free, pool.opened, pool.high_water, pool.inactive
    with pytest.raises(error, match=f"position {place}") as caught:
        pool.reserve(ids, 1 if error is errors.Duplicate else 2)
    assert type(caught.value) is error
    assert caught.value.position == place
    assert caught.value.cid == (ids[place] or None)
    assert before == (repr(pool), pool.free, pool.opened, pool.high_water, pool.inactive)
    pool._check()


def test_a_reservation_far_above_does_not_fill_the_memory() -> None:
    pool = Allocator(2**38, block=1)
    with pytest.raises(errors.Exhausted, match="too far above"):
        pool.reserve([2**37])
    assert pool.opened == 0


def test_a_reserved_id_of_an_idle_block() -> None:
    pool = Allocator(128, 1, 64)
    pool.release(pool.acquire(1), 1)
    pool.reserve([64], 2)
    assert pool.acquire(1) == 65
    pool._check()


def test_clear_lets_all_cool() -> None:
    pool = Allocator(1000, 1, 8)
    for owner in range(5):
        pool.acquire_many(50, owner)
    pool.reserve(np.arange(900, 910), 9)
    assert pool.clear(reuse_at=30) == 260
    assert (len(pool), pool.free + pool.cooling) == (0, 1000)
    assert pool.cooling >= 260
    assert pool.clear() == 0
    assert len(pool.acquire_many(1000, 1, now=30)) == 1000
    pool._check()
