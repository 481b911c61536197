"""The service alone: every way in which a request may be wrong, and that nothing escapes."""

from __future__ import annotations

import json
import socket
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from cidalloc import __version__
from cidalloc.codes import Code, Operation
from cidalloc.errors import CidError
from cidalloc.manager.registry import Registry
from cidalloc.manager.service import Service, boottime_ms
from cidalloc.manager.settings import Settings


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


TOKEN = "00112233445566778899aabbccddeeff"
OTHER = "ff" * 16


def open_session(service: Service, session: str = TOKEN, **more: Any) -> Any:
    return ask(service, Operation.OPEN, session=session, **{"ttl_ms": 10_000, **more})


def status(service: Service) -> dict[str, Any]:
    output = service.answer(np.array([[Operation.STATUS]], np.int8), None, "")
    assert not isinstance(output, CidError)
    ids, detail = output
    assert ids.shape == (1, 0) and ids.dtype == np.uint64
    found: dict[str, Any] = json.loads(detail)
    return found


def test_the_life_of_a_session(service: Service) -> None:
    protocol, generation, ttl, high, low, *rest = open_session(service, label="one")
    assert (protocol, generation, ttl) == (1, 1, 10_000)
    assert rest == [5_000, 120_000, 0, 0]
    assert str(UUID(int=high << 64 | low)) == status(service)["registry"]
    assert open_session(service, ttl_ms=2_000) == [
        *(protocol, generation, ttl, high, low),
        *rest,
    ]
    assert ask(service, Operation.RENEW, session=TOKEN.upper())[:2] == [1, 10_000], (
        "digits are digits"
    )
    assert ask(service, Operation.NEW, session=TOKEN, seq=1, count=3) == [10, 11, 12]
    assert ask(service, Operation.HELD, session=TOKEN) == [10, 11, 12]
    assert ask(service, Operation.NEW, session=TOKEN, seq=1) is Code.REPEATED
    assert ask(service, Operation.DELETE, [12, 10], session=TOKEN, seq=5, ended=True) == [2]
    assert ask(service, Operation.DELETE, [11], session=TOKEN, seq=5) is Code.REPEATED
    assert ask(service, Operation.HELD, session=TOKEN, seq=6) == [11]
    assert ask(service, Operation.HELD, session=TOKEN, seq=6) is Code.REPEATED
    assert ask(service, Operation.CLOSE, session=TOKEN, ended=True) == [1]
    for operation in (Operation.CLOSE, Operation.HELD, Operation.RENEW):
        assert ask(service, operation, session=TOKEN) is Code.SESSION_UNKNOWN
    assert open_session(service)[1] == 2, "another generation"


def test_nothing_has_ended_unless_it_is_said(service: Service, clock: Clock) -> None:
    open_session(service)
    ask(service, Operation.NEW, session=TOKEN, seq=1, count=5, cooldown_ms=60_000)
    assert ask(service, Operation.DELETE, [10], session=TOKEN, seq=2) == [1]
    assert ask(service, Operation.CLOSE, session=TOKEN) == [4]
    clock.now += 59_999
    assert ask(service, Operation.NEW) is Code.EXHAUSTED
    clock.now += 1
    assert sorted(ask(service, Operation.NEW, count=4)) == [11, 12, 13, 14]
    clock.now += 59_999
    assert ask(service, Operation.NEW) is Code.EXHAUSTED, "the manager's default"
    clock.now += 1
    assert ask(service, Operation.NEW) == [10]


def test_a_cooldown_is_announced_with_each_request_of_a_session(
    service: Service, clock: Clock
) -> None:
    for operation in (Operation.OPEN, Operation.NEW, Operation.RENEW):
        given = {each: {} for each in (Operation.OPEN, Operation.NEW, Operation.RENEW)}
        given[operation] = {"cooldown_ms": 300_000}
        open_session(service, **given[Operation.OPEN])
        assert ask(
            service,
            Operation.NEW,
            session=TOKEN,
            seq=1,
            count=5,
            **{"cooldown_ms": 5_000, **given[Operation.NEW]},
        )
        ask(service, Operation.RENEW, session=TOKEN, **given[Operation.RENEW])
        clock.now += 20_001
        assert ask(service, Operation.ACTIVE) == [0]
        clock.now += 299_999
        assert ask(service, Operation.NEW) is Code.EXHAUSTED, operation.name
        clock.now += 1
        assert len(ask(service, Operation.NEW, count=5)) == 5
        ask(service, Operation.DELETE, [10, 11, 12, 13, 14], ended=True)
        clock.now += 5_000


def test_a_session_expires(service: Service, clock: Clock) -> None:
    open_session(service)
    assert ask(service, Operation.NEW, session=TOKEN, seq=1, count=5, cooldown_ms=7_000)
    clock.now += 20_000  # ttl and grace
    assert ask(service, Operation.ACTIVE) == [5]
    clock.now += 128
    assert ask(service, Operation.ACTIVE) == [0]
    clock.now += 6_999
    assert ask(service, Operation.NEW) is Code.EXHAUSTED
    clock.now += 1
    assert sorted(ask(service, Operation.NEW, count=5)) == [10, 11, 12, 13, 14]


def test_a_session_expires_while_nobody_asks(service: Service, clock: Clock) -> None:
    open_session(service)
    assert ask(service, Operation.NEW, session=TOKEN, seq=1, count=5, cooldown_ms=0)
    clock.now += 20_128
    service.poll()
    clock.now += 5_000
    assert len(ask(service, Operation.NEW, count=5)) == 5, "they have cooled since it was seen"


def test_owners(service: Service) -> None:
    open_session(service)
    open_session(service, OTHER)
    assert ask(service, Operation.NEW, session=TOKEN, seq=1, count=2) == [10, 11]
    assert ask(service, Operation.NEW) == [12]
    assert ask(service, Operation.DELETE, [10], session=OTHER, seq=1) is Code.NOT_OWNER
    assert ask(service, Operation.DELETE, [10]) is Code.NOT_OWNER
    assert ask(service, Operation.DELETE, [12], session=TOKEN, seq=2) is Code.NOT_OWNER
    assert ask(service, Operation.DELETE, [10, 12], session=TOKEN, seq=3) is Code.NOT_OWNER
    assert ask(service, Operation.DELETE, [13], session=TOKEN, seq=4) is Code.NOT_HELD
    assert ask(service, Operation.HELD, session=OTHER) == []
    assert ask(service, Operation.DELETE, [11], session=TOKEN, seq=5) == [1], "none was applied"


SESSION_OPERATIONS = {
    Operation.OPEN: {"ttl_ms": 5_000},
    Operation.RENEW: {},
    Operation.CLOSE: {},
    Operation.HELD: {},
    Operation.NEW: {"seq": 1},
    Operation.DELETE: {"seq": 1},
}


@pytest.mark.parametrize(
    "session",
    ["", "0", TOKEN[:-1], TOKEN + "0", TOKEN[:-1] + "g", TOKEN[:-1] + "\n", " " + TOKEN[1:],
     "٠" * 32, 7, 1.5, True, [TOKEN], {}],
)  # fmt: skip
@pytest.mark.parametrize("operation", SESSION_OPERATIONS)
def test_a_session_that_is_none(service: Service, operation: Operation, session: Any) -> None:
    given = SESSION_OPERATIONS[operation]
    assert ask(service, operation, [10], session=session, **given) is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "operation", [Operation.OPEN, Operation.RENEW, Operation.CLOSE, Operation.HELD]
)
def test_a_session_that_is_missing(service: Service, operation: Operation) -> None:
    assert ask(service, operation, ttl_ms=5_000) is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("seq", [None, 0, -1, True, "1", 1.0, 2**53, 2**70])
@pytest.mark.parametrize("operation", [Operation.NEW, Operation.DELETE, Operation.HELD])
def test_a_seq_that_is_none(service: Service, operation: Operation, seq: Any) -> None:
    open_session(service)
    assert ask(service, Operation.NEW, session=TOKEN, seq=1) == [10]
    assert ask(service, operation, [10], session=TOKEN, seq=seq) is Code.INVALID_ARGUMENT
    assert ask(service, Operation.HELD, session=TOKEN, seq=2**53 - 1) == [10]
    assert ask(service, operation, [10], session=TOKEN, seq=2**53 - 1) is Code.REPEATED


def test_an_open_without_a_ttl(service: Service) -> None:
    assert ask(service, Operation.OPEN, session=TOKEN) is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("operation", [Operation.NEW, Operation.DELETE])
def test_a_change_of_a_session_without_a_seq(service: Service, operation: Operation) -> None:
    open_session(service)
    assert ask(service, Operation.NEW, session=TOKEN, seq=1) == [10]
    assert ask(service, operation, [10], session=TOKEN) is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"ttl_ms": None}, Code.INVALID_ARGUMENT),
        ({"ttl_ms": -1}, Code.INVALID_ARGUMENT),
        ({"ttl_ms": "5000"}, Code.INVALID_ARGUMENT),
        ({"ttl_ms": 5000.0}, Code.INVALID_ARGUMENT),
        ({"ttl_ms": True}, Code.INVALID_ARGUMENT),
        ({"ttl_ms": 0}, Code.LIMIT_EXCEEDED),
        ({"ttl_ms": 999}, Code.LIMIT_EXCEEDED),
        ({"ttl_ms": 600_001}, Code.LIMIT_EXCEEDED),
        ({"ttl_ms": 2**80}, Code.LIMIT_EXCEEDED),
        ({"cooldown_ms": -1}, Code.INVALID_ARGUMENT),
        ({"cooldown_ms": "1"}, Code.INVALID_ARGUMENT),
        ({"cooldown_ms": 10**12}, Code.LIMIT_EXCEEDED),
        ({"label": 5}, Code.INVALID_ARGUMENT),
        ({"label": "a\nb"}, Code.INVALID_ARGUMENT),
        ({"label": "a\0"}, Code.INVALID_ARGUMENT),
        ({"label": "\x1b[2J"}, Code.INVALID_ARGUMENT),
        ({"label": "\u202e"}, Code.INVALID_ARGUMENT),
        ({"label": "\ud800"}, Code.INVALID_ARGUMENT),
        ({"label": "x" * 65}, Code.INVALID_ARGUMENT),
        ({"label": "ü" * 33}, Code.INVALID_ARGUMENT),
        ({"registry": "nonsense"}, Code.REGISTRY_MISMATCH),
        ({"registry": str(UUID(int=0))}, Code.REGISTRY_MISMATCH),
        ({"registry": 5}, Code.INVALID_ARGUMENT),
    ],
)
def test_an_open_that_is_refused(
    service: Service, parameters: dict[str, Any], expected: Code
) -> None:
    assert open_session(service, **parameters) is expected
    assert status(service)["sessions_total"] == 0
    assert open_session(service, label="ü" * 32)[1] == 1
    assert status(service)["sessions"][0]["label"] == "ü" * 32


def test_the_registry_that_was_meant(service: Service) -> None:
    registry = status(service)["registry"]
    assert ask(service, Operation.NEW, registry=registry) == [10]
    assert ask(service, Operation.ACTIVE, registry=OTHER) is Code.REGISTRY_MISMATCH
    output = service.answer(
        np.array([[Operation.STATUS]], np.int8), None, json.dumps({"registry": OTHER})
    )
    assert isinstance(output, CidError) and registry in str(output)


@pytest.mark.parametrize("session", [TOKEN, TOKEN[:-1], TOKEN + "x"])
@pytest.mark.parametrize("operation", SESSION_OPERATIONS)
def test_no_error_shows_a_token(service: Service, operation: Operation, session: str) -> None:
    open_session(service, OTHER)
    for more in ({}, {"seq": 1}, {"seq": 1, "count": 10**6}, {"seq": 1, "ttl_ms": 1}):
        output = service.answer(
            np.array([[operation]], np.int8),
            np.array([[10, 77]], np.uint64),
            json.dumps({"session": session, **more}),
        )
        assert isinstance(output, CidError)
        assert TOKEN[:-1] not in repr(output)
    assert TOKEN[:-1] not in json.dumps(status(service))


def test_a_status(service: Service, clock: Clock) -> None:
    open_session(service, label="one")
    ask(service, Operation.NEW, session=TOKEN, seq=1, count=2)
    ask(service, Operation.NEW)
    ask(service, Operation.DELETE, [10], session=TOKEN, seq=2, ended=True, used=1)
    ask(service, Operation.DELETE, [10], session=TOKEN, seq=3)
    clock.now += 1_500
    found = status(service)
    assert UUID(found.pop("registry")).version == 4
    assert found == {
        "version": __version__,
        "host": socket.gethostname(),
        "slice": None,
        "pool": {"first": 10, "capacity": 5, "block": 1},
        "held": 2,
        "used": 1,
        "cooling": 1,
        "free": 2,
        "inactive": 1,
        "peak": 3,
        "high_water": 3,
        "issues_in_s": 0.0,
        "restored": False,
        "draining": False,
        "anonymous": 1,
        "waiting": 0,
        "sessions": [{"label": "one", "held": 1, "used": 1, "age_s": 1.5, "expires_in_s": 18.5}],
        "sessions_total": 1,
        "sessions_silent": 0,
        "sessions_expired": 0,
        "sessions_expired_in_use": 0,
        "expired": [],
        "dead": 0,
        "acquired": 3,
        "released": {"ended": 1, "cooled": 0, "expired": 0},
        "uptime_s": 1.5,
        "file": None,
        "operations": {"OPEN": 1, "NEW": 2, "DELETE": 2, "STATUS": 1},
        "errors": {"NOT_HELD": 1},
    }


def test_one_that_has_ended_its_work(service: Service) -> None:
    service.close()
    assert ask(service, Operation.NEW) is Code.UNAVAILABLE
    assert open_session(service) is Code.UNAVAILABLE
    service.poll()
    service.close()


@pytest.mark.parametrize("kind", [ZeroDivisionError, MemoryError, RuntimeError])
def test_nothing_escapes(
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
) -> None:
    def broken(*arguments: Any, **named: Any) -> None:
        raise kind("/secret/path.py")

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


def test_a_renewal_says_whether_sessions_wait(service: Service, clock: Clock) -> None:
    other = "0" * 32
    open_session(service)
    open_session(service, session=other)
    everything = status(service)["free"]
    ask(service, Operation.NEW, session=TOKEN, seq=1, count=everything)
    assert ask(service, Operation.RENEW, session=TOKEN) == [1, 10_000, 0]
    asked = ask(service, Operation.NEW, session=other, seq=1, wait_ms=1_000)
    assert asked is Code.EXHAUSTED
    assert ask(service, Operation.RENEW, session=TOKEN) == [1, 10_000, 1]
    assert status(service)["waiting"] == 1
    clock.now += 1_000
    assert ask(service, Operation.RENEW, session=TOKEN) == [1, 10_000, 0]
    assert status(service)["waiting"] == 0


def test_a_place_needs_a_session(service: Service) -> None:
    assert ask(service, Operation.NEW, wait_ms=1_000) is Code.INVALID_ARGUMENT
