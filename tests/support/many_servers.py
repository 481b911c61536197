"""Many servers and clients in one thread, with virtual time: restarts, a lost zone, autoscaling.

The real `AsyncFleet` with its clients and the real service run against each other, on an event loop
whose clock jumps. What is simulated is the network with its names and addresses, and Triton. A seed
decides everything: `python many_servers.py 20x300x4 --seed N`. `make simulate-fleet` runs large
fleets.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import random
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loopback import Loopback
from virtual_servers import SETTINGS, START_S, TIMEOUT_S, Loop, Server, SimClient, SimFleet

from cidalloc import protocol
from cidalloc.client.asyncio.sequence import AsyncSequence
from cidalloc.codes import Operation
from cidalloc.errors import CidError, Unavailable

ZONES = 3
GAP_S = 5.0, 35.0  # between two requests of a sequence
REQUESTS, PAUSE_S = 3, 10.0  # of a sequence, and between two sequences of a client
TRIES = 3  # of a request
NOTICE_S = 10.0  # until the names are those of the servers that there are
SAMPLE_S = 5.0
STORY = {
    "start": 90.0,
    "steady": 60.0,
    "rolling restart": 120.0,
    "a zone is lost": 120.0,
    "the zone is back": 150.0,
    "20 % leave": 120.0,
    "20 % come": 120.0,
}
"""What happens, and for how many seconds."""


class World:
    """All of it.

    Attributes:
        at: the process at each address.
        open: the open sequences at each address.
        wrong: broken promises.
        wanting: since when clients want a sequence and have none.
        waited: for how many seconds they did.
        samples: what was measured, every `SAMPLE_S`.
    """

    def __init__(self, seed: int, servers: int, clients: int, subset: int | None) -> None:
        self.loop = Loop()
        self.dice = random.Random(seed)
        self.clients, self.subset = clients, subset
        self.at: dict[str, Server] = {}
        self.open: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.wanting: dict[int, float] = {}
        self.waited: list[float] = []
        self.samples: list[dict[str, Any]] = []
        self.began: dict[str, float] = {}  # of the story's parts, in seconds
        self.rss = 0.0  # at the end of the steady part, in MB
        for number in range(servers):
            self.at[f"grpc://10.{number >> 8}.{number & 255}.1:8001"] = Server(self, number % ZONES)
        self._publish()

    @property
    def now(self) -> float:
        return self.loop.time()

    @property
    def seconds(self) -> float:
        """Return the time since the start."""
        return self.now - START_S

    def clock_ms(self) -> int:
        return int(self.now * 1000)

    def run(self, limit_s: float = float("inf")) -> None:
        """Run the story, for at most so many seconds of the real clock."""
        until = time.monotonic() + limit_s
        telling = self.loop.create_task(self._tell())
        self._running = [self.loop.create_task(self._use(each)) for each in range(self.clients)]
        self._running.append(self.loop.create_task(self._sample(until, telling)))
        with suppress(asyncio.CancelledError):
            self.loop.run_until_complete(telling)
        for server in self.at.values():
            server.loopback.service._holder.registry()._check()
        self.longest = max([*self.waited, *(self.now - each for each in self.wanting.values())])
        for each in self._running:
            if each.done():
                each.result()

    def close(self) -> None:
        """End the clients in order."""
        for each in self._running:
            each.cancel()
        ending = asyncio.gather(*self._running, return_exceptions=True)
        self.loop.run_until_complete(ending)
        self.loop.close()

    # ---- The clients

    async def _use(self, number: int) -> None:
        """Begin one sequence after the other."""
        await asyncio.sleep(self.dice.uniform(0, STORY["start"] / 2))
        async with SimFleet(self, number, self.subset) as fleet:
            while True:
                self.wanting.setdefault(number, self.now)
                if await self._use_one(fleet, number):
                    await asyncio.sleep(self.dice.expovariate(1 / PAUSE_S))
                else:
                    await asyncio.sleep(self.dice.uniform(0.2, 1.0))

    async def _use_one(self, fleet: SimFleet, number: int) -> bool:
        try:
            async with fleet.sequence("model", timeout=TIMEOUT_S) as sequence:
                with self._counted(sequence.server):
                    for left in reversed(range(REQUESTS)):
                        await self._send(sequence, left == 0)
                        if since := self.wanting.pop(number, None):
                            self.waited.append(self.now - since)
                        await asyncio.sleep(self.dice.uniform(*GAP_S) if left else 0.0)
        except CidError as error:
            began = "lost" if number not in self.wanting else "not begun"
            self.counts[f"{began}: {type(error).__name__}"] += 1
            return False
        self.counts["sequences"] += 1
        return True

    async def _send(self, sequence: AsyncSequence, end: bool) -> None:
        """Send a request; after a failure try again, as an application may."""
        for left in reversed(range(TRIES)):
            try:
                await sequence.infer([], end=end, request_id=sequence.key)
                return
            except Unavailable:
                if not left:
                    raise
            await asyncio.sleep(self.dice.uniform(0.5, 10.0))

    @contextmanager
    def _counted(self, url: str) -> Iterator[None]:
        self.open[url] += 1
        try:
            yield
        finally:
            self.open[url] -= 1

    # ---- The servers

    def _publish(self) -> None:
        lit = [url for url, server in self.at.items() if not server.dark]
        self.loop.publish([url.split("/")[2].split(":")[0] for url in lit])

    async def _tell(self) -> None:
        """Let happen what happens, one part after the other."""
        whole = len(self.at)
        self._part("start")
        await self._until("steady")
        self._part("steady")
        gc.collect()
        await self._until("rolling restart")
        self.rss = rss_mb()
        self._part("rolling restart")
        every = max(whole // 20, 1)
        batches = [list(self.at)[each : each + every] for each in range(0, whole, every)]
        for number, batch in enumerate(batches):  # at their addresses
            before = {url: self.at.pop(url) for url in batch}
            await asyncio.sleep(0.8 * STORY["rolling restart"] / len(batches))
            for url, server in before.items():
                # Every second one has lost its registry.
                self.at[url] = Server(self, server.zone, server.loopback if number % 2 else None)
        await self._until("a zone is lost")
        self._part("a zone is lost")
        lost = [url for url, server in self.at.items() if server.zone == 0]
        for url in lost:
            self.at[url].dark = True
        await asyncio.sleep(NOTICE_S)
        self._publish()
        await self._until("the zone is back")
        self._part("the zone is back")
        for url in lost:  # at their addresses, with new registries
            self.at[url] = Server(self, 0)
        await asyncio.sleep(NOTICE_S)
        self._publish()
        await self._until("20 % leave")
        self._part("20 % leave")
        leaving = {url: self.at[url] for url in self.dice.sample(list(self.at), whole // 5)}
        for server in leaving.values():
            server.drain()
        names = dict(self.at)
        self.at = {url: server for url, server in names.items() if url not in leaving}
        self._publish()
        self.at = names
        await asyncio.sleep(0.9 * STORY["20 % leave"])
        for url in leaving:
            del self.at[url]
        await self._until("20 % come")
        self._part("20 % come")
        for url, server in leaving.items():  # others, at the same addresses
            self.at[url] = Server(self, server.zone)
        await asyncio.sleep(NOTICE_S)
        self._publish()
        await self._until(None)

    def _part(self, name: str) -> None:
        self.began[name] = self.seconds

    async def _until(self, name: str | None) -> None:
        """Wait until a part of the story begins; None: until the end."""
        parts = list(STORY)
        before = parts if name is None else parts[: parts.index(name)]
        await asyncio.sleep(sum(STORY[each] for each in before) - self.seconds)

    # ---- What is measured

    async def _sample(self, until: float, telling: asyncio.Task[None]) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            lit = {url: server for url, server in self.at.items() if not server.dark}
            loads = sorted(self.open[url] for url in lit)
            zones: dict[int, list[int]] = {zone: [] for zone in range(ZONES)}
            for url, server in lit.items():
                zones[server.zone].append(self.open[url])
            renewals = [each.requests[Operation.RENEW] / SAMPLE_S for each in lit.values()]
            requests = [each.requests.total() / SAMPLE_S for each in lit.values()]
            for server in self.at.values():
                server.requests.clear()
            self.samples.append(
                {
                    "at": round(self.seconds),
                    "zones": [statistics.mean(each or [0]) for each in zones.values()],
                    "low": loads[len(loads) // 100],
                    "high": loads[-1 - len(loads) // 100],
                    "renewals": statistics.mean(renewals),
                    "requests": statistics.mean(requests),
                    "most": max(requests),
                    "sessions": statistics.mean(each.sessions for each in lit.values()),
                }
            )
            if time.monotonic() > until:
                telling.cancel()

    def spread_after(self, within: float = 0.2) -> float | None:
        """Return how long it took from the zone's return until its load was that of the others."""
        back, end = self.began["the zone is back"], self.began["20 % leave"]
        after = [each for each in self.samples if back < each["at"] <= end]
        off = [each["at"] for each in after if abs(share(each) - 1) > within]
        if off and off[-1] == after[-1]["at"]:
            return None
        return max(off, default=back) + SAMPLE_S - back


def share(sample: dict[str, Any]) -> float:
    """Return the sequences on a server of the first zone, divided by those of the other zones."""
    first, *others = sample["zones"]
    return float(first / statistics.mean(others))


def rss_mb() -> float:
    """Return the memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def memory(sessions: int = 5_000) -> dict[str, float]:
    """Return the KB that a session takes at its manager, and in its client when it is idle."""
    world = World(0, 1, 0, None)
    (url, server), bare = next(iter(world.at.items())), Loopback(SETTINGS, world.clock_ms)
    before = rss_mb()
    for number in range(4 * sessions):
        what = {"session": f"{number:032x}", "ttl_ms": 120_000, "label": f"client{number}"}
        for operation, more in ((Operation.OPEN, {}), (Operation.NEW, {"seq": 1})):
            bare.call("", protocol.Request(operation, parameters=what | more), 1.0)
    manager = (rss_mb() - before) / (4 * sessions)

    async def use() -> list[SimClient]:
        clients = [SimClient(url, world=world, label=f"client{n}") for n in range(sessions)]
        for client in clients:
            async with client.sequence("model"):
                pass
        await asyncio.sleep(60.0)
        return clients

    before = rss_mb()
    clients = world.loop.run_until_complete(use())
    assert server.sessions == len(clients) == sessions
    client = (rss_mb() - before) / sessions - manager
    return {"manager_kb": round(manager * 1000, 2), "client_kb": round(client * 1000, 1)}


def simulate(
    seed: int, servers: int, clients: int, subset: int | None, limit_s: float = float("inf")
) -> tuple[World, dict[str, Any]]:
    """Run one fleet; return it, and what was measured."""
    gc.collect()
    empty, began, cpu = rss_mb(), time.monotonic(), time.process_time()
    world = World(seed, servers, clients, subset)
    world.run(limit_s)
    found: dict[str, Any] = {
        "servers": servers,
        "clients": clients,
        "subset": subset,
        "real_s": round(time.monotonic() - began),
        "cpu_s": round(time.process_time() - cpu, 1),
        "virtual_s": round(world.seconds),
        "counts": dict(world.counts),
        "longest_wait_s": round(world.longest, 1),
        "waits_s": [round(each, 3) for each in statistics.quantiles(world.waited, n=1000)[-50::49]],
        "wrong": world.wrong[:9],
        "rss_mb": round(world.rss - empty) if world.rss else None,
        "began": world.began,
        "samples": world.samples,
    }
    if "20 % leave" in world.began:
        found["spread_s"] = {str(each): world.spread_after(each) for each in (0.1, 0.2)}
    return world, found


def main() -> None:
    """Run fleets of the sizes given, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "sizes", nargs="+", help="servers x clients x subset, as 50x5000x8; 0: none"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for each")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), **memory(), "runs": []}
    gc.set_threshold(100_000, 50, 1000)
    for size in options.sizes:
        servers, clients, subset = map(int, size.split("x"))
        world, run = simulate(options.seed, servers, clients, subset or None, options.limit)
        found["runs"].append(run)
        print({name: value for name, value in run.items() if name != "samples"}, flush=True)
        if options.output:
            options.output.write_text(json.dumps(found) + "\n")
        if world.wrong:
            break
    sys.stdout.flush()
    os._exit(bool(world.wrong))  # nobody has to end hundreds of thousands of tasks in order


if __name__ == "__main__":
    main()
