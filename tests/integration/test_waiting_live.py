"""Waiting for IDs of an exhausted pool, and for slots, on the real server."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.http
from command import run

from cidalloc import errors
from cidalloc.client import AsyncClient, Client
from cidalloc.devserver.demo.sequences import number
from cidalloc.devserver.triton_server import TritonServer

COOLDOWN_S = 0.2  # of the manager "pair", which has two IDs
ONE_SLOT = "one_slot_sequence"


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, triton: TritonServer) -> str:
    return triton.grpc_url if request.param == "grpc" else triton.http_url


def pair(url: str) -> Client:
    return Client(url, model="pair", ahead=0)


@pytest.fixture
def holder(url: str) -> Iterator[Client]:
    """A client that holds both IDs."""
    with pair(url) as client:
        assert sorted(client.acquire_many(2, timeout=10)) == [3000, 3001]
        yield client
    # What comes next finds all IDs free.
    with pair(url) as client:
        client.acquire_many(2, timeout=10)


def in_order(number: int, task: Callable[[int], Any]) -> ThreadPoolExecutor:
    """Start so many threads, each a moment after the one before."""
    pool = ThreadPoolExecutor(number)
    for each in range(number):
        pool.submit(task, each)
        time.sleep(0.1)
    return pool


def test_without_waiting_the_error_says_when_the_next_id_is_due(holder: Client, url: str) -> None:
    holder.release(3000, cooldown=4.0)
    holder.status()  # it was released at the manager
    with pair(url) as other:
        for call in (
            other.acquire,
            lambda: other.acquire(timeout=0),
            lambda: other.acquire_many(2),
            lambda: other.sequence("simple_sequence"),
        ):
            began = time.monotonic()
            with pytest.raises(errors.Exhausted, match=r"the next is due in \d") as caught:
                call()
            assert time.monotonic() - began < 2.0
            assert caught.value.due_s is not None and caught.value.due_s < 4.0


@pytest.mark.parametrize("shared", [True, False], ids=["one client", "clients"])
def test_threads_are_served_in_their_order(holder: Client, url: str, shared: bool) -> None:
    served: list[int] = []
    with pair(url) as ours:

        def work(place: int) -> None:
            with contextlib.nullcontext(ours) if shared else pair(url) as other:
                cid = other.acquire(timeout=30)
                served.append(place)
                other.release(cid, ended=True)

        with in_order(6, work):
            assert served == []
            holder.release(3001, ended=True)
    assert served == list(range(6))


def test_tasks_are_served_in_their_order(holder: Client, url: str) -> None:
    served: list[int] = []

    async def work(client: AsyncClient, place: int) -> None:
        await asyncio.sleep(0.1 * place)
        cid = await client.acquire(timeout=30)
        served.append(place)
        await client.release(cid, ended=True)

    async def main() -> None:
        async with AsyncClient(url, model="pair", ahead=0) as client:
            tasks = [asyncio.create_task(work(client, place)) for place in range(6)]
            await asyncio.sleep(1.0)
            assert served == []
            holder.release(3000, ended=True)
            cancelled = tasks.pop(3)
            cancelled.cancel()
            await asyncio.gather(*tasks)
            assert cancelled.cancelled()

    asyncio.run(main())
    assert served == [0, 1, 2, 4, 5]


def test_the_time_is_over(holder: Client, url: str) -> None:
    async def main() -> None:
        async with AsyncClient(url, model="pair") as client:
            await client.acquire(timeout=0.7)

    with pair(url) as other:
        for call in (
            lambda: other.acquire(timeout=0.7),
            lambda: other.acquire_many(2, timeout=0.7),
            lambda: other.sequence("simple_sequence", wait=0.7),
            lambda: asyncio.run(main()),
        ):
            began = time.monotonic()
            with pytest.raises(errors.Exhausted, match=r"2 are held.*waited \d\.\d s"):
                call()
            assert 0.7 <= time.monotonic() - began < 3.0


HOLDER = """
import sys
from cidalloc.client import Client

with Client(sys.argv[1], model="pair", ahead=0) as client:
    client.acquire_many(2, timeout=10)
    print("ready", flush=True)
    input()
"""


def test_another_process_lets_go(url: str) -> None:
    with (
        pair(url) as client,
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(client.acquire_many, 2, timeout=20)
            time.sleep(0.5)
            assert not waiting.done()
            assert (
                "2 open, 0 expired; 1 wait for IDs" in run("status", url, "--model", "pair").stdout
            )
            process.stdin.write("\n")
            process.stdin.flush()
            assert sorted(waiting.result()) == [3000, 3001]
        client.release_many([3000, 3001], ended=True)


def test_a_signal_while_it_waits(holder: Client, url: str) -> None:
    """A handler raises out of the call, and the ID goes to the next one."""

    class Alarm(Exception):
        pass

    def handler(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name == "__del__":  # Python drops what a destructor raises
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                return
            frame = frame.f_back
        raise Alarm

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pair(url) as other:
            for seconds in (0.3, 0.31, 0.33, 0.37, 0.45):
                signal.setitimer(signal.ITIMER_REAL, seconds)
                with pytest.raises(Alarm):
                    other.acquire(timeout=30)
            holder.release(3000, ended=True)
            assert other.acquire(timeout=10) == 3000
            assert other.held().tolist() == [3000]
            other.release(3000, ended=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_sequences_wait_for_ids(holder: Client, url: str) -> None:
    tensors = tritonclient.http if url.startswith("http") else tritonclient.grpc
    sums: list[int] = []
    with pair(url) as other:

        def work(place: int) -> None:
            with other.sequence("simple_sequence", wait=30) as sequence:
                sequence.infer(number(place, tensors))
                result = sequence.infer(number(1, tensors), end=True)
                sums.append(int(result.as_numpy("OUTPUT")[0, 0]))

        with in_order(6, work):
            holder.release(3001, ended=True)
    assert sums == [1, 2, 3, 4, 5, 6]


def test_the_command_waits(holder: Client, url: str) -> None:
    refused = run("acquire", url, "--model", "pair", "--wait", "0.5")
    assert refused.returncode == 1 and "EXHAUSTED" in refused.stderr
    timer = threading.Timer(1.0, lambda: holder.release(3000, ended=True))
    timer.start()
    done = run("acquire", url, "--model", "pair", "--wait", "20")
    timer.join()
    assert done.stdout == "3000\n", done.stderr
    assert run("release", url, "--model", "pair", "--ended", "3000").returncode == 0


# ---- Slots


@pytest.fixture(params=["grpc", "stream", "http"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_sequence_waits_for_a_slot(kind: str, triton: TritonServer) -> None:
    tensors = tritonclient.http if kind == "http" else tritonclient.grpc
    options: dict[str, Any] = {"streaming": kind == "stream", "timeout": 0.5}
    with (
        Client(triton.http_url if kind == "http" else triton.grpc_url) as cids,
        ThreadPoolExecutor() as pool,
        cids.sequence(ONE_SLOT, streaming=kind == "stream") as first,
    ):
        first.infer(number(1, tensors))
        with cids.sequence(ONE_SLOT, wait=20, **options) as second:
            started = pool.submit(second.infer, number(5, tensors))
            with cids.sequence(ONE_SLOT, wait=1.5, **options) as third:
                began = time.monotonic()
                with pytest.raises(errors.Unavailable, match=r"no slot for .* within 1\.5 s"):
                    third.infer(number(7, tensors))
                assert 1.2 < time.monotonic() - began < 4.0
            assert not started.done()
            first.infer(number(1, tensors), end=True)
            assert int(started.result().as_numpy("OUTPUT")[0, 0]) == 5
            assert int(second.infer(number(2, tensors), end=True).as_numpy("OUTPUT")[0, 0]) == 7


def test_a_task_waits_for_a_slot(kind: str, triton: TritonServer) -> None:
    tensors = tritonclient.http if kind == "http" else tritonclient.grpc
    options: dict[str, Any] = {"streaming": kind == "stream", "timeout": 0.5}

    async def main() -> None:
        url = triton.http_url if kind == "http" else triton.grpc_url
        async with AsyncClient(url) as cids, cids.sequence(ONE_SLOT, **options) as first:
            await first.infer(number(1, tensors))
            async with cids.sequence(ONE_SLOT, wait=20, **options) as second:
                started = [second.async_infer(number(value, tensors)) for value in (5, 6)]
                await asyncio.sleep(1.5)
                assert not any(each.done() for each in started)
                await first.infer(number(1, tensors), end=True)
                results = await asyncio.gather(*started)
                assert [int(each.as_numpy("OUTPUT")[0, 0]) for each in results] == [5, 11]
                await second.infer(number(0, tensors), end=True)

    asyncio.run(main())
