"""A client process of the drill behind proxies: see test_route.py.

    python route_client.py MODEL REQUESTS SECONDS URL...

For each URL it runs workers that begin one sequence after the other, until so many requests were
sent, so many seconds have passed, and each of the three servers had a sequence. The model adds up
from a number that is its server's own, so each answer shows which server had the sequence and which
requests it had. The first part of a sequence's key names the registry of its ID. Prints counts as
JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import threading
import time
from collections import Counter
from typing import Any

from based import BASE

from cidalloc.client import AsyncClient, Client
from cidalloc.errors import CidError

SERVERS = 3
OPTIONS: dict[str, Any] = {"ttl": 3.0, "timeout": 2.0, "ahead": 4}


class Tally:
    """What happened. It counts requests until there were enough."""

    def __init__(self, model: str, requests: int, seconds: float) -> None:
        self.model, self.requests = model, requests
        self.until = time.monotonic() + seconds
        self.pause = seconds / max(requests, 1)
        self.sent = self.right = self.sequences = 0
        self.homes: dict[str, int] = {}  # by registry: what its server begins with
        self.wrong: list[str] = []
        self.errors: Counter[str] = Counter()

    @property
    def goes_on(self) -> bool:
        return (
            self.sent < self.requests
            or time.monotonic() < self.until
            or len(self.homes) < SERVERS  # new sessions, after kills, come to the others
        )

    def check(self, key: str, base: int, expected: int, answer: Any) -> int:
        """Compare an answer with the sum of this sequence; return what its server begins with."""
        found = int(answer["OUTPUT"][0, 0])
        base = base or found - expected
        home = self.homes.setdefault(key.partition("-")[0], base)
        if base % BASE == 0 and base == home and found == base + expected:
            self.right += 1
        else:
            self.wrong.append(f"{key}: {found} is not {base} + {expected}, its home is {home}")
        return base

    def failed(self, error: Exception) -> None:
        kind = (
            type(error).__name__ if isinstance(error, CidError) else f"raw {type(error).__name__}"
        )
        self.errors[f"{kind}: {error}"] += 1


def work(tally: Tally, client: Client, streaming: bool) -> None:
    """Run sequences of a client for threads."""
    while tally.goes_on:
        try:
            expected = base = 0
            with client.sequence(tally.model, timeout=4.0, streaming=streaming) as sequence:
                for left in range(random.randint(2, 12), 0, -1):
                    value = random.randint(1, 999)
                    expected += value
                    tally.sent += 1
                    answer = sequence.infer({"INPUT": [[value]]}, end=left == 1)
                    base = tally.check(sequence.key, base, expected, answer)
                    time.sleep(tally.pause)
            tally.sequences += 1
        except Exception as error:
            tally.failed(error)
            time.sleep(0.05)


async def work_async(tally: Tally, client: AsyncClient, streaming: bool) -> None:
    """Run sequences of a client for asyncio."""
    while tally.goes_on:
        try:
            expected = base = 0
            async with client.sequence(tally.model, timeout=4.0, streaming=streaming) as sequence:
                for left in range(random.randint(2, 12), 0, -1):
                    value = random.randint(1, 999)
                    expected += value
                    tally.sent += 1
                    answer = await sequence.infer({"INPUT": [[value]]}, end=left == 1)
                    base = tally.check(sequence.key, base, expected, answer)
                    await asyncio.sleep(tally.pause)
            tally.sequences += 1
        except Exception as error:
            tally.failed(error)
            await asyncio.sleep(0.05)


async def run_async(tally: Tally, urls: list[str]) -> None:
    """Run a client for asyncio of each URL, with and without streams."""
    clients = [AsyncClient(url, **OPTIONS) for url in urls]
    tasks = [
        work_async(tally, client, streaming)
        for client, url in zip(clients, urls, strict=True)
        for streaming in ((False, True) if url.startswith("grpc") else (False,))
    ]
    await asyncio.gather(*tasks)
    for client in clients:
        await client.close()


def main(model: str, requests: int, seconds: float, urls: list[str]) -> None:
    """Run all workers and print what happened."""
    logging.disable()  # of sessions that are lost, which is what happens here
    tally = Tally(model, requests, seconds)
    clients = [Client(url, **OPTIONS) for url in urls for _ in range(2)]
    threads = [
        threading.Thread(target=work, args=(tally, client, streaming))
        for client in clients
        for streaming in ((False, True) if client._transport.streams else (False,))
    ]
    tally.pause *= len(threads) + 3 * len(urls) / 2
    for thread in threads:
        thread.start()
    asyncio.run(run_async(tally, urls))
    for thread in threads:
        thread.join()
    for client in clients:
        client.close()
    names = ("sent", "right", "sequences", "homes", "wrong", "errors")
    print(json.dumps({name: getattr(tally, name) for name in names}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
