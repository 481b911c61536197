"""gRPC for threads."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from ... import protocol
from ...errors import CidError, Unavailable
from ..core.grpc_calls import (
    SHORT_S,
    Calls,
    Connection,
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
from .threads import spawn

__all__ = ["GrpcTransport"]


class GrpcTransport:
    """gRPC for threads. A request blocks the thread that sends it, without any other."""

    inputs = tritonclient.grpc.InferInput
    now = staticmethod(boottime)

    def __init__(
        self, address: Address, headers: Mapping[str, str] | None, options: Mapping[str, Any]
    ) -> None:
        self.url = address.url
        self._calls = Calls(address, headers, options)
        # The manager's requests never wait behind those of sequences.
        self._asks, self._sequences = (
            Connections(lambda: self._calls.channel(grpc), lambda channel: channel.close())
            for _ in range(2)
        )

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        request, beside = self._calls.request(model, inputs, **options)
        self._calls.show(request)
        if limit < SHORT_S:
            answer = self._wait(self._sequences, "infer", request, limit, beside)
        else:
            answer = self._block(request, limit, beside)
        self._calls.show(answer)
        return tritonclient.grpc.InferResult(answer)

    def call(
        self, model: str, request: protocol.Request, timeout: float
    ) -> tuple[protocol.IDs, str]:
        with translating(model, self.url):
            message, beside = self._calls.manager_request(model, request)
            answer = self._wait(self._asks, "infer", message, timeout, beside)
        return read_answer(tritonclient.grpc.InferResult(answer), request, model, self.url)

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with translating(model, self.url):
            request, beside = self._calls.config_request(model)
            return read_config(self._wait(self._asks, "config", request, timeout, beside))

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Done, /, **options: Any
    ) -> None:
        request, beside = self._calls.request(model, inputs, **options)
        connections = self._sequences
        connection = connections.take()

        def over(call: Any) -> None:
            result, error = None, None
            try:
                self._calls.show(call.result())
                result = tritonclient.grpc.InferResult(call.result())
            except grpc.RpcError as failed:
                error = connections.failed(connection, failed, self.url)
            connections.release(connection)
            done(result, error)

        self._calls.show(request)
        self._start(connections, connection, "infer", request, limit, beside, over)

    def open_stream(self, receive: Receive, /) -> _Stream:
        return _Stream(self._sequences, self._calls, receive)

    def close(self) -> None:
        self._asks.close()
        self._sequences.close()

    def _block(self, request: Any, limit: float, beside: Mapping[str, Any]) -> Any:
        """Send a request in this thread alone, which costs half of what others take.

        If a signal handler raises an exception in the main thread meanwhile, gRPC cancels it.
        """
        connection = self._sequences.take()
        try:
            return connection.infer(request, timeout=limit, **beside)
        except grpc.RpcError as error:
            raise self._sequences.failed(connection, error, self.url) from None
        finally:
            self._sequences.release(connection)

    def _wait(
        self,
        connections: Connections,
        method: str,
        request: Any,
        limit: float,
        beside: Mapping[str, Any],
    ) -> Any:
        """Send a request in the background and wait for it; when that ends, it goes on."""
        connection = connections.take()
        release: Callable[[Any], object] = lambda call: connections.release(connection)  # noqa: E731
        call = self._start(connections, connection, method, request, limit, beside, release)
        try:
            return call.result(limit)
        except grpc.FutureTimeoutError:
            connections.retire(connection)
            status = "StatusCode.DEADLINE_EXCEEDED"
            raise InferenceServerException("Deadline Exceeded", status) from None
        except grpc.RpcError as error:
            raise connections.failed(connection, error, self.url) from None

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


class _Stream:
    """A stream, and the thread that reads it. gRPC has another one, which sends."""

    def __init__(self, connections: Connections, calls: Calls, receive: Receive) -> None:
        self._connections, self._calls, self._receive = connections, calls, receive
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.over = False
        self._connection = connections.take()
        try:
            self._answers = self._connection.stream(
                iter(self._queue.get, None), metadata=calls.metadata
            )
            spawn(self._read, name="cidalloc-stream")
        except BaseException as error:
            self._queue.put(None)
            connections.give_up(self._connection, error)
            raise

    def send(self, model: str, inputs: list[Any], /, **options: Any) -> None:
        request, _ = self._calls.request(model, inputs, **options)
        if self.over:
            raise Unavailable(f"the stream to {self._calls.url} broke: open a new sequence")
        self._calls.show(request)
        self._queue.put(request)

    def end(self) -> None:
        self._queue.put(None)

    def cut(self) -> None:
        if not self.over:
            self._answers.cancel()

    def suspect(self) -> None:
        self._connections.retire(self._connection)

    def _read(self) -> None:
        try:
            for answer in self._answers:
                self._calls.show(answer)
                self._receive(*read_stream(answer))
            error: CidError = Unavailable(f"the stream to {self._calls.url} was closed")
        except Exception as failed:
            self.suspect()
            error = stream_broke(failed, self._calls.url)
        self.over = True
        self._queue.put(None)  # gRPC's other thread ends
        self._connections.release(self._connection)
        self._receive("", True, None, error)
