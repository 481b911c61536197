"""HTTP for asyncio, over tritonclient's client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import tritonclient.http
import tritonclient.http.aio

from ... import protocol
from ...errors import InvalidArgument
from ..core.tls import tls_context
from ..core.transport import (
    DAY_S,
    HURRY_S,
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
from .tasks import Tasks, deliver

__all__ = ["AsyncHttpTransport"]

_TLS = ("ssl_options", "ssl_context_factory", "insecure")  # of tritonclient's blocking client


class AsyncHttpTransport:
    """HTTP for asyncio. Each request has a connection and a time limit of its own."""

    inputs = tritonclient.http.InferInput
    now = staticmethod(boottime)

    def __init__(
        self, address: Address, headers: Mapping[str, str] | None, options: Mapping[str, Any]
    ) -> None:
        self.url = address.url
        self._headers = check_headers(headers)
        own = {name: value for name, value in options.items() if name not in _TLS}
        if address.tls and len(own) < len(options):
            tls = {name: options[name] for name in options.keys() - own.keys()}
            kind = tritonclient.http.InferenceServerClient
            own["ssl_context"] = tls_context(check_options(kind, address, tls))
        self._options = {"conn_limit": 0, "conn_timeout": DAY_S, **own}  # 0: no limit
        self._verbose = bool(self._options.pop("verbose", False))
        aio: Any = tritonclient.http.aio.InferenceServerClient
        check_options(aio, address, self._options)
        self._open: Callable[[bool], Any] = lambda verbose: aio(
            address.target + address.path, ssl=address.tls, verbose=verbose, **self._options
        )
        # The manager's requests are not printed, since they have secrets.
        self._opened: dict[bool, Any] = {}
        self._tasks = Tasks()

    async def infer(
        self,
        limit: float,
        model: str,
        inputs: list[Any],
        /,
        *,
        secret: bool = False,
        **options: Any,
    ) -> Any:
        options.setdefault("headers", dict(self._headers))
        triton = self._triton(self._verbose and not secret)
        return await self._within(limit, triton.infer(model, inputs, **options))

    async def call(
        self, model: str, request: protocol.Request, timeout: float
    ) -> tuple[protocol.IDs, str]:
        with translating(model, self.url):
            arguments = encode(tritonclient.http, request)
            result = await self.infer(
                timeout, model, arguments.pop("inputs"), secret=True, **arguments
            )
        return read_answer(result, request, model, self.url)

    async def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with translating(model, self.url):
            reading = self._triton(False).get_model_config(model, headers=dict(self._headers))
            config: Mapping[str, Any] = await self._within(timeout, reading)
            if not isinstance(config, dict):
                raise TypeError("a model configuration that is not a JSON object")
        return config

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Done, /, **options: Any
    ) -> None:
        self._tasks.start(deliver(self.infer(limit, model, inputs, **options), done))

    def open_stream(self, receive: Receive, /) -> Stream:
        raise InvalidArgument(f"streaming needs gRPC, and {self.url} is HTTP")

    async def close(self) -> None:
        # Over HTTP the server does not notice that a request was given up.
        await self._tasks.wait(HURRY_S)
        opened, self._opened = self._opened, {}
        for triton in opened.values():
            await triton.close()

    def _triton(self, verbose: bool) -> Any:
        if verbose not in self._opened:
            self._opened[verbose] = self._open(verbose)
        return self._opened[verbose]

    async def _within(self, limit: float, work: Any) -> Any:
        try:
            return await asyncio.wait_for(work, limit)
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error) or type(error).__name__) from error
