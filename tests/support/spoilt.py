"""What can go wrong with one request or its answer, between a client and its server."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FAULTS", "LATE_S", "WAYS", "Fault"]

LATE_S = 1.5
"""Later than every limit of the clients here; gRPC's shortest one is a second."""

WAYS = ("http", "grpc", "stream")
"""How a request comes: HTTP/1.1, a gRPC call of its own, or a message on a gRPC stream."""


class Fault(NamedTuple):
    """One fault.

    Attributes:
        name: as the tables have it.
        does: what happens to the answer; `server_front.Connection` has a method for each.
        runs: how many times the server gets the request.
        delay_s: so much later it gets it, or the client gets the answer if it ``runs`` at once.
        at_once: it gets it at once, whatever the delay.
        detail: of ``does``: a status.
        ways: where there is such a fault.
    """

    name: str
    does: str
    runs: int = 1
    delay_s: float = 0.0
    at_once: bool = True
    detail: int = 0
    ways: tuple[str, ...] = WAYS


_CALLS, _GRPC = ("http", "grpc"), ("grpc", "stream")
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("request lost", "silence", runs=0),
        Fault("answer lost", "silence"),
        Fault("request late", "answer", delay_s=LATE_S, at_once=False),
        Fault("answer late", "answer", delay_s=LATE_S),
        Fault("request repeated", "answer", runs=2, ways=_CALLS),
        Fault("answer repeated", "twice"),
        Fault("closed before", "close", runs=0),
        Fault("closed after", "close"),
        Fault("reset before", "reset", runs=0),
        Fault("reset after", "reset"),
        Fault("answer cut", "cut"),
        Fault("answer cut and reset", "cut_and_reset"),
        Fault("page 200", "page", runs=0, detail=200),
        Fault("page 502", "page", runs=0, detail=502),
        Fault("page 504 after", "page", detail=504),
        Fault("page 429", "page", runs=0, detail=429),
        Fault("page 503, Retry-After", "page", runs=0, detail=503),
        Fault("page 413", "page", runs=0, detail=413),
        Fault("page 413 after", "page", detail=413),
        Fault("JSON 200", "json", runs=0, detail=200, ways=("http",)),
        Fault("text 503", "text", runs=0, detail=503, ways=("http",)),
        Fault("UNAVAILABLE of a proxy", "trailers", runs=0, detail=14, ways=_GRPC),
        Fault("RESOURCE_EXHAUSTED", "trailers", runs=0, detail=8, ways=_GRPC),
        Fault("garbage", "garbage"),
        Fault("junk in a frame", "junk"),
        Fault("last answer of a connection", "last"),
        Fault("GOAWAY, then the answer", "goaway", ways=_GRPC),
        Fault("GOAWAY before the request", "goaway_before", runs=0, ways=_GRPC),
        Fault("stream refused", "refuse", runs=0, ways=_GRPC),
        Fault("stream reset after", "reset_stream", ways=_GRPC),
    )
}
"""All faults by name."""
