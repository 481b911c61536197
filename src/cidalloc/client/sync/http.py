"""HTTP for threads: each request has a connection of its own, and runs in the calling thread.

tritonclient's HTTP client runs on gevent, which ties it to its thread and gives every thread an
event loop whose file descriptors it never closes. So the bodies are tritonclient's, and the
connections are the standard library's.
"""

from __future__ import annotations

import gzip
import http.client
import json
import select
import threading
import zlib
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode

import tritonclient.http
from tritonclient.utils import InferenceServerException

from ... import protocol
from ...errors import InvalidArgument
from ..core.tls import tls_context
from ..core.transport import (
    Address,
    Done,
    Receive,
    Stream,
    boottime,
    check_headers,
    check_options,
    encode,
    read_answer,
    translating,
)
from .threads import spawn

__all__ = ["HttpTransport"]

_IDLE_S = 30.0  # an idle connection is kept so long
_BODY = tritonclient.http.InferenceServerClient.generate_request_body
_LENGTH = "Inference-Header-Content-Length"
_PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


class HttpTransport:
    """HTTP for threads. No request waits for another one."""

    inputs = tritonclient.http.InferInput
    now = staticmethod(boottime)

    def __init__(
        self, address: Address, headers: Mapping[str, str] | None, options: Mapping[str, Any]
    ) -> None:
        found = check_options(tritonclient.http.InferenceServerClient, address, options)
        self.url = address.url
        self._target = address.target
        self._path = f"{address.path}/v2/models/"
        self._headers = check_headers(headers)
        self._context = tls_context(found) if address.tls else None
        self._verbose = found["verbose"]
        self._lock = threading.Lock()
        # Idle connections and when they became idle, the latest at the end.
        self._idle: list[tuple[float, http.client.HTTPConnection]] = []
        self._closed = False

    def infer(
        self,
        limit: float,
        model: str,
        inputs: list[Any],
        /,
        *,
        model_version: str = "",
        headers: Mapping[str, str] | None = None,
        query_params: Mapping[str, Any] | None = None,
        request_compression_algorithm: str | None = None,
        response_compression_algorithm: str | None = None,
        secret: bool = False,
        **options: Any,
    ) -> Any:
        body, size = _BODY(inputs, **options)
        if self._verbose and not secret:
            print(model, body[:size])
        sent = dict(self._headers if headers is None else headers)
        if size is not None:
            sent[_LENGTH] = str(size)
        if request_compression_algorithm is not None:
            body = _packed(request_compression_algorithm, body)
            sent["Content-Encoding"] = request_compression_algorithm
        if response_compression_algorithm is not None:
            sent["Accept-Encoding"] = response_compression_algorithm
        version = f"/versions/{model_version}" if model_version else ""
        query = f"?{urlencode(query_params, doseq=True)}" if query_params else ""
        path = f"{self._path}{quote(model)}{version}/infer{query}"
        answer, content = self._send("POST", path, body, sent, limit)
        length = answer.getheader(_LENGTH)
        return tritonclient.http.InferResult.from_response_body(
            content,
            verbose=self._verbose and not secret,
            header_length=None if length is None else int(length),
            content_encoding=answer.getheader("Content-Encoding"),
        )

    def call(
        self, model: str, request: protocol.Request, timeout: float
    ) -> tuple[protocol.IDs, str]:
        with translating(model, self.url):
            arguments = encode(tritonclient.http, request)
            result = self.infer(timeout, model, arguments.pop("inputs"), secret=True, **arguments)
        return read_answer(result, request, model, self.url)

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with translating(model, self.url):
            path = f"{self._path}{quote(model)}/config"
            _, content = self._send("GET", path, b"", self._headers, timeout)
            config: Mapping[str, Any] = json.loads(content)
            if not isinstance(config, dict):
                raise TypeError("a model configuration that is not a JSON object")
        return config

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

    def open_stream(self, receive: Receive, /) -> Stream:
        raise InvalidArgument(f"streaming needs gRPC, and {self.url} is HTTP")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()

    def _send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], limit: float
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Send a request and return its answer, read to its end.

        Raises:
            InferenceServerException: Triton answered with an error.
            OSError, http.client.HTTPException: no answer came.
        """
        until = boottime() + limit
        connection = self._take(limit)
        usable = False
        try:
            connection.request(method, path, body, headers)
            _set_timeout(connection, until)
            answer = connection.getresponse()
            content = answer.read()
            usable = not answer.will_close
        finally:
            self._give_back(connection, usable)
        if answer.status != 200:
            raise _failure(answer.status, content)
        return answer, content

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


def _failure(status: int, content: bytes) -> InferenceServerException:
    """Return tritonclient's exception for an answer with an error, as tritonclient does."""
    try:
        text = json.loads(content)["error"]
    except (ValueError, LookupError, TypeError):
        text = content[:1000].decode(errors="replace")
    return InferenceServerException(str(text), str(status))


def _packed(name: str, body: bytes) -> bytes:
    if name not in _PACK:
        raise InvalidArgument(f"compression {name!r} is neither 'gzip' nor 'deflate'")
    return _PACK[name](body)
