"""Transports for asyncio: as `Transport`, but awaiting."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import aiohttp
import tritonclient.grpc.aio
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from .. import wire
from ..errors import InvalidArgument
from ._transport import (
    STRANGE,
    boottime,
    encode,
    host_and_port,
    opener,
    parse_url,
    read_answer,
    translate,
)

__all__ = ["AsyncTransport", "connect_async"]

_DAY_S = 86_400.0


class AsyncTransport(Protocol):
    """What an asynchronous client needs of a server; `Transport` says what each is."""

    url: str

    def now(self) -> float: ...

    async def call(
        self, model: str, request: wire.Request, timeout: float
    ) -> tuple[wire.IDs, str]: ...

    async def model_config(self, model: str, timeout: float) -> Mapping[str, Any]: ...

    async def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        """Call tritonclient's ``infer`` with a limit of ``limit`` seconds."""

    def open_stream(self, requests: AsyncIterator[dict[str, Any]]) -> Any:
        """Return tritonclient's iterator of answers to the requests, over gRPC.

        Raises:
            InvalidArgument: this is not gRPC.
        """

    async def close(self) -> None: ...


class _Triton:
    """What gRPC and HTTP have in common. The connection is made in the loop that first needs it."""

    module: Any  # of tritonclient, for its tensors
    kind: Any  # tritonclient's client
    port: int
    now = staticmethod(boottime)

    def __init__(
        self, url: str, headers: Mapping[str, str] | None, ssl: bool, options: Mapping[str, Any]
    ) -> None:
        self.url = url
        self._headers = None if headers is None else dict(headers)
        self._open = opener(self.kind, host_and_port(url, 443 if ssl else self.port), ssl, options)
        self._opened: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def _triton(self) -> Any:
        loop = asyncio.get_running_loop()
        if self._opened is None:
            self._opened, self._loop = self._open(), loop
        if self._loop is not loop:
            raise InvalidArgument(
                f"the client of {self.url} is used in another event loop: make one in each"
            )
        return self._opened

    async def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        raise NotImplementedError

    async def call(self, model: str, request: wire.Request, timeout: float) -> tuple[wire.IDs, str]:
        arguments = encode(self.module, request)
        with self._translating(model):
            result = await self.infer(timeout, model, arguments.pop("inputs"), **arguments)
        return read_answer(result, request, model, self.url)

    async def close(self) -> None:
        if self._opened is not None:
            await self._triton.close()

    @contextmanager
    def _translating(self, model: str) -> Iterator[None]:
        try:
            yield
        except InvalidArgument:
            raise
        except (
            *(InferenceServerException, http.client.HTTPException, aiohttp.ClientError),
            *(asyncio.TimeoutError, *STRANGE),
        ) as error:
            raise translate(error, model, self.url) from error


class AsyncGrpcTransport(_Triton):
    """gRPC; one connection serves all tasks."""

    module = tritonclient.grpc
    kind = tritonclient.grpc.aio.InferenceServerClient
    port = 8001

    async def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        options.setdefault("headers", self._headers)
        return await self._triton.infer(model, inputs, client_timeout=limit, **options)

    def open_stream(self, requests: AsyncIterator[dict[str, Any]]) -> Any:
        return self._triton.stream_infer(requests, headers=self._headers)

    async def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with self._translating(model):
            answer = await self._triton.get_model_config(
                model, headers=self._headers, as_json=True, client_timeout=timeout
            )
            config: Mapping[str, Any] = answer["config"]
        return config


class AsyncHttpTransport(_Triton):
    """HTTP; the tasks share a pool of connections."""

    module = tritonclient.http
    kind = tritonclient.http.aio.InferenceServerClient
    port = 8000

    def __init__(
        self, url: str, headers: Mapping[str, str] | None, ssl: bool, options: Mapping[str, Any]
    ) -> None:
        # Each request has a limit of its own; tritonclient's is for all alike.
        super().__init__(url, headers, ssl, {"conn_timeout": _DAY_S, **options})

    async def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        options.setdefault("headers", self._headers)
        return await asyncio.wait_for(self._triton.infer(model, inputs, **options), limit)

    def open_stream(self, requests: AsyncIterator[dict[str, Any]]) -> Any:
        raise InvalidArgument(f"streaming needs gRPC, and {self.url} is HTTP")

    async def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with self._translating(model):
            reading = self._triton.get_model_config(model, headers=self._headers)
            config: Mapping[str, Any] = await asyncio.wait_for(reading, timeout)
            if not isinstance(config, dict):
                raise TypeError("a model configuration that is no JSON object")
        return config


def connect_async(
    url: str, headers: Mapping[str, str] | None = None, options: Mapping[str, Any] | None = None
) -> AsyncTransport:
    """Return the transport for ``url``, as `cidalloc.client._transport.connect` does."""
    full, kind, ssl = parse_url(url)
    transport = AsyncGrpcTransport if kind == "grpc" else AsyncHttpTransport
    return transport(full, headers, ssl, options or {})
