"""Requests and errors survive the wire, and nothing else gets in."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cidalloc import protocol
from cidalloc.codes import Code, Operation
from cidalloc.errors import (
    CidError,
    InvalidArgument,
    OutOfRange,
    ProtocolError,
    UnknownOperation,
    error_for,
)
from cidalloc.protocol import Request

cids = st.lists(st.integers(0, 2**64 - 1), max_size=5)
parameters = st.dictionaries(
    st.text(max_size=5), st.integers() | st.booleans() | st.text() | st.floats(allow_nan=False)
)


@given(st.sampled_from(Operation), cids, parameters)
def test_round_trip(operation: Operation, ids: list[int], parameters: dict[str, Any]) -> None:
    request = Request(operation, np.array(ids, np.uint64), parameters)
    tensors = request.encode()
    read = Request.decode(
        tensors[protocol.CODE], tensors[protocol.CORRELATION_ID], json.dumps(request.parameters)
    )
    assert read.operation is operation
    assert read.ids.tolist() == ids
    assert read.parameters == parameters


@given(st.sampled_from([code for code in Code if code is not Code.OK]), st.text(), st.text())
def test_errors_are_found_in_any_text(code: Code, words: str, before: str) -> None:
    text = before.replace("[", "(") + protocol.error_text(error_for(code, words))
    found = protocol.parse_error(text)
    assert found is not None
    assert found.code is code
    assert str(found) == words


@pytest.mark.parametrize("text", ["", "CIDALLOC 3 NOT_OWNER", "[CIDALLOC x NOT_HELD] no"])
def test_other_texts_are_no_errors(text: str) -> None:
    assert protocol.parse_error(text) is None


def test_an_error_of_a_later_version() -> None:
    found = protocol.parse_error("[CIDALLOC 99 NEW_KIND] its words")
    assert type(found) is ProtocolError and found.answered
    assert "its words" in str(found)


ONE = np.array([[0]], np.int8)


@pytest.mark.parametrize(
    ("code", "ids", "parameters", "kind", "words"),
    [
        (np.array([[0], [1]], np.int8), None, "", InvalidArgument, "[2, 1]"),
        (np.array([], np.int8), None, "", InvalidArgument, "[0]"),
        (np.array([[77]], np.int8), None, "", UnknownOperation, "77"),
        (np.array([[-1]], np.int8), None, "", UnknownOperation, "-1"),
        (ONE, np.array([[1], [2]], np.uint64), "", InvalidArgument, "[2, 1]"),
        (ONE, np.array([1], np.uint64), "", InvalidArgument, "[1]"),
        (ONE, np.array([[1]], np.int64), "", InvalidArgument, "int64"),
        (ONE, None, "{", InvalidArgument, "JSON"),
        (ONE, None, "[]", InvalidArgument, "JSON object"),
    ],
)
def test_what_is_refused(
    code: Any, ids: Any, parameters: str, kind: type[CidError], words: str
) -> None:
    with pytest.raises(kind) as caught:
        Request.decode(code, ids, parameters)
    assert words in str(caught.value)


def decoded(**parameters: Any) -> Request:
    return Request.decode(ONE, None, json.dumps(parameters))


@pytest.mark.parametrize("value", ["3", 3.0, True, None, [3]])
@pytest.mark.parametrize("name", ["count", "seq", "ttl_ms", "cooldown_ms", "wait_ms", "used"])
def test_integers_are_strict(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"{name}=.* is not an integer"):
        decoded(**{name: value})


@pytest.mark.parametrize(
    ("name", "low"),
    [("count", 1), ("seq", 1)]
    + [(name, 0) for name in ("ttl_ms", "cooldown_ms", "wait_ms", "used")],
)
def test_integers_have_bounds(name: str, low: int) -> None:
    for value in (low, protocol.MAX_SEQ):
        assert decoded(**{name: value}).parameters == {name: value}
    with pytest.raises(InvalidArgument, match=f"{name}={low - 1} is less than {low}"):
        decoded(**{name: low - 1})
    with pytest.raises(InvalidArgument, match=f"seq={2**53} is more than {2**53 - 1}"):
        decoded(seq=2**53)


@pytest.mark.parametrize("value", ["true", 1, 0, 1.0, None])
def test_booleans_are_strict(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="ended="):
        decoded(ended=value)


@pytest.mark.parametrize("name", ["session", "registry", "label"])
def test_texts_are_strict(name: str) -> None:
    for value in (1, True, None, ["a"]):
        with pytest.raises(InvalidArgument, match=f"{name} is not a text"):
            decoded(**{name: value})


def test_unknown_parameters_are_ignored() -> None:
    assert decoded(other=[1], count=2).parameters["count"] == 2


def test_a_token() -> None:
    assert decoded(session="0a" * 16).token == b"\n" * 16
    assert decoded().token is None
    for wrong in ("", "0a" * 15, "0a" * 17, "x" * 32, " " + "0a" * 15 + "0"):
        with pytest.raises(InvalidArgument, match="32 hexadecimal digits") as caught:
            decoded(session=wrong)
        assert not wrong or wrong not in str(caught.value)


@pytest.mark.parametrize(
    "ids", [[1, 2], (1, 2), np.array([1, 2], np.int8), np.array([1, 2], np.uint64), range(1, 3)]
)
def test_ids_of_any_integer_kind(ids: Any) -> None:
    array = protocol.as_ids(ids)
    assert array.dtype == np.uint64
    assert array.tolist() == [1, 2]


def test_no_ids() -> None:
    assert protocol.as_ids([]).shape == (0,)


@pytest.mark.parametrize("ids", [[-1], [2**64], np.array([1, -5]), [1, 2**70]])
def test_ids_out_of_range(ids: Any) -> None:
    with pytest.raises(OutOfRange):
        protocol.as_ids(ids)


@pytest.mark.parametrize(
    "ids", [[1.5], ["1"], [[1]], [True, False], np.ones(2), [None], 5, [[1], [2, 3]]]
)
def test_what_are_no_ids(ids: Any) -> None:
    with pytest.raises(InvalidArgument):
        protocol.as_ids(ids)
