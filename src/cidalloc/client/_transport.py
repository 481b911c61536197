"""Transports: one manager request over gRPC or HTTP, and any failure as one of our errors.

A transport is the client's only way to the outside, so it is also where tests put something else.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from .. import wire
from ..errors import CidError, InternalError, InvalidArgument, ProtocolError, Unavailable

__all__ = ["GrpcTransport", "HttpTransport", "Transport", "connect", "translate"]


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

    def open_triton(self, timeout: float) -> Any:
        """Return a new tritonclient client of the same server; the caller closes it."""

    def triton(self, timeout: float) -> Any:
        """Return a tritonclient client of the same server, which stays this transport's.

        Where tritonclient knows a time limit per connection only, ``timeout`` is that, in
        seconds; where it knows one per request, it is what `deadline` says.
        """

    def deadline(self, timeout: float) -> dict[str, Any]:
        """Return the arguments of ``infer`` that limit a request to ``timeout`` seconds."""

    def close(self) -> None:
        """Close all connections."""


class _TritonTransport:
    """What gRPC and HTTP have in common."""

    module: Any  # of tritonclient
    url: str

    def open_triton(self, timeout: float) -> Any:
        raise NotImplementedError

    def triton(self, timeout: float) -> Any:
        raise NotImplementedError

    def deadline(self, timeout: float) -> dict[str, Any]:
        raise NotImplementedError

    def call(self, model: str, request: wire.Request, timeout: float) -> wire.IDs:
        inputs = []
        for name, array in request.encode().items():
            kind = np_to_triton_dtype(array.dtype)
            tensor = self.module.InferInput(name, list(array.shape), kind)
            inputs.append(tensor.set_data_from_numpy(array))
        outputs = [self.module.InferRequestedOutput(wire.OUTPUT)]
        options = {"parameters": dict(request.parameters), **self.deadline(timeout)}
        with self._translating(model):
            result = self.triton(timeout).infer(model, inputs, outputs=outputs, **options)
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
        except (InferenceServerException, http.client.HTTPException, OSError) as error:
            raise translate(error, model, self.url) from error


class GrpcTransport(_TritonTransport):
    """gRPC; one connection serves all threads."""

    module = tritonclient.grpc

    def __init__(self, url: str, *, ssl: bool = False) -> None:
        self.url = url
        self._where = _host_and_port(url, 443 if ssl else 8001)
        self._ssl = ssl
        self._triton = self.open_triton(0)

    def open_triton(self, timeout: float) -> Any:
        return tritonclient.grpc.InferenceServerClient(self._where, ssl=self._ssl)

    def triton(self, timeout: float) -> Any:
        return self._triton

    def deadline(self, timeout: float) -> dict[str, Any]:
        return {"client_timeout": timeout}

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with self._translating(model):
            answer = self._triton.get_model_config(model, as_json=True, client_timeout=timeout)
        config: Mapping[str, Any] = answer["config"]
        return config

    def close(self) -> None:
        self._triton.close()


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.opened: dict[float, Any] = {}


class HttpTransport(_TritonTransport):
    """HTTP; every thread has connections of its own, since tritonclient ties them to theirs."""

    module = tritonclient.http

    def __init__(self, url: str, *, ssl: bool = False) -> None:
        self.url = url
        self._where = _host_and_port(url, 443 if ssl else 8000)
        self._ssl = ssl
        self._local = _PerThread()

    def open_triton(self, timeout: float) -> Any:
        return tritonclient.http.InferenceServerClient(
            self._where, ssl=self._ssl, connection_timeout=timeout, network_timeout=timeout
        )

    def triton(self, timeout: float) -> Any:
        opened = self._local.opened
        if timeout not in opened:
            opened[timeout] = self.open_triton(timeout)
        return opened[timeout]

    def deadline(self, timeout: float) -> dict[str, Any]:
        return {}

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with self._translating(model):
            config: Mapping[str, Any] = self.triton(timeout).get_model_config(model)
        return config

    def close(self) -> None:
        # The connections of other threads close when those threads end.
        while self._local.opened:
            self._local.opened.popitem()[1].close()


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
        port = parts.port or default_port
    except ValueError as error:
        raise InvalidArgument(f"{url!r}: {error}") from None
    if not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
        raise InvalidArgument(f"{url!r} is not of the form scheme://host:port")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{port}"


def translate(error: Exception, model: str, url: str) -> CidError:
    """Return our error for a failure that tritonclient, its sockets or Triton reported."""
    if not isinstance(error, InferenceServerException):
        return Unavailable(f"no answer from {url}: {error or type(error).__name__}")
    text, status = error.message() or "", error.status()
    ours = wire.parse_error(text)
    if ours is not None:
        return ours
    if "unknown model" in text.lower():
        return Unavailable(
            f"{url} serves no model {model}: 'cidalloc model' writes the manager into a model"
            " repository"
        )
    if status in _UNAVAILABLE or "is not healthy" in text or "not ready" in text:
        return Unavailable(f"no answer from {url}: {text}")
    if status in _INVALID:
        return InvalidArgument(text)
    if status in _INTERNAL:
        return InternalError(text)
    return ProtocolError(f"unexpected answer from {url}: {error}")


# The status of gRPC, of HTTP, and, where tritonclient gave up by itself, none.
_UNAVAILABLE = ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "503", "504", "502", None)
_INVALID = ("StatusCode.INVALID_ARGUMENT", "400")
_INTERNAL = ("StatusCode.INTERNAL", "StatusCode.UNKNOWN", "500")
