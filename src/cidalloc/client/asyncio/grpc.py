"""gRPC for asyncio: as `_grpc`, but awaiting."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc.aio
import tritonclient.grpc

from ... import protocol
from ...errors import Unavailable
from ..core.grpc_calls import (
    SHORT_S,
    Calls,
    Connections,
    read_config,
    read_stream,
    stream_broke,
)
from ..core.transport import (
    Address,
    Done,
    Receive,
    boottime,
    read_answer,
    translating,
)
from .tasks import CLOSE_S, Tasks, deliver

__all__ = ["AsyncGrpcTransport"]


class AsyncGrpcTransport:
    """gRPC; the coroutines that send requests run in tasks that nobody cancels."""

    inputs = tritonclient.grpc.InferInput
    now = staticmethod(boottime)

    def __init__(
        self, address: Address, headers: Mapping[str, str] | None, options: Mapping[str, Any]
    ) -> None:
        self.url = address.url
        self._calls = Calls(address, headers, options)
        self._tasks = Tasks()
        self._asks, self._sequences = (
            Connections(
                lambda: self._calls.channel(grpc.aio),
                lambda channel: self._tasks.start(channel.close()),
            )
            for _ in range(2)
        )

    async def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        request, beside = self._calls.request(model, inputs, **options)
        self._calls.show(request)
        answer = await self._wait(self._sequences, "infer", request, limit, beside)
        self._calls.show(answer)
        return tritonclient.grpc.InferResult(answer)

    async def call(
        self, model: str, request: protocol.Request, timeout: float
    ) -> tuple[protocol.IDs, str]:
        with translating(model, self.url):
            message, beside = self._calls.manager_request(model, request)
            answer = await self._wait(self._asks, "infer", message, timeout, beside)
        return read_answer(tritonclient.grpc.InferResult(answer), request, model, self.url)

    async def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with translating(model, self.url):
            request, beside = self._calls.config_request(model)
            return read_config(await self._wait(self._asks, "config", request, timeout, beside))

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Done, /, **options: Any
    ) -> None:
        self._tasks.start(deliver(self.infer(limit, model, inputs, **options), done))

    def open_stream(self, receive: Receive, /) -> _Stream:
        return _Stream(self._sequences, self._calls, receive, self._tasks)

    async def close(self) -> None:
        self._asks.close()
        self._sequences.close()
        # What takes longer goes on, unless the event loop ends.
        await self._tasks.wait(CLOSE_S)

    async def _wait(
        self,
        connections: Connections,
        method: str,
        request: Any,
        limit: float,
        beside: Mapping[str, Any],
    ) -> Any:
        connection = connections.take()
        try:
            send = getattr(connection, method)
            return await send(request, timeout=max(limit, SHORT_S), **beside)
        except grpc.RpcError as error:
            raise connections.failed(connection, error, self.url) from None
        finally:
            connections.release(connection)


class _Stream:
    """A stream, and the task that reads it."""

    def __init__(
        self, connections: Connections, calls: Calls, receive: Receive, tasks: Tasks
    ) -> None:
        self._connections, self._calls, self._receive = connections, calls, receive
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self.over = False
        self._connection = connections.take()
        self._answers = self._connection.stream(self._requests(), metadata=calls.metadata)
        tasks.start(self._read())

    def send(self, model: str, inputs: list[Any], /, **options: Any) -> None:
        request, _ = self._calls.request(model, inputs, **options)
        if self.over:
            raise Unavailable(f"the stream to {self._calls.url} broke: open a new sequence")
        self._calls.show(request)
        self._queue.put_nowait(request)

    def end(self) -> None:
        self._queue.put_nowait(None)

    def cut(self) -> None:
        if not self.over:
            self._answers.cancel()

    def suspect(self) -> None:
        self._connections.retire(self._connection)

    async def _requests(self) -> AsyncIterator[Any]:
        while (request := await self._queue.get()) is not None:
            yield request

    async def _read(self) -> None:
        error: BaseException
        try:
            async for answer in self._answers:
                self._calls.show(answer)
                self._receive(*read_stream(answer))
            error = Unavailable(f"the stream to {self._calls.url} was closed")
        except asyncio.CancelledError:  # `cut`, or the event loop ends
            error = Unavailable(f"the stream to {self._calls.url} was closed")
        except Exception as failed:
            self.suspect()
            error = stream_broke(failed, self._calls.url)
        self.over = True
        with contextlib.suppress(RuntimeError):
            self._queue.put_nowait(None)
        self._connections.release(self._connection)
        self._receive("", True, None, error)
