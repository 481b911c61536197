"""Who uses what, on the real server: running sequences, clients that die, lines in Triton's log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
from command import run
from servers import Server

from cidalloc import __version__
from cidalloc.client import Client
from cidalloc.devserver import demo
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings

pytestmark = pytest.mark.server

TTL_S = 2.0

CHILD = """
import contextlib, sys, time
from cidalloc.client import Client

url, label, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with Client(url, ttl=2.0, label=label) as cids, contextlib.ExitStack() as stack:
    for _ in range(count):
        sequence = stack.enter_context(cids.sequence("simple_sequence"))
        sequence.infer({"INPUT": [[1]]})
    print("ready", flush=True)
    time.sleep(100)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("used")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[TritonServer]:
    (folder / "state").mkdir()
    settings = Settings(
        first=1,
        capacity=5000,
        min_ttl_ms=500,
        grace_ms=500,
        state=str(folder / "state"),
        fresh=True,
    )
    demo.write_repository(folder / "models", settings)
    options = ["--model-control-mode=explicit", "--load-model=*"]
    with Server(folder / "models", log=folder / "log", arguments=options) as server:
        yield server


@pytest.fixture
def log(folder: Path) -> Callable[[str], bool]:
    """Whether a line of Triton's log matches."""
    return lambda line: bool(re.search(line, (folder / "log").read_text(), re.M))


def wait_until(look: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 30
    while not (found := look()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def by_label(status: dict[str, Any], key: str = "sessions") -> dict[str, dict[str, Any]]:
    return {each["label"]: each for each in status[key]}


def test_sequences_of_two_clients(server: TritonServer) -> None:
    with (
        Client(server.grpc_url, ttl=TTL_S, label="by grpc") as one,
        Client(server.http_url, ttl=TTL_S, label="by http") as two,
        contextlib.ExitStack() as stack,
    ):
        for client, count in ((one, 3), (two, 5)):
            for _ in range(count):
                sequence = stack.enter_context(client.sequence(demo.MODEL))
                sequence.infer({"INPUT": [[1]]})
        expected = {"by grpc": 3, "by http": 5}

        def told() -> dict[str, Any] | None:
            status = one.status()
            found = by_label(status)
            same = {label: found[label]["used"] for label in expected} == expected
            return status if same else None

        status = wait_until(told, "a heartbeat tells it")
        assert [each["label"] for each in status["sessions"]][:2] == ["by http", "by grpc"]
        assert status["used"] == 8 <= status["held"]
        text = run("status", server.grpc_url).stdout
        assert re.search(r"in use +8, ", text)
        assert re.search(r"by http +5 +\d+ ", text)
        stack.close()
        wait_until(lambda: one.status()["used"] == 0, "they have ended")


def test_a_client_that_is_killed(server: TritonServer, log: Callable[[str], bool]) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, server.grpc_url, "victim", "4"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        with Client(server.grpc_url, label="witness") as cids:
            wait_until(lambda: by_label(cids.status())["victim"]["used"] == 4, "a heartbeat")
            child.send_signal(signal.SIGKILL)
            status = wait_until(
                lambda: (s := cids.status()) and "victim" in by_label(s, "expired") and s,
                "it expires",
            )
            assert "victim" not in by_label(status)
            victim = by_label(status, "expired")["victim"]
            assert victim["used"] == 4 <= victim["held"]
            assert 0 <= victim["ago_s"] < 30
            assert status["sessions_expired_in_use"] == 1
    finally:
        child.kill()
        child.communicate()
    line = rf"^W.*the session 'victim' expired with IDs in use: 4 of {victim['held']}"
    wait_until(lambda: log(line), "the line in Triton's log")
    text = run("status", server.http_url).stdout
    assert re.search(rf"victim +4 +{victim['held']} ", text)
    found = json.loads(run("doctor", server.grpc_url, "--json").stdout)
    assert "4 IDs in use (the last one: victim" in json.dumps(found)


def test_lines_at_load_and_takeover(
    server: TritonServer, folder: Path, log: Callable[[str], bool]
) -> None:
    pool = r"registry [0-9a-f-]{36}: pool 1 to 5000, file \S+/cidmgr\.cidalloc"
    version = re.escape(__version__)
    assert log(rf"^I.*cidalloc {version} opened the {pool}, sessions: 0, IDs held: 0")
    with Client(server.grpc_url, label="stays") as cids:
        cid = cids.acquire()
        file = folder / "models" / "cidmgr" / "1" / "model.py"
        file.write_text(file.read_text() + "# changed\n")
        os.utime(file)
        triton = tritonclient.grpc.InferenceServerClient(server.grpc_url)
        triton.load_model("cidmgr")
        triton.close()
        line = rf"^I.*cidalloc {version} took over the {pool}, sessions: 1, IDs held: [1-9]"
        wait_until(lambda: log(line), "the new process")
        assert log(r"^I.*handing \S+ over to a newer process")
        (session,) = wait_until(lambda: cids.status()["sessions"], "and it answers")
        assert session["used"] == 1, "it was in the file"
        cids.release(cid, ended=True)
