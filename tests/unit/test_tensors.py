"""Inputs as arrays: whatever is given, it is sent whole or refused by `InvalidArgument`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from cidalloc.client.core.tensors import Input, Signature
from cidalloc.errors import InvalidArgument

KINDS = ["BOOL", "INT8", "INT64", "UINT8", "UINT64", "FP16", "FP32", "FP64", "BYTES"]

scalars = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    *(st.binary(max_size=3), st.complex_numbers(), st.just(object())),
)
values = st.one_of(
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=6),
    arrays.arrays(arrays.scalar_dtypes(), arrays.array_shapes(min_dims=0, max_dims=3, max_side=3)),
)
shapes = st.lists(st.sampled_from([-1, 1, 2]), max_size=3).map(tuple)


@given(st.sampled_from(KINDS), shapes, values)
def test_sent_whole_or_refused(kind: str, shape: tuple[int, ...], value: Any) -> None:
    signature = Signature("m", [Input("X", kind, shape)])
    try:
        (sent,) = signature.tensors({"X": value}, tritonclient.http.InferInput)
    except InvalidArgument:
        return
    assert sent.datatype() == kind
    assert len(sent.shape()) == len(shape)
    assert all(wanted in (is_, -1) for is_, wanted in zip(sent.shape(), shape, strict=True))
    raw = sent._get_binary_data()
    if kind == "BYTES":
        given_ = [each.encode() if isinstance(each, str) else each for each in flat(value)]
        assert deserialize_bytes_tensor(raw).tolist() == given_
    else:
        wanted = np.array(flat(value), triton_to_np_dtype(kind))
        np.testing.assert_array_equal(np.frombuffer(raw, wanted.dtype), wanted)
        exact = kind not in ("FP16", "FP32")
        if exact:
            np.testing.assert_array_equal(wanted.astype(object), np.array(flat(value), object))


def flat(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        return list(value.reshape(-1).tolist())
    if isinstance(value, list):
        return [leaf for each in value for leaf in flat(each)]
    return [value]


@given(st.lists(st.integers(-1, 2**64), min_size=1, max_size=4))
def test_integers_that_do_not_fit_are_refused(numbers: list[int]) -> None:
    fits = all(0 <= number < 2**64 for number in numbers)
    signature = Signature("m", [Input("X", "UINT64", (-1,))])
    if fits:
        (sent,) = signature.tensors({"X": numbers}, tritonclient.grpc.InferInput)
        assert np.frombuffer(sent._get_content(), np.uint64).tolist() == numbers
    else:
        with pytest.raises(InvalidArgument):
            signature.tensors({"X": numbers}, tritonclient.grpc.InferInput)


def test_an_array_of_another_library() -> None:
    class Tensor:
        def __array__(self, *_: Any, **__: Any) -> Any:
            return np.array([1.5], np.float32)

    signature = Signature("m", [Input("X", "FP32", (1,))])
    (sent,) = signature.tensors({"X": Tensor()}, tritonclient.http.InferInput)
    assert np.frombuffer(sent._get_binary_data(), np.float32).tolist() == [1.5]


def test_a_data_type_that_tritonclient_does_not_know() -> None:
    signature = Signature("m", [Input("X", "FP4", (1,))])
    with pytest.raises(InvalidArgument, match="does not know its data type"):
        signature.tensors({"X": np.zeros(1)}, tritonclient.http.InferInput)
