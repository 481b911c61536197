"""gRPC for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc.aio
from tritonclient.grpc.service_pb2 import ModelInferResponse

from ... import protocol
from ...errors import ProtocolError
from ..core.grpc_calls import (
    SHORT_S,
    Calls,
    GrpcBase,
    GrpcResult,
    StreamBase,
    read_config,
)
from ..core.grpc_connections import Connection, Connections
from ..core.transport import (
    HURRY_S,
    Address,
    Done,
    Receive,
    read_answer,
    translating,
)
from .tasks import Tasks, deliver

__all__ = ["AsyncGrpcTransport"]


class AsyncGrpcTransport(GrpcBase):
    """gRPC for asyncio. Requests are sent in tasks that are never cancelled."""

    def __init__(
        self, address: Address, headers: Mapping[str, str] | None, options: Mapping[str, Any]
    ) -> None:
        self._tasks = Tasks()
        shut = lambda channel: self._tasks.start(channel.close())  # noqa: E731
        is_ready = lambda channel: channel.get_state() is grpc.ChannelConnectivity.READY  # noqa: E731
        super().__init__(grpc.aio, shut, is_ready, address, headers, options)

    async def call(
        self, model: str, request: protocol.Request, timeout: float
    ) -> tuple[protocol.IDs, str]:
        with translating(model, self.url):
            message, beside = self._calls.manager_request(model, request)
            answer = await self._wait(self._asks, "infer", message, timeout, beside)
        return read_answer(GrpcResult(answer), model, self.url)

    async def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with translating(model, self.url):
            request, beside = self._calls.config_request(model)
            return read_config(await self._wait(self._asks, "config", request, timeout, beside))

    async def server_version(self, timeout: float) -> str:
        with translating("", self.url):
            request, beside = self._calls.version_request()
            found = await self._wait(self._asks, "version", request, timeout, beside)
        return str(found.version)

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Done, /, **options: Any
    ) -> None:
        request, beside = self._calls.request(model, inputs, **options)
        connection = self._sequences.take()
        try:
            call = connection.infer(request, timeout=max(limit, SHORT_S), **beside)
        except BaseException:
            self._sequences.release(connection)
            raise

        def over(response: asyncio.Future[Any]) -> None:
            done_well = not response.cancelled() and response.exception() is None
            found = response.result() if done_well else None
            if not isinstance(found, ModelInferResponse) or not found.model_name:
                self._tasks.start(deliver(self._read(call, connection), done))
                return
            self._sequences.release(connection)
            done(self._calls.result(found), None)

        # gRPC's own task; a further one would double the cost in asyncio.
        self._tasks.add(call._call_response).add_done_callback(over)

    async def _read(self, call: Any, connection: Connection) -> GrpcResult:
        """Return the result of a call, or raise its error."""
        try:
            return self._calls.result(await call)
        except grpc.RpcError as error:
            failure = self._sequences.failed(connection, error, self.url)
        finally:
            self._sequences.release(connection)
            del call  # the failure refers to this frame, and would keep the connection open
        raise failure

    def open_stream(self, receive: Receive, /, limit: float | None = None) -> _Stream:
        return _Stream(self._sequences, self._calls, receive, limit, self._tasks)

    async def close(self) -> None:
        self._asks.close()
        self._sequences.close()
        # Requests that take longer go on, unless the event loop ends.
        await self._tasks.wait(HURRY_S)

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
            answer = await send(request, timeout=max(limit, SHORT_S), **beside)
            if answer is None:
                raise ProtocolError(f"{self.url} answers unlike Triton: with what cannot be read")
            return answer
        except grpc.RpcError as error:
            failure = connections.failed(connection, error, self.url)
        finally:
            connections.release(connection)
        raise failure


class _Stream(StreamBase):
    """A stream, and the task that reads it."""

    def __init__(
        self,
        connections: Connections,
        calls: Calls,
        receive: Receive,
        limit: float | None,
        tasks: Tasks,
    ) -> None:
        super().__init__(connections, calls, receive, asyncio.Queue())
        self._answers = self._connection.stream(
            self._requests(), timeout=limit, metadata=calls.metadata
        )
        tasks.start(self._read())

    async def _requests(self) -> AsyncIterator[Any]:
        while (request := await self._queue.get()) is not None:
            yield request

    async def _read(self) -> None:
        try:
            async for answer in self._answers:
                self._received(answer)
        except asyncio.CancelledError:  # of `cut`, or the event loop ends
            self._ended(None)
        except Exception as error:  # in no other variable, else it would refer to itself
            self._ended(error)
        else:
            self._ended(None)
