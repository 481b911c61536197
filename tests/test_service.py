"""The service alone: every way in which a request may be wrong, and that nothing escapes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from cidalloc.codes import Code, Operation
from cidalloc.errors import CidError
from cidalloc.registry import Registry
from cidalloc.service import Service, boottime_ms
from cidalloc.settings import Settings


class Clock:
    """A clock that stands until it is moved."""

    now = 1_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service(clock: Clock) -> Service:
    return Service(Settings(first=10, capacity=5, fresh=True, max_count=100), clock)


def ask(service: Service, code: int, ids: Any = (), **parameters: Any) -> Any:
    """Return the OUTPUT as a list, or the error's code."""
    output = service.answer(
        np.array([[code]], np.int8), np.array([ids], np.uint64), json.dumps(parameters)
    )
    if isinstance(output, CidError):
        return output.code
    ids, detail = output
    assert ids.dtype == np.uint64 and ids.shape[0] == 1 and detail == ""
    return ids[0].tolist()


def test_the_operations_of_2019(service: Service) -> None:
    assert ask(service, Operation.NEW) == [10]
    assert ask(service, Operation.NEW) == [11]
    assert ask(service, Operation.ACTIVE) == [2]
    assert ask(service, Operation.DELETE, [10]) == [1]
    assert ask(service, Operation.ACTIVE) == [1]
    assert ask(service, Operation.INACTIVE) == [1]
    assert ask(service, Operation.PEAK) == [2]


def test_many(service: Service) -> None:
    assert ask(service, Operation.NEW, count=3) == [10, 11, 12]
    assert ask(service, Operation.DELETE, [12, 10], ended=True) == [2]
    assert ask(service, Operation.ACTIVE) == [1]


def test_the_clock_decides(service: Service, clock: Clock) -> None:
    ask(service, Operation.NEW, count=5)
    assert ask(service, Operation.DELETE, [12], cooldown_ms=9_000) == [1]
    clock.now += 8_999
    assert ask(service, Operation.NEW) is Code.EXHAUSTED
    clock.now += 1
    assert ask(service, Operation.NEW) == [12]


def test_operations_without_ids_ignore_them(service: Service) -> None:
    assert ask(service, Operation.NEW, [0]) == [10]
    assert ask(service, Operation.ACTIVE, [77]) == [1]


@pytest.mark.parametrize(
    ("code", "ids", "parameters", "expected"),
    [
        (99, [], {}, Code.UNKNOWN_OPERATION),
        (-1, [], {}, Code.UNKNOWN_OPERATION),
        (Operation.NEW, [], {"count": 0}, Code.INVALID_ARGUMENT),
        (Operation.NEW, [], {"count": -3}, Code.INVALID_ARGUMENT),
        (Operation.NEW, [], {"count": 10**9}, Code.LIMIT_EXCEEDED),
        (Operation.NEW, [], {"count": 6}, Code.EXHAUSTED),
        (Operation.NEW, [], {"count": "2"}, Code.INVALID_ARGUMENT),
        (Operation.NEW, [], {"count": 2.0}, Code.INVALID_ARGUMENT),
        (Operation.NEW, [], {"count": True}, Code.INVALID_ARGUMENT),
        (Operation.NEW, [], {"count": 2**70}, Code.LIMIT_EXCEEDED),
        (Operation.DELETE, [], {}, Code.INVALID_ARGUMENT),
        (Operation.DELETE, [0], {}, Code.OUT_OF_RANGE),
        (Operation.DELETE, [9], {}, Code.OUT_OF_RANGE),
        (Operation.DELETE, [15], {}, Code.OUT_OF_RANGE),
        (Operation.DELETE, [2**64 - 1], {}, Code.OUT_OF_RANGE),
        (Operation.DELETE, [14], {}, Code.NOT_HELD),
        (Operation.DELETE, [10, 14], {}, Code.NOT_HELD),
        (Operation.DELETE, [10, 10], {}, Code.DUPLICATE),
        (Operation.DELETE, [10] * 101, {}, Code.LIMIT_EXCEEDED),
        (Operation.DELETE, [10], {"ended": 1}, Code.INVALID_ARGUMENT),
        (Operation.DELETE, [10], {"cooldown_ms": -1}, Code.INVALID_ARGUMENT),
        (Operation.DELETE, [10], {"cooldown_ms": 10**15}, Code.LIMIT_EXCEEDED),
        (Operation.DELETE, [10], {"cooldown_ms": 1e20}, Code.INVALID_ARGUMENT),
    ],
)
def test_bad_requests_change_nothing(
    service: Service, code: int, ids: list[int], parameters: dict[str, Any], expected: Code
) -> None:
    assert ask(service, Operation.NEW, count=2) == [10, 11]
    assert ask(service, code, ids, **parameters) is expected
    assert ask(service, Operation.ACTIVE) == [2]
    assert ask(service, Operation.INACTIVE) == [0]
    assert ask(service, Operation.DELETE, [10, 11]) == [2]


def test_nothing_escapes(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("/secret/path.py")

    monkeypatch.setattr(Registry, "acquire", broken)
    output = service.answer(np.array([[0]], np.int8), None, "")
    assert isinstance(output, CidError)
    assert output.code is Code.INTERNAL
    assert "secret" not in str(output)
    assert "secret" in caplog.text


def test_the_clock_of_boot_time_runs() -> None:
    first = boottime_ms()
    assert first > 0
    assert boottime_ms() >= first
