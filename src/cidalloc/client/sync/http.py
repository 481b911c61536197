"""HTTP for threads: each request has a connection of its own, and runs in the calling thread.

tritonclient's HTTP client runs on gevent, which ties it to its thread and gives every thread an
event loop whose file descriptors it never closes. So the bodies are tritonclient's, and the
connections are the standard library's.
"""

from __future__ import annotations

import http.client
import select
import threading
from collections.abc import Mapping
from typing import Any

import tritonclient.http

from ... import protocol
from ..core.http_calls import HttpAnswer, HttpBase, HttpCall, HttpResult
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

_IDLE_S = 30.0  # an idle connection is kept so long


class HttpTransport(HttpBase):
    """HTTP for threads. No request waits for another one."""

    def __init__(
        self, address: Address, headers: Mapping[str, str] | None, options: Mapping[str, Any]
    ) -> None:
        found = check_options(tritonclient.http.InferenceServerClient, address, options)
        super().__init__(address, headers, found["verbose"])
        self._target = address.target
        self._context = tls_context(found) if address.tls else None
        self._lock = threading.Lock()
        # Idle connections and when they became idle, the latest at the end.
        self._idle: list[tuple[float, http.client.HTTPConnection]] = []
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
        return read_answer(result, request, model, self.url)

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with translating(model, self.url):
            return self._send(self._config_request(model), timeout).json()

    def server_version(self, timeout: float) -> str:
        with translating("", self.url):
            return str(self._send(self._version_request(), timeout).json().get("version", ""))

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
        for _, connection in idle:
            connection.close()

    def _send(self, call: HttpCall, limit: float) -> HttpAnswer:
        """Send a request and return its answer.

        Raises:
            OSError, http.client.HTTPException: no answer came.
        """
        until = boottime() + limit
        connection = self._take(limit)
        usable = False
        try:
            connection.request(call.method, call.path, call.body, call.headers)
            _set_timeout(connection, until)
            answer = connection.getresponse()
            content = answer.read()
            usable = not answer.will_close
        finally:
            self._give_back(connection, usable)
        return HttpAnswer(answer.status, answer.headers, content)

    def _take(self, limit: float) -> http.client.HTTPConnection:
        old: list[http.client.HTTPConnection] = []
        found = None
        with self._lock:
            stale = boottime() - _IDLE_S
            while self._idle and self._idle[0][0] < stale:
                old.append(self._idle.pop(0)[1])
            while found is None and self._idle:
                connection = self._idle.pop()[1]
                if _went_away(connection):
                    old.append(connection)
                else:
                    found = connection
        for connection in old:
            connection.close()
        if found is None:
            if self._context is None:
                found = http.client.HTTPConnection(self._target, timeout=limit)
            else:
                found = http.client.HTTPSConnection(
                    self._target, timeout=limit, context=self._context
                )
        elif found.sock is not None:
            found.sock.settimeout(limit)
        return found

    def _give_back(self, connection: http.client.HTTPConnection, usable: bool) -> None:
        with self._lock:
            if usable and not self._closed:
                self._idle.append((boottime(), connection))
                return
        connection.close()


def _set_timeout(connection: http.client.HTTPConnection, until: float) -> None:
    if connection.sock is not None:
        connection.sock.settimeout(max(until - boottime(), 0.001))


def _went_away(connection: http.client.HTTPConnection) -> bool:
    """Whether the server has closed an idle connection: then there is something to read."""
    if connection.sock is None:
        return True
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))
