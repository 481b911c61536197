"""The drivers: many threads or tasks on one session, and what is left when all is over."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from loopback import AsyncLoopback, Loopback

from cidalloc import wire
from cidalloc.client import AsyncClient, Client
from cidalloc.settings import Settings

SETTINGS = Settings(first=1, capacity=100_000, max_sessions=100, cooldown_ms=0, fresh=True)


class Slow(Loopback):
    """A manager that takes its time, and notes how many changes it was asked for at once."""

    def __init__(self) -> None:
        super().__init__(SETTINGS)
        self.changes = self.most = 0
        self.counting = threading.Lock()

    def call(self, model: str, request: wire.Request, timeout: float) -> tuple[wire.IDs, str]:
        changes = "seq" in request.parameters
        with self.counting:
            self.changes += changes
            self.most = max(self.most, self.changes)
        time.sleep(0.002)
        try:
            return super().call(model, request, timeout)
        finally:
            with self.counting:
                self.changes -= changes


def test_many_threads_share_a_client() -> None:
    used: set[int] = set()
    lock = threading.Lock()
    transport = Slow()
    with Client(transport=transport) as cids:

        def work(number: int) -> None:
            for turn in range(150):
                cid = cids.acquire()
                with lock:
                    assert cid not in used
                    used.add(cid)
                    used.remove(cid)
                cids.release(cid, ended=bool((turn + number) % 3))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert cids.held().tolist() == []
        assert transport.most == 1, "changes go one after the other"
        assert cids.active() == len(cids._session.stock.known())
    assert Client(transport=transport).active() == 0


def keepers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "cidalloc-client"]


def test_a_closed_client_leaves_no_thread() -> None:
    before = len(keepers())
    with Client(transport=Loopback(SETTINGS)) as cids:
        cids.acquire()
        assert len(keepers()) == before + 1
    assert len(keepers()) == before


def test_a_client_that_nobody_has_ends_its_keeper() -> None:
    before = len(keepers())
    cids = Client(transport=Loopback(SETTINGS), ttl=1.0)
    cids.acquire()
    del cids
    gc.collect()
    deadline = time.monotonic() + 30
    while len(keepers()) > before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_keeper_renews_in_the_background() -> None:
    with Client(transport=Loopback(SETTINGS), ttl=1.0) as cids:
        cid = cids.acquire()
        epoch = cids._session.epoch
        time.sleep(2.5)
        cids._session.now = cids._clock()
        cids._session.check(epoch, cid)


def test_many_tasks_share_a_client() -> None:
    async def main() -> None:
        used: set[int] = set()
        async with AsyncClient(transport=AsyncLoopback(SETTINGS)) as cids:

            async def work(number: int) -> None:
                for turn in range(50):
                    cid = await cids.acquire()
                    assert cid not in used
                    used.add(cid)
                    await asyncio.sleep(0)
                    used.remove(cid)
                    await cids.release(cid, ended=bool((turn + number) % 3))

            await asyncio.gather(*(work(number) for number in range(20)))
            assert await cids.active() == len(cids._session.stock.known())
        assert len(asyncio.all_tasks()) == 1, "the keeper is still there"

    asyncio.run(main())


def test_a_cancelled_acquire_leaves_no_turn_behind() -> None:
    class Stuck(AsyncLoopback):
        stuck = True

        async def call(
            self, model: str, request: wire.Request, timeout: float
        ) -> tuple[wire.IDs, str]:
            if "count" in request.parameters and self.stuck:
                await asyncio.sleep(3600)
            return await super().call(model, request, timeout)

    async def main() -> None:
        transport = Stuck(SETTINGS)
        async with AsyncClient(transport=transport) as cids:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(cids.acquire(), 0.1)
            transport.stuck = False
            assert await cids.acquire()
            assert await cids.active() == len(cids._session.stock.known())

    asyncio.run(main())


def test_the_token_is_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cidalloc.client")
    transport = Loopback(SETTINGS)
    with Client(transport=transport, timeout=0.5) as cids:
        cids.acquire()
        token = cids._session._token
        transport.service = Loopback(SETTINGS).service  # it forgot us
        assert len(cids.acquire_many(50)) == 50
        assert "lost" in caplog.text
    assert len(token) == 32 and token not in caplog.text and token not in repr(cids)
