"""A client process with many sequences at once: see test_crowd.py.

Begins with the first line of its standard input and runs until that ends; then it prints what it
saw as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys

from cidalloc.client import AsyncClient
from cidalloc.devserver.demo.sequences import number

TTL_S = 3.0


async def main(url: str, model: str, sequences: int, pause: float) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    seen = {"sequences": 0, "sums": 0, "wrong": 0}
    stop = asyncio.Event()
    # The first contact is not repeated by itself, and a busy server may take its time.
    async with AsyncClient(url, ttl=TTL_S, timeout=30.0, label="crowd") as cids:
        work = [asyncio.create_task(use(cids, model, stop, seen, pause)) for _ in range(sequences)]
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        stop.set()
        await asyncio.gather(*work)
    print(json.dumps(seen), flush=True)


async def use(
    cids: AsyncClient, model: str, stop: asyncio.Event, seen: dict[str, int], pause: float
) -> None:
    """Run one sequence after the other; some are left without END."""
    while not stop.is_set():
        async with cids.sequence(model, timeout=20.0) as sequence:
            expected, length = 0, random.randint(1, 12)
            for step in range(length):
                value = random.randint(-1000, 1000)
                expected += value
                end = step == length - 1 and random.random() < 0.8
                result = await sequence.infer(number(value), end=end)
                await asyncio.sleep(random.uniform(0, 2 * pause))
                seen["sums"] += 1
                seen["wrong"] += int(result.as_numpy("OUTPUT")[0, 0]) != expected
        seen["sequences"] += 1


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
