"""Transports: requests to the server over gRPC or HTTP, and any failure as one of our errors.

A transport is the client's only way to the server, and its clock; tests put another one in its
place. It owns the requests that are on their way. No request is ever cancelled, since a request
that is cancelled at the wrong moment can end Triton 2.51: each one ends with its answer or by its
time limit, and an answer that is not awaited any more is dropped. No request waits for another one:
the transports open a further connection if the others are in use.
"""

from __future__ import annotations

import asyncio
import http.client
import inspect
import re
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from ... import protocol
from ...errors import (
    CidError,
    InternalError,
    InvalidArgument,
    LimitExceeded,
    ProtocolError,
    Unavailable,
)
from .result import has_outputs, version_of
from .tensors import Library

__all__ = [
    "DAY_S",
    "DEFAULT_URL",
    "HURRY_S",
    "NOT_TRITON",
    "NO_MODEL",
    "NO_SLOT",
    "SLACK_S",
    "STRANGE",
    "Address",
    "Done",
    "Receive",
    "Route",
    "Stream",
    "Transport",
    "boottime",
    "check_options",
    "encode",
    "foreign",
    "parse_url",
    "read_answer",
    "translate",
    "translating",
    "unreachable",
    "without_tags",
]

# Without an answer, or when tritonclient cannot read what another server than Triton answers.
STRANGE = (
    *(OSError, ValueError, LookupError, AttributeError, TypeError),
    *(EOFError, RecursionError, zlib.error),
)

DAY_S = 86_400.0

SLACK_S = 0.4
"""An answer is awaited for so many seconds longer than Triton's own limit on its request."""

NOT_TRITON = "another server than Triton answers"
"""Part of the text of an HTTP error whose body is not Triton's JSON: that of a proxy."""

NO_MODEL = "serves no model"
"""Part of the text of `Unavailable` if the server is there and the model is not."""

NO_SLOT = "timeout of the corresponding sequence has been expired"
"""Part of Triton's text if a START waited in vain for a slot of its model."""

HURRY_S = 2.0
"""Closing waits so many seconds for a server, if the block has failed or the client is closed."""

boottime: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
"""Returns the seconds since boot; it runs on in suspend and never jumps."""

Done = Callable[[Any, BaseException | None], object]
"""Takes the result of a request, or None and its error."""

Receive = Callable[[str, bool, Any, BaseException | None], None]
"""Takes an answer of a stream: the ID of the request, whether this was its last answer, the result,
the error. Without an ID, an error is for all requests that are unanswered."""


Route = Callable[[], int | None]


class Transport(Protocol):
    """What a client needs of a server.

    For `AsyncClient`, `call`, `model_config`, `server_version` and `close` return awaitables. For
    `Client`, it also has the method ``infer(limit, model, inputs, /, **options)``: it sends a
    request as tritonclient's ``infer`` does, and waits at most ``limit`` seconds for its result.

    Attributes:
        url: the server, as errors name it.
        library: what tritonclient has for its protocol.
        streams: whether it has streams: it is gRPC.
        route: returns the number that each request but OPEN carries in `protocol.ROUTE_HEADER`;
            None: they carry no such header. A client sets it.
    """

    route: Route

    @property
    def streams(self) -> bool: ...

    @property
    def url(self) -> str: ...

    @property
    def library(self) -> Library: ...

    def now(self) -> float:
        """Return the time in seconds, by a clock that runs on in suspend."""

    def broke(self) -> bool:
        """Return whether a connection for sequences has broken since the last call."""

    def call(self, model: str, request: protocol.Request, timeout: float) -> Any:
        """Return the manager's OUTPUT, flat, and its DETAIL; ``timeout`` in seconds.

        Raises:
            CidError: the manager's error, or the reason why there is no answer.
        """

    def model_config(self, model: str, timeout: float) -> Any:
        """Return a model's configuration as Triton's JSON."""

    def server_version(self, timeout: float) -> Any:
        """Return the version of the server, such as ``2.51.0``."""

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Done, /, **options: Any
    ) -> None:
        """Send a request; ``done`` is called when it is over, at any time and in any thread."""

    def open_stream(self, receive: Receive, /, limit: float | None = None) -> Stream:
        """Return a new gRPC stream; ``receive`` may be called in another thread.

        After ``limit`` seconds the server ends it, and takes no request that arrives later.

        Raises:
            InvalidArgument: this is not gRPC.
        """

    def close(self) -> Any:
        """Close all connections, each after its last request."""


class Stream(Protocol):
    """A gRPC stream of one sequence.

    Attributes:
        over: it is closed.
    """

    over: bool

    def send(self, model: str, inputs: list[Any], /, **options: Any) -> None:
        """Send a request after those that were sent before; never waits.

        Raises:
            Unavailable: the stream broke.
        """

    def end(self) -> None:
        """Send nothing more. The stream closes when all is answered; never waits."""

    def cut(self) -> None:
        """Close it now if the server has not closed it."""

    def suspect(self) -> None:
        """Note that an answer did not come in time: the next stream takes a new connection."""


def encode(library: Library, request: protocol.Request) -> dict[str, Any]:
    """Return the arguments of tritonclient's ``infer`` for a request to the manager."""
    inputs = []
    for name, array in request.encode().items():
        kind = np_to_triton_dtype(array.dtype)
        tensor = library.inputs(name, list(array.shape), kind)
        inputs.append(tensor.set_data_from_numpy(array))
    outputs = [library.outputs(name) for name in (protocol.OUTPUT, protocol.DETAIL)]
    return {"inputs": inputs, "outputs": outputs, "parameters": dict(request.parameters)}


def read_answer(result: Any, model: str, url: str) -> tuple[protocol.IDs, str]:
    """Return OUTPUT and DETAIL of what the manager answered.

    Raises:
        Unavailable: it is an answer of Triton without outputs.
        ProtocolError: it is not a manager's answer.
    """
    try:
        output = result.as_numpy(protocol.OUTPUT)
        if output is not None and not output.size:  # tritonclient 2.51 does not keep its type
            output = output.astype("uint64")
        text = result.as_numpy(protocol.DETAIL)
        detail = "" if text is None else text[0, 0].decode()
    except (ValueError, TypeError, LookupError, AttributeError):  # of another kind or shape
        output = None
    if output is None and version_of(result) and not has_outputs(result):
        # So does Triton 2.51, rarely, after a proxy has given requests up.
        raise Unavailable(f"no answer from {url}: model {model} answered without outputs")
    if output is None or output.dtype != "uint64":
        raise ProtocolError(f"model {model} at {url} answers unlike a cidalloc manager")
    return output.reshape(-1), detail


@contextmanager
def translating(model: str, url: str) -> Iterator[None]:
    """Turn any failure of a request to the manager into one of our errors."""
    try:
        yield
    except CidError:
        raise
    except (
        *(InferenceServerException, http.client.HTTPException, asyncio.TimeoutError),
        *STRANGE,
    ) as error:
        if foreign(error):
            raise
        raise translate(error, model, url) from error


_INSIDE = {"cidalloc", "tritonclient", "google", "grpc", "aiohttp", "asyncio"}
_INSIDE |= {"http", "socket", "ssl", "select", "urllib", "gzip", "zlib", "json", "numpy"}


def foreign(error: BaseException) -> bool:
    """Whether a signal handler of the application raised an error."""
    trace = error.__traceback__
    if trace is None or threading.current_thread() is not threading.main_thread():
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    name = str(trace.tb_frame.f_globals.get("__name__"))
    return name.partition(".")[0] not in _INSIDE


class Address(NamedTuple):
    """Where a server is.

    Attributes:
        url: the URL with its scheme, as errors name it.
        kind: ``grpc`` or ``http``.
        tls: whether TLS is used.
        target: ``host:port``, or another kind of gRPC name.
        path: the path under which HTTP serves Triton; usually empty.
        name: the name that TLS checks; empty: the host in the target.
    """

    url: str
    kind: str
    tls: bool
    target: str
    path: str = ""
    name: str = ""


_PORTS = {"grpc": 8001, "http": 8000, "grpcs": 443, "https": 443}
DEFAULT_URL = f"localhost:{_PORTS['grpc']}"
_SCHEMES = ", ".join(_PORTS)
# gRPC's own names, https://github.com/grpc/grpc/blob/master/doc/naming.md
_GRPC_NAMES = ("unix", "unix-abstract", "dns", "ipv4", "ipv6", "vsock", "xds")


def parse_url(url: str) -> Address:
    """Return the address for ``url``; without a scheme it is gRPC's ``host:port``.

    Raises:
        InvalidArgument: the URL is not valid.
    """
    if not isinstance(url, str) or not url.isprintable() or " " in url:
        raise InvalidArgument(f"{url!r} is not a URL: a URL is text like scheme://host:port")
    if _is_grpc_name(url):
        return Address(f"grpc://{url}", "grpc", False, url)
    scheme, found, rest = url.partition("://")
    scheme = scheme.lower()
    if not found:
        scheme, rest = "grpc", url
    if scheme not in _PORTS:
        raise InvalidArgument(f"{url!r}: the scheme is one of {_SCHEMES}")
    if scheme.startswith("grpc") and _is_grpc_name(rest):
        return Address(f"{scheme}://{rest}", "grpc", scheme == "grpcs", rest)
    if rest.count(":") > 1 and "[" not in rest and "@" not in rest:
        raise InvalidArgument(f"{url!r}: write an IPv6 address in brackets, as [::1]:8001")
    full = f"{scheme}://{rest}"
    try:
        parts = urlsplit(full)
        port = _PORTS[scheme] if parts.port is None else parts.port
    except ValueError as error:
        raise InvalidArgument(f"{url!r}: {error}") from None
    if parts.username is not None or parts.query or parts.fragment or not parts.hostname:
        raise InvalidArgument(f"{url!r} is not of the form scheme://host:port")
    path = parts.path.rstrip("/")
    if path and not scheme.startswith("http"):
        raise InvalidArgument(f"{url!r}: gRPC takes no path after host and port")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    kind, tls = scheme[:4], scheme.endswith("s")
    return Address(full, kind, tls, f"{host}:{port}", path, getattr(url, "name", ""))


def _is_grpc_name(text: str) -> bool:
    # A host may be called dns, too.
    return text.partition(":")[0].lower() in _GRPC_NAMES and not re.fullmatch(r"\w+:\d+", text)


def unreachable(error: BaseException, url: str) -> Unavailable | None:
    """Return our error if ``error`` means that no answer came; None if Triton answered it."""
    if isinstance(error, InferenceServerException):
        text, status = error.message() or "", error.status()
        away = status in _NO_ANSWER_STATUS or _GRPC_CUT.search(text) is not None
        away = away or (status == "StatusCode.UNAVAILABLE" and _GRPC_AWAY.search(text) is not None)
        away = away or (status == "503" and _NOT_TRITON.search(text) is not None)
        away = away or (status == "StatusCode.RESOURCE_EXHAUSTED" and _TOO_LARGE not in text)
        return Unavailable(f"no answer from {url}: {without_tags(text)}") if away else None
    if isinstance(error, _NO_ANSWER) and not foreign(error):
        return Unavailable(f"no answer from {url}: {error or type(error).__name__}")
    return None


def without_tags(text: str) -> str:
    """Return the words of a page of HTML."""
    return " ".join(re.sub("<[^>]*>", " ", text).split())


_NO_ANSWER = (OSError, http.client.HTTPException, asyncio.TimeoutError, ssl.SSLError)
# Statuses of gRPC itself, and those that only proxies answer with.
_NO_ANSWER_STATUS = {"StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED"}
_NO_ANSWER_STATUS |= {"408", "429", "502", "504"}
# Texts of gRPC itself, and not of the server, with the status UNAVAILABLE.
_GRPC_AWAY = re.compile(
    "failed to connect|connection|socket|GOAWAY|keepalive|DNS|name resolution|Broken pipe"
    f"|http2 header|{protocol.ROUTE_HEADER}",  # the last two: of proxies
    re.I,
)
# The same with any status.
_GRPC_CUT = re.compile("RST_STREAM|Stream removed")
# Part of gRPC's own text, with RESOURCE_EXHAUSTED. Triton does not use this status: proxies do.
_TOO_LARGE = "larger than max"
# Texts of proxies with the status 503.
_NOT_TRITON = re.compile(f"{NOT_TRITON}|{protocol.ROUTE_HEADER}", re.I)


# Of Triton 2.51, if the process of a Python model has died, or dies just then.
_MODEL_AWAY = re.compile("is not healthy|not ready|Failed to process the requests")


def translate(error: Exception, model: str, url: str) -> CidError:
    """Return our error for a failure that tritonclient, a socket or Triton reported."""
    away = unreachable(error, url)
    if away is not None:
        return away
    if not isinstance(error, InferenceServerException):
        return ProtocolError(f"model {model} at {url} answers unlike Triton: {error!r}")
    text, status = error.message() or "", error.status()
    # A number that this version does not know has the meaning of Triton's status.
    ours = protocol.parse_error(text, STATUSES.get(str(status), ProtocolError))
    if ours is not None:
        return ours
    if "unknown model" in text.lower():
        return Unavailable(f"{url} {NO_MODEL} {model}")
    if _MODEL_AWAY.search(text):
        return Unavailable(f"no answer from {url}: {text}")
    kind = LimitExceeded if _TOO_LARGE in text else STATUSES.get(str(status), ProtocolError)
    if kind is Unavailable:
        return Unavailable(f"no answer from {url}: {text}")
    if kind is ProtocolError:
        return ProtocolError(f"unexpected answer from {url}: {without_tags(str(error))}")
    return kind(text)


STATUSES: dict[str, type[CidError]] = {
    **dict.fromkeys(("StatusCode.UNAVAILABLE", "503"), Unavailable),
    **dict.fromkeys(("StatusCode.ABORTED", "StatusCode.RESOURCE_EXHAUSTED"), Unavailable),
    **dict.fromkeys(("StatusCode.INVALID_ARGUMENT", "400"), InvalidArgument),
    **dict.fromkeys(("StatusCode.INTERNAL", "StatusCode.UNKNOWN", "500"), InternalError),
    "StatusCode.DATA_LOSS": InternalError,
    "413": LimitExceeded,
}
"""The error for a status of gRPC or HTTP, for requests to the manager. `unreachable` knows the
statuses that mean no answer; any other status is a `ProtocolError`."""


def check_options(
    kind: Callable[..., Any], address: Address, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all options of tritonclient's client ``kind``, with its defaults for absent ones.

    Raises:
        InvalidArgument: the client does not take one of these options.
    """
    try:
        bound = inspect.signature(kind).bind(address.target, ssl=address.tls, **options)
    except TypeError as error:
        raise InvalidArgument(f"tritonclient's client: {error}") from None
    bound.apply_defaults()
    return bound.arguments
