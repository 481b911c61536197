"""Transports: one manager request over gRPC or HTTP, and any failure as one of our errors.

Also the time, since a client's only ways to the outside are its transport and its threads.

A transport is the client's only way to the outside, so it is also where tests put something else.
It owns the requests that are on their way. None of them is ever cancelled, since a request that is
cancelled at the wrong moment can end Triton 2.51; each ends with its answer or by its time limit,
and what nobody waits for any more is dropped. No request waits behind another in here: `_grpc` and
`_http` take a further connection where the others are in use.
"""

from __future__ import annotations

import asyncio
import http.client
import inspect
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from ... import protocol
from ...codes import Operation
from ...errors import (
    CidError,
    InternalError,
    InvalidArgument,
    LimitExceeded,
    ProtocolError,
    Unavailable,
)

__all__ = [
    "STRANGE",
    "Address",
    "Receive",
    "Stream",
    "boottime",
    "check_inputs",
    "check_options",
    "encode",
    "foreign",
    "parse_url",
    "read_answer",
    "translate",
    "translating",
    "unreachable",
]

# No answer at all, and what tritonclient stumbles over when something else than Triton answers.
STRANGE = (OSError, ValueError, LookupError, AttributeError, TypeError)

SLACK_S = 0.4
"""For how long after Triton's own limit on a request its answer is waited for."""

boottime: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
"""Returns the seconds since boot; it runs on in suspend and never jumps."""

Done = Callable[[Any, BaseException | None], None]
"""Takes what became of a request: its result, or None and an error."""

Receive = Callable[[str, bool, Any, BaseException | None], None]
"""Takes what came over a stream: the ID of the request, whether this was its last answer, and the
result; or an error, which is for all requests that are unanswered, if the ID is empty."""


class Stream(Protocol):
    """A gRPC stream of one sequence.

    Attributes:
        over: it is closed.
    """

    over: bool

    def send(self, model: str, inputs: list[Any], /, **options: Any) -> None:
        """Send a request, behind those that were sent before; never waits.

        Raises:
            Unavailable: the stream broke.
        """

    def end(self) -> None:
        """Say that nothing more is sent. The stream closes when all is answered; never waits."""

    def cut(self) -> None:
        """Close it at once, if the server has not."""

    def suspect(self) -> None:
        """Note that an answer did not come in time: the next stream takes a new connection."""


def encode(module: Any, request: protocol.Request) -> dict[str, Any]:
    """Return the arguments of tritonclient's ``infer`` for a request to the manager."""
    inputs = []
    for name, array in request.encode().items():
        kind = np_to_triton_dtype(array.dtype)
        tensor = module.InferInput(name, list(array.shape), kind)
        inputs.append(tensor.set_data_from_numpy(array))
    names = [protocol.OUTPUT]
    if request.operation is Operation.STATUS:
        names.append(protocol.DETAIL)
    outputs = [module.InferRequestedOutput(name) for name in names]
    return {"inputs": inputs, "outputs": outputs, "parameters": dict(request.parameters)}


def read_answer(
    result: Any, request: protocol.Request, model: str, url: str
) -> tuple[protocol.IDs, str]:
    """Return OUTPUT and DETAIL of what the manager answered.

    Raises:
        ProtocolError: it is no manager's answer.
    """
    try:
        output, detail = result.as_numpy(protocol.OUTPUT), ""
        if request.operation is Operation.STATUS:
            detail = result.as_numpy(protocol.DETAIL)[0, 0].decode()
    except (ValueError, TypeError, LookupError):  # bytes that do not fit the shape
        output = None
    if output is None or output.dtype != "uint64":
        raise ProtocolError(f"model {model} at {url} answers unlike a cidalloc manager")
    return output.reshape(-1), detail


@contextmanager
def translating(model: str, url: str) -> Iterator[None]:
    """Turn whatever goes wrong with a request to the manager into one of our errors."""
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
    """Whether an error comes from elsewhere: a signal handler of the application has raised it."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    name = str(trace.tb_frame.f_globals.get("__name__"))
    return name.partition(".")[0] not in _INSIDE


class Address(NamedTuple):
    """Where a server is.

    Attributes:
        url: with its scheme, as errors name it.
        kind: ``grpc`` or ``http``.
        tls: whether it is with TLS.
        target: what the connection is made to: ``host:port``, or any other of gRPC's names.
        path: where Triton's own paths begin, for HTTP; mostly empty.
    """

    url: str
    kind: str
    tls: bool
    target: str
    path: str = ""


_PORTS = {"grpc": 8001, "http": 8000, "grpcs": 443, "https": 443}
_SCHEMES = ", ".join(_PORTS)
# gRPC's own names, https://github.com/grpc/grpc/blob/master/doc/naming.md
_GRPC_NAMES = ("unix", "unix-abstract", "dns", "ipv4", "ipv6", "vsock", "xds")


def parse_url(url: str) -> Address:
    """Return where ``url`` is; without a scheme it is gRPC's ``host:port``.

    Raises:
        InvalidArgument: no such URL; says what is wrong.
    """
    if not isinstance(url, str) or not url.isprintable():
        raise InvalidArgument(f"{url!r} is no URL: it is a text as scheme://host:port")
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
        raise InvalidArgument(f"{url!r}: gRPC takes no path behind host and port")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    kind, tls = scheme[:4], scheme.endswith("s")
    return Address(full, kind, tls, f"{host}:{port}", path)


def _is_grpc_name(text: str) -> bool:
    # A host may be called dns, too.
    return text.partition(":")[0].lower() in _GRPC_NAMES and not re.fullmatch(r"\w+:\d+", text)


def unreachable(error: BaseException, url: str) -> Unavailable | None:
    """Return our error if ``error`` means that no answer came; None if it is one of Triton's."""
    if isinstance(error, InferenceServerException):
        text, status = error.message() or "", error.status()
        away = status in _NO_ANSWER_STATUS or "RST_STREAM" in text
        away = away or (status == "StatusCode.UNAVAILABLE" and _GRPC_AWAY.search(text) is not None)
        away = away or (status == "503" and _NOT_TRITON.search(text) is not None)
        return Unavailable(f"no answer from {url}: {text}") if away else None
    if isinstance(error, _NO_ANSWER) and not foreign(error):
        return Unavailable(f"no answer from {url}: {error or type(error).__name__}")
    return None


_NO_ANSWER = (OSError, http.client.HTTPException, asyncio.TimeoutError, ssl.SSLError)
# Of gRPC's, and what only proxies answer.
_NO_ANSWER_STATUS = {"StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED"}
_NO_ANSWER_STATUS |= {"408", "429", "502", "504"}
# What gRPC itself, and not the server, says with the status UNAVAILABLE.
_GRPC_AWAY = re.compile(
    "failed to connect|connection|socket|GOAWAY|keepalive|DNS|name resolution|Broken pipe", re.I
)
# A proxy's page, and what tritonclient's asyncio client makes of it.
_NOT_TRITON = re.compile("<html|while decoding the response", re.I)


def translate(error: Exception, model: str, url: str) -> CidError:
    """Return our error for a failure that tritonclient, its sockets or Triton reported."""
    away = unreachable(error, url)
    if away is not None:
        return away
    if not isinstance(error, InferenceServerException):
        return ProtocolError(f"model {model} at {url} answers unlike Triton: {error!r}")
    text, status = error.message() or "", error.status()
    ours = protocol.parse_error(text)
    if ours is not None:
        return ours
    if "unknown model" in text.lower():
        return Unavailable(f"{url} serves no model {model}")
    if "is not healthy" in text or "not ready" in text:
        return Unavailable(f"no answer from {url}: {text}")
    kind = LimitExceeded if "larger than max" in text else STATUSES.get(str(status), ProtocolError)
    if kind is Unavailable:
        return Unavailable(f"no answer from {url}: {text}")
    if kind is ProtocolError:
        return ProtocolError(f"unexpected answer from {url}: {error}")
    return kind(text)


STATUSES: dict[str, type[CidError]] = {
    **dict.fromkeys(("StatusCode.UNAVAILABLE", "503"), Unavailable),
    **dict.fromkeys(("StatusCode.ABORTED", "StatusCode.RESOURCE_EXHAUSTED"), Unavailable),
    **dict.fromkeys(("StatusCode.INVALID_ARGUMENT", "400"), InvalidArgument),
    **dict.fromkeys(("StatusCode.INTERNAL", "StatusCode.UNKNOWN", "500"), InternalError),
    "StatusCode.DATA_LOSS": InternalError,
    "413": LimitExceeded,
}
"""What a status of gRPC or HTTP means for a request to the manager, but for those that mean no
answer (`unreachable`); any other one is a `ProtocolError`."""


def check_options(
    kind: Callable[..., Any], address: Address, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options for tritonclient's client ``kind``, those that were left out included.

    Raises:
        InvalidArgument: an argument that it does not take, or a file that cannot be read.
    """
    try:
        bound = inspect.signature(kind).bind(address.target, ssl=address.tls, **options)
    except TypeError as error:
        raise InvalidArgument(f"tritonclient's client: {error}") from None
    bound.apply_defaults()
    return bound.arguments


def check_inputs(inputs: Any, kind: type) -> None:
    """See that these are inputs of tritonclient for one protocol.

    Raises:
        InvalidArgument: says what they are in place of that.
    """
    if not isinstance(inputs, list | tuple):
        raise InvalidArgument(
            f"inputs are a list of {kind.__module__.rsplit('.', 1)[0]}.InferInput, not"
            f" {type(inputs).__name__}"
        )
    for each in inputs:
        if not isinstance(each, kind):
            name = f"{type(each).__module__}.{type(each).__name__}"
            wanted = f"{kind.__module__.rsplit('.', 1)[0]}.InferInput"
            raise InvalidArgument(f"an input is a {name}, and this client sends {wanted}")
