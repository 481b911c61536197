"""The status: which sessions it lists, those that expired, and its fields, which are stable."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import Loopback
from rich.console import Console

from cidalloc.cli.screen import status_view
from cidalloc.client import Client
from cidalloc.codes import Operation
from cidalloc.manager.expired import ExpiredSessions
from cidalloc.manager.inspection import SHOWN, look, status_of
from cidalloc.manager.registry import Registry
from cidalloc.manager.service import Service
from cidalloc.manager.settings import Settings

DOCS = Path(__file__).parent.parent.parent / "docs"
SETTINGS = Settings(first=1, capacity=100_000, max_sessions=10_000, grace_ms=0, fresh=True)
BOOT = b"b" * 16
HOUR_MS = 3_600_000

# Programs read these: names may be added, and none may change.
FIELDS: dict[str, Any] = {
    "version": str,
    "host": str,
    "slice": str,
    "pool": {"first": int, "capacity": int, "block": int},
    "held": int,
    "used": int,
    "cooling": int,
    "free": int,
    "inactive": int,
    "peak": int,
    "high_water": int,
    "issues_in_s": float,
    "restored": bool,
    "draining": bool,
    "dead": int,
    "anonymous": int,
    "waiting": int,
    "sessions": [
        {"label": str, "held": int, "used": int, "age_s": float, "expires_in_s": float},
    ],
    "sessions_total": int,
    "sessions_silent": int,
    "sessions_expired": int,
    "sessions_expired_in_use": int,
    "expired": [{"label": str, "held": int, "used": int, "ago_s": float}],
    "acquired": int,
    "released": {"ended": int, "cooled": int, "expired": int},
    "uptime_s": float,
    "registry": str,
    "file": str,
    "operations": dict,
    "errors": dict,
}


NEW = {"used", "sessions_silent", "sessions_expired_in_use", "expired"}


def token(n: int) -> bytes:
    return n.to_bytes(16, "little")


def add(
    registry: Registry, n: int, held: int, used: int | None, now: int = 0, ttl_ms: int = 60_000
) -> None:
    registry.open(token(n), now, ttl_ms=ttl_ms, label=f"{n}")
    if held:
        registry.acquire(held, now, token=token(n), seq=1, used=used)
    else:
        registry.renew(token(n), now, used=used)


def labels(status: dict[str, Any], key: str = "sessions") -> list[str]:
    return [each["label"] for each in status[key]]


# ---- The open sessions


def test_those_that_use_the_most_come_first() -> None:
    registry = Registry(SETTINGS, 0)
    for n, (held, used) in enumerate([(9, None), (5, 0), (5, 2), (8, 2), (3, 3), (10, None)]):
        add(registry, n, held, used)
    status = status_of(registry, 0)
    assert labels(status) == ["4", "3", "2", "1", "5", "0"]
    assert [each["used"] for each in status["sessions"]] == [3, 2, 2, 0, None, None]
    assert (status["used"], status["sessions_silent"]) == (7, 2)
    assert labels(status_of(registry, 0, 2)) == ["4", "3"]
    assert labels(status_of(registry, 0, 0)) == []


def test_a_large_one_that_came_late_is_listed() -> None:
    registry = Registry(SETTINGS, 0)
    for n in range(SHOWN + 50):
        add(registry, n, 1, 1)
    add(registry, 999, 7, 5)
    status = status_of(registry, 0)
    assert len(status["sessions"]) == SHOWN
    assert labels(status)[0] == "999"
    assert status["used"] == SHOWN + 55


def test_with_many_sessions_the_choice_is_kept_for_a_while() -> None:
    registry = Registry(SETTINGS, 0)
    for n in range(300):
        add(registry, n, 1, 1)
    add(registry, 998, 9, 8)
    assert labels(status_of(registry, 1_000))[0] == "998"
    add(registry, 999, 9, 9, now=1_000)
    registry.renew(token(998), 1_000, used=2)
    status = status_of(registry, 1_002)
    (first, *_) = status["sessions"]
    assert (first["label"], first["used"]) == ("998", 2), "the numbers are those of now"
    assert status["used"] == 300 + 9 + 2
    assert labels(status_of(registry, 1_003))[:2] == ["999", "998"]
    registry.close_session(token(999), 1_003)
    assert labels(status_of(registry, 1_004))[0] == "998", "one that has ended is not listed"


def test_a_change_that_is_refused_tells_nothing() -> None:
    registry = Registry(SETTINGS, 0)
    add(registry, 1, 3, 1)
    for call in (
        lambda: registry.acquire(2, 0, token=token(1), seq=1, used=3),
        lambda: registry.acquire(10**6, 0, token=token(1), seq=2, used=3),
        lambda: registry.release(np.array([77], np.uint64), 0, token=token(1), seq=2, used=0),
    ):
        with pytest.raises(Exception, match=r"seq|count|77"):
            call()
        assert status_of(registry, 0)["used"] == 1
    registry.acquire(1, 0, used=1)
    assert status_of(registry, 0)["used"] == 1, "IDs without a session are not counted"


def test_it_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "it"
    registry = Registry.in_file(path, SETTINGS, 0, BOOT)
    add(registry, 1, 5, 2)
    add(registry, 2, 3, None)
    used = [each["used"] for each in status_of(look(path, 0, BOOT), 0)["sessions"]]
    assert json.dumps(used) == "[2, null]"
    registry.close()
    registry = Registry.in_file(path, SETTINGS, 0, BOOT)
    status = status_of(registry, 0)
    assert [each["used"] for each in status["sessions"]] == [2, None]
    assert (status["used"], status["sessions_silent"]) == (2, 1)
    expired = {each["label"]: each["used"] for each in status_of(registry, 70_000)["expired"]}
    assert expired == {"1": 2, "2": None}
    registry.close()


# ---- Those that expired


def test_expired_sessions_are_listed_for_an_hour() -> None:
    registry = Registry(SETTINGS, 0)
    add(registry, 1, 3, 2, ttl_ms=10_000)
    add(registry, 2, 3, 0, ttl_ms=20_000)
    add(registry, 3, 3, None, ttl_ms=30_000)
    add(registry, 4, 3, 3, ttl_ms=40_000)
    registry.close_session(token(4), 0)
    status = status_of(registry, 10_001)
    assert status["expired"] == [{"label": "1", "held": 3, "used": 2, "ago_s": 0.0}]
    assert status["used"] == 0
    status_of(registry, 20_001)
    status = status_of(registry, 32_001)
    assert labels(status, "expired") == ["3", "2", "1"], "a closed one has not expired"
    assert [each["ago_s"] for each in status["expired"]] == [0.0, 12.0, 22.0]
    assert (status["sessions_expired"], status["sessions_expired_in_use"]) == (3, 1)
    assert labels(status_of(registry, 10_001 + HOUR_MS), "expired") == ["3", "2", "1"]
    assert labels(status_of(registry, 10_002 + HOUR_MS), "expired") == ["3", "2"]
    status = status_of(registry, 32_002 + HOUR_MS)
    assert status["expired"] == []
    assert status["sessions_expired"] == 3


def test_only_the_latest_are_kept() -> None:
    registry = Registry(SETTINGS, 0)
    for n in range(SHOWN + 10):
        add(registry, n, 1, 1, ttl_ms=10_000 + n)
    status = status_of(registry, 10**5)
    assert len(status["expired"]) == SHOWN
    assert labels(status, "expired")[0] == str(SHOWN + 9)
    assert labels(status_of(registry, 10**5, 2), "expired") == labels(status, "expired")[:2]
    assert status["sessions_expired_in_use"] == SHOWN + 10
    assert len(registry.expired.latest(10**5, 10**6)) == SHOWN


def test_ids_without_a_session_do_not_expire_as_one() -> None:
    registry = Registry(SETTINGS, 0)
    registry.acquire(3, 0)
    status = status_of(registry, 10**9)
    assert status["released"]["expired"] == 3
    assert status["expired"] == []


def test_the_log_is_limited(caplog: pytest.LogCaptureFixture) -> None:
    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    expired = ExpiredSessions()
    with caplog.at_level(logging.INFO, "cidalloc.manager.expired"):
        expired.add("quiet", 5, 0, 0)
        expired.add("old", 5, None, 0)
        assert lines() == [], "nobody has lost anything, as far as is known"
        for n in range(25):
            expired.add(f"c{n}", 5, 3, 1_000 * n)
        found = lines()
        assert found[0] == "the session 'c0' expired with IDs in use: 3 of 5"
        assert len(found) == 10
        expired.log_suppressed(59_999)
        assert lines() == []
        expired.log_suppressed(60_000)
        assert lines() == ["more sessions that expired with IDs in use within a minute: 15"]
        expired.log_suppressed(10**6)
        for _ in range(11):
            expired.add("next", 2, 1, 10**6)
        assert len(lines()) == 10
        expired.log_suppressed(10**6 + 1)
        assert lines() == []
    assert (expired.count, expired.in_use) == (38, 36)


# ---- What the client tells


def test_a_client_tells_what_it_uses() -> None:
    now = 1_000_000
    transport = Loopback(SETTINGS, lambda: now)

    def told() -> tuple[int | None, int]:
        answer = transport.service.answer(np.array([[Operation.STATUS]], np.int8), None, "")
        assert isinstance(answer, tuple)
        (session,) = json.loads(answer[1])["sessions"]
        return session["used"], session["held"]

    with Client(transport=transport, label="it") as cids:
        first = cids.acquire_many(4).tolist()
        used, held = told()
        assert used == 4 < held, "what NEW has just issued counts, what is cached does not"
        cids.release(first.pop(), cooldown=60.0)
        cids.status()  # sends the release
        assert told()[0] == 3
        more = [cids.acquire() for _ in range(20)]
        used, _ = told()
        assert used is not None and 3 <= used <= 23, "as old as the last request"
        cids.release_many(more, ended=True)
        cids.release_many(first, ended=True)


# ---- On the screen


def shown(status: dict[str, Any], most: int | None = None) -> str:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(status_view(status, most))
    return console.export_text()


def test_the_screen() -> None:
    registry = Registry(SETTINGS, 0)
    for n in range(9):
        add(registry, n, 3, n % 3, ttl_ms=10_000)
    add(registry, 10, 4, 2)
    add(registry, 11, 4, None)
    more = {"version": "1", "operations": {}, "errors": {}}
    status = {**status_of(registry, 12_000), **more}
    text = shown(status)
    assert re.search(r"in use +2, .*; sessions that have not said it: 1", text)
    assert re.search(r"2 open, 9 expired, 6 of them with IDs in use", text)
    assert re.search(r"^10 +2 +4 +12.0 s +48.0 s$(?s:.*)^11 +- +4 +12.0 s", text, re.M)
    assert len(re.findall(r"^\d +[12] +3 +0.0 s$", text, re.M)) == 6
    assert len(re.findall(r"^\d+ +\S+ +[34] +", shown(status, 6), re.M)) == 4
    old = {name: value for name, value in status.items() if name not in NEW}
    old["sessions"] = [{k: v for k, v in e.items() if k != "used"} for e in old["sessions"]]
    text = shown(old)
    assert "2 open, 9 expired\n" in re.sub(" +\n", "\n", text), "a manager of an earlier version"
    assert re.search(r"^10 +- +4 +12.0 s", text, re.M)


# ---- Its fields


def shape_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: shape_of(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape_of(each) for each in value]
    return type(value)


def test_the_fields_are_stable(tmp_path: Path) -> None:
    now = 1_000_000
    service = Service(
        Settings(first=1, capacity=9, slice="0/1", fresh=True, state=str(tmp_path)),
        lambda: now,
        "it",
    )

    def ask(code: Operation, **parameters: Any) -> Any:
        answer = service.answer(np.array([[code]], np.int8), None, json.dumps(parameters))
        assert isinstance(answer, tuple), answer
        return answer[1]

    for n in (1, 2):
        ask(Operation.OPEN, session=f"{n:032}", ttl_ms=10_000 * n, label="x")
        ask(Operation.NEW, session=f"{n:032}", seq=1, used=1)
    now += 25_000
    status = json.loads(ask(Operation.STATUS))
    service.close()
    assert shape_of(status | {"operations": {}, "errors": {}}) == {
        **FIELDS,
        "operations": {},
        "errors": {},
    }


@pytest.mark.skipif(not DOCS.is_dir(), reason="a source distribution has none")
def test_the_fields_are_documented() -> None:
    text = (DOCS / "protocol.md").read_text()
    table = text.partition("## STATUS")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z_\[\].]+)`", row)}
    expected = set()
    for name, kind in FIELDS.items():
        if isinstance(kind, dict):
            expected |= {f"{name}.{each}" for each in kind}
        elif isinstance(kind, list):
            expected |= {f"{name}[].{each}" for each in kind[0]}
        else:
            expected.add(name)
    assert named == expected
