"""The wire: requests and replies of the manager as tensors, parameters and error texts.

Both sides use this one description; it knows numpy, but neither tritonclient nor Triton.
`docs/protocol.md` is the same for people who write a client in another language.
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
from .errors import CidError, InvalidArgument, OutOfRange, UnknownOperation, error_for

__all__ = [
    "CODE",
    "CORRELATION_ID",
    "DETAIL",
    "MAX_COOLDOWN_MS",
    "MODEL",
    "OUTPUT",
    "PROTOCOL",
    "TOKEN_BYTES",
    "IDs",
    "Parameter",
    "Request",
    "as_ids",
    "error_text",
    "parse_error",
]

MODEL = "cidmgr"
"""The manager's usual model name."""
CODE = "CODE"
"""Input, INT8 [1, 1]: the `Operation`."""
CORRELATION_ID = "CORRELATION_ID"
"""Input, UINT64 [1, n], optional: the IDs that the operation is about."""
OUTPUT = "OUTPUT"
"""Output, UINT64 [1, n]: the IDs issued, or a single number."""
DETAIL = "DETAIL"
"""Output, BYTES [1, 1]: text of the operations that answer with text; else empty."""

PROTOCOL = 1
"""The version of the protocol, which OPEN answers."""
TOKEN_BYTES = 16
"""What a session's token has; it travels as twice as many hexadecimal digits."""
MAX_COOLDOWN_MS = 7 * 86_400_000
"""The longest cooldown that can be asked for. It also keeps times far from overflow."""

IDs = npt.NDArray[np.uint64]
Parameter = int | bool | str | float

_NO_IDS: IDs = np.empty(0, np.uint64)
_NO_PARAMETERS: Mapping[str, Parameter] = {}
_UINT64 = np.dtype(np.uint64)


@dataclass(slots=True)
class Request:
    """One operation with what it needs; `encode` and `decode` are each other's inverse."""

    operation: Operation
    ids: IDs = field(default_factory=lambda: _NO_IDS)
    parameters: Mapping[str, Parameter] = field(default_factory=lambda: _NO_PARAMETERS)

    def encode(self) -> dict[str, npt.NDArray[Any]]:
        """Return the input tensors by name.

        ``CORRELATION_ID`` is always there, if need be empty: Triton puts requests that leave
        an optional input out into batches of their own.
        """
        return {
            CODE: np.array([[self.operation]], np.int8),
            CORRELATION_ID: self.ids.reshape(1, -1),
        }

    @classmethod
    def decode(
        cls, code: npt.NDArray[Any], ids: npt.NDArray[Any] | None, parameters: str
    ) -> Request:
        """Return the request that these tensors, and parameters as JSON, stand for.

        Raises:
            InvalidArgument: a batch of more than one, or something of another type or shape.
            UnknownOperation: ``CODE`` is no operation.
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
        return cls(operation, ids, read)

    def integer(self, name: str, default: int, low: int, high: int | None = None) -> int:
        """Return the integer parameter ``name``, at least ``low``; ``default`` if it is absent.

        Raises:
            InvalidArgument: it is of another type, too small, or above ``high``.
        """
        value = self.parameters.get(name, default)
        if type(value) is not int:
            raise InvalidArgument(f"{name}={value!r} is not an integer")
        if value < low:
            raise InvalidArgument(f"{name}={value} is less than {low}")
        if high is not None and value > high:
            raise InvalidArgument(f"{name}={value} is more than {high}")
        return value

    def text(self, name: str) -> str | None:
        """Return the text parameter ``name``; None if it is absent.

        Raises:
            InvalidArgument: it is of another type.
        """
        value = self.parameters.get(name)
        if value is not None and type(value) is not str:
            raise InvalidArgument(f"{name} is not a text")
        return value

    @property
    def token(self) -> bytes | None:
        """The token of the session that the request is of, or None.

        Raises:
            InvalidArgument: it is none; the message does not show it.
        """
        text = self.text("session")
        if text is None:
            return None
        if not _TOKEN.fullmatch(text):
            raise InvalidArgument(
                f"session is not {2 * TOKEN_BYTES} hexadecimal digits: make them at random"
            )
        return bytes.fromhex(text)

    def boolean(self, name: str) -> bool:
        """Return the boolean parameter ``name``; False if it is absent.

        Raises:
            InvalidArgument: it is of another type.
        """
        value = self.parameters.get(name, False)
        if type(value) is not bool:
            raise InvalidArgument(f"{name}={value!r} is neither true nor false")
        return value


_OPERATIONS = {operation.value: operation for operation in Operation}

_TOKEN = re.compile(rf"[0-9a-fA-F]{{{2 * TOKEN_BYTES}}}")
_ERROR = re.compile(r"\[CIDALLOC (\d{1,9}) [A-Z_]+\] ?(.*)", re.DOTALL)


def error_text(error: CidError) -> str:
    """Return the text that carries ``error`` through Triton: ``[CIDALLOC 2 NOT_HELD] words``."""
    return f"[CIDALLOC {error.code.value} {error.code.name}] {error}"


def parse_error(text: str) -> CidError | None:
    """Return the error that stands anywhere in ``text``, or None if none does."""
    found = _ERROR.search(text)
    if not found:
        return None
    error = error_for(int(found[1]), found[2])
    error.answered = True
    return error


def as_ids(ids: Iterable[int] | npt.NDArray[Any]) -> IDs:
    """Return ``ids`` as the array that travels.

    Raises:
        OutOfRange: an integer that is negative, or larger than 64 bits.
        InvalidArgument: something else than integers in one dimension.
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
