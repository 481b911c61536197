"""Transports: one manager request over gRPC or HTTP, and any failure as one of our errors.

A transport is the client's only way to the outside, so it is also where tests put something else.
"""

from __future__ import annotations

import http.client
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from .. import wire
from ..errors import CidError, InternalError, InvalidArgument, ProtocolError, Unavailable

__all__ = ["GrpcTransport", "HttpTransport", "Transport", "connect", "translate", "unreachable"]

# No answer at all, and what tritonclient stumbles over when something else than Triton answers.
_STRANGE = (OSError, ValueError, LookupError, AttributeError, TypeError)


class Transport(Protocol):
    """What a client needs of a server."""

    url: str

    def call(self, model: str, request: wire.Request, timeout: float) -> wire.IDs:
        """Return the manager's OUTPUT, flat; ``timeout`` in seconds.

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


class _TritonTransport:
    """What gRPC and HTTP have in common."""

    module: Any  # of tritonclient
    url: str

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        raise NotImplementedError

    def call(self, model: str, request: wire.Request, timeout: float) -> wire.IDs:
        inputs = []
        for name, array in request.encode().items():
            kind = np_to_triton_dtype(array.dtype)
            tensor = self.module.InferInput(name, list(array.shape), kind)
            inputs.append(tensor.set_data_from_numpy(array))
        outputs = [self.module.InferRequestedOutput(wire.OUTPUT)]
        with self._translating(model):
            parameters = dict(request.parameters)
            result = self.infer(timeout, model, inputs, outputs=outputs, parameters=parameters)
        try:
            output = result.as_numpy(wire.OUTPUT)
        except ValueError:  # bytes that do not fit the shape
            output = None
        if output is None or output.dtype != "uint64":
            raise ProtocolError(f"model {model} at {self.url} answers unlike a cidalloc manager")
        flat: wire.IDs = output.reshape(-1)
        return flat

    @contextmanager
    def _translating(self, model: str) -> Iterator[None]:
        try:
            yield
        except (InferenceServerException, http.client.HTTPException, *_STRANGE) as error:
            raise translate(error, model, self.url) from error


class GrpcTransport(_TritonTransport):
    """gRPC; one connection serves all threads."""

    module = tritonclient.grpc

    def __init__(self, url: str, *, ssl: bool = False) -> None:
        self.url = url
        where = _host_and_port(url, 443 if ssl else 8001)
        self._open = partial(tritonclient.grpc.InferenceServerClient, where, ssl=ssl)
        self._triton = self._open()

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        return self._triton.infer(model, inputs, client_timeout=limit, **options)

    def open_stream(self, callback: Callable[..., None]) -> Any:
        triton = self._open()
        triton.start_stream(callback)
        return triton

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with self._translating(model):
            answer = self._triton.get_model_config(model, as_json=True, client_timeout=timeout)
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

    def __init__(self, url: str, *, ssl: bool = False) -> None:
        self.url = url
        where = _host_and_port(url, 443 if ssl else 8000)
        self._open = partial(tritonclient.http.InferenceServerClient, where, ssl=ssl)
        self.closed = False

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        return self._run(limit, lambda triton: triton.infer(model, inputs, **options))

    def open_stream(self, callback: Callable[..., None]) -> Any:
        raise InvalidArgument(f"streaming needs gRPC, and {self.url} is HTTP")

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with self._translating(model):
            config: Mapping[str, Any] = self._run(
                timeout, lambda triton: triton.get_model_config(model)
            )
            if not isinstance(config, dict):
                raise TypeError("a model configuration that is no JSON object")
        return config

    def _run(self, timeout: float, work: Callable[[Any], Any]) -> Any:
        def job() -> Any:
            for key in [key for key in _http.opened if key[0].closed]:
                _http.opened.pop(key).close()
            key = (self, timeout)
            if key not in _http.opened:
                # tritonclient knows a limit per connection only.
                _http.opened[key] = self._open(connection_timeout=timeout, network_timeout=timeout)
            return work(_http.opened[key])

        return _http_threads.submit(job).result()

    def close(self) -> None:
        # Each thread closes its connections with its next request.
        self.closed = True


class _Http(threading.local):
    """The HTTP clients of one of the threads, by transport and time limit."""

    def __init__(self) -> None:
        self.opened: dict[tuple[HttpTransport, float], Any] = {}


def _start_http_threads() -> None:
    """Make the pool of threads; in a forked child again, since threads stay with the parent."""
    global _http_threads
    _http_threads = ThreadPoolExecutor(_HTTP_AT_ONCE, "cidalloc-http")


_HTTP_AT_ONCE = 32  # requests of this process; threads are started as they are needed
_http = _Http()
_http_threads: ThreadPoolExecutor
_start_http_threads()
os.register_at_fork(after_in_child=_start_http_threads)


_SCHEMES: dict[str, Callable[[str], Transport]] = {
    "grpc": GrpcTransport,
    "grpcs": partial(GrpcTransport, ssl=True),
    "http": HttpTransport,
    "https": partial(HttpTransport, ssl=True),
}


def connect(url: str) -> Transport:
    """Return the transport for ``url``; without a scheme it is gRPC's ``host:port``.

    Raises:
        InvalidArgument: no such URL.
    """
    full = url if "://" in url else f"grpc://{url}"
    scheme = full.partition("://")[0]
    if scheme not in _SCHEMES:
        raise InvalidArgument(f"{url!r}: the scheme is one of {', '.join(_SCHEMES)}")
    return _SCHEMES[scheme](full)


def _host_and_port(url: str, default_port: int) -> str:
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
    if isinstance(error, OSError | http.client.HTTPException):
        return Unavailable(f"no answer from {url}: {error or type(error).__name__}")
    return None


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
