"""The transport of an asyncio client for a URL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.transport import Transport, parse_url

__all__ = ["connect_async"]


def connect_async(
    url: str, headers: Mapping[str, str] | None = None, options: Mapping[str, Any] | None = None
) -> Transport:
    """Return the transport for ``url``, as `cidalloc.client.sync.transport.connect` does."""
    address = parse_url(url)
    # Imported when needed: aiohttp takes a tenth of a second.
    if address.kind == "grpc":
        from .grpc import AsyncGrpcTransport

        return AsyncGrpcTransport(address, headers, options or {})
    from .http import AsyncHttpTransport

    return AsyncHttpTransport(address, headers, options or {})
