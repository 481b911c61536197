"""The transport of a blocking client for a URL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.transport import Transport, parse_url

if TYPE_CHECKING:
    from .grpc import GrpcTransport
    from .http import HttpTransport

__all__ = ["Transport", "connect"]


def connect(
    url: str, headers: Mapping[str, str] | None = None, options: Mapping[str, Any] | None = None
) -> GrpcTransport | HttpTransport:
    """Return the transport for ``url``; without a scheme it is gRPC's ``host:port``.

    Args:
        url: the server.
        headers: sent with every request.
        options: further arguments of tritonclient's ``InferenceServerClient``.

    Raises:
        InvalidArgument: the URL or an option is not valid.
    """
    address = parse_url(url)
    # Imported when needed: gRPC takes a quarter of a second, gevent a tenth.
    if address.kind == "grpc":
        from .grpc import GrpcTransport

        return GrpcTransport(address, headers, options or {})
    from .http import HttpTransport

    return HttpTransport(address, headers, options or {})
