"""HTTP for asyncio: each request has a connection of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Any

import tritonclient.http
import tritonclient.http.aio
from aiohappyeyeballs import start_connection

from ... import protocol
from ..core.http_calls import IDLE_S, HttpAnswer, HttpBase, HttpCall, HttpResult
from ..core.tls import tls_context
from ..core.transport import (
    DAY_S,
    HURRY_S,
    Address,
    Done,
    boottime,
    check_options,
    read_answer,
    translating,
)
from .tasks import Tasks, deliver

__all__ = ["AsyncHttpTransport"]

_TLS = ("ssl_options", "ssl_context_factory", "insecure")  # of tritonclient's blocking client


class AsyncHttpTransport(HttpBase):
    """HTTP for asyncio. No request waits for another one."""

    def __init__(
        self, address: Address, headers: Mapping[str, str] | None, options: Mapping[str, Any]
    ) -> None:
        own = {name: value for name, value in options.items() if name not in _TLS}
        if address.tls and own.get("ssl_context") is None:
            tls = {name: options[name] for name in options.keys() - own.keys()}
            kind = tritonclient.http.InferenceServerClient
            own["ssl_context"] = tls_context(check_options(kind, address, tls))
        aio = tritonclient.http.aio.InferenceServerClient
        found = check_options(aio, address, {"conn_timeout": DAY_S, **own})
        super().__init__(address, headers, found["verbose"])
        self._context = found["ssl_context"] if address.tls else None
        self._longest = found["conn_timeout"]
        self._idle: list[_Connection] = []  # the latest at the end
        self._tasks = Tasks()
        self._closed = False

    async def infer(
        self, limit: float, model: str, inputs: list[Any], /, **options: Any
    ) -> HttpResult:
        call = self._request(model, inputs, **options)
        return (await self._send(call, limit)).result(call)

    async def call(
        self, model: str, request: protocol.Request, timeout: float
    ) -> tuple[protocol.IDs, str]:
        with translating(model, self.url):
            call = self._manager_request(model, request)
            result = (await self._send(call, timeout)).result(call)
        return read_answer(result, model, self.url)

    async def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with translating(model, self.url):
            call = self._config_request(model)
            return (await self._send(call, timeout)).json(call)

    async def server_version(self, timeout: float) -> str:
        with translating("", self.url):
            call = self._version_request()
            found = (await self._send(call, timeout)).json(call)
        return str(found.get("version", ""))

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Done, /, **options: Any
    ) -> None:
        self._tasks.start(deliver(self.infer(limit, model, inputs, **options), done))

    async def close(self) -> None:
        # Over HTTP the server does not notice that a request was given up.
        await self._tasks.wait(HURRY_S)
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    async def _send(self, call: HttpCall, limit: float) -> HttpAnswer:
        """Send a request and return its answer.

        Raises:
            OSError, asyncio.TimeoutError: no answer came.
        """
        limit = min(limit, self._longest)
        until = boottime() + limit
        connection = self._take()
        if connection is None:
            connection = await asyncio.wait_for(self._connect(), limit)
        try:
            answer = await connection.exchange(call.data, until - boottime())
        except BaseException:
            connection.close()
            self._broke = True
            raise
        if answer.reusable and not self._closed:
            connection.idle_since = boottime()
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    async def _connect(self) -> _Connection:
        # create_connection itself leaves a socket open if it is cancelled at the wrong moment.
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        _, connection = await loop.create_connection(
            _Connection,
            sock=await start_connection(found, happy_eyeballs_delay=0.25),
            ssl=self._context,
            server_hostname=self._name if self._context else None,
        )
        return connection

    def _closed_by_server(self) -> bool:
        before = len(self._idle)
        self._idle = [connection for connection in self._idle if not connection.over]
        return len(self._idle) < before

    def _take(self) -> _Connection | None:
        """Return an idle connection that the server has not closed."""
        stale = boottime() - IDLE_S
        while self._idle and self._idle[0].idle_since < stale:
            self._idle.pop(0).close()
        while self._idle:
            connection = self._idle.pop()
            if not connection.over:
                return connection
            self._broke = True
        return None


class _Connection(asyncio.Protocol):
    """A connection, with at most one request at a time."""

    def __init__(self) -> None:
        self.over = False
        self.idle_since = 0.0
        self._transport: Any = None
        self._answer: HttpAnswer | None = None  # to the request on its way
        self._waiter: asyncio.Future[HttpAnswer] | None = None

    async def exchange(self, data: bytes, limit: float) -> HttpAnswer:
        """Send a request and return its answer; raises what `AsyncHttpTransport._send` does."""
        if self.over:
            raise ConnectionError("the connection was closed at once")
        loop = asyncio.get_running_loop()
        self._answer, self._waiter = HttpAnswer(), loop.create_future()
        self._transport.write(data)
        timer = loop.call_later(limit, self._fail, asyncio.TimeoutError())
        try:
            return await self._waiter
        finally:
            timer.cancel()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self.close()
            return
        try:
            if self._answer.feed(data):
                answer, self._answer = self._answer, None
                if self._waiter is not None and not self._waiter.done():
                    self._waiter.set_result(answer)
        except ConnectionError as error:
            self._fail(error)

    def eof_received(self) -> None:
        self.over = True
        if self._answer is not None:
            self.data_received(b"")

    def connection_lost(self, error: Exception | None) -> None:
        self.over = True
        self._fail(error or ConnectionError("the connection was closed"))

    def close(self) -> None:
        """Close the connection."""
        self.over = True
        self._transport.abort()

    def _fail(self, error: Exception) -> None:
        self._answer = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
