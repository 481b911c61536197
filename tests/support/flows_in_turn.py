"""Flows of a client of every kind, each step with its limit; `in_turn` spoils their requests."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from server_front import DEAD_END, Front
from spoilt import FAULTS, Fault
from tritonclient.utils import InferenceServerException

from cidalloc.client import AsyncClient, AsyncFleet, Client, Fleet
from cidalloc.codes import Operation
from cidalloc.errors import CidError, Draining, SessionExpired
from cidalloc.manager.storage.drain import DrainSwitch

__all__ = ["ERRORS", "FLOWS", "LIMIT_S", "STEPS", "TTL_S", "WAYS", "Case", "Flow", "Way"]

TTL_S = 20.0
LIMIT_S = 0.5
"""The limit of each request of a client here."""

NOISE_S = 1.2
"""A busy machine may take so much longer; a case that took longer is tried once more alone."""

MODEL = "adds"
STEPS = ("START", "step", "END", "START|END")
ERRORS = (CidError, InferenceServerException)


class Way(NamedTuple):
    """How a client talks: blocking or not, over HTTP or gRPC, with a stream or not."""

    asyncio: bool
    scheme: str
    streaming: bool = False

    def __str__(self) -> str:
        words = "AsyncClient" if self.asyncio else "Client", self.scheme, "stream" * self.streaming
        return " ".join(filter(None, words))


WAYS = [
    Way(*each)
    for each in (
        *((False, "http"), (True, "http"), (False, "grpc"), (True, "grpc")),
        *((False, "grpc", True), (True, "grpc", True)),
    )
]


@dataclass
class Case:
    """One run of a flow.

    Attributes:
        way: how its client talks.
        spoilt: which request, by its name and number, has which fault.
        errors: what its calls raised.
        wrong: what breaks a promise.
        slow: which calls took too long.
        model: of its sequences.
        fleet: its client is a fleet of this one server.
        kept: sequences that are still open when the client is closed.
    """

    way: Way
    front: Front
    spoilt: dict[tuple[str, int], Fault]
    options: Mapping[str, Any]
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    fleet: bool = False
    model: str = MODEL
    sequences: int = 0
    client: Any = None

    def connect(self) -> None:
        """Make a client."""
        kinds: Any = (Fleet, AsyncFleet) if self.fleet else (Client, AsyncClient)
        given = {"ttl": TTL_S, "timeout": LIMIT_S, "ahead": 4, "label": "in turn", **self.options}
        url = f"{self.way.scheme}://{self.front.target}"
        self.client = kinds[self.way.asyncio]([url] if self.fleet else url, **given)

    @property
    def of_server(self) -> Any:
        """The client of the server."""
        return self.client.servers[0].client if self.fleet else self.client

    async def do(
        self, call: Callable[..., Any], *given: Any, limit: float = LIMIT_S, **more: Any
    ) -> Any:
        """Call a method of the client, which takes ``limit`` seconds at most."""
        began = time.monotonic()
        name = getattr(call, "__name__", "call")
        try:
            found = call(*given, **more)
            return await found if inspect.isawaitable(found) else found
        except ERRORS as error:
            self.errors.append(f"{name}: {type(error).__name__}: {error}")
            if not str(error):
                self.wrong.append(f"{name}: {error!r} says nothing")
            raise
        finally:
            took = time.monotonic() - began
            if took > limit + NOISE_S:
                self.slow.append(f"{name} took {took:.1f} s instead of {limit:.1f} s")

    async def sleep(self, seconds: float) -> None:
        """Wait, as the client's application does."""
        await asyncio.sleep(seconds) if self.way.asyncio else time.sleep(seconds)

    async def begin(self, **more: Any) -> Any:
        """Begin a sequence: its model's configuration is read first, and the lease confirmed."""
        self.sequences += 1
        streaming = self.way.streaming
        sequence = await self.do(
            self.client.sequence,
            self.model,
            streaming=streaming,
            timeout=LIMIT_S,
            limit=3 * LIMIT_S,
            **more,
        )
        sequence.number = self.sequences
        return sequence

    async def infer(self, sequence: Any, step: int, end: bool = False) -> None:
        """Send a request; its answer must be the sum of those that were answered."""
        value = sequence.number * 100 + step
        inputs = {"INPUT": np.array([[value]], np.int32)}
        result = await self.do(sequence.infer, inputs, end=end, limit=LIMIT_S + 0.5)
        got, expected = (
            int(result["OUTPUT"].flat[0]),
            sum(sequence.number * 100 + each for each in range(1, step + 1)),
        )
        if got != expected:
            self.wrong.append(f"step {step} of sequence {sequence.number}: {got}, not {expected}")

    def end_inputs(self) -> dict[str, Any]:
        return {"INPUT": np.array([[(self.sequences + 1) * 100 + 99]], np.int32)}

    async def close_sequence(self, sequence: Any) -> None:
        await self.do(sequence.close, limit=LIMIT_S + 0.5)

    async def close(self) -> None:
        """Close the client: the manager gets its time, and requests on their way get theirs."""
        await self.do(self.client.close, limit=LIMIT_S + 2.0 * (1 + self.way.asyncio))


# ---- Flows

Flow = Callable[[Case], Awaitable[None]]


async def ids(case: Case) -> None:
    """Open a session; acquire, refill and release."""
    cids = case.client
    first = await case.do(cids.acquire)
    several = await case.do(cids.acquire_many, 9)
    await case.do(cids.release_many, several)
    await case.do(cids.release, first, ended=True)
    await case.do(cids.status)


async def sequence(case: Case) -> None:
    """START, a step and END."""
    found = await case.begin()
    try:
        for step in (1, 2, 3):
            await case.infer(found, step, end=step == 3)
    finally:
        await case.close_sequence(found)


async def of_fleet(case: Case) -> None:
    """Two sequences of a fleet; before the second one begins, the lease is renewed."""
    for pause in (0.15, 0.0):
        found = await case.begin()
        try:
            await case.infer(found, 1)
            await case.infer(found, 2, end=True)
        finally:
            await case.close_sequence(found)
        await case.sleep(pause)


async def unended(case: Case) -> None:
    """A sequence that is closed without END: its ID is released, and cools."""
    found = await case.begin()
    try:
        await case.infer(found, 1)
    finally:
        await case.close_sequence(found)
    await case.do(case.client.status)


async def end_inputs(case: Case) -> None:
    """A sequence that gets END when it is closed."""
    found = await case.begin(end_inputs=case.end_inputs())
    try:
        await case.infer(found, 1)
    finally:
        await case.close_sequence(found)


async def heartbeat(case: Case) -> None:
    """The lease is renewed in the background, during a sequence."""
    found = await case.begin()
    try:
        await case.infer(found, 1)
        await case.sleep(0.8)
        await case.infer(found, 2, end=True)
    finally:
        await case.close_sequence(found)


async def lease(case: Case) -> None:
    """No heartbeat is answered, and the lease runs out."""
    try:
        found = await case.begin()
        try:
            await case.infer(found, 1)
            await case.sleep(1.3)
            with contextlib.suppress(SessionExpired):
                await case.infer(found, 2)
                case.wrong.append("a request was sent after the lease")
        finally:
            await case.close_sequence(found)
    finally:
        del case.front.spoilt["RENEW", 0]


async def held(case: Case) -> None:
    """The answer to NEW was lost, so the client asks what it holds."""
    await case.do(case.client.acquire)


async def used(case: Case) -> None:
    """A client is closed with IDs in use and in its cache."""
    await case.do(case.client.acquire_many, 3)
    case.kept.append(await case.begin())
    await case.infer(case.kept[0], 1)


async def tidied(case: Case) -> None:
    """END for the sequences of a client that died."""
    case.front.network.run(_die(case.front))
    await case.do(case.client.acquire)
    until = time.monotonic() + 2.0
    while case.front.model.dead and time.monotonic() < until:
        await case.sleep(0.02)


async def drained(case: Case) -> None:
    """The server is drained: a sequence goes on, and no other one begins."""
    found = await case.begin()
    switch = DrainSwitch(next(Path(case.front.settings.state).iterdir()))
    try:
        switch.set(True)
        await case.infer(found, 1)
        with contextlib.suppress(Draining):
            await case.do(case.client.acquire_many, 20)
        switch.set(False)
        await case.infer(found, 2, end=True)
    finally:
        switch.set(False)
        switch.close()
        await case.close_sequence(found)


async def _die(front: Front) -> None:
    """Let sequences of a client that died be there, for which END is due."""
    asker, died = {"session": "a" * 32}, {"session": "d" * 32}
    front.ask(Operation.OPEN, ttl_ms=600_000, **asker)
    front.ask(Operation.DEAD, model=MODEL, **asker)  # else IDs of the dead are not noted
    front.ask(Operation.OPEN, ttl_ms=200, **died)
    cids = front.ask(Operation.NEW, seq=1, count=3, cooldown_ms=26_000, **died).flat
    front.ask(Operation.RENEW, models=json.dumps([MODEL]), **died)
    front.model.die(cids)
    front.ahead_ms += 1_000
    front.ask(Operation.CLOSE, **asker)
    front.ahead_ms += 27_000
    front.ask(Operation.ACTIVE)


class FlowOf(NamedTuple):
    """A flow, what its client needs, and which requests are spoilt anyway."""

    run: Flow
    options: Mapping[str, Any] = MappingProxyType({})
    spoilt: Mapping[tuple[str, int], Fault] = MappingProxyType({})
    ways: list[Way] = WAYS
    in_file: bool = False
    fleet: bool = False


TIDY = {"tidy": {MODEL: {"INPUT": np.array([[DEAD_END]], np.int32)}}}
FLOWS = {
    "IDs": FlowOf(ids),
    "sequence": FlowOf(sequence),
    "fleet": FlowOf(of_fleet, {"connect": LIMIT_S}, fleet=True),
    "no END": FlowOf(unended),
    "end_inputs": FlowOf(end_inputs),
    "heartbeat": FlowOf(heartbeat, {"ttl": 1.2}),
    "lease": FlowOf(lease, {"ttl": 0.8}, {("RENEW", 0): FAULTS["request lost"]}),
    "HELD": FlowOf(held, {"timeout": 1.5}, {("NEW", 1): FAULTS["reset after"]}),
    "close": FlowOf(used),
    "drain": FlowOf(drained, in_file=True),
    "tidy": FlowOf(
        tidied, TIDY, ways=[way for way in WAYS if way.scheme == "grpc" and not way.streaming]
    ),
}
