"""The drill of END for dead clients: what a model keeps while clients are killed, in three ways.

CIDALLOC_TIDY says how many processes, sequences of each way in a process, and deaths, and the
seconds from one death to the next: `make drill-tidy` takes 20x2x300x2. With CIDALLOC_TIDY_FILE the
measured values are written to that file.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import keeping_model
import pytest
import tidy_client
from servers import Server
from tidy_client import ANSWERS, IDLE_S, OPEN, TIMEOUT_S, TTL_S, WAYS, WRONG, counts

from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings
from cidalloc.protocol import DEAD_WINDOW_MS
from cidalloc.triton_model import export

PROCESSES, SEQUENCES, DEATHS, EVERY_S = map(
    int, os.environ.get("CIDALLOC_TIDY", "4x2x3x1").split("x")
)
FILE = os.environ.get("CIDALLOC_TIDY_FILE")
CAPACITY = 600
"""More IDs than cool and are held at a time, and fewer than are needed in ten minutes."""
GRACE_S, COOLDOWN_S = 1.0, IDLE_S + TIMEOUT_S
LIMIT_S = TTL_S + GRACE_S + COOLDOWN_S + 30
"""From the last death until the model keeps only the state of living sequences."""
REUSE_S = TTL_S + GRACE_S + 2 * COOLDOWN_S + DEAD_WINDOW_MS / 1000
"""From a death until an ID is issued again."""
PAUSE_S = PROCESSES * SEQUENCES / 80

pytestmark = pytest.mark.server


def write_repository(folder: Path) -> None:
    """Write a model for each way, and two managers."""
    settings = Settings(
        first=1000,
        capacity=CAPACITY,
        cooldown_ms=500,
        unended_cooldown_ms=int(COOLDOWN_S * 1000),
        grace_ms=int(GRACE_S * 1000),
        fresh=True,
    )
    for way in WAYS:
        keeping_model.write(folder, way, IDLE_S)
    for way in WAYS[1:]:
        export(folder, settings, name=f"cidmgr_{way}")


class Crowd:
    """The client processes, some of which tidy."""

    def __init__(self, server: TritonServer, file: Path) -> None:
        self.server, self.file = server, file
        self.counts = counts(file, PROCESSES)
        self.processes = [self.start(number) for number in range(PROCESSES)]

    def start(self, number: int) -> subprocess.Popen[bytes]:
        tidies = "tidies" if number in (0, PROCESSES // 2) else "-"
        options = [self.server.grpc_url, self.file, PROCESSES, number, SEQUENCES, PAUSE_S, tidies]
        command = [sys.executable, tidy_client.__file__, *map(str, options)]
        return subprocess.Popen(command, stdin=subprocess.PIPE)

    def wait_until_ready(self) -> None:
        until = time.monotonic() + 60
        while (self.counts[..., OPEN].sum(axis=1) < 2 * SEQUENCES).any():
            assert time.monotonic() < until, self.counts[..., OPEN]
            time.sleep(0.05)

    def kill(self, number: int) -> Any:
        """Kill a process and replace it; return how many of its sequences of each way were cut."""
        process = self.processes[number]
        assert process.poll() is None, "it failed"
        process.kill()
        process.communicate()
        cut = self.counts[number, :, OPEN].copy()
        self.counts[number, :, OPEN] = 0
        self.processes[number] = self.start(number)
        return cut

    def living(self) -> list[int]:
        living: list[int] = self.counts[..., OPEN].sum(axis=0).tolist()
        return living

    def end(self) -> None:
        """Let all sequences end."""
        for process in self.processes:
            assert process.stdin
            process.stdin.close()
        for process in self.processes:
            assert process.wait(30) == 0

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def kept(server: TritonServer, model: str) -> int:
    """Return of how many sequences a model keeps state, by a sequence with an ID of its own."""
    body = {
        "parameters": {"sequence_id": 1, "sequence_start": True, "sequence_end": True},
        "inputs": [{"name": "X", "datatype": "INT32", "shape": [1, 1], "data": [0]}],
    }
    url = f"{server.http_url}/v2/models/{model}/infer"
    with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=20) as answer:
        return int(json.load(answer)["outputs"][0]["data"][0]) - 1


@pytest.mark.timeout(DEATHS * EVERY_S + 240)
def test_the_state_of_dead_clients(tmp_path: Path) -> None:
    write_repository(tmp_path / "models")
    with Server(tmp_path / "models") as server:
        crowd = Crowd(server, tmp_path / "counts")
        try:
            crowd.wait_until_ready()
            samples, cut, last = drill(server, crowd)
            crowd.end()
        finally:
            crowd.stop()
        left = dict(zip(WAYS, (kept(server, way) for way in WAYS), strict=True))
    back = back_at(samples, last)
    assert back, f"{LIMIT_S} s after the last death: {samples[-1]}"
    answers, wrong = (crowd.counts[..., what].sum(axis=0).tolist() for what in (ANSWERS, WRONG))
    print(
        f"{DEATHS} processes of {PROCESSES} killed in {last:.0f} s, and {cut} sequences; answers"
        f" {answers}, wrong sums {wrong}; state left: {left}; only the state of the living"
        f" {back - last:.0f} s after the last death"
    )
    assert wrong == [0, 0, 0]
    assert min(cut) >= DEATHS, "they were killed in mid-sequence"
    assert cut[0] <= left["random"] <= DEATHS * SEQUENCES, "with each death it keeps more"
    assert left["tidied"] == 0
    recent = SEQUENCES * (LIMIT_S / EVERY_S + 1)
    most = max(tidied - living for _, living, *_, tidied in samples)
    assert most <= recent, "END comes for each death"
    most = max(managed for *_, managed, _ in samples)
    assert 0 < left["managed"] <= most <= CAPACITY
    if last > 2 * REUSE_S:
        assert left["managed"] < left["random"] / 2, "IDs are used again, and START replaces state"
    if FILE:
        write(Path(FILE), samples, last, back, left, sum(answers))


Samples = list[tuple[float, int, int, int, int]]


def drill(server: TritonServer, crowd: Crowd) -> tuple[Samples, list[int], float]:
    """Kill one process after the other, and wait until END has come for all their sequences.

    Returns:
        Each second: the time, living sequences of one way, and how many each way's model keeps.
        The sequences of each way that were cut. The time of the last death.
    """
    began, last = time.monotonic(), 0.0
    cuts: list[Any] = []
    samples: Samples = []
    for tick in itertools.count():
        time.sleep(max(0.0, began + tick - time.monotonic()))
        now, living = time.monotonic() - began, crowd.living()[2]
        found = [kept(server, way) for way in reversed(WAYS)]
        samples.append((round(now, 1), living, *reversed(found)))
        if len(cuts) < DEATHS:
            if tick % EVERY_S == 0:
                cuts.append(crowd.kill((len(cuts) + 1) % PROCESSES))
                last = now
        elif now > last + LIMIT_S or (not FILE and back_at(samples, last)):
            break
    return samples, sum(cuts).tolist(), last


def back_at(samples: Samples, last: float) -> float | None:
    """Return when the tidied model kept only the state of the living, after the last death.

    It takes two looks in a row, since sequences begin and end during a look.
    """
    after = [sample for sample in samples if sample[0] > last + 0.5]
    for one, two in itertools.pairwise(after):
        if all(tidied <= living for _, living, _, _, tidied in (one, two)):
            return one[0]
    return None


def write(
    file: Path, samples: Samples, last: float, back: float, left: dict[str, int], answers: int
) -> None:
    """Write what bench/tidy.py draws."""
    results = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "processes": PROCESSES,
        "sequences": SEQUENCES,
        "deaths": DEATHS,
        "every_s": EVERY_S,
        "times_s": [TTL_S, GRACE_S, COOLDOWN_S],
        "last_death": round(last, 1),
        "back": round(back, 1),
        "answers": answers,
        "left": left,
    }
    lines = ",\n".join(f"  {json.dumps(sample)}" for sample in samples)
    head = json.dumps(results, indent=1)[:-2]
    file.write_text(f'{head},\n "samples": [\n{lines}\n ]\n}}\n')
