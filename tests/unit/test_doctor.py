"""What ``cidalloc doctor`` makes of what it saw, without a server: facts in, findings out."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from click.testing import CliRunner

from cidalloc.cli.ask import Manager
from cidalloc.cli.compare import compare
from cidalloc.cli.doctor import doctor
from cidalloc.cli.rules import Facts, examine
from cidalloc.errors import InvalidArgument, Unavailable

STATUS = {
    "version": "1",
    "pool": {"first": 1, "capacity": 1000, "block": 1},
    "held": 0,
    "cooling": 0,
    "anonymous": 0,
    "used": 0,
    "sessions_silent": 0,
    "expired": [],
    "file": "/state/cidmgr.cidalloc",
}
NEW = {"used", "sessions_silent", "expired"}  # that managers before 0.1.0 do not tell
SEQUENCES = {"sequence_batching": {"max_sequence_idle_microseconds": "5000000"}}
TEXT = {
    "sequence_batching": {
        "control_input": [
            {"control": [{"kind": "CONTROL_SEQUENCE_CORRID", "data_type": "TYPE_STRING"}]}
        ]
    }
}
NARROW = {
    "sequence_batching": {
        "control_input": [
            {"control": [{"kind": "CONTROL_SEQUENCE_CORRID", "data_type": "TYPE_INT32"}]}
        ]
    }
}


def facts(status_says: dict[str, Any] | None = None, /, **more: Any) -> Facts:
    values: dict[str, Any] = {
        "manager": "cidmgr",
        "status": STATUS | (status_says or {}),
        "answered_ms": 1.0,
        "server": "2.99.0",
        "config": {"dynamic_batching": {}},
        "targets": {"asr": SEQUENCES},
    }
    return Facts(**values | more)


@pytest.mark.parametrize(
    "more",
    [
        {"held": 900, "used": 450},
        {"held": 900, "used": 0, "sessions_silent": 1},
        {"held": 700, "used": 0},
    ],
)
def test_caches_are_named_only_if_the_pool_is_nearly_full_of_them(more: dict[str, Any]) -> None:
    assert not any("held IDs are in use" in each.what for each in examine(facts(more)))


def test_an_earlier_manager() -> None:
    old = facts({"held": 950})
    assert old.status is not None
    old.status = {k: v for k, v in old.status.items() if k not in NEW}
    assert [each.level for each in examine(old)].count("FAIL") == 1


def test_nothing_to_complain_of() -> None:
    assert {each.level for each in examine(facts())} == {"ok"}


@pytest.mark.parametrize(
    ("seen", "level", "words"),
    [
        (facts({"file": None}), "warn", "only in memory"),
        (facts({"held": 799}), "ok", "79.9% of the 1,000 IDs"),
        (facts({"held": 700, "cooling": 100}), "warn", "80.0% of the 1,000 IDs"),
        (facts({"held": 950}), "FAIL", "95.0% of the 1,000 IDs"),
        (facts({"held": 900, "used": 449}), "note", "only 449 of the 900 held IDs are in use"),
        (
            facts(
                {
                    "expired": [
                        {"label": "w7", "held": 9, "used": 3, "ago_s": 61.0},
                        {"label": "w1", "held": 9, "used": None, "ago_s": 65.0},
                        {"label": "w2", "held": 9, "used": 0, "ago_s": 65.0},
                        {"label": "w8", "held": 9, "used": 2, "ago_s": 70.0},
                    ]
                }
            ),
            "warn",
            "2 sessions expired within the last hour with 5 IDs in use (the last one: w7, "
            "1 min 01 s ago)",
        ),
        (facts({"anonymous": 7}), "note", "7 IDs are held without a session"),
        (facts({"anonymous": 90_000}), "warn", "90,000 IDs are held without a session"),
        (facts(answered_ms=1500.0), "warn", "answers (1500 ms)"),
        (facts(config={}), "warn", "no dynamic_batching"),
        (
            facts(config={"dynamic_batching": {"max_queue_delay_microseconds": "100"}}),
            "warn",
            "every request waits for other requests",
        ),
        (facts(server="2.51.0"), "note", "a string as sequence_id can crash"),
        (facts(server="2.54.0"), "warn", "cancels a gRPC request at the wrong moment"),
        (facts(server="2.54.0"), "note", "does not exit while a gRPC stream is open"),
        (facts(server="2.58.0"), "note", "as ready even if its Python process is dead"),
        (facts(may_load=True), "warn", "can load models"),
        (facts(shared_memory=True), "note", "register shared memory"),
        (facts(index_error="restricted"), "note", "cannot be read: restricted"),
        (facts(unread={"asr": "gone"}), "note", "the configuration of asr cannot be read: gone"),
        (facts(unread={"asr": "gone"}, named=True), "FAIL", "the configuration of asr cannot be"),
        (
            facts({"pool": {"first": 2**53 - 10, "capacity": 11}}),
            "ok",
            "the pool fits its CORRID",
        ),
        (
            facts({"pool": {"first": 2**53 - 10, "capacity": 1_000}}),
            "warn",
            "read numbers above 2^53 as doubles",
        ),
        (
            facts(targets={"asr": {"name": "asr"}}, named=True),
            "FAIL",
            "the client refuses this model",
        ),
        (facts(targets={"asr": TEXT}, server="2.54.0"), "ok", "the pool fits its CORRID"),
        (facts(targets={"asr": TEXT}, server="2.53.0"), "warn", "can crash a Triton server"),
        (facts(targets={}), "note", "no model on this server has sequence_batching"),
        (facts(targets={"asr": SEQUENCES | {"backend": "python"}}), "note", "it leaks"),
        (
            facts(
                targets={
                    "asr": {"sequence_batching": {"max_sequence_idle_microseconds": 9 * 10**8}}
                }
            ),
            "warn",
            "remembers an idle sequence for 15 min",
        ),
    ],
)
def test_a_finding(seen: Facts, level: str, words: str) -> None:
    found = [each for each in examine(seen) if words in each.what]
    assert [each.level for each in found] == [level], examine(seen)
    assert level in ("ok", "note") or found[0].todo


@pytest.mark.parametrize(
    "seen",
    [
        facts(reachable=False, error="no answer"),
        facts(status=None, error="not healthy"),
        facts({"held": 950}),
        facts(unread={"asr": "gone"}, named=True),
        facts(targets={"asr": {"name": "asr"}}, named=True),
        facts({"pool": {"first": 2**40, "capacity": 1_000}}, targets={"asr": NARROW}),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_failure_is_exit_status_1(
    seen: Facts, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "FAIL" in [each.level for each in examine(seen)]
    monkeypatch.setattr("cidalloc.cli.doctor._gather", lambda *_: seen)
    done = CliRunner().invoke(doctor, ["localhost:1", *options])
    assert done.exit_code == 1, done.output


def test_anything_else_is_exit_status_0(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = facts({"held": 800}, may_load=True, unread={"asr": "gone"})
    monkeypatch.setattr("cidalloc.cli.doctor._gather", lambda *_: seen)
    assert CliRunner().invoke(doctor, ["localhost:1"]).exit_code == 0


def test_a_server_without_faults_has_none_of_them() -> None:
    assert not [each for each in examine(facts(server="2.59.0")) if "before" in each.what]


@pytest.mark.parametrize(
    ("error", "todo"), [("not healthy", "unload and load"), ("timeout", "read Triton's log")]
)
def test_a_manager_that_does_not_answer(error: str, todo: str) -> None:
    found = examine(facts(status=None, error=error))[0]
    assert found.level == "FAIL" and f"does not answer: {error}" in found.what
    assert todo in found.todo


# ---- Several servers


def server(
    url: str, first: int, capacity: int, slice_: str | None = None, registry: str = "", **more: Any
) -> Facts:
    pool = {"first": first, "capacity": capacity}
    more = {"registry": registry or url, "host": f"host-of-{url}", "slice": slice_, **more}
    return facts({"pool": pool, **more}, url=url)


A, B = server("a:1", 100, 50, "0/2"), server("b:1", 150, 50, "1/2")
WHOLE = server("w:1", 100, 100)
OLD = facts({"pool": {"first": 180, "capacity": 5}, "registry": "old"}, url="old:1")
AWAY = facts(status=None, error="no answer", url="away:1")
APART = ("ok", "the pools of 2 servers do not overlap")


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([A, B], [APART]),
        ([A, server("c:1", 2**62, 2**24, "random")], [APART]),
        ([A, OLD], [APART]),
        ([A, AWAY], [("note", "did not answer: 1; their pools are not compared")]),
        ([AWAY, AWAY], [("note", "did not answer: 2")]),
        (
            [A, B, server("a:2", 100, 50, "0/2")],
            [("FAIL", "a:1 and a:2 have one slice, 0/2: they issue the same IDs")],
        ),
        (
            [A, server("x:1", 100, 50, "0/2", "a:1", host="host-of-a:1")],
            [("FAIL", "a:1 and x:1 answer with one registry, a:1 (host: host-of-a:1): they are")],
        ),
        (
            [A, B, server("x:1", 100, 50, "0/2", "a:1")],
            [("FAIL", "answer with one registry, a:1 (host: host-of-a:1, host-of-x:1)"), APART],
        ),
        ([A, B, WHOLE], [("warn", "the pools of a:1, w:1 and b:1 overlap. This matters as soon")]),
        ([WHOLE, server("v:1", 100, 100)], [("warn", "the pools of w:1 and v:1 overlap")]),
        (
            [B, server("in:1", 110, 5), WHOLE],
            [("warn", "the pools of w:1, in:1 and b:1 overlap")],
        ),
        ([B, OLD], [("warn", "the pools of b:1 and old:1 overlap")]),
        (
            [A, server("c:1", 1000, 50, "0/4")],
            [APART, ("warn", "a:1 and c:1 have slices of one number, 0/2 and 0/4: a proxy")],
        ),
        (
            [server(f"{n}:1", 100, 100) for n in range(64)],
            [("warn", "62:1 and 63:1 overlap")],
        ),
    ],
)
def test_several_servers(seen: list[Facts], expected: list[tuple[str, str]]) -> None:
    found = compare(seen)
    assert [each.level for each in found] == [level for level, _ in expected], found
    for each, (level, words) in zip(found, expected, strict=True):
        assert words in each.what
        assert bool(each.todo) is (level in ("warn", "FAIL"))


@pytest.mark.parametrize(
    ("seen", "level", "words", "todo"),
    [
        (
            facts({"slice": "3/64", "host": "triton-3"}),
            "ok",
            "slice 3/64, on the host triton-3",
            "",
        ),
        (facts({"issues_in_s": 610.0}), "note", "issues no ID for another 10 min 10 s", ""),
        (facts({"issues_in_s": 9.0, "restored": True}), "warn", "file was restored", "no copies"),
        (facts({"issues_in_s": 9.0, "restored": False}), "note", "registry is new", ""),
        (
            facts({"pool": {"first": 2**62, "capacity": 2**24}, "slice": "random", "host": "a"}),
            "warn",
            "read numbers above 2^53 as doubles",
            "choose a fixed slice",
        ),
        (
            facts(
                {"pool": {"first": 2**62, "capacity": 2**24}, "slice": "random", "host": "a"},
                targets={"asr": NARROW},
            ),
            "FAIL",
            "asr takes IDs up to 2147483647, but the pool ends at",
            "the manager's settings first and slice",
        ),
    ],
)
def test_a_finding_about_a_slice(seen: Facts, level: str, words: str, todo: str) -> None:
    (found,) = (each for each in examine(seen) if words in each.what)
    assert found.level == level and todo in found.todo


def test_what_is_printed_about_several(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {each.url: each for each in (A, B, WHOLE)}
    monkeypatch.setattr("cidalloc.cli.doctor._gather", lambda manager, *_: answers[manager.url])
    words = CliRunner().invoke(doctor, [*answers]).output.splitlines()
    heads = [each for each in words if not each.startswith((" ", "ok", "note", "warn", "FAIL"))]
    assert heads == ["a:1", "b:1", "w:1", "All servers together"]
    found = json.loads(CliRunner().invoke(doctor, [*answers, "--json"]).output)
    assert {each["url"] for each in found} == {"a:1", "b:1", "w:1", None}
    (last,) = (each for each in found if each["url"] is None)
    assert last["level"] == "warn"
    alone = CliRunner().invoke(doctor, ["a:1", "a:1"]).output
    assert "All servers" not in alone, "it is one"


def test_a_name_stands_for_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        if host != "triton.test":
            raise socket.gaierror("no such name")
        found = [f"127.0.0.{n}" for n in (2, 3, 2)]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in found]

    asked: list[Manager] = []

    def gather(manager: Manager, *_: Any) -> Facts:
        asked.append(manager)
        return AWAY

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr("cidalloc.cli.doctor._gather", gather)
    CliRunner().invoke(doctor, ["dns:http://triton.test:8000"])
    assert [each.url for each in asked] == ["http://127.0.0.2:8000", "http://127.0.0.3:8000"]
    done = CliRunner().invoke(doctor, ["dns:none.test:8001"])
    assert isinstance(done.exception, Unavailable)
    assert "none.test:8001 cannot be resolved: no such name" in str(done.exception)
    monkeypatch.undo()
    done = CliRunner().invoke(doctor, [f"dns:{'a' * 70}.test:8001"])
    assert isinstance(done.exception, Unavailable)
    done = CliRunner().invoke(doctor, ["dns:unix:/tmp/triton"])
    assert isinstance(done.exception, InvalidArgument)
