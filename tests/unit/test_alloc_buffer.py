"""Tests the allocator core in memory that it is given."""

from __future__ import annotations

import gc
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cidalloc import Allocator, errors


def test_the_size_is_32_bytes_a_block_and_one_more() -> None:
    assert Allocator.buffer_size(1, 64) == 64
    assert Allocator.buffer_size(64, 64) == 64
    assert Allocator.buffer_size(2**16 - 1) == Allocator.buffer_size(2**16 - 1, 1)
    assert Allocator.buffer_size(2**16) == Allocator.buffer_size(2**16, 64)
    assert Allocator.buffer_size(65, 64) == 96
    assert Allocator.buffer_size(2**38, 1) == 32 * (2**38 + 1)
    for wrong in ((0, 1), (2**38 + 1, 1), (1, 3), ("1", 1)):
        with pytest.raises(errors.InvalidArgument):
            Allocator.buffer_size(*wrong)


@pytest.mark.parametrize(
    "make", [bytearray, lambda n: memoryview(bytearray(n)), lambda n: np.zeros(n // 8)]
)
@pytest.mark.parametrize("width", [1, 8, 64])
@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 1000])
def test_a_pool_in_given_memory(make: Callable[[int], Any], width: int, capacity: int) -> None:
    size = Allocator.buffer_size(capacity, width)
    buffer = make(size)
    pool = Allocator(capacity, 5, width, buffer=buffer)
    ids = pool.acquire_many(capacity, 3)
    assert ids.tolist() == list(range(5, 5 + capacity))
    assert bytes(memoryview(buffer).cast("B"))[32:] != bytes(size - 32), "it lives there"
    pool.release_many(ids[::2], 3, reuse_at=7)
    with pytest.raises(errors.Exhausted):
        pool.acquire_many(capacity, now=6)
    pool._check()
    pool.release_owner(3)
    assert len(pool.acquire_many(capacity, now=7)) == capacity
    pool._check()


def test_it_stays_within_its_size() -> None:
    size = Allocator.buffer_size(130, 4)
    memory = bytearray(size + 64)
    memory[size:] = b"x" * 64
    pool = Allocator(130, 1, 4, buffer=memoryview(memory)[:size])
    pool.release_many(pool.acquire_many(130))
    pool._check()
    assert memory[:32] == bytes(32), "the record that is none"
    assert memory[size:] == b"x" * 64


def test_a_file_holds_the_pool(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    path.write_bytes(bytes(Allocator.buffer_size(1000, 64)))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        pool = Allocator(1000, 1, 64, buffer=shared)
        pool.acquire_many(70, 9)
        assert path.read_bytes()[32:40] == b"\xff" * 8, "64 held ones"
        with pytest.raises(BufferError):
            shared.close()
        del pool


def test_the_buffer_is_held_until_the_pool_dies() -> None:
    buffer = bytearray(Allocator.buffer_size(100))
    before = sys.getrefcount(buffer)
    pool = Allocator(100, buffer=buffer)
    with pytest.raises(BufferError):
        buffer.append(1)
    del pool
    gc.collect()
    buffer.append(1)
    assert sys.getrefcount(buffer) == before
    with pytest.raises(errors.InvalidArgument, match="bytes"):
        Allocator(10_000, buffer=buffer)
    assert sys.getrefcount(buffer) == before


def _read_only() -> Any:
    frozen = np.zeros(64)
    frozen.flags.writeable = False
    return frozen


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(95),
        bytearray(),
        bytes(96),
        _read_only(),
        np.zeros(128)[::2],
        np.zeros(200, np.uint8)[1:],
        memoryview(bytearray(200))[4:],
        np.array([None] * 100),
        [0] * 100,
        "0" * 100,
        7,
    ],
)
def test_unfit_memory_is_refused(buffer: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="buffer"):
        Allocator(65, buffer=buffer)


def test_memory_that_a_pool_has_used_is_refused() -> None:
    buffer = bytearray(Allocator.buffer_size(128))
    pool = Allocator(128, buffer=buffer)
    pool.release(pool.acquire())
    del pool
    with pytest.raises(errors.InvalidArgument, match="zero"):
        Allocator(128, buffer=buffer)
    assert Allocator(64, buffer=bytearray(len(buffer))).acquire() == 1


@pytest.mark.parametrize("place", range(0, 64, 4))
def test_no_byte_of_the_first_records_may_be_set(place: int) -> None:
    buffer = bytearray(Allocator.buffer_size(128))
    buffer[place] = 1
    with pytest.raises(errors.InvalidArgument, match="zero"):
        Allocator(128, buffer=buffer)
