"""The rules of ``doctor``: they turn facts into findings, and do no I/O."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..client.core.model_info import ModelInfo, check_text_ids
from ..errors import InvalidArgument
from ..manager.slices import RANDOM
from .screen import duration

__all__ = ["EXACT", "INEXACT", "Facts", "Finding", "examine"]

EXACT = 2**53
"""A double represents every integer up to this one."""
INEXACT = (
    "JavaScript, jq and other programs read numbers above 2^53 as doubles and lose the last digits"
)

_NEARLY, _ALMOST = 0.8, 0.95  # of the pool in use
_SLOW_MS = 1000.0  # Triton answers for a dead model process after so long


@dataclass
class Facts:
    """What ``doctor`` found out about a deployment; unknown facts are empty.

    Attributes:
        manager: name of the manager model.
        url: address of the server.
        reachable: whether the server answers.
        error: the error, if the manager does not answer.
        status: the manager's answer to STATUS.
        answered_ms: how long the answer took.
        server: Triton's version.
        config: the manager's configuration.
        targets: the configurations of the models to check, by name.
        unread: the errors of models whose configuration cannot be read, by name.
        named: whether the user named the models.
        index_error: the error, if the list of models cannot be read.
        may_load: whether any client may load models.
        shared_memory: whether any client may register shared memory.
    """

    manager: str
    url: str = ""
    reachable: bool = True
    error: str = ""
    status: Mapping[str, Any] | None = None
    answered_ms: float = 0.0
    server: str = ""
    config: Mapping[str, Any] | None = None
    targets: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    named: bool = False
    index_error: str = ""
    may_load: bool = False
    shared_memory: bool = False


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        level: ``ok``, ``note``, ``warn`` or ``FAIL``.
        what: the finding and its effect.
        todo: the action to take; empty if there is none.
    """

    level: str
    what: str
    todo: str = ""

    def as_json(self) -> dict[str, str]:
        """Return the finding for JSON."""
        return {"level": self.level, "what": self.what, "todo": self.todo}


def examine(facts: Facts) -> list[Finding]:
    """Return all findings, in the order of their subjects."""
    return [finding for rule in _RULES for finding in rule(facts)]


def _manager(facts: Facts) -> Iterator[Finding]:
    if not facts.reachable:
        yield Finding(
            "FAIL", facts.error, "check that the server runs, and that this is its address"
        )
    elif facts.status is None:
        todo = "check that the model is loaded, and read Triton's log"
        if "not healthy" in facts.error:
            todo = (
                "unload and load the model, or restart the server: the model's process has died,"
                " and Triton does not restart it"
            )
        yield Finding("FAIL", f"{facts.manager} does not answer: {facts.error}", todo)
    else:
        version, took = facts.status["version"], facts.answered_ms
        level = "ok" if took < _SLOW_MS else "warn"
        todo = "" if level == "ok" else "find out what keeps the server's CPUs busy"
        yield Finding(level, f"{facts.manager} {version} answers ({took:.0f} ms)", todo)
        if waits_s := facts.status.get("issues_in_s"):
            what = f"the manager issues no ID for another {duration(waits_s)}: its "
            if facts.status.get("restored"):  # earlier managers do not tell it
                yield Finding(
                    "warn",
                    f"{what}file was restored, and clients may use IDs that were issued after the"
                    " copy was made",
                    "keep no copies of the file: they lack what was issued since",
                )
            else:
                yield Finding(
                    "note", f"{what}registry is new, and clients may use IDs from before it"
                )
        if facts.status.get("draining"):
            yield Finding(
                "warn",
                "the server is being drained: no new sequence begins, running ones continue",
                "restart the server when its sequences have ended ('cidalloc drain FILE --wait"
                " 10m'), or end the drain: 'cidalloc drain --undo FILE'",
            )


def _memory(facts: Facts) -> Iterator[Finding]:
    if facts.status is None:
        return
    if facts.status["file"]:
        yield Finding("ok", f"the manager stores held IDs in {facts.status['file']}")
    else:
        yield Finding(
            "warn",
            "the registry is only in memory: a restart forgets all held IDs",
            "choose a folder that outlives the server: 'cidalloc model -o --state FOLDER DIR'",
        )


def _slice(facts: Facts) -> Iterator[Finding]:
    if facts.status is not None and (part := facts.status.get("slice")):
        yield Finding("ok", f"the manager has the slice {part}, on the host {facts.status['host']}")


def _pool(facts: Facts) -> Iterator[Finding]:
    if facts.status is None:
        return
    status = facts.status
    capacity = status["pool"]["capacity"]
    used = (status["held"] + status["cooling"]) / capacity
    what = f"{used:.1%} of the {capacity:,} IDs are held or cooling"
    if used < _NEARLY:
        yield Finding("ok", what)
    else:
        larger = "enlarge the pool ('cidalloc registry upgrade --capacity N FILE')"
        if status.get("slice"):
            larger = "choose larger slices for all servers ('cidalloc model -o --slice K/N DIR')"
        todo = f"{larger}, or find the clients that hold the IDs ('cidalloc top URL')"
        yield Finding("warn" if used < _ALMOST else "FAIL", what, todo)
        # An earlier manager does not count them, and an earlier client does not say.
        in_use = status.get("used")
        if in_use is not None and not status["sessions_silent"] and 2 * in_use < status["held"]:
            yield Finding(
                "note",
                f"only {in_use:,} of the {status['held']:,} held IDs are in use: most are in the"
                " caches of clients",
                "let clients cache fewer IDs: Client(…, ahead=N)",
            )
    anonymous = status["anonymous"]
    if anonymous:
        yield Finding(
            "warn" if anonymous > _NEARLY * _setting(facts, "max_anonymous", 100_000) else "note",
            f"{anonymous:,} IDs are held without a session: the manager cannot see whether their"
            " programs are alive",
            "use the client in those programs, or make them release their IDs",
        )


def _expired(facts: Facts) -> Iterator[Finding]:
    expired = [each for each in (facts.status or {}).get("expired", ()) if each["used"]]
    if expired:
        in_use = sum(each["used"] for each in expired)
        last = expired[0]
        yield Finding(
            "warn",
            f"{len(expired):,} sessions expired within the last hour with {in_use:,} IDs in use"
            f" (the last one: {last['label'] or 'no label'}, {duration(last['ago_s'])} ago)",
            "look for clients that crashed, were killed or frozen, or cannot reach the server",
        )


def _digits(facts: Facts) -> Iterator[Finding]:
    if facts.status is None:
        return
    pool = facts.status["pool"]
    last = pool["first"] + pool["capacity"] - 1
    if last > EXACT:
        todo = "choose lower IDs for the pool"
        if facts.status.get("slice") == RANDOM:
            todo = "choose a fixed slice, such as --slice auto/64, if there are such programs"
        yield Finding("warn", f"the pool ends at {last}: {INEXACT}", todo)


def _manager_config(facts: Facts) -> Iterator[Finding]:
    if facts.config is None:
        return
    batching = facts.config.get("dynamic_batching")
    if batching is None:
        yield Finding(
            "warn",
            f"{facts.manager} has no dynamic_batching: it answers requests one by one, at less than"
            " half the rate",
            "add 'dynamic_batching { }' to the manager's config.pbtxt",
        )
    elif int(batching.get("max_queue_delay_microseconds", 0)):
        yield Finding(
            "warn",
            f"{facts.manager} has a max_queue_delay_microseconds: every request waits for other"
            " requests",
            "remove it from the manager's config.pbtxt",
        )


# Faults of Triton that matter here, each with the first version without it.
_FAULTS = (
    (
        (2, 54),
        "note",
        "a string as sequence_id can crash the server if the model's CORRID is an integer (Triton"
        " before 25.01)",
        "send integers only, or update Triton",
    ),
    (
        (2, 55),
        "warn",
        "a client that cancels a gRPC request at the wrong moment, also by a short timeout, can"
        " crash the server (seen on Triton 24.10, reported up to 25.01)",
        "set the timeouts of other clients above the longest duration of a request, or update"
        " Triton; the client of this package cancels no request",
    ),
    (
        (2, 58),
        "note",
        "the server does not exit while a gRPC stream is open (Triton before 25.05)",
        "close streams before a shutdown, or kill the server after a while: the manager's file"
        " loses nothing",
    ),
    (
        (2, 59),
        "note",
        "Triton reports a model as ready even if its Python process is dead (before 26.01)",
        "use 'cidalloc probe URL' for readiness probes: it is a real inference",
    ),
)


def _server(facts: Facts) -> Iterator[Finding]:
    numbers = re.match(r"(\d+)\.(\d+)", facts.server)
    if not numbers:
        return
    version = (int(numbers[1]), int(numbers[2]))
    yield Finding("ok", f"Triton {facts.server}")
    for fixed, level, what, todo in _FAULTS:
        if version < fixed:
            yield Finding(level, what, todo)


def _exposure(facts: Facts) -> Iterator[Finding]:
    if facts.may_load:
        yield Finding(
            "warn",
            "any client that reaches this port can load models, and so run its own code",
            "start Triton with --model-control-mode=none, or restrict 'model-repository'",
        )
    if facts.shared_memory:
        yield Finding(
            "note",
            "any client that reaches this port can register shared memory",
            "restrict it if untrusted clients reach the port:"
            " --grpc-restricted-protocol=shared-memory:KEY=VALUE and --http-restricted-api",
        )


def _targets(facts: Facts) -> Iterator[Finding]:
    if facts.index_error:
        yield Finding(
            "note",
            f"the list of models cannot be read: {facts.index_error}",
            "name the models that take IDs: --target NAME",
        )
    for name, words in facts.unread.items():
        level, todo = (
            ("FAIL", "check the name, and that the model is loaded")
            if facts.named
            else ("note", "")
        )
        yield Finding(level, f"the configuration of {name} cannot be read: {words}", todo)
    for name, config in facts.targets.items():
        yield from _target(facts, name, config)
    if facts.reachable and not facts.index_error and not facts.targets:
        yield Finding("note", "no model on this server has sequence_batching")


def _target(facts: Facts, name: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        target = ModelInfo.from_config(config)
        if target.text_ids:
            check_text_ids(name, facts.server)
    except InvalidArgument as error:
        yield Finding(
            "FAIL" if facts.named else "warn",
            f"the client refuses this model: {error}",
            "acquire IDs with 'Client.acquire', and send the requests with tritonclient",
        )
        return
    if facts.status is not None:
        pool = facts.status["pool"]
        last = pool["first"] + pool["capacity"] - 1
        if last > target.highest_cid:
            yield Finding(
                "FAIL",
                f"{name} takes IDs up to {target.highest_cid}, but the pool ends at {last}: Triton"
                " silently truncates higher IDs, so two sequences can share one state",
                "choose a pool that fits (the manager's settings first and slice), or give the"
                " model a 64-bit CORRID",
            )
            return
    unended_s = _setting(facts, "unended_cooldown_ms", 120_000) / 1000
    idle = duration(target.idle_s)
    if target.idle_s > unended_s:
        yield Finding(
            "warn",
            f"{name} remembers an idle sequence for {idle}, but an ID released without a cooldown"
            f" cools only {duration(unended_s)} (the client of this package sends a cooldown; other"
            " clients may not)",
            "raise unended_cooldown_ms in the manager's config.pbtxt",
        )
    else:
        yield Finding("ok", f"{name}: the pool fits its CORRID; it forgets a sequence after {idle}")
    if config.get("backend") == "python":
        yield Finding(
            "note",
            f"{name} is a Python model: if it stores data per correlation ID and deletes it only at"
            " END, it leaks, since Triton sends no END for an idle sequence",
            "use end_inputs= in clients, and delete data in the model after its idle time",
        )


def _setting(facts: Facts, name: str, default: int) -> int:
    parameters = (facts.config or {}).get("parameters", {})
    text = parameters.get(name, {}).get("string_value", "")
    return int(text) if re.fullmatch(r"\d+", text) else default


_RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _manager,
    _memory,
    _slice,
    _pool,
    _expired,
    _digits,
    _manager_config,
    _targets,
    _server,
    _exposure,
)
