"""Many IDs of dead clients, and models that take their time for END."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
from nodes import SimClient
from simulation import World
from tritonclient.utils import InferenceServerException

from cidalloc import protocol
from cidalloc.client.core.tidy import Tidier
from cidalloc.client.core.transport import Receive
from cidalloc.manager.dead_ids import DeadIds
from cidalloc.manager.settings import Settings


class SlowStream:
    """The manager names a thousand IDs each time, and an END takes 50 ms."""

    over = False

    def __init__(self, world: World, asked: list[float], receive: Receive, limit: float) -> None:
        self._world, self._asked, self._receive = world, asked, receive

    def send(self, model: str, inputs: list[Any], /, **options: Any) -> None:
        outputs = {}
        if "sequence_id" not in options:
            self._asked.append(self._world.now)
            ids = np.arange(1000, dtype=np.uint64).reshape(1, -1)
            outputs = {protocol.OUTPUT: ids, protocol.DETAIL: np.array([[b""]], object)}
        else:
            assert options["sequence_start"] and options["sequence_end"]
            assert options["timeout"] == 1_000_000, "live sequences need the slots more"
        self._world.now += 0.05
        self._answer(model, SimpleNamespace(as_numpy=outputs.get))

    def _answer(self, model: str, result: Any) -> None:
        self._receive("", True, result, None)

    def end(self) -> None:
        self.over = True

    def cut(self) -> None:
        self.over = True


def test_no_ids_are_asked_for_when_no_time_is_left() -> None:
    """They would count as named, and nobody would send END for them."""
    world = World(Settings(first=1, capacity=10, fresh=True))
    world.idle["model"] = 1.0
    asked: list[float] = []
    client = SimClient(
        random.Random(1),
        lambda: world.now,
        lambda *arguments: SlowStream(world, asked, *arguments),  # type: ignore[arg-type, return-value]
    )
    tidier = Tidier(client, {"model": []})  # type: ignore[arg-type]
    world.run(client.session, tidier._round())
    assert tidier.ended["model"] > 500
    assert len(asked) == 1, f"{len(asked)} times, within {asked[-1] - asked[0]:.1f} s"


class FailingStream(SlowStream):
    """The first model is decoupled: it answers END with an error and then with its last answer."""

    def send(self, model: str, inputs: list[Any], /, **options: Any) -> None:
        super().send(model, inputs, **options)
        if model == "first":
            number = options.get("request_id", "")
            self._receive(number, True, SimpleNamespace(as_numpy={}.get), None)

    def _answer(self, model: str, result: Any) -> None:
        broken = InferenceServerException("the model failed") if model == "first" else None
        self._receive("", True, None if broken else result, broken)


def test_a_model_that_fails_and_then_answers() -> None:
    """The last answer of one request must not count as that of the next one."""
    world = World(Settings(first=1, capacity=10, fresh=True))
    world.idle |= {"first": 1.0, "second": 1.0}
    asked: list[float] = []
    client = SimClient(
        random.Random(1),
        lambda: world.now,
        lambda *arguments: FailingStream(world, asked, *arguments),  # type: ignore[arg-type, return-value]
    )
    tidier = Tidier(client, {"first": [], "second": []})  # type: ignore[arg-type]
    world.run(client.session, tidier._round())
    assert tidier.failed == {"first": 1} and tidier.ended["second"] > 100, tidier.ended


class RefusingStream(SlowStream):
    """The manager refuses twice to name IDs, and the client is gone when it does."""

    client: SimClient

    def send(self, model: str, inputs: list[Any], /, **options: Any) -> None:
        self._asked.append(self._world.now)
        if len(self._asked) == 3:
            self.client.session.abandoned = True
        refused = InferenceServerException("no instance is there", "StatusCode.UNAVAILABLE")
        self._receive("", True, None, refused)


def test_a_round_that_was_refused_is_soon_made_again() -> None:
    """A manager that refuses half of the requests must not outlast the window for END."""
    world = World(Settings(first=1, capacity=10, fresh=True))
    asked: list[float] = []
    client = SimClient(
        random.Random(1),
        lambda: world.now,
        lambda *arguments: RefusingStream(world, asked, *arguments),  # type: ignore[arg-type, return-value]
    )
    RefusingStream.client = client
    world.run(client.session, Tidier(client, {"model": []}).rounds())  # type: ignore[arg-type]
    assert len(asked) == 3 and asked[-1] - asked[0] < 0.2


def test_ids_that_were_never_named_come_first() -> None:
    """Else the same ones are ended three times, and others not at all."""
    dead = DeadIds()
    dead.name("asr", 1, 10, 0)
    dead.add(np.arange(1, 31, dtype=np.uint64), ["asr"], since=1_000, now=0)
    named = [int(cid) for now in (1_000, 16_000, 46_000) for cid in dead.name("asr", 1, 10, now)]
    assert sorted(named) == list(range(1, 31))
