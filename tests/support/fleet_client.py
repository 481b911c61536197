"""A process with many clients of a fleet, one sequence at a time each: see test_fleet_drill.py.

It begins at once and runs until its standard input ends. Then it prints as JSON, for each sequence:
when it was asked for, had its ID, and ended; the number of its server; and how it ended. Times are
of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

from cidalloc.client import AsyncFleet
from cidalloc.devserver.demo import MODEL
from cidalloc.devserver.demo.sequences import number
from cidalloc.errors import CidError

TTL_S, TIMEOUT_S = 6.0, 3.0
REQUESTS = 4
Span = tuple[float, float | None, float, int | None, str]


async def use(urls: list[str], seconds: float, stop: asyncio.Event, spans: list[Span]) -> None:
    """Run one sequence after the other."""
    async with AsyncFleet(urls, ttl=TTL_S) as fleet:
        while not stop.is_set():
            began, had, server, outcome = time.monotonic(), None, None, "ok"
            try:
                async with fleet.sequence(MODEL, timeout=TIMEOUT_S) as sequence:
                    had, server = time.monotonic(), urls.index(sequence.server)
                    if not await right(sequence, seconds / (REQUESTS - 1)):
                        outcome = "wrong"
            except CidError as error:
                outcome = type(error).__name__
                await asyncio.sleep(0.05)
            spans.append((began, had, time.monotonic(), server, outcome))


async def right(sequence: Any, pause: float) -> bool:
    """Send the requests of a sequence, and return whether all sums were right."""
    found, total = True, 0
    for left in reversed(range(REQUESTS)):
        value = random.randint(1, 1000)
        total += value
        result = await sequence.infer(number(value), end=left == 0)
        found = found and int(result["OUTPUT"][0, 0]) == total
        await asyncio.sleep(random.uniform(0.5, 1.5) * pause if left else 0.0)
    return found


async def main(clients: int, seconds: float, urls: list[str]) -> None:
    spans: list[Span] = []
    stop = asyncio.Event()
    work = [asyncio.create_task(use(urls, seconds, stop, spans)) for _ in range(clients)]
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    stop.set()
    await asyncio.gather(*work)
    print(json.dumps(spans), flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
