"""A world for flows: one thread, a clock that tests move, and messages that get lost or come late.

It drives the client's core as the real runners do, one step at a time, into the real service.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, TypeVar

from cidalloc import protocol
from cidalloc.client.core.effects import Config, Flow, Idle, Reply, Send
from cidalloc.client.core.id_cache import MAX_AHEAD
from cidalloc.client.core.lease import Acquired
from cidalloc.client.core.link import Link
from cidalloc.client.core.session import Session
from cidalloc.codes import Operation
from cidalloc.errors import CidError, Unavailable
from cidalloc.manager.service import Service
from cidalloc.manager.settings import Settings

T = TypeVar("T")


class World:
    """A manager, a clock, and the way between a client and it."""

    def __init__(self, settings: Settings) -> None:
        self.now = 1000.0
        self.settings = settings
        self.service = Service(settings, self.clock)
        self.fates: list[str] = []  # of the next requests: "lost", "unanswered", "late" or "ok"
        self.late: list[protocol.Request] = []
        self.lies: dict[Operation, Reply] = {}  # what is answered once, while nothing is done
        self.sent: list[protocol.Request] = []
        self.idle: dict[str, float | CidError] = {}  # of models, or why it cannot be read
        self.looks = 0  # at the configurations of models
        self.lost_after = 0.5  # seconds that a request takes whose answer does not come

    def clock(self) -> int:
        return int(self.now * 1000)

    def restart(self, settings: Settings | None = None) -> None:
        """Replace the manager by one that remembers nothing."""
        self.service = Service(settings or self.settings, self.clock)

    def session(
        self, ttl: float = 60.0, timeout: float = 10.0, seed: int = 0, ahead: int = MAX_AHEAD
    ) -> Session:
        link = Link(timeout, ttl, random.Random(seed), lambda: self.now)
        return Session(link, "simulated", ahead)

    def apply(self, request: protocol.Request) -> Reply:
        tensors = request.encode()
        answer = self.service.answer(
            tensors[protocol.CODE],
            tensors[protocol.CORRELATION_ID],
            json.dumps(dict(request.parameters)),
        )
        if isinstance(answer, CidError):
            return Reply(error=protocol.parse_error(protocol.error_text(answer)))
        return Reply(answer[0][0], answer[1])

    def perform(self, effect: Send | Config | Idle) -> Reply:
        """Do what a flow asks for; waiting is quick here."""
        if isinstance(effect, Idle):
            assert effect.until < float("inf"), "this flow waits for ever"
            self.now = max(self.now, effect.until)
            return Reply()
        if isinstance(effect, Config):
            self.looks += 1
            idle = self.idle[effect.model]
            if isinstance(idle, CidError):
                return Reply(error=idle)
            batching = {"max_sequence_idle_microseconds": int(idle * 1e6)}
            return Reply(config={"name": effect.model, "sequence_batching": batching})
        self.sent.append(effect.request)
        if effect.request.operation in self.lies:
            return self.lies.pop(effect.request.operation)
        fate = self.fates.pop(0) if self.fates else "ok"
        if fate == "ok":
            return self.apply(effect.request)
        if fate == "unanswered":
            self.apply(effect.request)
        elif fate == "late":
            self.late.append(effect.request)
        self.now += min(self.lost_after, effect.timeout)
        return Reply(error=Unavailable("no answer"))

    def run(self, session: Session, flow: Flow[T]) -> T:
        """Run a flow to its end."""
        reply: Reply | None = None
        try:
            while True:
                effect = next(flow) if reply is None else flow.send(reply)
                reply = self.perform(effect)
        except StopIteration as stop:
            value: T = stop.value
            return value

    def keep(self, session: Session, until: float) -> None:
        """Run the heartbeat up to a time."""
        flow = session.heartbeat()
        effect = next(flow)
        while True:
            if isinstance(effect, Idle) and effect.until > until:
                break
            reply = self.perform(effect)
            effect = flow.send(reply)
        flow.close()
        self.now = max(self.now, until)

    def acquire(self, session: Session, count: int = 1, need_ms: int | None = None) -> list[int]:
        taken = Acquired()
        self.run(session, session.acquire(count, need_ms, self.now + session.link.timeout, taken))
        return list(taken)

    def release(self, session: Session, *cids: int, cooldown_ms: int | None = -1) -> None:
        session.lease.give(list(cids), cooldown_ms)

    def operations(self) -> list[str]:
        """Return the names of what was sent since the last call."""
        names = [request.operation.name for request in self.sent]
        self.sent.clear()
        return names

    def held(self) -> int:
        return self.read(lambda registry: registry.pool.active)

    def read(self, what: Callable[[Any], T]) -> T:
        registry = self.service._holder.registry()
        registry.tick(self.clock())
        return what(registry)
