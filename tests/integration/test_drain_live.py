"""The drill of a drain on a real server: new sequences are refused, running ones end, then Triton.

CIDALLOC_DRAIN says how many processes, sequences and seconds: `make drill-drain` takes 8x12x30.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import drain_client
import pytest
from anonymous import Anonymous
from command import run
from drain_client import TTL_S

from cidalloc.client import Client
from cidalloc.client.sync.transport import connect
from cidalloc.codes import Operation
from cidalloc.devserver import demo
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import Draining
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file_lock import writer_of

PROCESSES, SEQUENCES, SECONDS = map(int, os.environ.get("CIDALLOC_DRAIN", "4x4x2").split("x"))
PAUSE_S = PROCESSES * SEQUENCES / 200

pytestmark = pytest.mark.server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TritonServer]:
    values = Settings(cooldown_ms=200, grace_ms=1_000, fresh=True, state=str(tmp_path / "state"))
    demo.write_repository(tmp_path / "models", values)
    options = ["--model-control-mode=explicit", "--load-model=*"]
    with TritonServer(tmp_path / "models", arguments=options) as server:
        yield server


def start(url: str, sequences: int, idle: float) -> subprocess.Popen[str]:
    script = Path(drain_client.__file__)
    command = [sys.executable, str(script), url, str(sequences), str(PAUSE_S), str(idle)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start_draining(folder: Path) -> subprocess.Popen[str]:
    program = shutil.which("cidalloc", path=Path(sys.executable).parent)
    assert program
    command = [program, "drain", str(folder), "--wait", "1m"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def line(stream: IO[str] | None) -> str:
    assert stream
    return stream.readline().strip()


def manage(server: TritonServer, what: str) -> None:
    """Load or unload the manager."""
    url = f"{server.http_url}/v2/repository/models/cidmgr/{what}"
    urllib.request.urlopen(urllib.request.Request(url, b"{}"), timeout=60).close()


@pytest.mark.timeout(SECONDS + 240)
def test_a_drain(server: TritonServer, tmp_path: Path) -> None:
    file = tmp_path / "state" / "cidmgr.cidalloc"
    urls = (server.grpc_url, server.http_url)
    crowd = [start(urls[n % 2], SEQUENCES, 0.0) for n in range(PROCESSES)]
    # They hold cached IDs and nothing else when the drain begins, and may begin with these.
    crowd += [start(url, 1, SECONDS + after) for url, after in zip(urls, (0.3, 1.0), strict=True)]
    old = Anonymous(connect(server.grpc_url))  # it does not read that the server is drained
    try:
        for process in crowd:
            assert line(process.stdout) == "ready"
        (anonymous,) = old.call(Operation.NEW).tolist()
        token = {"session": "7" * 32}
        old.call(Operation.OPEN, ttl_ms=600_000, label="old", **token)
        held = old.call(Operation.NEW, count=2, seq=1, **token).tolist()
        time.sleep(SECONDS)

        waits = start_draining(tmp_path / "state")
        crowd.append(waits)
        assert line(waits.stdout) == "The server is draining: its manager issues no more IDs."
        began = time.monotonic()
        first, _ = writer_of(file)
        (tmp_path / "models" / "cidmgr" / "touched").touch()
        manage(server, "load")
        for process in crowd[:-1]:
            assert line(process.stdout) == "refused"
        second, _ = writer_of(file)
        assert first != second, "a new process of the manager, which drains as well"
        with Client(server.grpc_url) as late, pytest.raises(Draining, match="no new one begins"):
            late.sequence(demo.MODEL, wait=60)
        time.sleep(TTL_S / 2)
        assert waits.poll() is None, "the old client holds IDs"
        old.call(Operation.DELETE, held, seq=2, ended=True, **token)
        time.sleep(1.0)
        assert waits.poll() is None, "an ID is held without a session"
        last = time.monotonic()
        old.call(Operation.DELETE, [anonymous], ended=True)
        assert line(waits.stdout) == "No ID is held: all sequences have ended."
        done = time.monotonic()
        assert waits.wait(10) == 0
        crowd.remove(waits)
        waits.communicate()
        assert done - last < 2.0
        old.transport.close()

        os.kill(server.pid, signal.SIGTERM)
        while server.poll() is None:
            assert time.monotonic() < done + 10.0, "Triton does not end"
            time.sleep(0.05)
        ended = time.monotonic() - done
        found = [json.loads(process.communicate("", timeout=60)[0]) for process in crowd]
    finally:
        for process in crowd:
            process.kill()
            process.communicate()
    assert not [words for each in found for words in each["errors"]]
    spans = [span for each in found for span in each["sequences"]]
    refused = [when for each in found for when in each["refused"]]
    running = [end for start, end in spans if start < began < end]
    print(
        f"{len(crowd)} processes, {len(spans)} sequences, {len(running)} of them ran when the drain"
        f" began; the last one ended after {max(end for _, end in spans) - began:.1f} s, no ID was"
        f" held after {done - began:.1f} s, and Triton ended {ended:.1f} s later"
    )
    assert len(spans) > PROCESSES * SEQUENCES and running
    assert len(refused) == PROCESSES * SEQUENCES + 2 and min(refused) > began - 1.0
    assert max(end for _, end in spans) < done, "never early"
    latest = max(start for start, _ in spans)
    assert latest < began + 0.35 * TTL_S + 1.0, "cached IDs are handed out until a heartbeat"

    with TritonServer(tmp_path / "models") as another, Client(another.grpc_url) as cids:
        assert not cids.status()["draining"], "it begins undrained on the same file"
        with cids.sequence(demo.MODEL) as sequence:
            sequence.infer({"INPUT": [[1]]}, end=True)


def test_a_manager_that_is_killed(server: TritonServer, tmp_path: Path) -> None:
    """Its successor in the same server drains, too; sequences and `--wait` go on."""
    with Client(server.grpc_url, ttl=60.0) as cids, cids.sequence(demo.MODEL) as sequence:
        sequence.infer({"INPUT": [[1]]})
        with start_draining(tmp_path / "state") as waits:
            try:
                assert "draining" in line(waits.stdout)
                os.kill(writer_of(tmp_path / "state" / "cidmgr.cidalloc")[0], signal.SIGKILL)
                for what in ("unload", "load"):
                    sequence.infer({"INPUT": [[1]]})
                    manage(server, what)
                sequence.infer({"INPUT": [[1]]})
                with pytest.raises(Draining):
                    cids.acquire()
                assert waits.poll() is None
                sequence.infer({"INPUT": [[1]]}, end=True)
                assert waits.wait(30) == 0
            finally:
                waits.kill()


def test_undo(server: TritonServer, tmp_path: Path) -> None:
    folder = str(tmp_path / "state")
    with Client(server.grpc_url, ttl=TTL_S) as cids:
        with cids.sequence(demo.MODEL) as sequence:
            sequence.infer({"INPUT": [[1]]})
            assert run("drain", folder).returncode == 0
            with pytest.raises(Draining):
                cids.acquire_many(500)
            with pytest.raises(Draining):
                cids.sequence(demo.MODEL)
            late = run("drain", folder, "--wait", "1s")
            assert (late.returncode, late.stdout) == (
                3,
                "The server is draining: its manager issues no more IDs.\n",
            )
            assert late.stderr.startswith("error: time is over: 1 ID is held: ")
            sequence.infer({"INPUT": [[1]]}, end=True)
        assert run("drain", folder, "--wait", "20s").returncode == 0
        assert run("drain", "--undo", folder).returncode == 0
        cids.release(cids.acquire(), ended=True)
