"""What a blocking client needs of a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ... import protocol
from ..core.transport import Done, Receive, Stream, parse_url

__all__ = ["Transport", "connect"]


class Transport(Protocol):
    """What a client needs of a server.

    Attributes:
        url: the server, as errors name it.
        inputs: the class of the inputs that `infer` takes, or `object`.
    """

    url: str
    inputs: type

    def now(self) -> float:
        """Return the time in seconds, by a clock that runs on in suspend."""

    def call(
        self, model: str, request: protocol.Request, timeout: float
    ) -> tuple[protocol.IDs, str]:
        """Return the manager's OUTPUT, flat, and its DETAIL; ``timeout`` in seconds.

        Raises:
            CidError: what the manager answered, or why it did not.
        """

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        """Return a model's configuration as the JSON that Triton makes of it."""

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        """Send a request as tritonclient's ``infer`` does, and wait at most ``limit`` seconds."""

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Done, /, **options: Any
    ) -> None:
        """Send a request; ``done`` is called when it is over, at any time and in any thread."""

    def open_stream(self, receive: Receive, /) -> Stream:
        """Return a new gRPC stream; ``receive`` is called in a thread of its own.

        Raises:
            InvalidArgument: this is not gRPC.
        """

    def close(self) -> None:
        """Close all connections, each when nothing is on its way over it any more."""


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
    address = parse_url(url)
    # Each imports what only it needs: gRPC takes a quarter of a second, gevent a tenth.
    if address.kind == "grpc":
        from .grpc import GrpcTransport

        return GrpcTransport(address, headers, options or {})
    from .http import HttpTransport

    return HttpTransport(address, headers, options or {})
