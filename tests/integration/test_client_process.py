"""Client processes that are killed, frozen and cut off, on the real server."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc
from anonymous import Anonymous
from conftest import QUICK
from servers import Server

from cidalloc import errors
from cidalloc.client import Client
from cidalloc.client.sync.transport import connect
from cidalloc.devserver.demo.sequences import number
from cidalloc.devserver.triton_server import TritonServer

TTL_S, GRACE_S = 2.0, 1.0
COOLDOWN_S = 5.0 + 1.0  # the idle time of the model, and the timeout

HOLDER = """
import sys, time
from cidalloc import errors
from cidalloc.client import Client
from cidalloc.devserver.demo.sequences import number

cids = Client(sys.argv[1], model=sys.argv[2], ttl=2.0, timeout=1.0)
sequence = cids.sequence("simple_sequence", timeout=1.0)
sequence.infer(number(1))
ids = cids.acquire_many(9)
print(*ids, flush=True)
for line in sys.stdin:
    try:
        result = sequence.infer(number(1))
        print("sum", result.as_numpy("OUTPUT")[0, 0], flush=True)
    except errors.CidError as error:
        print(error.code.name, error, flush=True)
"""


@contextlib.contextmanager
def holder(url: str, model: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, url, model]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def say(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


@pytest.mark.timeout(400)  # the server's start may be in it
def test_the_ids_of_a_killed_client_are_free_in_time_and_not_before(triton: TritonServer) -> None:
    # Without a session, since it must not hold any in a stock.
    other = Anonymous(connect(triton.grpc_url), "quick")
    with other, holder(triton.grpc_url, "quick") as process:
        assert process.stdout is not None
        assert len(process.stdout.readline().split()) == 9
        assert other.active() >= 10
        process.kill()
        killed = time.monotonic()
        while True:
            try:
                # All that the pool has, so those of the dead, too.
                everything = other.acquire_many(QUICK.capacity)
                break
            except errors.Exhausted:
                assert time.monotonic() < killed + 60
                time.sleep(0.05)
        free = time.monotonic() - killed
        other.release_many(everything, ended=True)
        # Its last heartbeat was at most about a third of the ttl before.
        assert free >= 0.6 * TTL_S + GRACE_S + COOLDOWN_S, "before Triton had forgotten"
        assert free < TTL_S + GRACE_S + COOLDOWN_S + 5.0


def test_a_client_that_was_frozen_says_so_and_sends_nothing(triton: TritonServer) -> None:
    url, model = triton.grpc_url, "quick_too"
    with Client(url, model=model) as cids, holder(url, model) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert say(process) == "sum 2\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(TTL_S + GRACE_S + 1.0)
        assert cids.status()["sessions_expired"] >= 1
        count = executions(triton)
        process.send_signal(signal.SIGCONT)
        words = say(process)
        assert words.startswith(("SESSION_EXPIRED", "SEQUENCE_LOST")), words
        assert executions(triton) == count


def executions(triton: TritonServer) -> int:
    """Return how many requests for the target model the server has seen."""
    client = tritonclient.grpc.InferenceServerClient(triton.grpc_url)
    statistics = client.get_inference_statistics("simple_sequence", as_json=True)
    client.close()
    model = statistics["model_stats"][0]["inference_stats"]
    return sum(int(model[name].get("count", 0)) for name in ("success", "fail"))


@pytest.mark.server
def test_a_server_that_is_away_for_a_while_costs_no_sequence(few: Path) -> None:
    """Stopped and continued: what was idle meanwhile and still lives there goes on."""
    with Server(few) as server:
        with Client(server.grpc_url, ttl=30.0, timeout=1.0) as cids:
            with cids.sequence("patient_sequence", timeout=20.0) as sequence:
                sequence.infer(number(1))
                os.kill(server.pid, signal.SIGSTOP)
                try:
                    time.sleep(2.0)
                    with pytest.raises((errors.Unavailable, errors.SessionExpired)):
                        cids.acquire_many(5000)
                finally:
                    os.kill(server.pid, signal.SIGCONT)
                result = sequence.infer(number(1), end=True)
                assert result.as_numpy("OUTPUT")[0, 0] == 2
            deadline = time.monotonic() + 30
            while True:
                try:
                    assert len(cids.acquire_many(10)) == 10
                    break
                except errors.Unavailable:
                    assert time.monotonic() < deadline
            # What the lost answer had issued is not lost: it is in stock.
            held = next(each["held"] for each in cids.status()["sessions"])
            assert held == len(cids._session.lease.cache.known())


POOL = """
import multiprocessing, sys
import tritonclient.http
from concurrent.futures import ProcessPoolExecutor
from cidalloc.client import Client
from cidalloc.devserver.demo.sequences import number

def begin(url):
    global cids
    cids = Client(url, label="a worker")

def work(value):
    with cids.sequence("simple_sequence") as sequence:
        result = sequence.infer(number(value, tritonclient.http), end=True)
    return int(result.as_numpy("OUTPUT")[0, 0])

def show(url, label):
    with Client(url) as other:
        print(sum(each["label"] == label for each in other.status()["sessions"]))

if __name__ == "__main__":
    url, how = sys.argv[1:]
    if how == "Process":
        worker = multiprocessing.Process(target=lambda: (begin(url), work(1)))
        worker.start()
        worker.join()
    else:
        context = multiprocessing.get_context(how)
        options = {"mp_context": context, "initializer": begin, "initargs": (url,)}
        with ProcessPoolExecutor(2, **options) as pool:
            assert list(pool.map(work, range(6))) == list(range(6))
            show(url, "a worker")
    show(url, "a worker")
"""


@pytest.mark.parametrize("how", ["spawn", "forkserver", "fork", "Process"])
def test_a_process_pool_leaves_no_session(triton: TritonServer, tmp_path: Path, how: str) -> None:
    """Its workers end without atexit."""
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    command = [sys.executable, str(script), triton.http_url, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "0"
    assert how == "Process" or done.stdout.split()[0] in ("1", "2"), "the workers had sessions"


FORGETFUL = """
import asyncio, sys
import tritonclient.grpc, tritonclient.http
from cidalloc.client import AsyncClient
from cidalloc.devserver.demo.sequences import number

async def main():
    cids = AsyncClient(sys.argv[1], label=sys.argv[2])
    sequence = await cids.sequence("simple_sequence", streaming=sys.argv[2] == "stream")
    kind = tritonclient.http if "http" in sys.argv[1] else tritonclient.grpc
    await sequence.infer(number(1, kind))
    global kept
    kept = cids, sequence

asyncio.run(main())
"""


@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
def test_an_event_loop_that_ends_closes_its_clients(triton: TritonServer, way: str) -> None:
    url = triton.http_url if way == "http" else triton.grpc_url
    command = [sys.executable, "-c", FORGETFUL, url, way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    with Client(url) as other:
        assert way not in [each["label"] for each in other.status()["sessions"]]
