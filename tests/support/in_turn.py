"""Each request and each answer of each flow of a client is spoilt in turn, in every way."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from flows_in_turn import ERRORS, FLOWS, STEPS, TTL_S, WAYS, Case, Flow, Way
from server_front import Front, Network
from spoilt import FAULTS, Fault

from cidalloc.conformance.history import Rules, check
from cidalloc.manager.settings import Settings

__all__ = ["Outcome", "Turn", "all_turns", "run", "run_all", "works_again"]

SETTINGS = Settings(
    first=1, capacity=64, cooldown_ms=150, min_ttl_ms=100, grace_ms=100, max_sessions=50, fresh=True
)
AT_ONCE = 12  # cases, which mostly wait


class Outcome(NamedTuple):
    """What a case came to.

    Attributes:
        asked: the requests that the server got.
        met: whether there was the fault.
        errors: what the client raised.
        wrong: what must never be.
        slow: what must not be, unless the machine was so busy that limits passed.
    """

    asked: list[str]
    met: bool
    errors: list[str]
    wrong: list[str]
    slow: list[str]


async def works_again(case: Case) -> None:
    """Use the client after a fault: it must work within seconds, with a sequence of its own."""
    until = time.monotonic() + 6.0
    while True:
        try:
            found = await case.begin()
            try:
                await case.infer(found, 1)
                await case.infer(found, 2, end=True)
            finally:
                await case.close_sequence(found)
            return
        except ERRORS as error:
            if time.monotonic() >= until:
                case.slow.append(f"the client does not work any more: {error!r}")
                return
            await case.sleep(0.1)


async def _compare(case: Case) -> None:
    """See that the client knows of each ID that its session holds, once it has no doubt."""

    async def compare() -> tuple[set[int], set[int]]:
        lease = case.of_server._session.lease
        held = case.front.held_by(lease.token)
        with case.of_server._runner.lock:
            return held, held if lease.doubtful or not lease.opened else lease.cache.known()

    until = time.monotonic() + 1.0
    while True:
        held, known = case.front.network.run(compare())
        if held == known:
            return
        if time.monotonic() > until:
            case.slow.append(f"the session holds {held}, and the client knows {known}")
            return
        await case.sleep(0.02)


async def _run(case: Case, flow: Flow, dry: bool) -> None:
    """Run the flow of a case, and see that its promises hold."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, what: _note(case, what))
    case.connect()
    front = case.front
    with contextlib.suppress(*ERRORS):
        await flow(case)
    errors = len(case.errors)
    if dry or any(name == "CLOSE" for name, _ in case.spoilt):
        await _close(case)
        case.connect()
    front.recording = False
    await works_again(case)
    del case.errors[errors:]
    await _compare(case)
    await _close(case)


def _note(case: Case, what: dict[str, Any]) -> None:
    if "PollerCompletionQueue" not in what["message"]:  # grpc.aio: other threads' loops were closed
        case.wrong.append(f"in a task: {what}")


async def _close(case: Case) -> None:
    try:
        await case.close()
    except ERRORS as error:
        case.slow.append(f"close: {error!r}")


def run(
    network: Network,
    way: Way,
    name: str,
    target: tuple[str, int] | None = None,
    fault: Fault | None = None,
) -> Outcome:
    """Run one case; without a target nothing is spoilt."""
    flow = FLOWS[name]
    spoilt = dict(flow.spoilt)
    if target is not None and fault is not None:
        spoilt[target] = fault
    folder = TemporaryDirectory()
    settings = replace(SETTINGS, state=folder.name) if flow.in_file else SETTINGS
    front = Front(network, settings, spoilt)
    case = Case(way, front, spoilt, flow.options, fleet=flow.fleet)
    try:
        asyncio.run(_run(case, flow.run, fault is None))
        _judge(case, target)
    except Exception:
        case.wrong.append(traceback.format_exc())
    finally:
        front.close()
        folder.cleanup()
    met = fault is None or fault in front.met
    return Outcome(front.asked, met, case.errors, case.wrong, [*case.slow, *front.wrong])


def _judge(case: Case, target: tuple[str, int] | None) -> None:
    """Look at the server after the client was closed."""
    front, network = case.front, case.front.network

    async def left() -> tuple[int, int]:
        return len(front.connections), front.pending

    until = time.monotonic() + 5.0
    while any(found := network.run(left())) and time.monotonic() < until:
        time.sleep(0.02)
    if any(found):
        case.slow.append(f"after close there are {found[0]} connections, {found[1]} late requests")
    # A session of which the client heard nothing, or whose CLOSE was lost, ends with its lease.
    held, sessions = network.run(front.held_and_sessions())
    if (held or sessions) and (target is None or target[0] not in ("CLOSE", "OPEN")):
        case.slow.append(f"after close there are {sessions} sessions, {held} IDs held")
    front.ahead_ms += 3_600_000
    held, sessions = network.run(front.held_and_sessions())
    if held or sessions:
        case.wrong.append(f"an hour later there are {sessions} sessions, {held} IDs held")
    case.wrong += front.model.repeated()
    ttl = case.options.get("ttl", TTL_S)
    rules = Rules(ttl=ttl, grace=SETTINGS.grace_ms / 1000, cooldown=SETTINGS.cooldown_ms / 1000)
    case.wrong += check(front.events, rules)


class Turn(NamedTuple):
    """One case of the table."""

    way: Way
    flow: str
    target: tuple[str, int]
    fault: Fault

    def __str__(self) -> str:
        name, number = self.target
        return f"{self.way}, {self.flow}, {name} {number}, {self.fault.name}"


def all_turns(network: Network, ways: Iterable[Way] = WAYS) -> list[Turn]:
    """Run each flow without a fault, and return each fault of each of its requests."""
    dry = [(way, name) for way in ways for name, flow in FLOWS.items() if way in flow.ways]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = pool.map(lambda each: run(network, *each), dry)
        return [
            turn for each, found in zip(dry, outcomes, strict=True) for turn in _turns(*each, found)
        ]


def _turns(way: Way, flow: str, found: Outcome) -> Iterable[Turn]:
    assert not found.wrong, (way, flow, found)
    counts: Counter[str] = Counter()
    for name in found.asked:
        counts[name] += 1
        target = name, counts[name]
        if {target, (name, 0)} & FLOWS[flow].spoilt.keys():
            continue
        streamed = name == "DEAD" or (name in STEPS and (way.streaming or flow == "tidy"))
        for fault in FAULTS.values():
            # No client can notice that a proxy sends a step twice: docs/client.md refuses that.
            sensible = fault.runs < 2 or name not in STEPS
            if sensible and ("stream" if streamed else way.scheme) in fault.ways:
                yield Turn(way, flow, target, fault)


def run_all(network: Network, every: Iterable[Turn]) -> dict[Turn, Outcome]:
    """Run cases, some at a time. What was wrong or slow then is tried alone, three times at most.

    What was wrong once counts. What was slow counts if it was so each time. What ends a thread is
    noted with the last case.
    """
    every, broken = list(every), list[str]()
    before = threading.excepthook
    threading.excepthook = lambda what: broken.append(f"in {what.thread}: {what.exc_value!r}")
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = dict(zip(every, pool.map(lambda each: run(network, *each), every), strict=True))
        for turn, first in found.items():
            outcome, runs = first, 1
            while (outcome.slow or outcome.wrong) and runs < 4:
                outcome, runs = run(network, *turn), runs + 1
            if outcome is not first:
                print(f"{turn}: run {runs} times; the first one was {first.wrong} {first.slow}")
                outcome.wrong.extend(f"in the crowd: {each}" for each in first.wrong)
                found[turn] = outcome
    finally:
        threading.excepthook = before
    gc.collect()
    if broken:
        found[every[-1]].wrong.extend(broken)
    return found
