"""Tests the allocator core with several threads: large bulk calls let go of the GIL."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from cidalloc import Allocator, CidError, errors

LARGE = 4096  # IDs, from which on a call lets go of the GIL

needs_gil = pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(),
    reason="without a GIL another thread may run at any time",
)


@pytest.fixture
def busy_switching() -> Iterator[None]:
    """Let the threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def no_switching() -> Iterator[None]:
    """Let a thread run until it waits or lets go of the GIL by itself."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(interval)


def together(*work: Callable[[], object]) -> None:
    """Run each in a thread of its own; raise what they raise."""
    with ThreadPoolExecutor(len(work)) as threads:
        for result in [threads.submit(each) for each in work]:
            result.result()


@pytest.mark.usefixtures("busy_switching")
def test_threads_never_share_an_id() -> None:
    pool = Allocator(2000, 1, 1)

    def work(owner: int) -> None:
        for _ in range(300):
            ids = pool.acquire_many(20, owner).tolist()
            ids.append(pool.acquire(owner))
            assert all(pool.owner_of(cid) == owner for cid in ids)
            assert sorted(pool.held_by(owner).tolist()) == sorted(ids)
            pool.release_many(ids, owner)

    together(*(partial(work, owner) for owner in range(1, 5)))
    assert len(pool) == 0
    pool._check()


@pytest.mark.usefixtures("busy_switching")
@pytest.mark.parametrize("width", [1, 8, 64])
def test_single_and_bulk_calls_of_several_threads(width: int) -> None:
    pool = Allocator(2**30, 1, width)
    held: dict[int, list[int]] = {}

    def work(owner: int) -> None:
        chance = random.Random(owner)
        mine: list[int] = []
        for _ in range(60):
            n = chance.choice([1, 10, LARGE, 3 * LARGE])
            mine += pool.acquire_many(n, owner).tolist()
            mine += [pool.acquire(owner) for _ in range(20)]
            assert pool.held_count(owner) == len(mine)
            chance.shuffle(mine)
            gone, mine = mine[: chance.randrange(len(mine))], mine[len(mine) // 2 :]
            gone = sorted(set(gone) - set(mine))
            for cid in gone[:20]:
                pool.release(cid, owner)
            pool.release_many(np.array(gone[20:], np.uint64), owner)
            mine = pool.held_by(owner).tolist()
            if chance.random() < 0.1:
                assert pool.release_owner(owner) == len(mine)
                mine = []
        held[owner] = mine

    together(*(partial(work, owner) for owner in range(1, 5)))
    every = [cid for ids in held.values() for cid in ids]
    assert len(every) == len(set(every)) == len(pool)
    for owner, ids in held.items():
        assert sorted(pool.held_by(owner).tolist()) == sorted(ids)
    pool._check()


def calls(pool: Allocator, n: int) -> dict[str, Callable[[], object]]:
    """The calls for many IDs, each possible after those before it."""
    out, ids = np.zeros(n, np.uint64), np.arange(1, n + 1, dtype=np.uint64)
    return {
        "acquire_many": lambda: pool.acquire_many(n, out=out),
        "held_by": lambda: pool.held_by(0),
        "release_many": lambda: pool.release_many(ids),
        "acquire_many again": lambda: pool.acquire_many(n, out=out),
        "release_owner": lambda: pool.release_owner(0),
    }


@needs_gil
@pytest.mark.usefixtures("no_switching")
@pytest.mark.parametrize("n", [LARGE - 1, 3_000_000])
def test_a_large_call_lets_other_threads_run(n: int) -> None:
    pool = Allocator(block=1)
    for name, call in calls(pool, n).items():
        begun, over = threading.Event(), []

        def work(call: Callable[[], object] = call) -> None:
            begun.set()  # noqa: B023
            call()
            over.append(True)  # noqa: B023

        thread = threading.Thread(target=work)
        thread.start()
        begun.wait()
        assert bool(over) == (n < LARGE), name
        thread.join()
    pool._check()


@needs_gil
@pytest.mark.usefixtures("no_switching")
@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda pool: pool.acquire(), 3_000_001),
        (lambda pool: pool.acquire_many(LARGE)[0], 3_000_001),
        (lambda pool: len(pool), 3_000_000),
        (lambda pool: pool.held_count(0), 3_000_000),
        (lambda pool: 3_000_000 in pool, True),
        (lambda pool: pool.owner_of(3_000_000), 0),
        (lambda pool: pool.release(3_000_000), None),
        (lambda pool: pool.release_many([1, 2, 3_000_000]), None),
        (lambda pool: pool.release_owner(0), 3_000_000),
        (lambda pool: len(pool.held_by(0)), 3_000_000),
        (lambda pool: pool.peak, 3_000_000),
        (lambda pool: pool.cooling, 0),
        (lambda pool: repr(pool)[-12:], "3000000 held"),
    ],
)
def test_other_calls_wait_until_a_large_one_is_over(
    call: Callable[[Allocator], object], answer: object
) -> None:
    pool = Allocator(6_000_000, 1, 8)
    begun = threading.Event()

    def work() -> None:
        begun.set()
        pool.acquire_many(3_000_000)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    assert call(pool) == answer
    thread.join()


@needs_gil
@pytest.mark.usefixtures("no_switching")
@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda pool, sly: pool.acquire(sly), 3_000_001),
        (lambda pool, sly: pool.acquire_many(2, sly)[1], 3_000_002),
        (lambda pool, sly: pool.release(3_000_000, sly), None),
        (lambda pool, sly: pool.release_many([3_000_000], sly), None),
        (lambda pool, sly: pool.release_owner(sly), 3_000_000),
        (lambda pool, sly: pool.held_count(sly), 3_000_000),
        (lambda pool, sly: len(pool.held_by(sly)), 3_000_000),
        (lambda pool, sly: sly in pool, False),
    ],
)
def test_a_large_call_may_begin_while_arguments_are_read(
    call: Callable[[Allocator, object], object], answer: object
) -> None:
    pool = Allocator(6_000_000, 1, 8)
    begun = threading.Event()

    def work() -> None:
        begun.set()
        pool.acquire_many(3_000_000)

    thread = threading.Thread(target=work)

    class Sly:
        def __index__(self) -> int:
            thread.start()
            begun.wait()
            return 0

    assert call(pool, Sly()) == answer
    thread.join()


def test_whoever_waits_gets_the_pool_in_the_end() -> None:
    pool = Allocator()
    over = False

    def work() -> None:
        while not over:
            pool.release_many(pool.acquire_many(300_000, 1), 1)

    def wait() -> None:
        nonlocal over
        for _ in range(100):
            pool.acquire(2)
        over = True

    together(work, work, wait)
    assert len(pool) == 100
    pool._check()


def test_a_refused_large_call_leaves_the_pool_free() -> None:
    pool = Allocator(10_000, 1, 1)
    ids = pool.acquire_many(10_000)
    for wrong, error in ((0, errors.OutOfRange), (7, errors.Duplicate)):
        ids[9_999] = wrong
        with pytest.raises(error, match="position 9999"):
            pool.release_many(ids)
    ids[9_999] = 10_000
    with pytest.raises(errors.NotOwner):
        pool.release_many(ids, 1)
    pool.release_many(ids, reuse_at=100)
    with pytest.raises(errors.NotHeld):
        pool.release_many(ids)
    with pytest.raises(errors.Exhausted, match="10000 are cooling"):
        pool.acquire_many(9_000, now=50)
    assert pool.acquire(now=100) == 1
    pool._check()


@pytest.mark.usefixtures("busy_switching")
@pytest.mark.parametrize("width", [1, 16, 64])
def test_an_array_may_change_while_its_ids_are_released(width: int) -> None:
    n = 50_000
    pool = Allocator(2**20, 1, width)
    theirs = pool.acquire_many(n, 2)
    ids = np.zeros(n, np.uint64)
    over, released, refused = False, 0, 0
    turns = threading.Semaphore(0)

    def spoil() -> None:
        chance = np.random.default_rng(1)
        while turns.acquire() and not over:
            # Some for each release: a thread that always runs can keep the GIL for long.
            for at, other, what, wrong in chance.integers(0, [n, n, 4, 2**22], (200, 4)):
                if what == 0:
                    ids[at : at + 70] = ids[other]
                elif what == 1:
                    ids[at] = theirs[other]
                elif what == 2:
                    ids[at] = wrong
                else:
                    ids[[at, other]] = ids[[other, at]]

    def release() -> None:
        nonlocal over, released, refused
        chance = np.random.default_rng(2)
        try:
            while released + refused < 100 or (refused < 3 and released < 10_000):
                fresh = pool.acquire_many(n, 1)
                given = chance.permutation(fresh) if refused % 2 else fresh
                turns.release()
                ids[:] = given
                try:
                    pool.release_many(ids, 1, reuse_at=-1)
                    released += 1
                    assert pool.held_count(1) == 0
                except CidError:
                    assert np.array_equal(np.sort(pool.held_by(1)), np.sort(fresh))
                    pool.release_owner(1)
                    refused += 1
                assert np.array_equal(np.sort(pool.held_by(2)), theirs)
        finally:
            over = True
            turns.release()

    together(spoil, release)
    assert refused >= 3
    assert len(pool) == n
    pool._check()


def test_a_fork_while_another_thread_is_in_a_large_call() -> None:
    script = """if True:
        import os, signal, sys, threading
        import numpy as np
        from cidalloc import Allocator, errors
        sys.setswitchinterval(1000)     # so this thread runs only while the other is in a call
        n = 3_000_000
        out = np.zeros(n, np.uint64)
        for attempt in range(50):   # on a busy machine the call may be over too early
            pool, begun, over = Allocator(), threading.Event(), []
            def work():
                begun.set()
                pool.acquire_many(n, out=out)
                over.append(True)
            thread = threading.Thread(target=work)
            thread.start()
            begun.wait()
            if not over:
                break
            thread.join()
        assert not over
        child = os.fork()
        if not child:
            signal.alarm(20)
            refused = 0
            for call in (pool.acquire, lambda: pool.acquire_many(n), lambda: len(pool)):
                try:
                    call()
                except errors.Forked:
                    refused += 1
            del pool
            os._exit(10 * refused + Allocator().acquire())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 31
        thread.join()
        assert pool.acquire() == n + 1
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
