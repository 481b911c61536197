"""What an ID costs at the client: out of its stock, from uuid4, from Redis, by a plain round trip.

Prints microseconds for an ID: of this process's CPU time, and of the clock; each the median of many
rounds, taken in turns. `make bench-client` runs it. Redis is left out where it is not installed.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from cidalloc.client import Client
from cidalloc.client.sync.transport import connect
from cidalloc.codes import Operation
from cidalloc.devserver.demo import demo_server
from cidalloc.manager.settings import Settings
from cidalloc.protocol import MODEL, Request, as_ids

ROUNDS = 60
PIPELINED = 1_000


def per_call(work: Callable[[], object], times: int) -> tuple[float, float]:
    """Return the microseconds of CPU time and of the clock that one call takes."""
    began = time.process_time(), time.perf_counter()
    for _ in range(times):
        work()
    ended = time.process_time(), time.perf_counter()
    return (ended[0] - began[0]) / times * 1e6, (ended[1] - began[1]) / times * 1e6


@contextlib.contextmanager
def redis_server() -> Iterator[Any]:
    """Yield a client of a Redis server on loopback that lives as long as this; None without one."""
    try:
        import redis
    except ImportError:
        redis = None
    binary = shutil.which("redis-server")
    if binary is None or redis is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)  # noqa: S603
    try:
        client = redis.Redis(port=port)
        deadline = time.monotonic() + 10
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield client
        client.close()
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Measure and print."""
    # Without a cooldown, so that IDs recycle at once at any rate.
    settings = Settings(cooldown_ms=0, fresh=True)
    with (
        demo_server(settings) as server,
        Client(server.grpc_url) as cids,
        redis_server() as redis,
    ):
        plain = connect(server.grpc_url)

        def recycled() -> None:
            cids.release(cids.acquire(), ended=True)

        def round_trip() -> None:
            ids, _ = plain.call(MODEL, Request(Operation.NEW), 10.0)
            plain.call(MODEL, Request(Operation.DELETE, as_ids(ids), {"ended": True}), 10.0)

        def pipelined() -> None:
            pipeline = redis.pipeline(transaction=False)
            for _ in range(PIPELINED):
                pipeline.incr("id")
            pipeline.execute()

        ways: dict[str, tuple[Callable[[], object], int, int]] = {
            "acquire + release, recycled": (recycled, 2_000, 1),
            "uuid.uuid4()": (uuid.uuid4, 2_000, 1),
            "acquire + release, two round trips over gRPC": (round_trip, 10, 1),
        }
        if redis is not None:
            ways["Redis INCR"] = (lambda: redis.incr("id"), 50, 1)
            ways[f"Redis INCR, {PIPELINED} in a pipeline"] = (pipelined, 1, PIPELINED)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(ROUNDS + 5):
            for name, (work, times, each) in ways.items():
                cpu, clock = per_call(work, times)
                found[name].append((cpu / each, clock / each))
        plain.close()
    base = found["uuid.uuid4()"][5:]
    print("| an ID by | CPU | clock | CPU / uuid4 |\n|---|---|---|---|")
    for name, times in found.items():
        cpu, clock = (statistics.median(column) for column in zip(*times[5:], strict=True))
        pairs = zip(times[5:], base, strict=True)
        ratio = statistics.median(mine[0] / theirs[0] for mine, theirs in pairs)
        print(f"| {name} | {cpu:,.2f} µs | {clock:,.2f} µs | {ratio:,.2f} |")


if __name__ == "__main__":
    main()
