"""The protocol: requests and answers of the manager as tensors, parameters and error texts.

Client and manager share this module. It uses numpy, but neither tritonclient nor Triton.
`docs/protocol.md` describes the same for clients in other languages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .codes import Operation
from .errors import (
    CidError,
    InvalidArgument,
    OutOfRange,
    ProtocolError,
    UnknownOperation,
    error_for,
)

__all__ = [
    "CODE",
    "CORRELATION_ID",
    "DEAD_WINDOW_MS",
    "DETAIL",
    "DRAINING",
    "END_WITHIN_MS",
    "MAX_COOLDOWN_MS",
    "MAX_MODELS",
    "MAX_SEQ",
    "MAX_WAIT_MS",
    "MODEL",
    "OUTPUT",
    "PROTOCOL",
    "ROUTE_HEADER",
    "SEQ_BITS",
    "TOKEN_BYTES",
    "IDs",
    "Parameter",
    "Request",
    "as_ids",
    "error_text",
    "is_name",
    "parse_error",
]

MODEL = "cidmgr"
"""The manager's model name by default."""
CODE = "CODE"
"""Input, INT8 [1, 1]: the `Operation`."""
CORRELATION_ID = "CORRELATION_ID"
"""Input, UINT64 [1, n], optional: the IDs of the operation."""
OUTPUT = "OUTPUT"
"""Output, UINT64 [1, n]: the issued IDs, or a number."""
ROUTE_HEADER = "cid-slice"
"""The header, or metadata of gRPC, by which a proxy finds the server of a session."""
DETAIL = "DETAIL"
"""Output, BYTES [1, 1]: the text of STATUS; `DRAINING` during a drain; otherwise empty."""
DRAINING = "draining"
"""The DETAIL of each answer but that of STATUS while the server is being drained."""

PROTOCOL = 1
"""The version of the protocol, which the answer to OPEN has."""
TOKEN_BYTES = 16
"""Bytes of a session's token; requests have it as hexadecimal digits."""
SEQ_BITS = 53
"""Bits of the number of a session's change: as many as a double can have."""
MAX_SEQ = 2**SEQ_BITS - 1
"""The highest number of a session's change."""
MAX_COOLDOWN_MS = 7 * 86_400_000
"""The longest cooldown that a client can ask for. It also keeps times far from overflow."""
MAX_WAIT_MS = 5_000
"""The longest time for which a session keeps its place among those that wait without asking."""

MAX_MODELS = 16
"""The most models that a session may announce."""
END_WITHIN_MS = 30_000
"""After sending DEAD, for so long END may be sent for the IDs of its answer."""
DEAD_WINDOW_MS = 120_000
"""For so long the END of a dead client's sequence may arrive at its model."""

IDs = npt.NDArray[np.uint64]
Parameter = int | bool | str | float

_NO_IDS: IDs = np.empty(0, np.uint64)
_NO_PARAMETERS: Mapping[str, Parameter] = {}
_UINT64 = np.dtype(np.uint64)


@dataclass(slots=True)
class Request:
    """An operation with its IDs and parameters. `encode` and `decode` are inverse."""

    operation: Operation
    ids: IDs = field(default_factory=lambda: _NO_IDS)
    parameters: Mapping[str, Any] = field(default_factory=lambda: _NO_PARAMETERS)

    def encode(self) -> dict[str, npt.NDArray[Any]]:
        """Return the input tensors by name.

        ``CORRELATION_ID`` is always among them, empty if there are no IDs: Triton batches requests
        with and without an optional input separately.
        """
        return {
            CODE: np.array([[self.operation]], np.int8),
            CORRELATION_ID: self.ids.reshape(1, -1),
        }

    @classmethod
    def decode(
        cls, code: npt.NDArray[Any], ids: npt.NDArray[Any] | None, parameters: str
    ) -> Request:
        """Return the request with these tensors, and with parameters as JSON.

        Raises:
            InvalidArgument: a batch of more than one, another type or shape, or a parameter that
                is not valid.
            UnknownOperation: no operation has this ``CODE``.
        """
        if code.shape != (1, 1):
            raise InvalidArgument(
                f"{CODE} has the shape {list(code.shape)}, not [1, 1]: send one operation in each"
                " request (Triton batches the requests by itself)"
            )
        number = int(code[0, 0])
        operation = _OPERATIONS.get(number)
        if operation is None:
            known = ", ".join(f"{each.value} {each.name}" for each in Operation)
            raise UnknownOperation(f"{CODE} {number} is no operation; there are {known}")
        if ids is None:
            ids = _NO_IDS
        elif ids.ndim != 2 or ids.shape[0] != 1 or ids.dtype != _UINT64:
            raise InvalidArgument(
                f"{CORRELATION_ID} is {ids.dtype} of the shape {list(ids.shape)}, not uint64 of"
                " the shape [1, n]"
            )
        else:
            ids = ids[0]
        if parameters in ("", "{}"):
            return cls(operation, ids, _NO_PARAMETERS)
        try:
            read = json.loads(parameters)
        except ValueError:
            read = None
        if not isinstance(read, dict):
            raise InvalidArgument("the request's parameters are not a JSON object")
        _check_parameters(read)
        return cls(operation, ids, read)

    @property
    def models(self) -> tuple[str, ...] | None:
        """The names in ``models``, or None if there is no such parameter."""
        text = self.parameters.get("models")
        return None if text is None else tuple(json.loads(text))

    @property
    def token(self) -> bytes | None:
        """The token of the request's session, or None."""
        text = self.parameters.get("session")
        return None if text is None else bytes.fromhex(text)


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    """Check the type and the bounds of each known parameter; others are ignored.

    Raises:
        InvalidArgument: one of them is not valid. The message never shows a token.
    """
    for name in parameters.keys() & _KINDS.keys():
        value, kind = parameters[name], _KINDS[name]
        if kind is bool:
            if type(value) is not bool:
                raise InvalidArgument(f"{name}={value!r} is neither true nor false")
        elif kind is str:
            if type(value) is not str:
                raise InvalidArgument(f"{name} is not a text")
        elif type(value) is not int:
            raise InvalidArgument(f"{name}={value!r} is not an integer")
        elif value < kind:
            raise InvalidArgument(f"{name}={value} is less than {kind}")
        elif name == "seq" and value > MAX_SEQ:
            raise InvalidArgument(f"seq={value} is more than {MAX_SEQ}")
    if not _TOKEN.fullmatch(parameters.get("session", _ANY_TOKEN)):
        raise InvalidArgument(
            f"session is not {2 * TOKEN_BYTES} hexadecimal digits: make them at random"
        )
    if "model" in parameters and not is_name(parameters["model"]):
        raise InvalidArgument(f"model is not a name of 1 to {_NAME_BYTES} bytes")
    if "models" in parameters:
        _check_models(parameters["models"])


def _check_models(text: str) -> None:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or len(names) > MAX_MODELS or not all(map(is_name, names)):
        raise InvalidArgument(
            f"models is not a JSON list of at most {MAX_MODELS} names of 1 to {_NAME_BYTES} bytes"
        )


def is_name(name: object) -> bool:
    """Whether requests may name a model so."""
    return isinstance(name, str) and 0 < len(name.encode(errors="replace")) <= _NAME_BYTES


_KINDS: dict[str, Any] = {
    "session": str,
    "registry": str,
    "label": str,
    "model": str,
    "models": str,
    "ended": bool,
    "count": 1,
    "seq": 1,
    "ttl_ms": 0,
    "cooldown_ms": 0,
    "wait_ms": 0,
    "used": 0,
}
"""The parameters that operations know: their type; of an integer, its minimum."""

_OPERATIONS = {operation.value: operation for operation in Operation}

_NAME_BYTES = 256
_ANY_TOKEN = "0" * 2 * TOKEN_BYTES
_TOKEN = re.compile(rf"[0-9a-fA-F]{{{2 * TOKEN_BYTES}}}")
_ERROR = re.compile(r"\[CIDALLOC (\d{1,9}) [A-Z_]+\] ?(.*)", re.DOTALL)


def error_text(error: CidError) -> str:
    """Return the text that Triton sends for ``error``: ``[CIDALLOC 2 NOT_HELD] words``."""
    return f"[CIDALLOC {error.code.value} {error.code.name}] {error}"


def parse_error(text: str, unknown: type[CidError] = ProtocolError) -> CidError | None:
    """Return the error of cidalloc anywhere in ``text``, or None.

    Args:
        text: what Triton sent.
        unknown: the class of an error whose number this version does not know.
    """
    found = _ERROR.search(text)
    if not found:
        return None
    error = error_for(int(found[1]), found[2], unknown)
    error.answered = True
    return error


def as_ids(ids: Iterable[int] | npt.NDArray[Any]) -> IDs:
    """Return ``ids`` as an array of uint64, shape [n].

    Raises:
        OutOfRange: an integer is negative, or has more than 64 bits.
        InvalidArgument: these are not integers in one dimension.
    """
    try:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    except (TypeError, ValueError):
        raise InvalidArgument(f"not integers in one dimension: {ids!r}") from None
    if array.size == 0:
        return _NO_IDS
    if array.ndim == 1 and array.dtype.kind == "u":
        return array.astype(np.uint64, copy=False)
    if array.ndim == 1 and array.dtype.kind == "i" and array.min() >= 0:
        return array.astype(np.uint64)
    if array.ndim == 1 and all(type(each) is int or isinstance(each, np.integer) for each in ids):
        raise OutOfRange(f"correlation IDs are positive integers of 64 bits: {ids!r}")
    raise InvalidArgument(f"not integers in one dimension: {ids!r}")
