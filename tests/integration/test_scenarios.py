"""What both clients do, over a loopback into the service and on the real server by gRPC and HTTP.

Each scenario is written once, with ``await``. For the blocking client, awaiting is calling: its
results are wrapped, and the scenario's coroutine never really waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from loopback import AsyncLoopback, Loopback
from servers import Server
from tritonclient.utils import InferenceServerException

from cidalloc import errors
from cidalloc.client import AsyncClient, AsyncSequence, Client, Sequence
from cidalloc.devserver.demo.sequences import number
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings

MODEL = "simple_sequence"
SETTINGS = Settings(first=1, capacity=100_000, max_sessions=1000, fresh=True)


class Done:
    """A value that can be awaited, and is there already."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Iterator[Any]:
        return self.value
        yield


class Awaited:
    """A blocking client or sequence in the clothes of an asynchronous one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if not callable(found):
            return found
        if name in ("flags", "infer_kwargs", "bls_kwargs", "held"):
            return found
        if name == "async_infer":
            return lambda *args, **options: Later(found(*args, **options))
        if name == "sequence":
            return lambda *args, **options: Beginning(lambda: found(*args, **options))
        return lambda *args, **options: Done(found(*args, **options))

    async def __aenter__(self) -> Awaited:
        self.inner.__enter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)


class Later(Done):
    """A future of concurrent.futures; awaiting it waits for its result."""

    def __await__(self) -> Iterator[Any]:
        return self.value.result(30)
        yield


class Beginning:
    """A sequence that is made when it is entered, as the asynchronous one."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    async def __aenter__(self) -> Awaited:
        self.inner = self.make()
        return Awaited(self.inner.__enter__())

    async def __aexit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)

    def __await__(self) -> Iterator[Any]:
        return Awaited(self.make())
        yield


class Way:
    """How a scenario is run: with which client, and to where."""

    def __init__(self, kind: str, where: str, request: pytest.FixtureRequest) -> None:
        self.where = where
        self.asynchronous = kind == "async"
        self.server: TritonServer | None = None
        if where != "loopback":
            self.server = request.getfixturevalue("triton")
        self.module = tritonclient.http if where == "http" else tritonclient.grpc

    def client(self, **options: Any) -> Any:
        if self.server is None:
            transport = AsyncLoopback if self.asynchronous else Loopback
            options["transport"] = transport(SETTINGS)
            url = ""
        else:
            url = self.server.http_url if self.where == "http" else self.server.grpc_url
        return AsyncClient(url, **options) if self.asynchronous else Awaited(Client(url, **options))

    def run(self, scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self.asynchronous:
            asyncio.run(scenario())
            return
        coroutine = scenario()
        with pytest.raises(StopIteration):
            coroutine.send(None)

    def send(self, value: int) -> list[Any]:
        return number(value, self.module)

    def bad_input(self) -> list[Any]:
        tensor = self.module.InferInput("INPUT", [1, 1], "FP32")
        return [tensor.set_data_from_numpy(np.zeros([1, 1], np.float32))]


WAYS = [(kind, where) for kind in ("sync", "async") for where in ("loopback", "grpc", "http")]


@pytest.fixture(params=WAYS, ids="-".join)
def way(request: pytest.FixtureRequest) -> Way:
    return Way(*request.param, request)


@pytest.fixture(params=[way for way in WAYS if way[1] != "loopback"], ids="-".join)
def real(request: pytest.FixtureRequest) -> Way:
    return Way(*request.param, request)


def total(result: Any) -> int:
    return int(result.as_numpy("OUTPUT")[0, 0])


# ---- Names


def public(kind: type) -> dict[str, Any]:
    return {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (Sequence, AsyncSequence)])
def test_equal_names_and_arguments(one: type, other: type) -> None:
    assert public(one).keys() == public(other).keys()
    for name, member in public(one).items():
        if not callable(member):
            continue
        ours = inspect.signature(member).parameters
        theirs = inspect.signature(public(other)[name]).parameters
        assert list(ours.values()) == list(theirs.values()), name
        waits = inspect.iscoroutinefunction(public(other)[name])
        at_once = ("sequence", "held", "flags", "infer_kwargs", "bls_kwargs", "async_infer")
        assert waits or name in (*at_once, "stream"), name
    ours, theirs = (dict(inspect.signature(kind).parameters) for kind in (Client, AsyncClient))
    assert ours.pop("transport").name == theirs.pop("transport").name
    assert ours == theirs


# ---- IDs


def test_acquire_and_release(way: Way) -> None:
    async def scenario() -> None:
        async with way.client(label="here") as cids:
            one, two = await cids.acquire(), await cids.acquire()
            many = await cids.acquire_many(100)
            assert many.dtype == np.uint64 and many.shape == (100,)
            assert len({one, two, *many.tolist()}) == 102
            assert cids.held().tolist() == sorted([one, two, *many.tolist()])
            status = await cids.status()
            (session,) = [each for each in status["sessions"] if each["label"] == "here"]
            assert session["held"] >= 102
            assert await cids.peak() >= await cids.active() >= 102
            await cids.release(one, ended=True)
            await cids.release(two)
            await cids.release_many(many[:50], cooldown=0.5)
            await cids.release_many(many[50:].tolist(), ended=True)
            assert cids.held().tolist() == []
            assert await cids.inactive() >= 51
            for cid in (one, int(many[3])):
                with pytest.raises(errors.NotHeld):
                    await cids.release(cid)
        async with way.client() as other:
            labels = [each["label"] for each in (await other.status())["sessions"]]
            assert "here" not in labels

    way.run(scenario)


def test_a_block_that_fails_gives_all_back(way: Way) -> None:
    async def scenario() -> None:
        with pytest.raises(ZeroDivisionError):
            async with way.client(label="failing") as cids:
                await cids.acquire_many(5)
                raise ZeroDivisionError
        assert "closed" in repr(getattr(cids, "inner", cids))
        with pytest.raises(errors.InvalidArgument, match="closed"):
            await cids.acquire()
        await cids.close()

    way.run(scenario)


@pytest.mark.parametrize("count", [0, -3, True, "3", None, [1], np.array([1, 2])])
def test_counts_that_are_none(way: Way, count: Any) -> None:
    async def scenario() -> None:
        async with way.client() as cids:
            with pytest.raises(errors.InvalidArgument, match="count="):
                await cids.acquire_many(count)

    way.run(scenario)


def test_counts_that_are_too_much(way: Way) -> None:
    async def scenario() -> None:
        async with way.client() as cids:
            for count in (10**9, 2**63 + 1):
                with pytest.raises(errors.LimitExceeded):
                    await cids.acquire_many(count)
            assert len(await cids.acquire_many(np.int64(2))) == 2

    way.run(scenario)


@pytest.mark.parametrize("cooldown", [-1.0, float("nan"), float("inf"), 1e12, "x", True])
def test_cooldowns_that_are_none(way: Way, cooldown: Any) -> None:
    async def scenario() -> None:
        async with way.client() as cids:
            cid = await cids.acquire()
            with pytest.raises(errors.InvalidArgument, match="cooldown"):
                await cids.release(cid, cooldown=cooldown)
            with pytest.raises(errors.InvalidArgument, match="cooldown"):
                await cids.release_many([cid], cooldown=cooldown)
            await cids.release(np.uint64(cid), cooldown=np.float32(0))

    way.run(scenario)


def test_releases_that_are_none(way: Way) -> None:
    async def scenario() -> None:
        async with way.client() as cids:
            cid = await cids.acquire()
            for wrong, kind in (
                ([], errors.InvalidArgument),
                (["1"], errors.InvalidArgument),
                ([0], errors.OutOfRange),
                ([-1], errors.OutOfRange),
                ([cid, cid], errors.Duplicate),
                ([cid, 2**40], errors.NotHeld),
            ):
                for ended in (False, True):
                    with pytest.raises(kind):
                        await cids.release_many(wrong, ended=ended)
            assert cids.held().tolist() == [cid]

    way.run(scenario)


# ---- Sequences


@pytest.mark.parametrize("streaming", [False, True])
def test_sums(real: Way, streaming: bool) -> None:
    if streaming and real.where == "http":
        return

    async def scenario() -> None:
        async with real.client() as cids:
            async with (
                cids.sequence(MODEL, streaming=streaming) as one,
                cids.sequence(MODEL, streaming=streaming) as two,
            ):
                assert one.cid != two.cid
                assert total(await one.infer(real.send(5))) == 5
                assert total(await two.infer(real.send(100))) == 100
                waiting = [one.async_infer(real.send(1)) for _ in range(10)]
                assert total(await one.infer(real.send(1), end=True)) == 16
                assert [total(await each) for each in waiting] == list(range(6, 16))
                with pytest.raises(errors.InvalidArgument, match="no more"):
                    await one.infer(real.send(1))
                assert total(await two.infer(real.send(-1))) == 99
            assert (one.state, two.state) == ("closed, recycled", "closed, cooling")
            assert cids.held().tolist() == []

    real.run(scenario)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_a_farewell(real: Way, error: type[Exception] | None, streaming: bool) -> None:
    if streaming and real.where == "http":
        return
    options = {"end_inputs": real.send(0), "streaming": streaming}

    async def scenario() -> None:
        async with real.client() as cids:
            try:
                async with cids.sequence(MODEL, **options) as sequence:
                    await sequence.infer(real.send(5))
                    if error is not None:
                        raise error
            except ZeroDivisionError:
                assert error is not None
            assert sequence.state == "closed, recycled"

    real.run(scenario)


def test_a_farewell_that_fails(real: Way) -> None:
    """The ID cools, as without one."""

    async def scenario() -> None:
        async with real.client() as cids:
            async with cids.sequence(MODEL, end_inputs=real.bad_input()) as sequence:
                await sequence.infer(real.send(5))
            assert sequence.state == "closed, cooling"

    real.run(scenario)


def test_only_grpc_has_streams(real: Way) -> None:
    """And nothing stays held where one was asked for in vain."""
    expected: Any = contextlib.nullcontext()
    if real.where == "http":
        expected = pytest.raises(errors.InvalidArgument, match="streaming needs gRPC")

    async def scenario() -> None:
        async with real.client() as cids:
            with expected:
                async with cids.sequence(MODEL, streaming=True) as sequence:
                    assert total(await sequence.infer(real.send(3), end=True)) == 3
            assert cids.held().tolist() == []

    real.run(scenario)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_input_that_the_model_refuses(real: Way, streaming: bool) -> None:
    if streaming and real.where == "http":
        return

    async def scenario() -> None:
        async with real.client() as cids:
            async with cids.sequence(MODEL, streaming=streaming) as sequence:
                with pytest.raises(InferenceServerException):
                    await sequence.infer(real.bad_input())
                # START was not spent on it.
                assert total(await sequence.infer(real.send(4))) == 4
            assert sequence.state == "closed, cooling"

    real.run(scenario)


def test_errors_of_triton(real: Way) -> None:
    async def scenario() -> None:
        async with real.client() as cids:
            async with cids.sequence("idle_sequence") as sequence:
                await sequence.infer(real.send(1))
                await pause(real, 0.6)
                with pytest.raises(errors.SequenceLost, match=r"idle time, 0\.2 s"):
                    await sequence.infer(real.send(1))
            async with (
                cids.sequence("one_slot_sequence") as first,
                cids.sequence("one_slot_sequence", timeout=0.5) as second,
            ):
                await first.infer(real.send(1))
                with pytest.raises(errors.Unavailable, match="all slots"):
                    await second.infer(real.send(1))
                await first.infer(real.send(1), end=True)
            with pytest.raises(errors.InvalidArgument, match="sequence_batching"):
                await cids.sequence("cidmgr")
            with pytest.raises(errors.Unavailable, match="nonesuch"):
                await cids.sequence("nonesuch")
            with pytest.raises(errors.InvalidArgument, match="the sequence sets it"):
                async with cids.sequence(MODEL) as sequence:
                    await sequence.infer(real.send(1), sequence_id=4)

    real.run(scenario)


async def pause(way: Way, seconds: float) -> None:
    if way.asynchronous:
        await asyncio.sleep(seconds)
    else:
        time.sleep(seconds)


def test_flags(real: Way) -> None:
    assert real.server is not None
    port = real.server.http_port if real.where == "http" else real.server.grpc_port
    own = real.module.InferenceServerClient(f"127.0.0.1:{port}")

    async def scenario() -> None:
        async with real.client() as cids, cids.sequence(MODEL) as sequence:
            assert total(own.infer(MODEL, real.send(2), **sequence.infer_kwargs())) == 2
            assert total(own.infer(MODEL, real.send(2), **sequence.infer_kwargs(end=True))) == 4

    real.run(scenario)
    own.close()


def test_an_open_sequence_loses_its_id_with_the_client(real: Way) -> None:
    async def scenario() -> None:
        async with real.client() as cids:
            sequence = await cids.sequence(MODEL)
            await sequence.infer(real.send(1))
        with pytest.raises(errors.InvalidArgument, match="closed"):
            await sequence.infer(real.send(1))
        await sequence.close()

    real.run(scenario)


def test_headers_and_options(real: Way) -> None:
    async def scenario() -> None:
        async with real.client(headers={"x-who": "me"}, verbose=False) as cids:
            assert await cids.acquire()
        with pytest.raises(errors.InvalidArgument, match="nonesuch"):
            real.client(nonesuch=1)

    real.run(scenario)


# ---- Only with asyncio


def test_many_tasks_share_a_client(triton: TritonServer) -> None:
    async def work(cids: AsyncClient, value: int) -> int:
        async with cids.sequence(MODEL) as sequence:
            await sequence.infer(number(value))
            return total(await sequence.infer(number(value), end=True))

    async def main() -> None:
        async with AsyncClient(triton.grpc_url) as cids:
            sums = await asyncio.gather(*(work(cids, value) for value in range(50)))
            assert sums == [2 * value for value in range(50)]

    asyncio.run(main())


def test_a_task_that_is_cancelled(triton: TritonServer) -> None:
    async def main() -> None:
        async with AsyncClient(triton.grpc_url) as cids:
            async with cids.sequence("one_slot_sequence") as first:
                await first.infer(number(1))
                async with cids.sequence("one_slot_sequence") as second:
                    with pytest.raises(asyncio.TimeoutError):
                        await asyncio.wait_for(second.infer(number(1)), 0.3)
                assert second.state == "closed, cooling"
                await first.infer(number(1), end=True)

    asyncio.run(main())


@pytest.fixture
def brittle(few: Path) -> Iterator[TritonServer]:
    """A server that a test may stop and kill."""
    with Server(few) as server:
        yield server
        kill(server)


def kill(server: TritonServer) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(server.pid, signal.SIGKILL)


def wait_stopped(pid: int) -> None:
    """Wait until no thread of a process runs any more; a busy machine takes a while to stop all."""
    deadline = time.monotonic() + 10
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is gone
        for task in Path(f"/proc/{pid}/task").iterdir():
            while (task / "stat").read_text().rpartition(")")[2].split()[0] not in "TtZXx":
                assert time.monotonic() < deadline, "the process does not stop"
                time.sleep(0.001)


def of_sequences() -> list[str]:
    """Return the tasks that run for sequences, those in gRPC included."""
    names = [each.get_coro().__qualname__ for each in asyncio.all_tasks()]
    return [each for each in names if each.startswith(("AsyncSequence", "_Stream"))]


@pytest.mark.server
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_server_that_dies_or_hangs(
    brittle: TritonServer, streaming: bool, how: signal.Signals
) -> None:
    """Everything ends in time and says `Unavailable`, with much in the queue, too."""

    async def main() -> None:
        async with AsyncClient(brittle.grpc_url, timeout=1.0) as cids:
            idle = await cids.sequence(MODEL, streaming=streaming, timeout=1.0)
            busy = await cids.sequence(MODEL, streaming=streaming, timeout=1.0)
            await idle.infer(number(1))
            await busy.infer(number(1))
            os.kill(brittle.pid, how)
            wait_stopped(brittle.pid)
            began = time.monotonic()
            tasks = [busy.async_infer(number(1)) for _ in range(10)]
            with pytest.raises(errors.Unavailable):
                await busy.infer(number(1))
            late = busy.async_infer(number(1))
            await idle.close()
            with pytest.raises(ZeroDivisionError):
                async with busy:
                    raise ZeroDivisionError
            assert time.monotonic() - began < 12
            for failed in await asyncio.gather(*tasks, late, return_exceptions=True):
                assert isinstance(failed, (errors.CidError, asyncio.CancelledError))
            while left := of_sequences():  # those that end may take a moment
                assert time.monotonic() - began < 20, left
                await asyncio.sleep(0.01)
            kill(brittle)  # the client need not wait for it

    asyncio.run(main())


def test_a_sequence_that_was_not_begun(triton: TritonServer) -> None:
    async def main() -> None:
        async with AsyncClient(triton.grpc_url) as cids:
            sequence = cids.sequence(MODEL)
            assert "not begun" in repr(sequence) and sequence.state == "not begun"
            for use in (lambda: sequence.cid, sequence.flags):
                with pytest.raises(errors.InvalidArgument, match="async with"):
                    use()
            await sequence.close()

    asyncio.run(main())


def test_another_event_loop_is_refused(triton: TritonServer) -> None:
    cids = AsyncClient(triton.grpc_url)

    async def close() -> None:
        await cids.acquire()
        with pytest.raises(errors.InvalidArgument, match="another event loop"):
            await asyncio.to_thread(lambda: asyncio.run(other()))
        await cids.close()

    async def other() -> Awaitable[Any]:
        return await cids.active()

    asyncio.run(close())
