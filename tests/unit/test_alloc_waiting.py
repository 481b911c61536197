"""Tests the calls that wait for an ID, in threads and in tasks."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cidalloc import Allocator, errors


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def waiting(pool: Allocator) -> int:
    return len(pool._line._callers)


def test_a_release_in_another_thread_ends_the_wait() -> None:
    pool = Allocator(1)
    cid = pool.acquire(7)
    with ThreadPoolExecutor() as threads:
        got = threads.submit(pool.acquire_wait, 8, timeout=30)
        until(lambda: waiting(pool) == 1)
        pool.release(cid, 7)
        assert got.result(30) == cid
    assert pool.owner_of(cid) == 8
    assert waiting(pool) == 0
    pool._check()


@pytest.mark.parametrize(
    ("free", "cooling"),
    [
        (lambda pool: pool.release(1), False),
        (lambda pool: pool.release_many([1]), False),
        (lambda pool: pool.release_owner(0), False),
        (lambda pool: pool.clear(), False),
        (lambda pool: setattr(pool, "ready", 2), False),
        (lambda pool: pool.acquire_many(0, 0, 60), True),
    ],
)
def test_all_that_frees_an_id_ends_the_wait(
    free: Callable[[Allocator], object], cooling: bool
) -> None:
    pool = Allocator(3, ready=1)
    pool.acquire()
    if cooling:
        pool.release(1, reuse_at=60)
    with ThreadPoolExecutor() as threads:
        got = threads.submit(pool.acquire_wait, timeout=30)
        until(lambda: waiting(pool) == 1)
        free(pool)
        assert got.result(30) in (1, 2)
    pool._check()


def test_first_come_first_served() -> None:
    pool = Allocator(2)
    held = pool.acquire_many(2).tolist()
    order: list[int] = []

    async def one(number: int) -> None:
        cid = await pool.acquire_async(number)
        order.append(number)
        pool.release(cid, number)

    async def main() -> None:
        tasks = []
        with ThreadPoolExecutor(10) as threads:
            for number in range(0, 20, 2):
                tasks.append(asyncio.create_task(one(number)))
                while waiting(pool) != number + 1:
                    await asyncio.sleep(0.001)
                got = threads.submit(pool.acquire_wait, number + 1, timeout=30)
                got.add_done_callback(lambda done, n=number + 1: pool.release(done.result(), n))
                while waiting(pool) != number + 2:
                    await asyncio.sleep(0.001)
            pool.release(held[0])
            await asyncio.wait_for(asyncio.gather(*tasks), 30)

    asyncio.run(main())
    assert order == list(range(0, 20, 2))
    assert list(pool) == [held[1]]
    pool._check()


def test_no_later_call_is_served_before_those_that_wait() -> None:
    pool = Allocator(1)
    pool.release(pool.acquire(), reuse_at=50)
    with ThreadPoolExecutor() as threads:
        got = threads.submit(pool.acquire_wait, 1, timeout=30)
        until(lambda: waiting(pool) == 1)
        with pytest.raises(errors.Exhausted):
            pool.acquire(2, now=50)
        assert got.result(30) == 1
    assert pool.owner_of(1) == 1


def test_a_timeout() -> None:
    pool = Allocator(1)
    assert pool.acquire_wait(timeout=0) == 1
    begun = time.monotonic()
    for call in (
        lambda: pool.acquire_wait(timeout=0.05),
        lambda: asyncio.run(pool.acquire_async(timeout=0.05)),
        lambda: pool.lease(timeout=0.05).__enter__(),
    ):
        with pytest.raises(errors.Exhausted, match="1 of 1 IDs are held"):
            call()
    assert time.monotonic() - begun >= 0.15
    assert waiting(pool) == 0
    pool.release(1)
    assert pool.acquire() == 1


@pytest.mark.parametrize("wrong", [-1, -0.1, math.nan, -math.inf, True, "1", [1], 1j])
def test_a_wrong_timeout_is_refused(wrong: Any) -> None:
    pool = Allocator(2)
    for _ in range(2):
        with pytest.raises(errors.InvalidArgument, match="timeout"):
            pool.acquire_wait(timeout=wrong)
        with pytest.raises(errors.InvalidArgument, match="timeout"):
            asyncio.run(pool.acquire_async(timeout=wrong))
        assert waiting(pool) == 0
        pool.reserve([1, 2]) if not len(pool) else None


def test_a_cancelled_task_keeps_no_id() -> None:
    pool = Allocator(1)

    async def main(served: bool) -> None:
        cid = pool.acquire()
        tasks = [asyncio.create_task(pool.acquire_async(n)) for n in (1, 2)]
        await asyncio.sleep(0)
        assert waiting(pool) == 2
        if served:
            pool.release(cid)  # the first task has the ID, but has not run yet
            assert pool.owner_of(cid) == 1
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        if not served:
            pool.release(cid)
        if tasks[0].cancelled():
            assert await tasks[1] == cid
            pool.release(cid, 2)
        else:
            pool.release(tasks[0].result(), 1)
            pool.release(await tasks[1], 2)

    for served in (False, True):
        asyncio.run(main(served))
        assert len(pool) == waiting(pool) == 0
        pool._check()


def test_a_closed_event_loop_gets_no_id() -> None:
    pool = Allocator(1)
    pool.acquire()
    loop = asyncio.new_event_loop()
    work = pool.acquire_async(5)
    task = loop.create_task(work)
    loop.run_until_complete(asyncio.sleep(0))
    assert waiting(pool) == 1
    loop.close()
    pool.release(1)
    assert len(pool) == waiting(pool) == 0
    work.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    assert pool.acquire() == 1


def test_a_large_call_while_others_wait() -> None:
    pool = Allocator(10_000, 1, 1)
    ids = pool.acquire_many(10_000)
    with ThreadPoolExecutor() as threads:
        got = [threads.submit(pool.acquire_wait, 1, timeout=30) for _ in range(3)]
        until(lambda: waiting(pool) == 3)
        pool.release_many(ids)
        assert sorted(each.result(30) for each in got) == [1, 2, 3]
    assert len(pool.acquire_many(9_997)) == 9_997
    pool._check()


def test_no_release_is_missed_while_the_line_is_served() -> None:
    class Busy(Allocator):
        # Another thread may release the ID as soon as calls do not serve the line.
        def _set_queued(self, queued: bool) -> None:
            super()._set_queued(queued)
            if not queued and waiting(self):
                self.release(1)

    pool = Busy(1)
    pool.acquire()
    with ThreadPoolExecutor() as threads:
        got = threads.submit(pool.acquire_wait, timeout=20)
        until(lambda: waiting(pool) == 1 and not pool._line._serving.locked())
        if 1 in pool:
            pool.release(1)
        assert got.result(5) == 1


def test_who_gives_up_while_it_is_served_releases_the_id_once() -> None:
    pool = Allocator(1)
    pool.acquire()
    served = threading.current_thread()

    class Slow(deque[Any]):
        def remove(self, caller: Any) -> None:
            if threading.current_thread() is served:
                assert isinstance(got.exception(30), errors.Exhausted)
            super().remove(caller)

    pool._line._callers = Slow()
    with ThreadPoolExecutor() as threads:
        got = threads.submit(pool.acquire_wait, timeout=0.2)
        until(lambda: waiting(pool) == 1)
        pool.release(1)  # the line has the ID for the caller, which gives up before it is served
    assert len(pool) == waiting(pool) == 0
    pool._check()


def test_many_threads_share_few_ids() -> None:
    pool = Allocator(3)
    in_use: set[int] = set()
    most = 0

    def work(owner: int) -> None:
        nonlocal most
        for _ in range(200):
            with pool.lease(owner, timeout=60) as cid:
                assert cid not in in_use
                in_use.add(cid)
                most = max(most, len(in_use))
                in_use.remove(cid)

    with ThreadPoolExecutor(12) as threads:
        for each in [threads.submit(work, owner) for owner in range(12)]:
            each.result(60)
    assert len(pool) == waiting(pool) == 0
    assert 1 <= most <= 3
    pool._check()


def test_a_forked_child_does_not_wait() -> None:
    pool = Allocator(1)
    pool.acquire()
    with ThreadPoolExecutor() as threads:
        got = threads.submit(pool.acquire_wait, timeout=30)
        until(lambda: waiting(pool) == 1)
        child = os.fork()
        if not child:
            refused = 0
            for call in (
                lambda: pool.acquire_wait(timeout=30),
                lambda: asyncio.run(pool.acquire_async()),
                lambda: pool.release(1),
            ):
                try:
                    call()
                except errors.Forked:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        pool.release(1)
        assert got.result(30) == 1


def test_a_destructor_may_release_at_any_moment() -> None:
    pool = Allocator(1)
    pool.acquire()

    class Holder:
        def __del__(self) -> None:
            pool.release(1)

    with ThreadPoolExecutor() as threads:
        got = threads.submit(pool.acquire_wait, timeout=30)
        until(lambda: waiting(pool) == 1)
        holder = Holder()
        with threading.Lock():
            del holder
        assert got.result(30) == 1
