"""What this client costs next to plain tritonclient, and an ID next to other ways to get one.

All of it is measured in one run on one server, in turns: both clients do the same work one after
the other, in an order that changes each round. `make bench-client` runs it; client_report.py fills
docs/performance.md in. Redis is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import client_report
import load
import sides
import tritonclient.grpc
from study import DOCS, QUICK, machine
from tritonclient.utils import InferenceServerException

from cidalloc.client import Client, Fleet
from cidalloc.client.sync.transport import connect
from cidalloc.codes import Operation
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import CidError
from cidalloc.manager.settings import Settings
from cidalloc.protocol import MODEL as MANAGER
from cidalloc.protocol import Request, as_ids
from cidalloc.triton_model import export

WORKERS = (1, 8, 64)
COOLING = "cooling"
"""A manager with the default cooldown; `MANAGER` has none, so that IDs recycle at any rate."""
SLICE = 0.03  # seconds: many short turns tell more than few long ones, since load comes in bursts
PIPELINED = 1_000
PACKAGES = ("cidalloc", "tritonclient", "grpcio", "protobuf", "aiohttp", "gevent", "numpy")
Values = dict[str, list[float]]
Turns = Callable[[dict[str, Callable[[], sides.Times]]], dict[str, Values]]
"""`in_turns` with its duration."""


def cases() -> Iterator[tuple[str, str, int, str]]:
    """Yield transport, unit, number of workers and manager of each comparison."""
    for transport in sides.TRANSPORTS:
        for unit in (client_report.REQUEST, client_report.SEQUENCE):
            if transport != sides.NEW_STREAM or unit == client_report.SEQUENCE:
                yield from ((transport, unit, workers, MANAGER) for workers in WORKERS)
    yield from (("gRPC", client_report.SEQUENCE, workers, COOLING) for workers in WORKERS)


def in_turns(
    ways: dict[str, Callable[[], sides.Times]], seconds: float, least: int
) -> dict[str, Values]:
    """Let the ways take turns; return each one's microseconds of the clock and of CPU time.

    Args:
        ways: what to run in each round.
        seconds: how long.
        least: the number of rounds that it takes at least.
    """
    found: dict[str, Values] = {name: {"time": [], "cpu": []} for name in ways}
    order, chance = list(ways), random.Random(0)  # noqa: S311
    until = time.monotonic() + seconds
    rounds = 0
    gc.collect()
    while rounds < least or time.monotonic() < until:
        # Every order is followed by its reverse: each of two is the first equally often.
        if rounds % 2:
            order.reverse()
        else:
            chance.shuffle(order)
        rounds += 1
        for name in order:
            for kind, value in zip(("time", "cpu"), ways[name](), strict=True):
                found[name][kind].append(float(f"{value:.4g}"))
    return found


def calibrated(run: Callable[[int], object]) -> int:
    """Return how many times fit into a slice; this also warms up."""
    run(1)
    times = 1
    while True:
        began = time.perf_counter()
        run(times)
        took = time.perf_counter() - began
        if took > SLICE / 4:
            return max(1, round(times * SLICE / took))
        times *= 2


def compare(
    transport: str, unit: str, workers: int, manager: str, server: TritonServer, turns: Turns
) -> dict[str, Any]:
    """Compare both clients in one case."""
    with sides.both(transport, unit, workers, server, manager) as pair:
        times = calibrated(pair["plain"].run)
        calibrated(pair["ours"].run)
        found = turns({name: partial(side.run, times) for name, side in pair.items()})
    what = {"transport": transport, "unit": unit, "workers": workers}
    return {**what, "cooldown": manager == COOLING, **found}


def surviving(server: TritonServer, measure: Callable[[], Any]) -> tuple[Any, int]:
    """Return what was measured, and how many times the server had to be started again for it.

    Triton 2.51 sometimes crashes if 64 streams have requests at once, also with plain tritonclient.
    """
    for crashes in range(5):
        try:
            return measure(), crashes
        except (InferenceServerException, CidError):
            time.sleep(2)  # it takes some time to die
            if server.poll() is None:
                raise
            server.stop_process()
            server.start()
    raise SystemExit("error: Triton crashed five times in one case")


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


def ids(server: TritonServer, turns: Turns) -> dict[str, Values]:
    """Measure what an ID costs: from the client's cache, at random, and by round trips."""
    with (
        Client(server.grpc_url) as cids,
        contextlib.closing(connect(server.grpc_url)) as plain,
        redis_server() as redis,
    ):

        def cached() -> None:
            cids.release(cids.acquire(), ended=True)

        def unused() -> None:
            with cids.sequence(sides.MODEL):
                pass

        def round_trips(model: str) -> None:
            new, _ = plain.call(model, Request(Operation.NEW), 10.0)
            plain.call(model, Request(Operation.DELETE, as_ids(new), {"ended": True}), 10.0)

        def pipelined() -> None:
            pipeline = redis.pipeline(transaction=False)
            for _ in range(PIPELINED):
                pipeline.incr("id")
            pipeline.execute()

        ways: dict[str, tuple[Callable[[], Any], int]] = {
            client_report.CACHED: (cached, 1),
            client_report.RANDBITS: (lambda: secrets.randbits(63), 1),
            client_report.UUID: (uuid.uuid4, 1),
            client_report.UNUSED: (unused, 1),
            client_report.ROUND_TRIPS: (lambda: round_trips(MANAGER), 1),
            client_report.EMPTY: (lambda: round_trips(load.EMPTY), 1),
        }
        if redis is not None:
            ways["Redis `INCR`"] = (lambda: redis.incr("id"), 1)
            ways[f"Redis `INCR`, {PIPELINED} in a pipeline"] = (pipelined, PIPELINED)
        runs = {}
        for name, (work, each) in ways.items():
            if name != client_report.EMPTY:  # it does as many as the round trips before it
                times = calibrated(partial(sides.repeat, work))
            runs[name] = partial(sides.timed, partial(sides.repeat, work, times), times * each)
        return turns(runs)


def fleet(server: TritonServer, turns: Turns) -> dict[str, Values]:
    """Measure a sequence of 2 with a `Client`, and with a `Fleet` of the same server alone."""
    inputs = sides.inputs_of(tritonclient.grpc)
    with Client(server.grpc_url) as client, Fleet([server.grpc_url]) as alone:
        works = {
            name: partial(sides.repeat, partial(sides.our_two, cids, inputs, False))
            for name, cids in (("Client", client), ("Fleet", alone))
        }
        for work in works.values():
            times = calibrated(work)
        runs = {name: partial(work, times) for name, work in works.items()}
        return turns({name: partial(sides.timed, run, times) for name, run in runs.items()})


def main() -> None:
    """Measure all cases and write the report."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="short, into build/bench/quick")
    options.add_argument("--seconds", type=float, help="per case; 7.5, or 0.5 with --quick")
    options.add_argument("--only", default="", help="transports that begin with this")
    options.add_argument("--output", type=Path, help="where to write")
    given = options.parse_args()
    folder = given.output or (QUICK if given.quick or given.only else DOCS)
    seconds = given.seconds or (0.5 if given.quick else 7.5)
    turns = partial(in_turns, seconds=seconds, least=5 if given.quick else 15)
    began = time.time()
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "machine": machine(PACKAGES),
        "crashes": 0,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as name:
        models = load.repository(Path(name), load.EMPTY)
        export(models, Settings(fresh=True), name=COOLING)
        sides.write_model(models)
        with TritonServer(models) as server:
            for case in cases():
                if case[0].startswith(given.only):
                    print(f"\r{' '.join(map(str, case)):<60}", end="", file=sys.stderr, flush=True)
                    row, crashes = surviving(server, partial(compare, *case, server, turns))
                    results["rows"].append(row)
                    results["crashes"] += crashes
            results["ids"] = ids(server, partial(turns, seconds=3 * seconds))
            results["fleet"] = fleet(server, partial(turns, seconds=2 * seconds))
    results["minutes"] = round((time.time() - began) / 60, 1)
    print(f"\r{results['minutes']} minutes{'':<60}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "client.json").write_text(client_report.compact(results))
    client_report.write(folder)


if __name__ == "__main__":
    main()
