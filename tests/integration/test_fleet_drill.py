"""The load of a fleet on three real servers, while these are killed, stopped and drained.

CIDALLOC_LOAD says how many clients, and the seconds of a sequence and of a part of the drill:
`make drill-fleet` takes 60x5x60.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import fleet_client
import pytest
from fleet_client import TIMEOUT_S, Span
from servers import Server

from cidalloc.client import Fleet
from cidalloc.devserver import demo
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.drain import DrainSwitch

CLIENTS, SEQUENCE_S, PART_S = (
    float(each) for each in os.environ.get("CIDALLOC_LOAD", "60x0.2x1.2").split("x")
)
LONG = PART_S >= 60
PROCESSES = 3
WITHIN = 0.2 if LONG else 0.5  # of the mean: in a short time chance does more
BACK_S = 120.0  # until a server that came back has its share
DEATHS = 10 if LONG else 2
UNHEARD_S = 0.15  # a server that was heard a moment ago is taken to be there
HEARD_S = 6.0  # until a heartbeat notices the end of a fault

pytestmark = [pytest.mark.server, pytest.mark.slow]


class Place:
    """A server that starts again at its address, with its file."""

    def __init__(self, folder: Path) -> None:
        settings = Settings(
            first=1,
            capacity=3000,
            cooldown_ms=200,
            grace_ms=500,
            fresh=True,
            state=str(folder / "state"),
        )
        demo.write_repository(folder / "models", settings)
        config = folder / "models" / demo.MODEL / "config.pbtxt"
        text = config.read_text()
        assert "direct { }" in text
        config.write_text(text.replace("direct { }", "oldest { max_candidate_sequences: 256 }"))
        self.file = folder / "state" / "cidmgr.cidalloc"
        self.server = Server(folder / "models")

    def start(self) -> None:
        server = self.server
        server.start()
        server._wanted_ports = server.http_port, server.grpc_port, server.metrics_port

    def kill(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        while self.server.poll() is None:
            time.sleep(0.001)

    def restart(self) -> None:
        self.server.stop_process()
        self.start()

    @property
    def url(self) -> str:
        return f"grpc://{self.server.grpc_url}"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Place]]:
    with ExitStack() as stack:
        found = [Place(tmp_path_factory.mktemp("server")) for _ in range(3)]
        for place in found:
            stack.callback(place.server.stop)
        with ThreadPoolExecutor(len(found)) as pool:
            list(pool.map(Place.start, found))
        yield found


def test_a_server_that_has_just_died(places: list[Place]) -> None:
    """A new sequence then costs one refused connection, once, and no time-out."""
    costs, others = [], []
    with Fleet([each.url for each in places], ttl=30.0) as fleet:
        for death in range(DEATHS):
            dead = places[death % 3]
            victim = next(each for each in fleet.servers if each.url == dead.url)
            until = time.monotonic() + 30
            while victim.client is None or victim.trouble is not None or not victim.registry:
                assert time.monotonic() < until
                one(fleet)
            dead.kill()
            time.sleep(UNHEARD_S)
            for _ in range(60):
                began = time.monotonic()
                with fleet.sequence(demo.MODEL) as sequence:
                    took = time.monotonic() - began
                    assert sequence.server != dead.url
                    hit = victim.trouble is not None and len(costs) == death
                    (costs if hit else others).append(took * 1000)
            assert len(costs) == death + 1
            dead.restart()
    print(
        f"{DEATHS} deaths: the sequence that met it took {statistics.median(costs):.1f} ms, at most"
        f" {max(costs):.1f} ms; the {len(others)} others took {statistics.median(others):.2f} ms,"
        f" at most {max(others):.1f} ms"
    )
    assert statistics.median_low(costs) < 50
    assert max(*costs, *others) < 500, "that is no time-out"


def one(fleet: Fleet) -> None:
    with fleet.sequence(demo.MODEL) as sequence:
        sequence.infer({"INPUT": [[1]]}, end=True)


@pytest.mark.timeout(8 * PART_S + 200)
def test_the_load_is_spread(places: list[Place]) -> None:
    options = [str(int(CLIENTS) // PROCESSES), str(SEQUENCE_S), *(place.url for place in places)]
    command = [sys.executable, fleet_client.__file__, *options]
    faults: list[tuple[str, int, float, float]] = []  # of which server, from when to when
    with ExitStack() as stack:
        crowd = []
        for _ in range(PROCESSES):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            crowd.append(process)
        for process in crowd:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(1.0)
        steady = time.monotonic()
        time.sleep(2 * PART_S)
        for name, number in (("killed", 0), ("stopped", 1), ("drained", 2)):
            place, began = places[number], time.monotonic()
            if name == "killed":
                place.kill()
                time.sleep(PART_S / 2)
                place.restart()
            elif name == "stopped":
                os.kill(place.server.pid, signal.SIGSTOP)
                time.sleep(PART_S / 2)
                os.kill(place.server.pid, signal.SIGCONT)
            else:
                switch = DrainSwitch(place.file)
                stack.callback(switch.close)
                switch.set(True)
                time.sleep(PART_S / 2)
                switch.set(False)
            faults.append((name, number, began, time.monotonic()))
            time.sleep(min(HEARD_S, PART_S) + PART_S)
        for process in crowd:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        spans = [
            tuple(each)
            for process in crowd
            for each in json.loads(process.communicate(timeout=60)[0])
        ]
    check(spans, steady, faults)


def check(spans: list[Span], steady: float, faults: list[tuple[str, int, float, float]]) -> None:
    """Print what was measured, and check it."""
    loads = spread(spans, steady, faults[0][2])
    row("steady", loads)
    assert max(abs(each - 1) for each in loads) <= WITHIN
    ends = [began for _, _, began, _ in faults[1:]] + [max(each[2] for each in spans)]
    for (name, number, began, back), end in zip(faults, ends, strict=True):
        row(f"{number} {name}", spread(spans, began + SEQUENCE_S, back), ids(spans, began, back))
        took = next(
            (
                start - back
                for start in steps(back, min(end - PART_S, back + BACK_S))
                if max(abs(each - 1) for each in spread(spans, start, start + PART_S)) <= WITHIN
            ),
            None,
        )
        assert took is not None, f"the load is not spread again after {number} was {name}"
        row(f"{took:.1f} s later", spread(spans, back + took, back + took + PART_S))
    outcomes = dict(Counter(each[4] for each in spans))
    took = ids(spans, steady, faults[0][2])
    print(f"{len(spans)} sequences of {SEQUENCE_S:g} s: {outcomes}; while nothing is wrong, {took}")
    assert not [each for each in spans if each[4] == "wrong"]
    for began, had, ended, server, outcome in spans:
        if outcome != "ok":  # only on a server with a fault, and at that time
            assert any(
                server == number and since <= ended and (had or began) <= back + TIMEOUT_S + HEARD_S
                for _, number, since, back in faults
            ), (outcome, server, began - steady, ended - steady)
    assert len(spans) > CLIENTS * 5


def steps(start: float, end: float) -> Iterator[float]:
    while start <= end:
        yield start
        start += 0.1


def spread(spans: list[Span], start: float, end: float) -> list[float]:
    """Return the sequences open on each server in this time, divided by the servers' mean."""
    open_ = [0.0] * 3
    for _, had, ended, server, _ in spans:
        if had is not None and server is not None:
            open_[server] += max(min(ended, end) - max(had, start), 0.0)
    return [each / statistics.mean(open_) for each in open_]


def ids(spans: list[Span], start: float, end: float) -> str:
    """Say how long it took to get an ID in this time."""
    took = sorted((had - asked) * 1000 for asked, had, *_ in spans if had and start < asked < end)
    half, most, last = (took[int(part * (len(took) - 1))] for part in (0.5, 0.99, 1.0))
    return f"an ID took {half:.1f} ms, 99 % at most {most:.0f}, all at most {last:.0f} ms"


def row(what: str, loads: list[float], more: str = "") -> None:
    print(f"{what:>14}: " + " ".join(f"{each:5.2f}" for each in loads), more)
