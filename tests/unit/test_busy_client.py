"""A client with many short sequences: few requests to the manager, also while IDs cool."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from loopback import Loopback

from cidalloc import protocol
from cidalloc.client import Client
from cidalloc.manager.settings import Settings


class Counting(Loopback):
    """Counts the requests to the manager, and takes a moment for each."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.asked: Counter[str] = Counter()

    def call(self, model: str, request: protocol.Request, timeout: float) -> Any:
        self.asked[request.operation.name] += 1
        time.sleep(0.001)
        return super().call(model, request, timeout)


@pytest.mark.parametrize(("ahead", "most"), [(1024, 60), (64, 250)])
def test_ids_that_cool_leave_room_for_fresh_ones(ahead: int, most: int) -> None:
    transport = Counting(Settings(first=1, capacity=100_000, cooldown_ms=60_000, fresh=True))
    with Client(transport=transport, ahead=ahead) as cids:
        for _ in range(5_000):
            cids.release(cids.acquire(), ended=True)
        assert transport.asked["NEW"] <= most, transport.asked


def test_released_ids_leave_together() -> None:
    transport = Counting(Settings(first=1, capacity=100_000, cooldown_ms=60_000, fresh=True))
    with Client(transport=transport) as cids:
        held = [cid for _ in range(20) for cid in cids.acquire_many(100).tolist()]
        began = time.monotonic()
        for cid in held:
            cids.release(cid, ended=True)
            time.sleep(0.0002)
        took = time.monotonic() - began
        assert 2 <= transport.asked["DELETE"] <= took / 0.05 + 3, transport.asked


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_a_small_cache_still_recycles(ahead: int) -> None:
    transport = Counting(Settings(first=1, capacity=100_000, cooldown_ms=0, fresh=True))
    with Client(transport=transport, ahead=ahead) as cids:
        used = set()
        for _ in range(200):
            cid = cids.acquire()
            used.add(cid)
            cids.release(cid, ended=True)
        assert (len(used) < 20) == (ahead > 0), len(used)
