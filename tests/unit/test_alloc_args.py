"""Tests what the allocator core takes as IDs, arrays and numbers, and what it refuses."""

from __future__ import annotations

import array
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from cidalloc import Allocator, errors


def test_out_is_filled_and_returned() -> None:
    pool = Allocator(block=4)
    out = np.zeros(9, np.uint64)
    assert pool.acquire_many(9, out=out) is out
    assert out.tolist() == list(range(1, 10))
    plain: Any = array.array("Q", [0] * 3)
    assert pool.acquire_many(3, out=plain) is plain
    assert plain.tolist() == [10, 11, 12]


def _read_only() -> Any:
    frozen = np.zeros(4, np.uint64)
    frozen.flags.writeable = False
    return frozen


@pytest.mark.parametrize(
    "out",
    [
        np.zeros(3, np.uint64),
        np.zeros(5, np.uint64),
        np.zeros(4, np.int64),
        np.zeros(4),
        np.zeros((4, 1), np.uint64),
        np.zeros(8, np.uint64)[::2],
        np.zeros(4, ">u8"),
        _read_only(),
        np.zeros(33, np.uint8)[1:].view(np.uint64),
        [0] * 4,
        b"01234567" * 4,
        7,
    ],
)
def test_an_out_of_another_shape_or_type_is_refused(out: Any) -> None:
    pool = Allocator()
    with pytest.raises(errors.InvalidArgument, match="out"):
        pool.acquire_many(4, out=out)
    assert len(pool) == 0


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        lambda ids: np.array(ids),
        lambda ids: np.array(ids, np.uint8),
        *(partial(np.array, dtype=size) for size in "bBhHiIlLqQ"),
        lambda ids: np.array(ids, ">i2"),
        lambda ids: np.array(ids, np.uint64),
        lambda ids: np.repeat(np.array(ids, np.uint64), 2)[::2],
        lambda ids: array.array("i", ids),
        lambda ids: memoryview(array.array("Q", ids)),
        lambda ids: [np.int16(i) for i in ids],
        lambda ids: np.frombuffer(b"x" + np.array(ids, np.uint64).tobytes(), np.uint64, offset=1),
    ],
)
def test_ids_in_many_forms(make: Callable[[list[int]], Any]) -> None:
    pool = Allocator(block=8)
    pool.acquire_many(100)
    pool.release_many(make([5, 99, 1, 2, 3, 4, 17]))
    assert len(pool) == 93
    pool.reserve(make([5, 99, 1, 2, 3, 4, 17]))
    assert list(pool) == list(range(1, 101))
    pool._check()


@pytest.mark.parametrize("ids", [range(1, 100, 3), range(99, 0, -2), range(7, 8)])
def test_ids_in_a_range(ids: range) -> None:
    pool = Allocator(block=8)
    pool.acquire_many(100)
    pool.release_many(ids)
    assert sorted({*range(1, 101)} - {*ids}) == list(pool)


def test_no_ids_are_fine() -> None:
    pool = Allocator()
    nothing: list[Any] = [[], (), np.array([], np.uint64), np.array([], np.int32), range(0)]
    for none in nothing:
        pool.release_many(none)
    assert len(pool) == 0


@pytest.mark.parametrize(
    "ids",
    [
        1,
        None,
        {1},
        "1",
        ["1"],
        [1.0],
        [True],
        [None],
        [[1]],
        np.array([1.0]),
        np.array([True]),
        np.array([[1]], np.uint64),
        np.array(1, np.uint64),
        np.array([1], object),
        np.array(["1"]),
        np.array([], float),
        np.array([1], "datetime64[s]"),
        iter([1]),
    ],
)
def test_ids_of_another_type_are_refused(ids: Any) -> None:
    pool = Allocator()
    pool.acquire()
    for call in (pool.release_many, pool.reserve):
        with pytest.raises(errors.InvalidArgument):
            call(ids)
    assert list(pool) == [1]


@pytest.mark.parametrize(
    "ids",
    [
        [1, -1],
        np.array([1, -1]),
        np.array([1, -1], np.int8),
        [1, 2**64],
        np.array([1, 2**64 - 1], np.uint64),
    ],
)
def test_negative_and_huge_ids_are_out_of_range(ids: Any) -> None:
    pool = Allocator()
    pool.acquire()
    for call in (pool.release_many, Allocator().reserve):
        with pytest.raises(errors.OutOfRange, match="position 1"):
            call(ids)
    assert 1 in pool


class Odd:
    def __index__(self) -> int:
        return 1


def test_whatever_says_that_it_is_an_integer_is_one() -> None:
    pool = Allocator()
    assert pool.acquire(np.int64(5), np.uint8(3)) == 1
    assert np.uint64(1) in pool
    assert Odd() in pool
    assert pool.owner_of(Odd()) == 5
    pool.release(np.uint64(1), np.int8(5), np.int64(9))


@pytest.mark.parametrize("wrong", ["1", 1.0, True, None, b"1", [1], np.float64(1), np.bool_(True)])
def test_an_argument_of_another_type_is_refused(wrong: Any) -> None:
    pool = Allocator()
    pool.acquire()
    calls: list[Callable[[], object]] = [
        lambda: pool.acquire(wrong),
        lambda: pool.acquire(0, wrong),
        lambda: pool.acquire_many(wrong),
        lambda: pool.acquire_many(1, wrong),
        lambda: pool.acquire_many(1, 0, wrong),
        lambda: pool.release(wrong),
        lambda: pool.release(1, wrong),
        lambda: pool.release(1, 0, wrong),
        lambda: pool.release_many([1], wrong),
        lambda: pool.release_many([1], 0, wrong),
        lambda: pool.release_owner(wrong),
        lambda: pool.release_owner(0, wrong),
        lambda: pool.owner_of(wrong),
        lambda: pool.held_by(wrong),
        lambda: pool.clear(wrong),
        lambda: pool.resize(wrong),
        lambda: pool.reserve([7], wrong),
        lambda: pool.reserve([wrong]),
        lambda: pool.lease(wrong).__enter__(),
        lambda: pool.held_count(wrong),
        lambda: Allocator(wrong),
        lambda: Allocator(1, wrong),
        *([] if wrong is None else [lambda: Allocator(1, 1, wrong)]),
    ]
    for call in calls:
        with pytest.raises(errors.InvalidArgument):
            call()
    assert wrong not in pool
    assert len(pool) == 1
    if wrong is not None:
        with pytest.raises(errors.InvalidArgument):
            Allocator(ready=wrong)


def test_an_argument_out_of_bounds_is_refused() -> None:
    pool = Allocator()
    pool.acquire()
    calls: list[Callable[[], object]] = [
        lambda: pool.acquire(-1),
        lambda: pool.acquire(2**24),
        lambda: pool.acquire(2**64),
        lambda: pool.acquire(0, 2**63),
        lambda: pool.acquire(0, -(2**63) - 1),
        lambda: pool.acquire_many(-1),
        lambda: pool.acquire_many(2**64),
        lambda: pool.release(1, -1),
        lambda: pool.release(1, 0, 2**63),
        lambda: pool.release_many([1], 2**24),
        lambda: pool.held_by(-1),
        lambda: pool.release_owner(2**32),
        lambda: Allocator(0),
        lambda: Allocator(-1),
        lambda: Allocator(2**38 + 1),
        lambda: Allocator(2**38 + 1, block=1),
        lambda: Allocator(1, 0),
        lambda: Allocator(1, 2**63),
        lambda: Allocator(2, 2**63 - 1),
        lambda: Allocator(1, 1, 0),
        lambda: Allocator(1, 1, 3),
        lambda: Allocator(1, 1, 128),
        lambda: Allocator(10, ready=-1),
        lambda: Allocator(10, ready=11),
    ]
    for call in calls:
        with pytest.raises(errors.InvalidArgument):
            call()
    assert len(pool) == 1


def test_far_too_many_are_exhausted_not_a_lack_of_memory() -> None:
    pool = Allocator()
    with pytest.raises(errors.Exhausted):
        pool.acquire_many(2**62)


def test_membership_takes_anything() -> None:
    pool = Allocator()
    pool.acquire()
    assert 1 in pool
    for stranger in ("1", 1.0, True, None, 2, 0, -1, 2**70, object()):
        assert stranger not in pool
