"""The two sides of `make bench-client`: this client and plain tritonclient, doing the same work.

A *worker* is a context manager that yields a function: one call of it does one unit of work. A
*side* has many workers, in threads or in tasks, and lets all of them work at the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from client_report import SEQUENCE

from cidalloc.client import AsyncClient, Client
from cidalloc.devserver.triton_server import TritonServer

MODEL = "constant"
"""A sequence model that answers every request with the same tensor."""

NEW_STREAM = "new gRPC stream"
"""Both sides use a new stream for each sequence; in "gRPC stream" tritonclient keeps its own."""
TRANSPORTS = ("gRPC", "HTTP", "gRPC stream", NEW_STREAM, "asyncio gRPC", "asyncio HTTP")

_CODE = """
import numpy as np
import triton_python_backend_utils as pb_utils

OUTPUT = np.array([[1]], np.int32)


class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", OUTPUT)]) for _ in requests
        ]
"""

# The idle time is longer than any case takes: a side whose turn it is not must stay alive.
_CONFIG = """
backend: "python"
max_batch_size: 64
sequence_batching { max_sequence_idle_microseconds: 600000000
  oldest { max_candidate_sequences: 512 } }
input [ { name: "INPUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "OUTPUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""

Call = Callable[[], Any]
Times = tuple[float, float]
"""Microseconds of the clock and of this process's CPU time."""


class Side(Protocol):
    """Workers that work at the same time."""

    def run(self, times: int) -> Times:
        """Let each worker do so many units; return what one unit took."""


def write_model(folder: Path) -> None:
    """Write the model into a model repository."""
    (folder / MODEL / "1").mkdir(parents=True)
    (folder / MODEL / "1" / "model.py").write_text(_CODE)
    (folder / MODEL / "config.pbtxt").write_text(_CONFIG)


def timed(work: Call, units: int) -> Times:
    """Return what one unit took."""
    began = time.perf_counter(), time.process_time()
    work()
    ended = time.perf_counter(), time.process_time()
    return (ended[0] - began[0]) / units * 1e6, (ended[1] - began[1]) / units * 1e6


def inputs_of(library: Any) -> list[Any]:
    """Return the inputs of a request; both sides build them once."""
    tensor = library.InferInput("INPUT", [1, 1], "INT32")
    return [tensor.set_data_from_numpy(np.array([[1]], np.int32))]


def random_id() -> int:
    """Return an ID as a client without a manager picks it."""
    return secrets.randbits(63) or 1


# ---- Threads


class PlainStream:
    """tritonclient's stream as its examples use it: a callback puts the answers into a queue."""

    def __init__(self, url: str) -> None:
        self._client = tritonclient.grpc.InferenceServerClient(url)
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.start()

    def start(self) -> None:
        """Start the stream."""
        self._client.start_stream(lambda result, error: self._answers.put((result, error)))

    def stop(self) -> None:
        """End the stream."""
        self._client.stop_stream()

    def infer(self, model: str, inputs: list[Any], **options: Any) -> Any:
        """Send a request and wait for its answer."""
        self._client.async_stream_infer(model, inputs, **options)
        result, error = self._answers.get()
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End the stream and close the connection."""
        self._client.close()


def plain_two(client: Any, inputs: list[Any]) -> None:
    """Send a whole sequence of two requests."""
    cid = random_id()
    client.infer(MODEL, inputs, sequence_id=cid, sequence_start=True)
    client.infer(MODEL, inputs, sequence_id=cid, sequence_end=True)


def plain_two_on_new_stream(client: PlainStream, inputs: list[Any]) -> None:
    """Send a whole sequence over a stream of its own."""
    client.start()
    plain_two(client, inputs)
    client.stop()


@contextlib.contextmanager
def plain_worker(transport: str, unit: str, server: TritonServer) -> Iterator[Call]:
    """Yield a unit of work for a thread, with a client of its own, as tritonclient asks for."""
    if transport == "HTTP":
        client: Any = tritonclient.http.InferenceServerClient(server.http_url[7:])
    elif transport == "gRPC":
        client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
    else:
        client = PlainStream(server.grpc_url)
    inputs = inputs_of(tritonclient.http if transport == "HTTP" else tritonclient.grpc)
    try:
        if transport == NEW_STREAM:
            client.stop()
            yield partial(plain_two_on_new_stream, client, inputs)
        elif unit == SEQUENCE:
            yield partial(plain_two, client, inputs)
        else:
            cid = random_id()
            client.infer(MODEL, inputs, sequence_id=cid, sequence_start=True)
            yield partial(client.infer, MODEL, inputs, sequence_id=cid)
            client.infer(MODEL, inputs, sequence_id=cid, sequence_end=True)
    finally:
        client.close()


def our_two(cids: Client, inputs: list[Any], streaming: bool) -> None:
    """Send a whole sequence of two requests."""
    with cids.sequence(MODEL, streaming=streaming) as sequence:
        sequence.infer(inputs)
        sequence.infer(inputs, end=True)


@contextlib.contextmanager
def our_worker(transport: str, unit: str, cids: Client) -> Iterator[Call]:
    """Yield a unit of work for a thread, with the client that all threads share."""
    inputs = inputs_of(tritonclient.http if transport == "HTTP" else tritonclient.grpc)
    streaming = "stream" in transport
    if unit == SEQUENCE:
        yield partial(our_two, cids, inputs, streaming)
        return
    with cids.sequence(MODEL, streaming=streaming) as sequence:
        sequence.infer(inputs)
        yield partial(sequence.infer, inputs)
        sequence.infer(inputs, end=True)


def repeat(call: Call, times: int) -> None:
    """Call it so many times."""
    for _ in range(times):
        call()


class Threads:
    """A side of threads. Each enters, uses and leaves its own worker."""

    def __init__(self, workers: list[contextlib.AbstractContextManager[Call]]) -> None:
        self._workers = workers

    def __enter__(self) -> Threads:
        self._threads = [ThreadPoolExecutor(1) for _ in self._workers]
        pairs = zip(self._threads, self._workers, strict=True)
        self._calls = [thread.submit(worker.__enter__).result() for thread, worker in pairs]
        return self

    def __exit__(self, *error: Any) -> None:
        pairs = zip(self._threads, self._workers, strict=True)
        left = [thread.submit(worker.__exit__, *error) for thread, worker in pairs]
        for thread in self._threads:
            thread.shutdown()
        if error == (None, None, None):
            for each in left:
                each.result()

    def run(self, times: int) -> Times:
        """Let each worker do so many units; return what one unit took."""
        return timed(partial(self._run, times), times * len(self._calls))

    def _run(self, times: int) -> None:
        pairs = zip(self._threads, self._calls, strict=True)
        for each in [thread.submit(repeat, call, times) for thread, call in pairs]:
            each.result()


# ---- asyncio


async def plain_two_async(client: Any, inputs: list[Any]) -> None:
    """Send a whole sequence of two requests."""
    cid = random_id()
    await client.infer(MODEL, inputs, sequence_id=cid, sequence_start=True)
    await client.infer(MODEL, inputs, sequence_id=cid, sequence_end=True)


@contextlib.asynccontextmanager
async def plain_task(transport: str, unit: str, client: Any) -> AsyncIterator[Call]:
    """Yield a unit of work for a task, with the client that all tasks share."""
    inputs = inputs_of(tritonclient.http if "HTTP" in transport else tritonclient.grpc)
    if unit == SEQUENCE:
        yield partial(plain_two_async, client, inputs)
        return
    cid = random_id()
    await client.infer(MODEL, inputs, sequence_id=cid, sequence_start=True)
    yield partial(client.infer, MODEL, inputs, sequence_id=cid)
    await client.infer(MODEL, inputs, sequence_id=cid, sequence_end=True)


async def our_two_async(cids: AsyncClient, inputs: list[Any]) -> None:
    """Send a whole sequence of two requests."""
    async with cids.sequence(MODEL) as sequence:
        await sequence.infer(inputs)
        await sequence.infer(inputs, end=True)


@contextlib.asynccontextmanager
async def our_task(transport: str, unit: str, cids: AsyncClient) -> AsyncIterator[Call]:
    """Yield a unit of work for a task, with the client that all tasks share."""
    inputs = inputs_of(tritonclient.http if "HTTP" in transport else tritonclient.grpc)
    if unit == SEQUENCE:
        yield partial(our_two_async, cids, inputs)
        return
    async with cids.sequence(MODEL) as sequence:
        await sequence.infer(inputs)
        yield partial(sequence.infer, inputs)
        await sequence.infer(inputs, end=True)


async def repeat_async(call: Call, times: int) -> None:
    """Call and await it so many times."""
    for _ in range(times):
        await call()


class Tasks:
    """A side of tasks in an event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        workers: list[contextlib.AbstractAsyncContextManager[Call]],
    ) -> None:
        self._loop, self._workers = loop, workers

    def __enter__(self) -> Tasks:
        run = self._loop.run_until_complete
        self._calls = [run(worker.__aenter__()) for worker in self._workers]
        return self

    def __exit__(self, *error: Any) -> None:
        for worker in self._workers:
            self._loop.run_until_complete(worker.__aexit__(*error))

    def run(self, times: int) -> Times:
        """Let each worker do so many units; return what one unit took."""
        return timed(partial(self._run, times), times * len(self._calls))

    def _run(self, times: int) -> None:
        async def together() -> None:
            await asyncio.gather(*(repeat_async(call, times) for call in self._calls))

        self._loop.run_until_complete(together())


# ---- Both sides of a case


@contextlib.contextmanager
def both(
    transport: str, unit: str, workers: int, server: TritonServer, manager: str
) -> Iterator[dict[str, Side]]:
    """Yield this client's side and tritonclient's, each with so many workers."""
    url = server.http_url if "HTTP" in transport else server.grpc_url
    with contextlib.ExitStack() as stack:
        if not transport.startswith("asyncio"):
            cids = stack.enter_context(Client(url, model=manager))
            sides: dict[str, Any] = {
                "ours": Threads([our_worker(transport, unit, cids) for _ in range(workers)]),
                "plain": Threads([plain_worker(transport, unit, server) for _ in range(workers)]),
            }
        else:
            loop = stack.enter_context(contextlib.closing(asyncio.new_event_loop()))
            ours, theirs = loop.run_until_complete(_connect(transport, url, manager))
            for client in (ours, theirs):
                stack.callback(lambda client=client: loop.run_until_complete(client.close()))
            sides = {
                "ours": Tasks(loop, [our_task(transport, unit, ours) for _ in range(workers)]),
                "plain": Tasks(loop, [plain_task(transport, unit, theirs) for _ in range(workers)]),
            }
        yield {name: stack.enter_context(side) for name, side in sides.items()}


async def _connect(transport: str, url: str, manager: str) -> tuple[AsyncClient, Any]:
    # tritonclient's clients for asyncio are made where the event loop runs.
    library = tritonclient.http.aio if "HTTP" in transport else tritonclient.grpc.aio
    theirs = library.InferenceServerClient(url.removeprefix("http://"))
    return AsyncClient(url, model=manager), theirs
