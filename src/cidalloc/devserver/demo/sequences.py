"""The two sequences of the demo, one streaming, one not, and their expected sums."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

from ...client import Client, Sequence
from . import MODEL

__all__ = ["FIRST", "SECOND", "expected_sums", "number", "run_two_sequences"]

_VALUES = (11, 7, 5, 3, 2, 0, 1)
FIRST = (0, *_VALUES)
"""The first sequence sends a start value, then values to add."""
SECOND = (100, *(-value for value in _VALUES))
"""The second sequence sends a start value, then values to subtract."""


def expected_sums(values: tuple[int, ...]) -> list[int]:
    """Return the correct sums of a sequence."""
    return list(itertools.accumulate(values))


def number(value: int, module: Any = tritonclient.grpc) -> list[Any]:
    """Return the accumulator's input for ``value``, of tritonclient's ``module``."""
    tensor = module.InferInput("INPUT", [1, 1], "INT32")
    return [tensor.set_data_from_numpy(np.array([[value]], np.int32))]


def run_two_sequences(
    client: Client,
    *,
    asynchronous: bool = False,
    reverse: bool = False,
    say: Callable[[str], None] = lambda line: None,
    watch: Callable[[Sequence], AbstractContextManager[Any]] = nullcontext,
) -> int:
    """Run both sequences side by side and return the number of wrong sums.

    Args:
        client: a client over gRPC.
        asynchronous: send all requests before reading the first answer.
        reverse: stream the second sequence instead of the first.
        say: called with each line of the report.
        watch: returns a context manager that is entered when a sequence has its ID, and left
            before the ID is released.
    """
    with (
        client.sequence(MODEL, streaming=not reverse) as first,
        watch(first),
        client.sequence(MODEL, streaming=reverse) as second,
        watch(second),
    ):
        pair = (first, second)
        answers: list[list[Any]] = []
        for step, values in enumerate(zip(FIRST, SECOND, strict=True)):
            end = step == len(FIRST) - 1
            row = []
            for sequence, value in zip(pair, values, strict=True):
                send: Any = sequence.async_infer if asynchronous else sequence.infer
                row.append(send({"INPUT": value}, end=end))
            answers.append(row)

        say("non-streaming : streaming" if reverse else "streaming : non-streaming")
        wrong = 0
        expected = zip(expected_sums(FIRST), expected_sums(SECOND), strict=True)
        for step, (row, wanted) in enumerate(zip(answers, expected, strict=True)):
            results = [each.result() for each in row] if asynchronous else row
            got = tuple(int(result["OUTPUT"][0, 0]) for result in results)
            say(f"[{step}] {got[0]} : {got[1]}")
            if got != wanted:
                say(f"[ expected ] {wanted[0]} : {wanted[1]}")
                wrong += sum(a != b for a, b in zip(got, wanted, strict=True))
        return wrong
