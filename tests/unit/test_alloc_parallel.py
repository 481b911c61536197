"""Tests one pool under several threads at once. On free-threaded Python they run in parallel."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from cidalloc import Allocator, errors

THREADS = 4
PARALLEL = not getattr(sys, "_is_gil_enabled", lambda: True)()
# So many that every thread is at work when the last one begins.
TURNS = 200_000 if PARALLEL else 2_000
LARGE = 4096  # IDs, from which on a call lets go of the GIL


@pytest.fixture(autouse=True)
def busy_switching() -> Iterator[None]:
    """Let threads that share a GIL take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def together(*work: Callable[[], object]) -> None:
    """Run each in a thread of its own, all from the same moment on; raise what they raise."""
    begin = threading.Barrier(len(work))

    def run(each: Callable[[], object]) -> object:
        begin.wait()
        return each()

    with ThreadPoolExecutor(len(work)) as threads:
        for result in [threads.submit(run, each) for each in work]:
            result.result()


class Holders:
    """Who holds an ID. A dict's own operations let no other thread in between."""

    def __init__(self) -> None:
        self._names: dict[int, int] = {}

    def got(self, cid: int, name: int) -> None:
        assert self._names.setdefault(cid, name) == name, f"ID {cid} was issued twice"

    def gives(self, cid: int) -> None:
        del self._names[cid]


def hold_in_turn(pool: Allocator, holders: Holders, turns: int, name: int) -> None:
    """Hold up to three IDs of one owner that all threads share."""
    mine: list[int] = []
    for turn in range(turns):
        cid = pool.acquire()
        holders.got(cid, name)
        mine.append(cid)
        if len(mine) > turn % 4:
            cid = mine.pop(0)
            holders.gives(cid)
            pool.release(cid)
    for cid in mine:
        holders.gives(cid)
        pool.release(cid)


@pytest.mark.parametrize("width", [1, 64])
def test_no_id_is_issued_twice(width: int) -> None:
    pool = Allocator(2**20, block=width)
    holders = Holders()
    together(*(partial(hold_in_turn, pool, holders, TURNS, name) for name in range(THREADS)))
    assert len(pool) == 0
    assert pool.inactive <= pool.high_water
    assert 1 <= pool.peak <= 5 * THREADS
    pool._check()


@pytest.mark.parametrize("width", [1, 64])
def test_every_call_is_counted(width: int) -> None:
    pool = Allocator(2**21, block=width)

    def work(owner: int) -> None:
        for _ in range(TURNS):
            pool.release(pool.acquire(owner), owner)
            pool.acquire(owner)

    together(*(partial(work, name % 2) for name in range(THREADS)))
    assert len(pool) == pool.held().size == THREADS * TURNS
    assert pool.held_count(0) == pool.held_count(1) == THREADS * TURNS // 2
    pool._check()
    assert pool.clear() == THREADS * TURNS


def test_large_calls_beside_small_ones() -> None:
    pool = Allocator(2**22)
    holders = Holders()

    def large() -> None:
        for _ in range(100):
            ids = pool.acquire_many(2 * LARGE)
            pool.release_many(ids)

    small = [partial(hold_in_turn, pool, holders, TURNS, name) for name in range(2)]
    together(large, large, *small)
    assert len(pool) == 0
    pool._check()


@pytest.mark.parametrize(
    "look",
    [
        lambda pool: Allocator.restore(pool.snapshot())._check(),
        lambda pool: pool.resize(pool.capacity + 7),
        lambda pool: np.unique(pool.held()).size,
        lambda pool: (pool.held_by(0), pool.held_count(0), pool.owner_of),
        lambda pool: (pool.free, pool.cooling, pool.pinned, pool.next_due, len(pool), repr(pool)),
        lambda pool: pool.release_owner(5),
        lambda pool: pool.acquire_many(100, 5),
    ],
    ids=["snapshot", "resize", "held", "held_by", "counts", "release_owner", "many"],
)
def test_other_calls_beside_them(look: Callable[[Allocator], object]) -> None:
    pool = Allocator(2**12, block=8)
    holders, over = Holders(), threading.Event()

    def work(name: int) -> None:
        try:
            hold_in_turn(pool, holders, TURNS // 2, name)
        finally:
            over.set()

    def observe() -> None:
        while not over.is_set():
            try:
                look(pool)
            except errors.Exhausted:
                pool.release_owner(5)

    together(observe, *(partial(work, name) for name in range(3)))
    pool.release_owner(5)
    assert len(pool) == 0
    pool._check()


def test_threads_wait_for_few_ids() -> None:
    pool = Allocator(3)
    holders = Holders()

    def work(name: int) -> None:
        for turn in range(TURNS // 20):
            # Some give up at the moment at which they are served.
            try:
                cid = pool.acquire_wait(name, timeout=60 if turn % 3 else 0.0001)
            except errors.Exhausted:
                continue
            holders.got(cid, name)
            holders.gives(cid)
            pool.release(cid, name)

    together(*(partial(work, name) for name in range(2 * THREADS)))
    assert len(pool) == len(pool._line._callers) == 0
    pool._check()


def test_a_lease_is_for_one_thread_at_a_time() -> None:
    pool = Allocator(THREADS)
    lease = pool.lease(timeout=60)
    inside, entered = threading.Lock(), [0] * THREADS

    def work(name: int) -> None:
        for _ in range(TURNS // 20):
            try:
                cid = lease.__enter__()
            except errors.InvalidArgument:
                continue
            assert inside.acquire(blocking=False), "two threads in one lease"
            assert cid in pool
            entered[name] += 1
            inside.release()
            lease.__exit__(None, None, None)

    together(*(partial(work, name) for name in range(THREADS)))
    assert sum(entered) > 0
    assert len(pool) == 0
    pool._check()


@pytest.mark.skipif(not PARALLEL, reason="this Python has a GIL")
def test_no_module_asks_for_the_gil() -> None:
    script = "import sys, cidalloc, cidalloc.manager.storage._mapping\n"
    script += "import cidalloc.triton_model._parent_watch\n"
    script += "raise SystemExit(sys._is_gil_enabled())"
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
