"""The manager's metrics: their arithmetic, and on a real server."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
from servers import Server

from cidalloc.client import Client
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import export
from cidalloc.triton_model.metrics import FAMILIES, SETTLED, Metrics


class Family:
    """Stands for Triton's families, and keeps what is said to them."""

    COUNTER, GAUGE = "counter", "gauge"
    values: dict[str, float]

    def __init__(self, name: str, description: str, kind: str) -> None:
        assert name not in FAMILIES or FAMILIES[name] == (kind, description)
        self.name, self.kind = name, kind

    def Metric(self, labels: dict[str, str]) -> Series:
        return Series(self, labels)


class Series:
    def __init__(self, family: Family, labels: dict[str, str]) -> None:
        assert labels.pop("model") == "ids"
        self.family = family
        self.key = " ".join([family.name, *labels.values()])
        assert self.key not in Family.values, "two of one name"
        Family.values[self.key] = 0.0

    def set(self, value: float) -> None:
        assert self.family.kind == "gauge"
        Family.values[self.key] = value

    def increment(self, value: float) -> None:
        assert self.family.kind == "counter"
        assert value >= 0, "or the server may end"
        Family.values[self.key] += value

    def __del__(self) -> None:
        Family.values.pop(self.key, None)


@pytest.fixture
def values() -> dict[str, float]:
    Family.values = {}
    return Family.values


def status(**more: Any) -> dict[str, Any]:
    counts = ("held", "used", "cooling", "peak", "sessions_total", "anonymous", "acquired")
    counts += ("draining",)
    zero = dict.fromkeys((*counts, "sessions_expired_in_use"), 0)
    released = {"ended": 0, "cooled": 0, "expired": 0}
    rest = {"pool": {"capacity": 9}, "errors": {}, "sessions_expired": 0, "uptime_s": 5.0}
    return {**zero, **rest, "released": released, **more}


def test_they_follow_the_status(values: dict[str, float]) -> None:
    now: dict[str, Any] | None = status(
        held=3, used=2, acquired=5, sessions_expired_in_use=4, errors={"NOT_HELD": 2}
    )
    metrics = Metrics(lambda: now, "ids", Family, lambda: 100.0)
    for _ in range(SETTLED - 1):
        metrics.flush()
        assert values == {}, "whoever had the registry before may still have its series"
    metrics.flush()
    assert {name.split()[0] for name in values} == set(FAMILIES), "all of them, at once"
    assert values["cidmgr_ids held"] == 3
    assert values["cidmgr_ids_used"] == 2
    assert values["cidmgr_sessions_expired_in_use_total"] == 4
    assert values["cidmgr_acquired_total"] == 5
    assert values["cidmgr_errors_total NOT_HELD"] == 2
    assert values["cidmgr_start_time_seconds"] == 95.0
    released = {"ended": 4, "cooled": 2, "expired": 0}
    now = status(held=1, acquired=7, sessions_expired_in_use=5, released=released)
    metrics.flush()
    assert values["cidmgr_ids held"] == 1
    assert values["cidmgr_acquired_total"] == 7
    assert values["cidmgr_released_total ended"] == 4
    assert values["cidmgr_sessions_expired_in_use_total"] == 5
    now = None  # handed over
    metrics.flush()
    assert values == {}
    now = status(acquired=1)  # and had back: another registry object, which counts from zero
    for _ in range(SETTLED):
        metrics.flush()
    assert values["cidmgr_acquired_total"] == 1


def scraped(server: TritonServer) -> dict[str, float]:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        text = answer.read().decode()
    found = (line.rpartition(" ") for line in text.splitlines() if line.startswith("cidmgr_"))
    return {name: float(value) for name, _, value in found}


def wait_until(
    server: TritonServer, condition: Callable[[dict[str, float]], bool]
) -> dict[str, float]:
    """Wait until all series are there, the last one, too, and say what they should."""
    deadline = time.monotonic() + 60
    while RELEASED[-1] not in (found := scraped(server)) or not condition(found):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


STARTED = 'cidmgr_start_time_seconds{model="cidmgr"}'
RELEASED = [
    f'cidmgr_released_total{{how="{how}",model="cidmgr"}}' for how in ("ended", "cooled", "expired")
]
HELD = 'cidmgr_ids{model="cidmgr",state="held"}'


@pytest.mark.server
def test_on_the_server(tmp_path: Path) -> None:
    state, models = tmp_path / "state", tmp_path / "models"
    state.mkdir()
    folder = export(models, Settings(first=1, capacity=5000, fresh=True, state=str(state)))
    options = ["--model-control-mode=explicit", "--load-model=*"]
    with Server(models, arguments=options) as server:
        with Client(server.grpc_url) as cids:
            ids = cids.acquire_many(500)
            found = wait_until(server, lambda found: found.get(HELD) == cids.status()["held"])
            assert found['cidmgr_sessions{model="cidmgr"}'] == 1
            assert found['cidmgr_capacity{model="cidmgr"}'] == 5000
            assert found['cidmgr_acquired_total{model="cidmgr"}'] >= 500
            began = found[STARTED]
            # Another process: it takes what is held over, and counts anew.
            file = folder / "1" / "model.py"
            file.write_text(file.read_text() + "# changed\n")
            os.utime(file)
            triton = tritonclient.grpc.InferenceServerClient(server.grpc_url)
            triton.load_model("cidmgr")
            triton.close()
            wait_until(server, lambda found: found.get(STARTED, began) != began)
            wait_until(server, lambda found: found.get(HELD) == cids.status()["held"])
            cids.release_many(ids, ended=True)
        wait_until(
            server,
            lambda found: found.get(HELD) == 0 and sum(map(found.__getitem__, RELEASED)) >= 500,
        )


@pytest.mark.server
def test_a_server_without_metrics(tmp_path: Path) -> None:
    export(tmp_path, Settings(first=1, capacity=5000, fresh=True))
    log = tmp_path / "log"
    with Server(tmp_path, log=log, arguments=["--allow-metrics=false"]) as server:
        with Client(server.grpc_url) as cids:
            cids.acquire()
            time.sleep(SETTLED + 2)  # by then it has tried
            assert cids.acquire_many(200).size == 200
    assert "Traceback" not in log.read_text()
