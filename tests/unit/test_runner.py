"""The runners: many threads or tasks on one session, and what is left when all is over."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from loopback import AsyncLoopback, Loopback

from cidalloc import errors, protocol
from cidalloc.client import AsyncClient, Client
from cidalloc.client.core.lease import Lease
from cidalloc.manager.settings import Settings

SETTINGS = Settings(
    first=1, capacity=100_000, max_sessions=100, cooldown_ms=0, min_ttl_ms=1, fresh=True
)


class Slow(Loopback):
    """A manager that takes its time, and notes how many changes it was asked for at once."""

    def __init__(self) -> None:
        super().__init__(SETTINGS)
        self.changes = self.most = 0
        self.counting = threading.Lock()

    def call(
        self, model: str, request: protocol.Request, timeout: float
    ) -> tuple[protocol.IDs, str]:
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
        assert cids.active() == len(cids._session.lease.cache.known())
    assert Client(transport=transport).active() == 0


def heartbeats() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "cidalloc-client"]


def test_a_closed_client_leaves_no_thread() -> None:
    before = len(heartbeats())
    with Client(transport=Loopback(SETTINGS)) as cids:
        cids.acquire()
        assert len(heartbeats()) == before + 1
    assert len(heartbeats()) == before


def test_a_client_that_nobody_has_ends_its_keeper() -> None:
    before = len(heartbeats())
    transport = Loopback(SETTINGS)
    cids = Client(transport=transport)
    cids.acquire()
    line = inspect.currentframe().f_lineno - 2  # type: ignore[union-attr]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        del cids
        gc.collect()
    (warning,) = seen
    assert warning.category is ResourceWarning
    assert f"unclosed Client of loopback, opened at {__file__}:{line}" in str(warning.message)
    deadline = time.monotonic() + 30
    while len(heartbeats()) > before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with Client(transport=transport) as other:
        assert len(other.status()["sessions"]) == 0, "its session was closed"


def test_the_keeper_renews_in_the_background() -> None:
    with Client(transport=Loopback(SETTINGS), ttl=0.4) as cids:
        cid = cids.acquire()
        lease = cids._session.lease
        time.sleep(1.0)
        lease.check(cid, cids._session.now())


def test_heartbeats_after_a_first_acquire_that_failed() -> None:
    """The session is open all the same."""
    transport = Loopback(Settings(first=1, capacity=1, min_ttl_ms=1, fresh=True))
    with Client(transport=transport) as holder:
        cid = holder.acquire()
        with Client(transport=transport, ttl=0.4) as cids:
            for acquire in (cids.acquire, lambda: cids.acquire_many(1)):
                with pytest.raises(errors.Exhausted):
                    acquire()
            time.sleep(1.0)
            assert cids._session.state == "open"
        holder.release(cid, ended=True)


def test_heartbeats_of_asyncio_after_a_first_acquire_that_failed() -> None:
    async def main() -> None:
        transport = AsyncLoopback(Settings(first=1, capacity=1, min_ttl_ms=1, fresh=True))
        async with AsyncClient(transport=transport) as holder:
            await holder.acquire()
            async with AsyncClient(transport=transport, ttl=0.4) as cids:
                with pytest.raises(errors.Exhausted):
                    await cids.acquire()
                await asyncio.sleep(1.0)
                assert cids._session.state == "open"

    asyncio.run(main())


@pytest.mark.parametrize("ahead", [-1, 1025, True, 1.0, "1", None])
def test_ahead_that_is_none(ahead: Any) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(errors.InvalidArgument, match="ahead="):
            kind("h:1", ahead=ahead)


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
            assert await cids.active() == len(cids._session.lease.cache.known())
        assert len(asyncio.all_tasks()) == 1, "the heartbeat is still there"

    asyncio.run(main())


def test_a_cancelled_acquire_leaves_no_turn_behind() -> None:
    class Stuck(AsyncLoopback):
        stuck = True

        async def call(
            self, model: str, request: protocol.Request, timeout: float
        ) -> tuple[protocol.IDs, str]:
            if "count" in request.parameters and self.stuck:
                await asyncio.sleep(1.0)
            return await super().call(model, request, timeout)

    async def main() -> None:
        transport = Stuck(SETTINGS)
        async with AsyncClient(transport=transport) as cids:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(cids.acquire(), 0.1)
            transport.stuck = False
            assert await cids.acquire()
            assert await cids.active() == len(cids._session.lease.cache.known())

    asyncio.run(main())


def test_the_token_is_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cidalloc.client")
    transport = Loopback(SETTINGS)
    with Client(transport=transport, timeout=0.5) as cids:
        cids.acquire()
        token = cids._session.lease.token
        transport.service = Loopback(SETTINGS).service  # it forgot us
        assert len(cids.acquire_many(50)) == 50
        assert "lost" in caplog.text
    assert len(token) == 32 and token not in caplog.text and token not in repr(cids)


def test_a_lease_is_checked_once_for_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once more before a request is sent that has waited for another one."""
    checks: list[int] = []
    check = Lease.check
    monkeypatch.setattr(
        Lease, "check", lambda self, cid, now: checks.append(cid) or check(self, cid, now)
    )
    held: list[Any] = []

    class Held(Loopback):
        def submit(
            self, limit: float, model: str, inputs: list[Any], done: Any, /, **_: Any
        ) -> None:
            held.append(done)

    transport = Held(SETTINGS)
    with Client(transport=transport) as cids:
        sequence = cids.sequence("model")
        sequence.infer([])
        assert len(checks) == 1
        one, two = sequence.async_infer([]), sequence.async_infer([])
        assert (len(checks), len(held)) == (3, 1)
        held[0](transport.infer(1.0, "model", []), None)
        assert (len(checks), len(held)) == (4, 2) and one.done() and not two.done()
        held[1](transport.infer(1.0, "model", []), None)
        sequence.close()
