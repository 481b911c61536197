"""What ``doctor`` makes of what it saw: facts in, findings out, nothing asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..client.core.model_info import ModelInfo
from ..errors import InvalidArgument
from .screen import duration

__all__ = ["EXACT", "INEXACT", "Facts", "Finding", "examine"]

EXACT = 2**53
"""The highest integer up to which a double has all."""
INEXACT = (
    "JavaScript, jq and others read numbers above 2^53 as doubles, which lose their last digits"
)

_NEARLY, _ALMOST = 0.8, 0.95  # of the pool in use
_SLOW_MS = 1000.0  # what a dead stub takes for each request


@dataclass
class Facts:
    """What was seen of a deployment; what could not be seen is empty.

    Attributes:
        manager: the manager's name.
        reachable: a server answers.
        error: why the manager does not.
        status: what its STATUS says.
        answered_ms: how long that took.
        server: Triton's version.
        config: the manager's configuration.
        targets: the configurations of the models that are looked at, by name.
        unread: models without one, and why.
        named: they were asked for by name.
        index_error: why the list of models cannot be had.
        may_load: anybody may load models.
        shared_memory: anybody may register shared memory.
    """

    manager: str
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
    """One thing that was found.

    Attributes:
        level: ``ok``, ``note``, ``warn`` or ``FAIL``.
        what: what it is, and what it means.
        todo: what to do, if anything.
    """

    level: str
    what: str
    todo: str = ""

    def as_json(self) -> dict[str, str]:
        """Return it as it goes into JSON."""
        return {"level": self.level, "what": self.what, "todo": self.todo}


def examine(facts: Facts) -> list[Finding]:
    """Return all findings, in the order of their subjects."""
    return [finding for rule in _RULES for finding in rule(facts)]


def _manager(facts: Facts) -> Iterator[Finding]:
    if not facts.reachable:
        yield Finding("FAIL", facts.error, "is the server up, and is this its address?")
    elif facts.status is None:
        todo = "read Triton's log; is the model loaded?"
        if "not healthy" in facts.error:
            todo = (
                "the model's process died, and Triton does not start it again: unload and load"
                " the model, or restart the server"
            )
        yield Finding("FAIL", f"{facts.manager} does not answer: {facts.error}", todo)
    else:
        version, took = facts.status["version"], facts.answered_ms
        level = "ok" if took < _SLOW_MS else "warn"
        todo = "" if level == "ok" else "see what keeps the server's CPUs busy"
        yield Finding(level, f"{facts.manager} {version} answers ({took:.0f} ms)", todo)


def _memory(facts: Facts) -> Iterator[Finding]:
    if facts.status is None:
        return
    if facts.status["file"]:
        yield Finding("ok", f"what is held is remembered in {facts.status['file']}")
    else:
        yield Finding(
            "warn",
            "the registry is in memory alone: a restart forgets what is held",
            "name a folder that outlives the server: 'cidalloc model -o --state FOLDER DIR'",
        )


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
        yield Finding(
            "warn" if used < _ALMOST else "FAIL",
            what,
            "let the pool grow ('cidalloc registry upgrade --capacity N FILE'), or see who holds"
            " them ('cidalloc top URL')",
        )
    anonymous = status["anonymous"]
    if anonymous:
        yield Finding(
            "warn" if anonymous > _NEARLY * _setting(facts, "max_anonymous", 100_000) else "note",
            f"{anonymous:,} IDs are held without a session: nobody sees whether their users live",
            "let those programs use the client, or release what they take",
        )


def _digits(facts: Facts) -> Iterator[Finding]:
    if facts.status is None:
        return
    pool = facts.status["pool"]
    last = pool["first"] + pool["capacity"] - 1
    if last > EXACT:
        yield Finding("warn", f"the pool ends at {last}: {INEXACT}", "choose a lower pool")


def _manager_config(facts: Facts) -> Iterator[Finding]:
    if facts.config is None:
        return
    batching = facts.config.get("dynamic_batching")
    if batching is None:
        yield Finding(
            "warn",
            f"{facts.manager} has no dynamic_batching: each request is answered by itself, at less"
            " than half the rate",
            "add 'dynamic_batching { }' to its config.pbtxt",
        )
    elif int(batching.get("max_queue_delay_microseconds", 0)):
        yield Finding(
            "warn",
            f"{facts.manager} has a max_queue_delay_microseconds: every request waits for others",
            "take it out of its config.pbtxt",
        )


# Which Triton has a fault that matters here: the first version without it.
_FAULTS = (
    (
        (2, 54),
        "note",
        "a sequence_id that is a string, sent to a model whose CORRID is an integer, can end the"
        " server (Triton before 25.01)",
        "let no client send strings, or update Triton",
    ),
    (
        (2, 55),
        "warn",
        "a gRPC request that its client cancels at the wrong moment, by a short time limit too, can"
        " end the server (seen on Triton 24.10, reported up to 25.01)",
        "the client of this package cancels none; give others time limits above what a request"
        " takes at worst, or update Triton",
    ),
    (
        (2, 58),
        "note",
        "an open gRPC stream keeps the server from ever ending (Triton before 25.05)",
        "end streams before a shutdown, or let it be killed after a while; nothing that the manager"
        " holds is lost by that",
    ),
    (
        (2, 59),
        "note",
        "Triton says that a model is ready when its Python process is dead (before 26.01)",
        "let probes call 'cidalloc probe URL', which is a real inference",
    ),
)


def _server(facts: Facts) -> Iterator[Finding]:
    numbers = re.match(r"(\d+)\.(\d+)", facts.server)
    if not numbers:
        return
    version = (int(numbers[1]), int(numbers[2]))
    yield Finding("ok", f"Triton {facts.server}")
    for mended, level, what, todo in _FAULTS:
        if version < mended:
            yield Finding(level, what, todo)


def _exposure(facts: Facts) -> Iterator[Finding]:
    if facts.may_load:
        yield Finding(
            "warn",
            "anybody who reaches this port can load models, and so run code of theirs",
            "start Triton with --model-control-mode=none, or restrict 'model-repository'",
        )
    if facts.shared_memory:
        yield Finding(
            "note",
            "anybody who reaches this port can register shared memory",
            "where strangers can, restrict it:"
            " --grpc-restricted-protocol=shared-memory:KEY=VALUE and --http-restricted-api",
        )


def _targets(facts: Facts) -> Iterator[Finding]:
    if facts.index_error:
        yield Finding(
            "note",
            f"the list of models cannot be had: {facts.index_error}",
            "name those that take IDs: --target NAME",
        )
    for name, words in facts.unread.items():
        level, todo = (
            ("FAIL", "is this its name, and is it loaded?") if facts.named else ("note", "")
        )
        yield Finding(level, f"the configuration of {name} cannot be had: {words}", todo)
    for name, config in facts.targets.items():
        yield from _target(facts, name, config)
    if facts.reachable and not facts.index_error and not facts.targets:
        yield Finding("note", "no model here keeps sequences (has sequence_batching)")


def _target(facts: Facts, name: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        target = ModelInfo.from_config(config)
    except InvalidArgument as error:
        yield Finding(
            "FAIL" if facts.named else "warn",
            f"the client refuses this model: {error}",
            "acquire IDs for it by hand ('Client.acquire'), and send the requests yourself",
        )
        return
    if facts.status is not None:
        pool = facts.status["pool"]
        last = pool["first"] + pool["capacity"] - 1
        if last > target.highest_cid:
            yield Finding(
                "FAIL",
                f"{name} takes IDs up to {target.highest_cid}, and the pool ends at {last}: Triton"
                " cuts those above without a word, and two sequences share one state",
                "give the manager a pool that fits, or the model a 64-bit CORRID",
            )
            return
    unended_s = _setting(facts, "unended_cooldown_ms", 120_000) / 1000
    idle = duration(target.idle_s)
    if target.idle_s > unended_s:
        yield Finding(
            "warn",
            f"{name} remembers an idle sequence for {idle}, and an ID that comes back without"
            f" a word on END cools {duration(unended_s)} (the client of this package says how long"
            " it must; others do not)",
            "raise unended_cooldown_ms in the manager's config.pbtxt",
        )
    else:
        yield Finding("ok", f"{name}: the pool fits its CORRID; it forgets a sequence after {idle}")
    if config.get("backend") == "python":
        yield Finding(
            "note",
            f"{name} runs Python: if it keeps something for each correlation ID and deletes it"
            " only at END, it leaks, since Triton sends it no END when a sequence goes idle",
            "let clients use end_inputs=, and the model delete what is older than its idle time",
        )


def _setting(facts: Facts, name: str, default: int) -> int:
    parameters = (facts.config or {}).get("parameters", {})
    text = parameters.get(name, {}).get("string_value", "")
    return int(text) if re.fullmatch(r"\d+", text) else default


_RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _manager,
    _memory,
    _pool,
    _digits,
    _manager_config,
    _targets,
    _server,
    _exposure,
)
