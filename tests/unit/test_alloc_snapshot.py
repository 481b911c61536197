"""Tests snapshots of the allocator, and how it grows."""

from __future__ import annotations

import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cidalloc import Allocator, errors


def used(width: int = 8) -> Allocator:
    pool = Allocator(1000, 5, width)
    chance = random.Random(1)
    for owner in range(4):
        pool.acquire_many(100, owner, now=owner)
        pool.release_many(chance.sample(pool.held_by(owner).tolist(), 90), owner, 10 * owner)
    return pool


@pytest.mark.parametrize("width", [1, 8, 64])
def test_a_restored_pool_goes_on(width: int) -> None:
    pool = used(width)
    copy = Allocator.restore(memoryview(pool.snapshot()))
    copy._check()
    assert repr(copy) == repr(pool)
    assert list(copy) == list(pool)
    assert [copy.owner_of(cid) for cid in copy] == [pool.owner_of(cid) for cid in pool]
    assert (copy.peak, copy.ready) == (pool.peak, pool.ready)
    assert (copy.high_water, copy.inactive) == (pool.high_water, pool.inactive)
    if width == 1:  # no block is left to its owner
        n = pool.free
        assert copy.acquire_many(n, 9).tolist() == pool.acquire_many(n, 9).tolist()
    assert Allocator.restore(Allocator(2**38).snapshot()).capacity == 2**38


def test_damaged_snapshots_are_refused() -> None:
    whole = used().snapshot()
    for size in range(0, len(whole), 7):
        with pytest.raises(errors.InvalidArgument, match=r"cut short|not the snapshot"):
            Allocator.restore(whole[:size])
    for at in range(0, len(whole), 5):
        wrong = bytearray(whole)
        wrong[at] ^= 1 << at % 8
        with pytest.raises(errors.InvalidArgument, match=r"damaged|not the snapshot|version"):
            Allocator.restore(wrong)
    for stranger in (b"", b"x" * 1000, whole + b"\0"):
        with pytest.raises(errors.InvalidArgument):
            Allocator.restore(stranger)


def test_forged_snapshots_are_refused_or_sound() -> None:
    whole = used().snapshot()
    chance = random.Random(2)
    refused = 0
    for _ in range(3000):
        forged = bytearray(whole)
        forged[chance.randrange(16, len(whole))] ^= 1 << chance.randrange(8)
        forged[12:16] = zlib.crc32(forged[16:]).to_bytes(4, "little")
        try:
            pool = Allocator.restore(forged)
        except (errors.InvalidArgument, MemoryError):
            refused += 1
        else:
            pool._check()
    assert refused > 300


def test_another_version_is_refused() -> None:
    whole = bytearray(used().snapshot())
    whole[8] = 2
    with pytest.raises(errors.InvalidArgument, match="version 2: this cidalloc reads version 1"):
        Allocator.restore(whole)


@pytest.mark.parametrize("wrong", [None, 1, "x", [1], 1.5])
def test_only_bytes_are_restored(wrong: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="bytes"):
        Allocator.restore(wrong)


@pytest.mark.parametrize("width", [1, 4, 64])
def test_a_pool_grows(width: int) -> None:
    pool = Allocator(10, 1, width)
    held = pool.acquire_many(10).tolist()
    with pytest.raises(errors.Exhausted):
        pool.acquire(1)
    pool.resize(100_000)
    held += pool.acquire_many(99_990).tolist()
    assert sorted(held) == list(range(1, 100_001))
    with pytest.raises(errors.Exhausted):
        pool.acquire()
    pool._check()


@pytest.mark.parametrize("wrong", [0, -1, 9, 2**38 + 1, 2**70])
def test_a_pool_does_not_shrink(wrong: int) -> None:
    pool = Allocator(10)
    with pytest.raises(errors.InvalidArgument, match="between 10 and 274877906944"):
        pool.resize(wrong)
    with pytest.raises(errors.InvalidArgument, match="between 10 and 10"):
        Allocator(10, 2**63 - 10).resize(11)
    with pytest.raises(errors.InvalidArgument, match="given memory"):
        Allocator(10, buffer=bytearray(1000)).resize(11)
    assert (pool.capacity, pool.free) == (10, 10)


def test_a_larger_pool_ends_a_wait() -> None:
    pool = Allocator(1)
    pool.acquire()
    with ThreadPoolExecutor() as threads:
        got = threads.submit(pool.acquire_wait, timeout=30)
        while not pool._line._callers:
            pass
        pool.resize(2)
        assert got.result(30) == 2
