"""Checks of the arguments that callers give."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, SupportsIndex

import numpy as np

from ...errors import InvalidArgument, LimitExceeded
from ...protocol import ROUTE_HEADER
from .model_info import HIGHEST_CID
from .tensors import ON_STREAMS, Library

__all__ = [
    "check_headers",
    "check_request_options",
    "seconds",
    "whole",
]


def whole(name: str, value: object) -> int:
    """Return a positive integer.

    Raises:
        InvalidArgument, LimitExceeded: it is something else, or out of range.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, SupportsIndex):
        raise InvalidArgument(f"{name}={value!r} is not an integer")
    try:
        number = operator.index(value)
    except TypeError:  # an array of several
        raise InvalidArgument(f"{name}={value!r} is not an integer") from None
    if number < 1:
        raise InvalidArgument(f"{name}={number} is less than 1")
    if number > HIGHEST_CID:
        raise LimitExceeded(f"{name}={number} is more than any pool has")
    return number


def seconds(name: str, value: object, high: float, low: float = 1e-6) -> float:
    """Return a time in seconds.

    Raises:
        InvalidArgument: it is not a time within these bounds.
    """
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, str | bytes | bool) or not low <= found <= high:
        raise InvalidArgument(f"{name}={value!r} is not a time of {low:g} to {high:g} seconds")
    return found


_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2


def check_headers(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return headers as a new dict.

    Raises:
        InvalidArgument: a name or a value that HTTP does not allow. The message shows no value.
    """
    if headers is not None and not isinstance(headers, Mapping):
        raise InvalidArgument(f"headers are a dict, not {type(headers).__name__}")
    found = dict(headers or {})
    for name, value in found.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise InvalidArgument(f"{name!r} is not a valid name of a header")
        if name.lower() == ROUTE_HEADER:
            raise InvalidArgument(f"the header {name} is set by the client, as the manager says")
        binary = isinstance(value, bytes) and name.lower().endswith("-bin")  # gRPC encodes these
        if not binary and not (isinstance(value, str) and value.isascii() and value.isprintable()):
            raise InvalidArgument(f"the value of header {name!r} is not printable ASCII text")
    return found


_WHY = {
    **dict.fromkeys(("sequence_id", "sequence_start", "sequence_end"), "the sequence sets it"),
    "client_timeout": "timeout=, in seconds, limits the request at the client and in Triton",
}
_RESERVED = {"priority", "timeout", "headers", "binary_data_output"}


def check_request_options(
    options: dict[str, Any], library: Library, streaming: bool, timeout: float
) -> dict[str, Any]:
    """Return the options of one request as tritonclient takes them, but ``timeout`` in seconds.

    Args:
        options: what the caller gave.
        library: the protocol.
        streaming: the request goes over a stream.
        timeout: the maximum of its time limit.

    Raises:
        InvalidArgument: an option is not valid, or cannot be sent this way.
    """
    found = dict(options)
    for name, value in options.items():
        if name not in (ON_STREAMS if streaming else library.options):
            why = _WHY.get(name, "tritonclient's infer does not take it for this protocol")
            if streaming and name in library.options:
                why = "a stream has it once for all requests: give it to the client"
            raise InvalidArgument(f"a request of a sequence takes no {name}: {why}")
        check = _CHECKS.get(name)
        if check is not None and not check[0](value):
            raise InvalidArgument(f"{name}={value!r} is not {check[1]}")
    check_headers(found.get("headers"))
    if "timeout" in found:
        found["timeout"] = seconds("timeout", found["timeout"], timeout)
    if found.get("outputs") is not None:
        found["outputs"] = [_output(each, library) for each in found["outputs"]]
    return found


def _output(output: Any, library: Library) -> Any:
    if isinstance(output, str):
        return library.outputs(output)
    if not isinstance(output, library.outputs):
        name = f"{type(output).__module__}.{type(output).__name__}"
        raise InvalidArgument(f"an output is a {name}: give names, or what tritonclient takes here")
    return output


def _is_parameters(value: Any) -> bool:
    return value is None or (
        isinstance(value, Mapping)
        and all(
            isinstance(name, str)
            and name not in _RESERVED
            and not name.startswith(("triton_", "sequence_"))
            and type(each) in (str, bool, int, float)
            and (not isinstance(each, int) or -(2**63) <= each < 2**63)
            for name, each in value.items()
        )
    )


_COMPRESSION: tuple[Callable[[Any], bool], str] = (
    lambda value: value in (None, "gzip", "deflate"),
    "'gzip' or 'deflate'",
)
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "compression_algorithm": _COMPRESSION,
    "model_version": (lambda value: isinstance(value, str), "a version as text"),
    "outputs": (
        lambda value: value is None or isinstance(value, list | tuple),
        "a list of names, or of tritonclient's InferRequestedOutput",
    ),
    "parameters": (
        _is_parameters,
        "a dict of text, numbers and booleans with names that Triton does not use itself",
    ),
    "priority": (
        lambda value: type(value) is int and 0 <= value < 2**64,
        "an integer of 0 to 2^64 - 1",
    ),
    "query_params": (lambda value: value is None or isinstance(value, Mapping), "a dict"),
    "request_compression_algorithm": _COMPRESSION,
    "request_id": (lambda value: isinstance(value, str) and value.isprintable(), "printable text"),
    "response_compression_algorithm": _COMPRESSION,
}
