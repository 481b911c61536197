"""Inputs of requests: arrays, checked against a model's configuration, as tritonclient's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from ...errors import InvalidArgument

__all__ = ["ON_STREAMS", "Input", "Inputs", "Library", "Signature", "check_inputs"]


Inputs = Mapping[str, Any] | Sequence[Any]
"""Arrays by the names of inputs, or tritonclient's ``InferInput`` objects."""

ON_STREAMS = frozenset(
    {"model_version", "outputs", "parameters", "priority", "request_id", "timeout"}
)
"""The arguments of a request that may differ between the requests of one stream."""


class Library(NamedTuple):
    """What tritonclient has for one protocol.

    Attributes:
        inputs: its ``InferInput``.
        outputs: its ``InferRequestedOutput``.
        options: the arguments of its ``infer`` that a sequence leaves to the caller.
    """

    inputs: Any
    outputs: Any
    options: frozenset[str]

    @classmethod
    def of(cls, module: Any, *options: str) -> Library:
        """Return what a module of tritonclient has, with the options that only it has."""
        return cls(module.InferInput, module.InferRequestedOutput, ON_STREAMS | {*options})


@dataclass
class Input:
    """An input of a model.

    Args:
        name: its name.
        kind: Triton's name of the data type, such as ``INT32`` or ``BYTES``.
        shape: its shape with the batch dimension; -1 for a dimension of any size.
        optional: a request may lack it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    optional: bool = False

    def __post_init__(self) -> None:
        known = triton_to_np_dtype(self.kind)
        self._dtype = None if known is None else np.dtype(known)

    def __str__(self) -> str:
        sizes = ", ".join("any" if size < 0 else str(size) for size in self.shape)
        return f"{self.name}, {self.kind} of shape [{sizes}]"

    def array(self, value: Any) -> NDArray[Any]:
        """Return an array for an array, for nested lists or for a single element.

        Raises:
            InvalidArgument: the data type, the shape or a value is wrong.
        """
        try:
            array = self._array(value)
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidArgument(f"input {self}: {str(error)[:200]}") from None
        shape = array.shape
        if shape != self.shape and not (
            len(shape) == len(self.shape)
            and all(wanted in (size, -1) for size, wanted in zip(shape, self.shape, strict=True))
        ):
            raise InvalidArgument(f"input {self}: the array's shape is {list(shape)}")
        return array

    def _array(self, value: Any) -> NDArray[Any]:
        if self._dtype is None:
            raise TypeError("this release of tritonclient does not know its data type")
        array: NDArray[Any] = value
        if not isinstance(value, np.ndarray):
            if hasattr(value, "__array__"):
                array = np.asarray(value)  # of another library
            else:
                array = _from_lists(value, self._dtype)
                if not array.ndim:  # a single element
                    array = array.reshape((1,) * len(self.shape))
        if self._dtype.hasobject:
            return _bytes(array)
        if array.dtype != self._dtype:
            raise TypeError(f"the array's data type is {array.dtype}")
        return array


class Signature:
    """The inputs of a model.

    Args:
        model: the name of the model.
        inputs: its inputs; None if its configuration is not known.
    """

    def __init__(self, model: str, inputs: list[Input] | None = None) -> None:
        self._model = model
        self._inputs = None if inputs is None else {each.name: each for each in inputs}
        self._required = {each.name for each in inputs or () if not each.optional}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Signature:
        """Return what a configuration says: Triton's JSON, or gRPC's with strings for int64."""
        # Triton's sequence batcher takes batches of one only.
        batch = (1,) if int(config.get("max_batch_size", 0)) else ()
        return cls(
            config.get("name", ""),
            [
                Input(
                    each["name"],
                    each.get("data_type", "").removeprefix("TYPE_").replace("STRING", "BYTES"),
                    (*batch, *map(int, each.get("dims", ()))),
                    bool(each.get("optional")),
                )
                for each in config.get("input", ())
            ],
        )

    def tensors(self, arrays: Mapping[str, Any], make: Any) -> list[Any]:
        """Return tritonclient's inputs for arrays, for nested lists or for single elements.

        Args:
            arrays: the data for each input by its name.
            make: tritonclient's ``InferInput`` for the protocol.

        Raises:
            InvalidArgument: an input is missing or unknown, or its data type or shape is wrong.
        """
        found = []
        for name, value in arrays.items():
            wanted = self._input(name, value)
            array = wanted.array(value)
            tensor = make(name, list(array.shape), wanted.kind)
            found.append(tensor.set_data_from_numpy(array))
        if not self._required <= arrays.keys():
            lacking = ", ".join(sorted(self._required - arrays.keys()))
            raise InvalidArgument(f"model {self._model} needs the input {lacking}: it takes {self}")
        return found

    def __str__(self) -> str:
        return "; ".join(map(str, (self._inputs or {}).values())) or "no inputs"

    def _input(self, name: str, value: Any) -> Input:
        if self._inputs is not None:
            if name not in self._inputs:
                raise InvalidArgument(f"model {self._model} has no input {name!r}: it takes {self}")
            return self._inputs[name]
        kind = isinstance(value, np.ndarray) and np_to_triton_dtype(value.dtype)
        if not kind:
            raise InvalidArgument(
                f"input {name!r} of model {self._model}: its configuration is not known, so give a"
                " numpy array with one of Triton's data types (bytes: dtype=object)"
            )
        return Input(name, kind, value.shape)


def check_inputs(inputs: Any, library: Library) -> list[Any]:
    """Return inputs of tritonclient for one protocol as they are.

    Raises:
        InvalidArgument: they are something else.
    """
    kind = library.inputs
    if not isinstance(inputs, list):
        raise InvalidArgument(
            f"inputs are a dict of arrays or a list of {_name(kind)}, not {_name(type(inputs))}"
        )
    for each in inputs:
        if not isinstance(each, kind):
            raise InvalidArgument(f"an input is a {_name(type(each))}, not a {_name(kind)}")
    return inputs


def _name(kind: type) -> str:
    # tritonclient's classes are in private modules of the public ones.
    return f"{kind.__module__.partition('._')[0]}.{kind.__name__}"


def _from_lists(value: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array of a data type for nested lists or a single element.

    Raises:
        ValueError, TypeError, OverflowError: a value has another type or does not fit.
    """
    if dtype.hasobject:
        return np.array(value, object)
    found = np.array(value)
    if found.dtype.kind == "f" and dtype.kind == "u":  # numpy's choice for 1 beside 2**63
        found = np.array(value, object)
        if all(type(each) is int and 0 <= each < 2**64 for each in found.flat):
            found = found.astype(np.uint64)
    allowed = {"b": "b", "i": "iu", "u": "iu"}.get(dtype.kind, "iuf")
    if found.size and found.dtype.kind not in allowed:
        raise TypeError(f"{value!r} is given")
    with np.errstate(over="ignore"):
        array = found.astype(dtype)
    lost = np.isinf(array) & np.isfinite(found) if allowed == "iuf" else array != found
    if lost.any():
        raise OverflowError(f"{found[lost].flat[0]} does not fit")
    return array


def _bytes(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array of bytes or text as tritonclient takes it."""
    if array.dtype.kind == "S":
        return array
    array = array.astype(object)
    for each in array.flat:
        if not isinstance(each, bytes | str):
            raise TypeError(f"{each!r} is neither bytes nor text")
    return array
