"""What an ID costs at the client: out of its stock, from uuid4, and by a plain round trip.

    .venv/bin/python bench/client.py

Prints microseconds of this process's CPU time for each, the best of many rounds, taken in turns.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from cidalloc.client import Client
from cidalloc.client._transport import connect
from cidalloc.codes import Operation
from cidalloc.demo import demo_server
from cidalloc.settings import Settings
from cidalloc.wire import MODEL, Request, as_ids

ROUNDS = 100


def per_call(work: Callable[[], object], times: int) -> float:
    """Return the microseconds of CPU time that one call takes."""
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times * 1e6


def main() -> None:
    """Measure and print."""
    # Without a cooldown, so that IDs recycle at once at any rate.
    settings = Settings(cooldown_ms=0, fresh=True)
    with demo_server(settings) as server, Client(server.grpc_url) as cids:
        plain = connect(server.grpc_url)

        def recycled() -> None:
            cids.release(cids.acquire(), ended=True)

        def round_trip() -> None:
            ids, _ = plain.call(MODEL, Request(Operation.NEW), 10.0)
            plain.call(MODEL, Request(Operation.DELETE, as_ids(ids), {"ended": True}), 10.0)

        ways: dict[str, tuple[Callable[[], object], int]] = {
            "acquire + release, recycled": (recycled, 2_000),
            "uuid.uuid4()": (uuid.uuid4, 2_000),
            "acquire + release, two round trips over gRPC": (round_trip, 20),
        }
        for work, times in ways.values():
            per_call(work, times // 10)
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(ROUNDS):
            for name, (work, times) in ways.items():
                best[name] = min(best[name], per_call(work, times))
        plain.close()
    for name, cost in best.items():
        print(f"{name:46}{cost:>9.2f} µs")


if __name__ == "__main__":
    main()
