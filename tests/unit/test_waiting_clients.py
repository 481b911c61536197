"""Waiting in the clients: the arguments, the order of calls, and how long a START may take."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from loopback import AsyncLoopback, Loopback

from cidalloc import errors
from cidalloc.client import AsyncClient, Client
from cidalloc.client.core.effects import Flow, Idle
from cidalloc.client.core.transport import Done
from cidalloc.manager.settings import Settings

SETTINGS = Settings(first=1, capacity=100, fresh=True)


class Waits(Loopback):
    """A model that notes the options of its requests."""

    def __init__(self) -> None:
        super().__init__(SETTINGS)
        self.seen: list[dict[str, Any]] = []

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        self.seen.append({"limit": limit, **options})
        return super().infer(limit, model, inputs)

    def submit(self, limit: float, model: str, inputs: list[Any], done: Done, /, **_: Any) -> None:
        done(self.infer(limit, model, inputs, **_), None)


class Slow(Waits):
    """A model that answers when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.unanswered: list[Callable[[], object]] = []

    def submit(self, limit: float, model: str, inputs: list[Any], done: Done, /, **_: Any) -> None:
        result = self.infer(limit, model, inputs, **_)
        self.unanswered.append(lambda: done(result, None))


@pytest.mark.parametrize("value", [-1, -0.001, 86_401, float("nan"), "1", True, None, [1]])
def test_times_that_are_none(value: Any) -> None:
    with Client(transport=Waits()) as client:
        calls: list[Callable[[], Any]] = [
            lambda: client.acquire(timeout=value),
            lambda: client.acquire_many(1, timeout=value),
            lambda: client.sequence("model", wait=value).close(),
        ]
        for call, name in zip(calls, ("timeout", "timeout", "wait"), strict=True):
            if value is None:
                call()
                continue
            with pytest.raises(errors.InvalidArgument, match=f"{name}=.* is not a time of 0 to"):
                call()


def test_start_may_wait_for_a_slot_as_long_as_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no later request may; the ID cools for the longest of them that may be on its way."""
    transport = Waits()
    with Client(transport=transport) as client:
        sequence = client.sequence("model", timeout=1.0, wait=100.0)
        registry = transport.service._holder.registry()
        (session,) = registry.sessions.named.values()
        assert session.cooldown == 2_000 + 100_000, "if the client dies right after START"
        sequence.infer([])
        sequence.async_infer([]).result()
        start, later = transport.seen
        assert start["sequence_start"] and "sequence_start" not in later
        assert 99.0e6 < start["timeout"] <= 100e6 and later["timeout"] == 1e6
        assert 99.0 < start["limit"] < 102.0 and later["limit"] < 2.0
        assert sequence.infer_kwargs()["timeout"] == 1e6
        lent = client.sequence("model", timeout=1.0, wait=100.0)
        assert lent.infer_kwargs()["timeout"] > 99e6
        lease, longest = client._session.lease, []
        released = lease.release_unended

        def spy(cid: int, model: str, idle: float, timeout: float) -> None:
            longest.append(timeout)
            released(cid, model, idle, timeout)

        monkeypatch.setattr(lease, "release_unended", spy)
        for each in (sequence, lent):
            each.close()
        assert len(longest) == 2 and min(longest) > 90.0 and max(longest) <= 100.0


def test_a_request_that_waits_for_start_has_its_own_time() -> None:
    transport = Slow()
    with Client(transport=transport) as client, client.sequence("m", timeout=1, wait=9) as sequence:
        futures = [sequence.async_infer([]) for _ in range(2)]
        time.sleep(1.5)
        assert not any(future.done() for future in futures), "both wait for the slot"
        for future in futures:
            transport.unanswered.pop()()
            assert future.result(5) is not None
        last = sequence.async_infer([])
        transport.unanswered.pop()()
        assert last.result(5) is not None
        assert [each["timeout"] for each in transport.seen] == [9e6, 9e6, 1e6]


def test_a_wait_that_is_shorter_than_the_timeout_changes_nothing_for_slots() -> None:
    transport = Waits()
    with Client(transport=transport) as client:
        sequence = client.sequence("model", timeout=60.0, wait=5.0)
        sequence.infer([])
        assert transport.seen[0]["timeout"] == 60e6
        (session,) = transport.service._holder.registry().sessions.named.values()
        assert session.cooldown == 2_000 + 60_000
        sequence.close()


def test_a_call_with_a_time_limit_does_not_overtake() -> None:
    """Calls without one may, as long as the pool is not exhausted."""

    def endless() -> Flow[None]:
        yield Idle(math.inf)

    with Client(transport=Waits(), timeout=0.2) as client:
        first = client.acquire()
        client._session.line[object()] = flow = endless()
        with pytest.raises(errors.Unavailable, match="other calls come first"):
            client.acquire(timeout=0.01)
        assert client.acquire() != first
        flow.close()
        assert client.acquire(timeout=0.01)

    async def main() -> None:
        async with AsyncClient(transport=AsyncLoopback(SETTINGS), timeout=0.2) as client:
            await client.acquire()
            client._session.line[object()] = flow = endless()
            with pytest.raises(errors.Unavailable, match="other calls come first"):
                await client.acquire(timeout=0.01)
            assert await client.acquire()
            flow.close()

    asyncio.run(main())


def test_many_threads_and_clients_share_few_ids() -> None:
    """Nobody fails, no ID is used twice at a time, and none is lost."""
    transport = Loopback(Settings(first=1, capacity=3, cooldown_ms=100, fresh=True))
    used: set[int] = set()
    lock = threading.Lock()

    def work(client: Client, turn: int) -> None:
        count = 1 + turn % 2
        cids = client.acquire_many(count, timeout=60).tolist()
        with lock:
            assert not used & set(cids)
            used.update(cids)
        time.sleep(0.01)
        with lock:
            used.difference_update(cids)
        client.release_many(cids, ended=True)

    clients = [Client(transport=transport, ahead=ahead) for ahead in (0, 2, 1024)]
    with ThreadPoolExecutor(12) as pool:
        tasks = [pool.submit(work, clients[turn % 3], turn) for turn in range(60)]
        for task in tasks:
            task.result(60)
    for client in clients:
        assert client.held().tolist() == []
        client.close()
    with Client(transport=transport, ahead=0) as client:
        assert sorted(client.acquire_many(3, timeout=10).tolist()) == [1, 2, 3]
