"""HTTP for threads: each request has a connection of its own, and runs in the calling thread.

tritonclient's HTTP client runs on gevent, which ties it to its thread and gives every thread an
event loop whose file descriptors it never closes. So the bodies are tritonclient's, and the
connections are sockets.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Mapping
from typing import Any

import tritonclient.http

from ... import protocol
from ..core.http_calls import IDLE_S, HttpAnswer, HttpBase, HttpCall, HttpResult
from ..core.tls import tls_context
from ..core.transport import (
    Address,
    Done,
    boottime,
    check_options,
    read_answer,
    translating,
)
from .threads import spawn

__all__ = ["HttpTransport"]


_READ = 2**16
_LOOK_S = 0.01
# To look at a connection releases the GIL, which costs a lot beside many threads. So one that was
# seen open, or used, within so many seconds is sent over without a second look.


class HttpTransport(HttpBase):
    """HTTP for threads. No request waits for another one."""

    def __init__(
        self, address: Address, headers: Mapping[str, str] | None, options: Mapping[str, Any]
    ) -> None:
        found = check_options(tritonclient.http.InferenceServerClient, address, options)
        super().__init__(address, headers, found["verbose"])
        self._context = tls_context(found) if address.tls else None
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []  # the latest at the end
        self._closed = False

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> HttpResult:
        call = self._request(model, inputs, **options)
        return self._send(call, limit).result(call)

    def call(
        self, model: str, request: protocol.Request, timeout: float
    ) -> tuple[protocol.IDs, str]:
        with translating(model, self.url):
            call = self._manager_request(model, request)
            result = self._send(call, timeout).result(call)
        return read_answer(result, model, self.url)

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with translating(model, self.url):
            call = self._config_request(model)
            return self._send(call, timeout).json(call)

    def server_version(self, timeout: float) -> str:
        with translating("", self.url):
            call = self._version_request()
            return str(self._send(call, timeout).json(call).get("version", ""))

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Done, /, **options: Any
    ) -> None:
        def work() -> None:
            result, error = None, None
            try:
                result = self.infer(limit, model, inputs, **options)
            except Exception as failed:
                error = failed
            done(result, error)

        spawn(work, name="cidalloc-request")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.socket.close()

    def _send(self, call: HttpCall, limit: float) -> HttpAnswer:
        """Send a request and return its answer.

        Raises:
            OSError: no answer came.
        """
        until = boottime() + limit
        connection = self._take() or _Connection(self._connect(until))
        answer = HttpAnswer()
        try:
            connection.exchange(call.data, answer, until)
        except OSError:
            self._broke = True
            raise
        finally:
            self._give_back(connection, answer.reusable)
        return answer

    def _connect(self, until: float) -> socket.socket:
        found: Any = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        for left in range(len(found), 0, -1):  # each address may take its share of the time
            limit = max((until - boottime()) / left, 0.001)
            try:
                connected = socket.create_connection(found[-left][4][:2], limit)
                break
            except OSError:
                if left == 1:
                    raise
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context is not None:
            connected.settimeout(max(until - boottime(), 0.001))
            connected = self._context.wrap_socket(connected, server_hostname=self._name)
        return connected

    def _closed_by_server(self) -> bool:
        # The one that comes next is enough: a server that has gone has closed all.
        latest = self._idle[-1:]
        if not latest or not latest[0].is_over():
            return False
        with self._lock:  # another thread may have used one meanwhile
            closed = [connection for connection in self._idle if connection.is_over()]
            self._idle = [connection for connection in self._idle if connection not in closed]
        for connection in closed:
            connection.socket.close()
        return bool(closed)

    def _take(self) -> _Connection | None:
        """Return an idle connection that the server has not closed."""
        old: list[_Connection] = []
        found = None
        with self._lock:
            now = boottime()
            while self._idle and self._idle[0].idle_since < now - IDLE_S:
                old.append(self._idle.pop(0))
            while found is None and self._idle:
                connection = self._idle.pop()
                if connection.open_at < now - _LOOK_S and connection.is_over():
                    old.append(connection)
                    self._broke = True
                else:
                    found = connection
        for connection in old:
            connection.socket.close()
        return found

    def _give_back(self, connection: _Connection, usable: bool) -> None:
        with self._lock:
            if usable and not self._closed:
                connection.idle_since = connection.open_at = boottime()
                self._idle.append(connection)
                return
        connection.socket.close()


class _Connection:
    """A connection, with at most one request at a time."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.idle_since = self.open_at = 0.0  # when it was last used, and last seen open
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)

    def is_over(self) -> bool:
        """Whether there is something to read while no request is on its way: its end."""
        now = boottime()
        while True:
            try:
                over = bool(self._poll.poll(0))
                break
            except RuntimeError:  # another thread looks at the same moment
                continue
        if not over:
            self.open_at = now
        return over

    def exchange(self, data: bytes, answer: HttpAnswer, until: float) -> None:
        """Send a request and read its answer; raises what `HttpTransport._send` does."""
        self.socket.settimeout(max(until - boottime(), 0.001))
        self.socket.sendall(data)
        while not answer.feed(self.socket.recv(_READ)):
            left = until - boottime()
            if left <= 0:
                raise TimeoutError("the answer took too long")
            self.socket.settimeout(left)
