"""Throughput as a user would see it: `pytest bench`. For comparisons see study.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from workloads import OURS, OWNER, BulkChurn, Calls, Churn, Pair, PairInFull, Rig, make

TURNS = 1000
SIZES = (1_000, 10_000, 100_000, 1_000_000)


def measure(benchmark: BenchmarkFixture, rig: Rig, turns: int, operations: int) -> None:
    """Time a rig, and note how many operations a second it does."""
    benchmark.extra_info["operations"] = operations
    benchmark.pedantic(rig.run, args=(turns,), rounds=15, warmup_rounds=3)
    if benchmark.stats is not None:  # it is None with --benchmark-disable
        rate = operations / benchmark.stats["median"]
        benchmark.extra_info["operations_per_second"] = float(f"{rate:.3g}")


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("capacity", [2**10, 2**30 - 1])
def test_pair(benchmark: BenchmarkFixture, name: str, capacity: int) -> None:
    """Acquire and release one ID, 1000 times."""
    measure(benchmark, Pair(make(name, capacity)), TURNS, TURNS)


@pytest.mark.parametrize("name", OURS)
def test_pair_with_owner_and_times(benchmark: BenchmarkFixture, name: str) -> None:
    """The same with the owner and the times given."""
    measure(benchmark, PairInFull(make(name)), TURNS, TURNS)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("live", SIZES)
def test_churn(benchmark: BenchmarkFixture, name: str, live: int) -> None:
    """Release a random one of the live IDs and acquire another, 1000 times."""
    measure(benchmark, Churn(make(name), live, seed=1, settle=2), TURNS, TURNS)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("live", SIZES)
def test_bulk_churn(benchmark: BenchmarkFixture, name: str, live: int) -> None:
    """The same by an array of 1000; choosing which is part of the time here."""
    rig = BulkChurn(make(name), live, seed=1)
    rig.settle(2)
    measure(benchmark, rig, 10, 10 * rig.chunk)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("out", [False, True], ids=["new array", "out"])
def test_bulk(benchmark: BenchmarkFixture, name: str, n: int, out: bool) -> None:
    """Acquire so many IDs at once and release them."""
    measure(benchmark, Calls(make(name), n, out=out), 1, n)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("n", SIZES)
def test_release_owner(benchmark: BenchmarkFixture, name: str, n: int) -> None:
    """Take back all IDs of one owner."""
    pool = make(name)

    def setup() -> None:
        pool.acquire_many(n, OWNER)

    benchmark.pedantic(pool.release_owner, args=(OWNER,), setup=setup, rounds=15)


@pytest.mark.parametrize("held", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("capacity", [10_000, 1_000_000])
def test_occupancy(benchmark: BenchmarkFixture, capacity: int, held: float) -> None:
    """Churn in a pool of which so much is held; only blocks of 1 can be that full."""
    rig = Churn(make("cidalloc 1", capacity), int(capacity * held), seed=1, settle=2)
    measure(benchmark, rig, TURNS, TURNS)


@pytest.mark.parametrize("dtype", [np.uint64, np.int64, np.int32, list])
def test_forms_of_ids(benchmark: BenchmarkFixture, dtype: Any) -> None:
    """Release 1000 IDs given as this type."""
    pool = make("cidalloc 64")

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        ids = pool.acquire_many(1000)
        return (ids.tolist() if dtype is list else ids.astype(dtype),), {}

    benchmark.pedantic(pool.release_many, setup=setup, rounds=200)
