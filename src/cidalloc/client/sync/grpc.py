"""gRPC for threads."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from tritonclient.utils import InferenceServerException

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
    Address,
    Done,
    Receive,
    read_answer,
    translating,
)
from .threads import spawn

__all__ = ["GrpcTransport"]


class GrpcTransport(GrpcBase):
    """gRPC for threads. A request blocks only the thread that sends it."""

    def __init__(
        self, address: Address, headers: Mapping[str, str] | None, options: Mapping[str, Any]
    ) -> None:
        shut = lambda channel: channel.close()  # noqa: E731
        super().__init__(grpc, shut, _is_ready, address, headers, options)

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> GrpcResult:
        request, beside = self._calls.request(model, inputs, **options)
        connections = self._sequences
        if limit < SHORT_S:
            return self._calls.result(self._wait(connections, "infer", request, limit, beside))
        # In this thread alone, which costs half as much as `_wait`. If a signal handler raises an
        # exception in the main thread meanwhile, gRPC cancels the request.
        connection = connections.take()
        try:
            return self._calls.result(connection.infer(request, timeout=limit, **beside))
        except grpc.RpcError as error:
            failure = connections.failed(connection, error, self.url)
        finally:
            connections.release(connection)
        raise failure  # not with gRPC's error as its context: see `Connections.failed`

    def call(
        self, model: str, request: protocol.Request, timeout: float
    ) -> tuple[protocol.IDs, str]:
        with translating(model, self.url):
            message, beside = self._calls.manager_request(model, request)
            answer = self._wait(self._asks, "infer", message, timeout, beside)
        return read_answer(GrpcResult(answer), model, self.url)

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with translating(model, self.url):
            request, beside = self._calls.config_request(model)
            return read_config(self._wait(self._asks, "config", request, timeout, beside))

    def server_version(self, timeout: float) -> str:
        with translating("", self.url):
            request, beside = self._calls.version_request()
            found = self._wait(self._asks, "version", request, timeout, beside)
        return str(found.version)

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Done, /, **options: Any
    ) -> None:
        request, beside = self._calls.request(model, inputs, **options)
        connections = self._sequences
        connection = connections.take()

        def over(call: Any) -> None:
            result: GrpcResult | None = None
            error: Exception | None = None
            try:
                result = self._calls.result(call.result())
            except grpc.RpcError as failed:
                error = connections.failed(connection, failed, self.url)
            except ProtocolError as unlike:
                error = unlike
            connections.release(connection)
            done(result, error)

        self._start(connections, connection, "infer", request, limit, beside, over)

    def open_stream(self, receive: Receive, /, limit: float | None = None) -> _Stream:
        return _Stream(self._sequences, self._calls, receive, limit)

    def close(self) -> None:
        self._asks.close()
        self._sequences.close()

    def _wait(
        self,
        connections: Connections,
        method: str,
        request: Any,
        limit: float,
        beside: Mapping[str, Any],
    ) -> Any:
        """Send a request in the background and wait for it. It goes on if the wait ends."""
        connection = connections.take()
        release: Callable[[Any], object] = lambda call: connections.release(connection)  # noqa: E731
        call = self._start(connections, connection, method, request, limit, beside, release)
        try:
            return call.result(limit)
        except grpc.FutureTimeoutError:
            connections.retire(connection)
            status = "StatusCode.DEADLINE_EXCEEDED"
            failure = InferenceServerException("Deadline Exceeded", status)
        except grpc.RpcError as error:
            failure = connections.failed(connection, error, self.url)
        raise failure

    def _start(
        self,
        connections: Connections,
        connection: Connection,
        method: str,
        request: Any,
        limit: float,
        beside: Mapping[str, Any],
        over: Callable[[Any], object],
    ) -> Any:
        try:
            send = getattr(connection, method).future
            call = send(request, timeout=max(limit, SHORT_S), **beside)
        except BaseException as error:
            connections.give_up(connection, error)
            raise
        call.add_done_callback(over)
        return call


def _is_ready(channel: Any) -> bool:
    # gRPC's public way, `subscribe`, needs a thread for each channel.
    try:
        return bool(channel._channel.check_connectivity_state(False) == _READY)
    except ValueError:  # another thread has just closed it
        return False


_READY = grpc.ChannelConnectivity.READY.value[0]


class _Stream(StreamBase):
    """A stream, and the thread that reads it. gRPC has another one, which sends."""

    def __init__(
        self, connections: Connections, calls: Calls, receive: Receive, limit: float | None
    ) -> None:
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        super().__init__(connections, calls, receive, requests)
        try:
            self._answers = self._connection.stream(
                iter(requests.get, None), timeout=limit, metadata=calls.metadata
            )
            spawn(self._read, name="cidalloc-stream")
        except BaseException as error:
            self.end()
            connections.give_up(self._connection, error)
            raise

    def _read(self) -> None:
        try:
            for answer in self._answers:
                self._received(answer)
        except Exception as error:  # in no other variable, else it would refer to itself
            self._ended(error)
        else:
            self._ended(None)
