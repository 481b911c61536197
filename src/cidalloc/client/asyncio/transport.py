"""What an asynchronous client needs of a server; `Transport` says what each is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ... import protocol
from ..core.transport import Done, Receive, Stream, parse_url

__all__ = ["AsyncTransport", "connect_async"]


class AsyncTransport(Protocol):
    """As `Transport`; its coroutines run in tasks that are not cancelled."""

    url: str
    inputs: type

    def now(self) -> float: ...

    async def call(
        self, model: str, request: protocol.Request, timeout: float
    ) -> tuple[protocol.IDs, str]: ...

    async def model_config(self, model: str, timeout: float) -> Mapping[str, Any]: ...

    async def infer(
        self, limit: float, model: str, inputs: list[Any], /, **options: Any
    ) -> Any: ...

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Done, /, **options: Any
    ) -> None: ...

    def open_stream(self, receive: Receive, /) -> Stream: ...

    async def close(self) -> None: ...


def connect_async(
    url: str, headers: Mapping[str, str] | None = None, options: Mapping[str, Any] | None = None
) -> AsyncTransport:
    """Return the transport for ``url``, as `cidalloc.client.core.transport.connect` does."""
    address = parse_url(url)
    # Each imports what only it needs: aiohttp takes a tenth of a second.
    if address.kind == "grpc":
        from .grpc import AsyncGrpcTransport

        return AsyncGrpcTransport(address, headers, options or {})
    from .http import AsyncHttpTransport

    return AsyncHttpTransport(address, headers, options or {})
