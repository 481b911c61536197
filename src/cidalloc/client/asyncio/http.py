"""HTTP for asyncio, over aiohttp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
import tritonclient.http
import tritonclient.http.aio
from yarl import URL

from ... import protocol
from ..core.http_calls import HttpAnswer, HttpBase, HttpCall, HttpResult
from ..core.tls import tls_context
from ..core.transport import (
    DAY_S,
    HURRY_S,
    Address,
    Done,
    check_options,
    read_answer,
    translating,
)
from .tasks import Tasks, deliver

__all__ = ["AsyncHttpTransport"]

_TLS = ("ssl_options", "ssl_context_factory", "insecure")  # of tritonclient's blocking client


class AsyncHttpTransport(HttpBase):
    """HTTP for asyncio. Each request has a connection and a time limit of its own."""

    def __init__(
        self, address: Address, headers: Mapping[str, str] | None, options: Mapping[str, Any]
    ) -> None:
        own = {name: value for name, value in options.items() if name not in _TLS}
        if address.tls and len(own) < len(options):
            tls = {name: options[name] for name in options.keys() - own.keys()}
            kind = tritonclient.http.InferenceServerClient
            own["ssl_context"] = tls_context(check_options(kind, address, tls))
        own = {"conn_limit": 0, "conn_timeout": DAY_S, **own}  # 0: no limit
        aio = tritonclient.http.aio.InferenceServerClient
        self._options = check_options(aio, address, own)
        super().__init__(address, headers, self._options["verbose"])
        self._origin = f"{'https' if address.tls else 'http'}://{address.target}"
        self._session: aiohttp.ClientSession | None = None
        self._tasks = Tasks()

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
        return read_answer(result, request, model, self.url)

    async def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        with translating(model, self.url):
            return (await self._send(self._config_request(model), timeout)).json()

    async def server_version(self, timeout: float) -> str:
        with translating("", self.url):
            found = (await self._send(self._version_request(), timeout)).json()
        return str(found.get("version", ""))

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Done, /, **options: Any
    ) -> None:
        self._tasks.start(deliver(self.infer(limit, model, inputs, **options), done))

    async def close(self) -> None:
        # Over HTTP the server does not notice that a request was given up.
        await self._tasks.wait(HURRY_S)
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _send(self, call: HttpCall, limit: float) -> HttpAnswer:
        """Send a request and return its answer.

        Raises:
            OSError, asyncio.TimeoutError: no answer came.
        """
        if self._session is None:  # it belongs to the event loop
            options = self._options
            connector = aiohttp.TCPConnector(
                ssl=options["ssl_context"] or True, limit=options["conn_limit"]
            )
            self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        timeout = aiohttp.ClientTimeout(total=min(limit, self._options["conn_timeout"]))
        url = URL(self._origin + call.path, encoded=True)
        try:
            async with self._session.request(
                call.method, url, data=call.body, headers=call.headers, timeout=timeout
            ) as answer:
                return HttpAnswer(answer.status, answer.headers, await answer.read())
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error) or type(error).__name__) from error
