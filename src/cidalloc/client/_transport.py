"""Transports: one manager request over gRPC or HTTP, and any failure as one of our errors.

Also the time, since a client's only ways to the outside are its transport and its threads.

A transport is the client's only way to the outside, so it is also where tests put something else.
"""

from __future__ import annotations

import asyncio
import http.client
import inspect
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from .. import wire
from ..codes import Operation
from ..errors import CidError, InternalError, InvalidArgument, ProtocolError, Unavailable

__all__ = [
    "STRANGE",
    "GrpcTransport",
    "HttpTransport",
    "Transport",
    "boottime",
    "connect",
    "encode",
    "parse_url",
    "read_answer",
    "translate",
    "unreachable",
]

# No answer at all, and what tritonclient stumbles over when something else than Triton answers.
STRANGE = (OSError, ValueError, LookupError, AttributeError, TypeError)


boottime: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
"""Returns the seconds since boot; it runs on in suspend and never jumps."""


class Transport(Protocol):
    """What a client needs of a server."""

    url: str

    def now(self) -> float:
        """Return the time in seconds, by a clock that runs on in suspend."""

    def call(self, model: str, request: wire.Request, timeout: float) -> tuple[wire.IDs, str]:
        """Return the manager's OUTPUT, flat, and its DETAIL; ``timeout`` in seconds.

        Raises:
            CidError: what the manager answered, or why it did not.
        """

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        """Return a model's configuration as the JSON that Triton makes of it."""

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        """Call tritonclient's ``infer`` with a limit of ``limit`` seconds."""

    def open_stream(self, callback: Callable[..., None]) -> Any:
        """Return a new tritonclient client with a started gRPC stream; the caller closes it.

        Raises:
            InvalidArgument: this is not gRPC.
        """

    def close(self) -> None:
        """Close all connections."""


def encode(module: Any, request: wire.Request) -> dict[str, Any]:
    """Return the arguments of tritonclient's ``infer`` for a request to the manager."""
    inputs = []
    for name, array in request.encode().items():
        kind = np_to_triton_dtype(array.dtype)
        tensor = module.InferInput(name, list(array.shape), kind)
        inputs.append(tensor.set_data_from_numpy(array))
    names = [wire.OUTPUT]
    if request.operation is Operation.STATUS:
        names.append(wire.DETAIL)
    outputs = [module.InferRequestedOutput(name) for name in names]
    return {"inputs": inputs, "outputs": outputs, "parameters": dict(request.parameters)}


def read_answer(result: Any, request: wire.Request, model: str, url: str) -> tuple[wire.IDs, str]:
    """Return OUTPUT and DETAIL of what the manager answered.

    Raises:
        ProtocolError: it is no manager's answer.
    """
    try:
        output, detail = result.as_numpy(wire.OUTPUT), ""
        if request.operation is Operation.STATUS:
            detail = result.as_numpy(wire.DETAIL)[0, 0].decode()
    except (ValueError, TypeError, LookupError):  # bytes that do not fit the shape
        output = None
    if output is None or output.dtype != "uint64":
        raise ProtocolError(f"model {model} at {url} answers unlike a cidalloc manager")
    return output.reshape(-1), detail


class _TritonTransport:
    """What gRPC and HTTP have in common."""

    module: Any  # of tritonclient
    url: str
    now = staticmethod(boottime)

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        raise NotImplementedError

    def _ask(self, limit: float, model: str, inputs: list[Any], **options: Any) -> Any:
        """Send a request to the manager: as any other, unless those could stand in its way."""
        return self.infer(limit, model, inputs, **options)

    def call(self, model: str, request: wire.Request, timeout: float) -> tuple[wire.IDs, str]:
        arguments = encode(self.module, request)
        with self._translating(model):
            result = self._ask(timeout, model, arguments.pop("inputs"), **arguments)
        return read_answer(result, request, model, self.url)

    @contextmanager
    def _translating(self, model: str) -> Iterator[None]:
        try:
            yield
        except (InferenceServerException, http.client.HTTPException, *STRANGE) as error:
            raise translate(error, model, self.url) from error


class GrpcTransport(_TritonTransport):
    """gRPC; one connection serves all threads."""

    module = tritonclient.grpc

    def __init__(
        self, url: str, headers: Mapping[str, str] | None, ssl: bool, options: Mapping[str, Any]
    ) -> None:
        self.url = url
        where = host_and_port(url, 443 if ssl else 8001)
        self._headers = None if headers is None else dict(headers)
        self._open = opener(tritonclient.grpc.InferenceServerClient, where, ssl, options)
        self._triton = self._open()

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        options.setdefault("headers", self._headers)
        return self._triton.infer(model, inputs, client_timeout=limit, **options)

    def open_stream(self, callback: Callable[..., None]) -> Any:
        triton = self._open()
        triton.start_stream(callback, headers=self._headers)
        return triton

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with self._translating(model):
            answer = self._triton.get_model_config(
                model, headers=self._headers, as_json=True, client_timeout=timeout
            )
            config: Mapping[str, Any] = answer["config"]
        return config

    def close(self) -> None:
        self._triton.close()


class HttpTransport(_TritonTransport):
    """HTTP; the requests of all threads go through a few threads that live on.

    tritonclient's HTTP client runs on gevent, which ties it to its thread, and gives every thread
    an event loop with file descriptors that it never takes back.
    """

    module = tritonclient.http

    def __init__(
        self, url: str, headers: Mapping[str, str] | None, ssl: bool, options: Mapping[str, Any]
    ) -> None:
        self.url = url
        where = host_and_port(url, 443 if ssl else 8000)
        self._headers = None if headers is None else dict(headers)
        self._open = opener(tritonclient.http.InferenceServerClient, where, ssl, options)
        self.closed = False

    def infer(
        self, limit: float, model: str, inputs: list[Any], /, *, asks: bool = False, **options: Any
    ) -> Any:
        options.setdefault("headers", self._headers)
        return self._run(limit, lambda triton: triton.infer(model, inputs, **options), asks)

    def _ask(self, limit: float, model: str, inputs: list[Any], **options: Any) -> Any:
        return self.infer(limit, model, inputs, asks=True, **options)

    def open_stream(self, callback: Callable[..., None]) -> Any:
        raise InvalidArgument(f"streaming needs gRPC, and {self.url} is HTTP")

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with self._translating(model):
            config: Mapping[str, Any] = self._run(
                timeout, lambda triton: triton.get_model_config(model, headers=self._headers)
            )
            if not isinstance(config, dict):
                raise TypeError("a model configuration that is no JSON object")
        return config

    def _run(self, timeout: float, work: Callable[[Any], Any], asks: bool = False) -> Any:
        def job() -> Any:
            for key in [key for key in _http.opened if key[0].closed]:
                _http.opened.pop(key).close()
            key = (self, timeout)
            if key not in _http.opened:
                # tritonclient knows a limit per connection only.
                _http.opened[key] = self._open(connection_timeout=timeout, network_timeout=timeout)
            return work(_http.opened[key])

        return (_http_asks if asks else _http_threads).submit(job).result()

    def close(self) -> None:
        # Each thread closes its connections with its next request.
        self.closed = True


class _Http(threading.local):
    """The HTTP clients of one of the threads, by transport and time limit."""

    def __init__(self) -> None:
        self.opened: dict[tuple[HttpTransport, float], Any] = {}


def _start_http_threads() -> None:
    """Make the pool of threads; in a forked child again, since threads stay with the parent."""
    global _http_threads, _http_asks
    _http_threads = ThreadPoolExecutor(_HTTP_AT_ONCE, "cidalloc-http")
    # The manager's requests have some of their own, or heartbeats would wait behind sequences.
    _http_asks = ThreadPoolExecutor(_HTTP_ASKS_AT_ONCE, "cidalloc-http-manager")


_HTTP_AT_ONCE = 32  # requests of this process; threads are started as they are needed
_HTTP_ASKS_AT_ONCE = 8
_http = _Http()
_http_threads: ThreadPoolExecutor
_http_asks: ThreadPoolExecutor
_start_http_threads()
os.register_at_fork(after_in_child=_start_http_threads)


_SCHEMES = ("grpc", "grpcs", "http", "https")


def parse_url(url: str) -> tuple[str, str, bool]:
    """Return the URL with its scheme, ``grpc`` or ``http``, and whether it is with TLS.

    Raises:
        InvalidArgument: no such URL.
    """
    full = url if "://" in url else f"grpc://{url}"
    scheme = full.partition("://")[0]
    if scheme not in _SCHEMES:
        raise InvalidArgument(f"{url!r}: the scheme is one of {', '.join(_SCHEMES)}")
    return full, scheme[:4], len(scheme) == 5


def connect(
    url: str, headers: Mapping[str, str] | None = None, options: Mapping[str, Any] | None = None
) -> Transport:
    """Return the transport for ``url``; without a scheme it is gRPC's ``host:port``.

    Args:
        url: where the server is.
        headers: go with every request.
        options: further arguments of tritonclient's ``InferenceServerClient``.

    Raises:
        InvalidArgument: no such URL, or no such option.
    """
    full, kind, ssl = parse_url(url)
    transport = GrpcTransport if kind == "grpc" else HttpTransport
    return transport(full, headers, ssl, options or {})


def opener(
    kind: Callable[..., Any], where: str, ssl: bool, options: Mapping[str, Any]
) -> partial[Any]:
    """Return what makes tritonclient's client.

    Raises:
        InvalidArgument: an argument that it does not take.
    """
    try:
        inspect.signature(kind).bind(where, ssl=ssl, **options)
    except TypeError as error:
        raise InvalidArgument(f"tritonclient's client: {error}") from None
    return partial(kind, where, ssl=ssl, **options)


def host_and_port(url: str, default_port: int) -> str:
    try:
        parts = urlsplit(url)
        port = default_port if parts.port is None else parts.port
    except ValueError as error:
        raise InvalidArgument(f"{url!r}: {error}") from None
    if not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
        raise InvalidArgument(f"{url!r} is not of the form scheme://host:port")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{port}"


def unreachable(error: BaseException, url: str) -> Unavailable | None:
    """Return our error if ``error`` means that no answer came; None if it is one of Triton's."""
    if isinstance(error, InferenceServerException):
        text, status = error.message() or "", error.status()
        late = status == "StatusCode.DEADLINE_EXCEEDED" or text == _HTTP_TIMEOUT
        away = status == "StatusCode.UNAVAILABLE" and _GRPC_AWAY.search(text)
        return Unavailable(f"no answer from {url}: {text}") if late or away else None
    if isinstance(error, _NO_ANSWER):
        return Unavailable(f"no answer from {url}: {error or type(error).__name__}")
    return None


_NO_ANSWER = (OSError, http.client.HTTPException, asyncio.TimeoutError, aiohttp.ClientError)
# What tritonclient says, without a status, when geventhttpclient timed out.
_HTTP_TIMEOUT = "failed to obtain inference response"
# What gRPC itself, and not the server, says with the status UNAVAILABLE.
_GRPC_AWAY = re.compile(
    "failed to connect|connection|socket|GOAWAY|keepalive|DNS|name resolution|Broken pipe", re.I
)


def translate(error: Exception, model: str, url: str) -> CidError:
    """Return our error for a failure that tritonclient, its sockets or Triton reported."""
    away = unreachable(error, url)
    if away is not None:
        return away
    if not isinstance(error, InferenceServerException):
        return ProtocolError(f"model {model} at {url} answers unlike Triton: {error!r}")
    text, status = error.message() or "", error.status()
    ours = wire.parse_error(text)
    if ours is not None:
        return ours
    if "unknown model" in text.lower():
        return Unavailable(f"{url} serves no model {model}")
    if status in _UNAVAILABLE or "is not healthy" in text or "not ready" in text:
        return Unavailable(f"no answer from {url}: {text}")
    if status in _INVALID:
        return InvalidArgument(text)
    if status in _INTERNAL:
        return InternalError(text)
    return ProtocolError(f"unexpected answer from {url}: {error}")


# The status of gRPC, and of HTTP.
_UNAVAILABLE = ("StatusCode.UNAVAILABLE", "503", "504", "502")
_INVALID = ("StatusCode.INVALID_ARGUMENT", "400")
_INTERNAL = ("StatusCode.INTERNAL", "StatusCode.UNKNOWN", "500")
