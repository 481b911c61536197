"""Sequences under faults."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
from loopback import Loopback
from simulation import World
from test_every_line import Bell

from cidalloc.client import Client
from cidalloc.client.core.tensors import ON_STREAMS, Library
from cidalloc.client.core.transport import translating
from cidalloc.errors import CidError, InvalidArgument, SequenceLost, Unavailable
from cidalloc.manager.settings import Settings

SETTINGS = Settings(first=1, capacity=10_000, max_sessions=1000, fresh=True)


class Model(Loopback):
    """Notes the requests of sequences, and answers each at once, or never."""

    library = Library(object, object, ON_STREAMS)

    def __init__(self, settings: Settings = SETTINGS) -> None:
        super().__init__(settings)
        self.sent: list[dict[str, Any]] = []
        self.held: list[Any] = []  # the answers that are held back
        self.hold = False

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        self.sent.append(options)
        return SimpleNamespace(get_response=dict)

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Any, /, **options: Any
    ) -> None:
        if self.hold:
            self.sent.append(options)
            self.held.append(done)
            return
        done(self.infer(limit, model, inputs, **options), None)


def test_an_interrupted_wait_does_not_let_the_next_request_overtake() -> None:
    class Interrupt(Exception):
        pass

    def handler(*_: Any) -> None:
        raise Interrupt

    model = Model()
    with Client(transport=model) as cids, cids.sequence("model", timeout=5) as sequence:
        sequence.infer([])
        model.hold = True
        first = sequence.async_infer([])
        before = signal.signal(signal.SIGALRM, handler)
        timer = threading.Timer(
            0.2, lambda: model.held.pop(0)(SimpleNamespace(get_response=dict), None)
        )
        timer.start()  # the first is answered, so the second is sent by the timer's thread
        signal.setitimer(signal.ITIMER_REAL, 0.6)
        try:
            with pytest.raises(Interrupt):
                sequence.infer([])  # waits for its turn, then for its answer
        finally:
            signal.signal(signal.SIGALRM, before)
        assert first.done() and len(model.held) == 1, "Triton has the second request"
        sent = len(model.sent)
        third = sequence.async_infer([])
        time.sleep(0.1)
        overtakes = len(model.sent) > sent
        for done in model.held:
            done(SimpleNamespace(get_response=dict), None)
        assert not overtakes, "the third was sent while Triton has the second"
        del third


def test_a_heartbeat_outlives_an_answer_that_cannot_be_read() -> None:
    class Garbled(Loopback):
        garbled = 0

        def call(self, model: str, request: Any, timeout: float) -> Any:
            with translating(model, self.url):
                if self.garbled:
                    self.garbled -= 1
                    zlib.decompress(b"not zlib")
            return super().call(model, request, timeout)

    transport = Garbled(SETTINGS)
    with Client(transport=transport, ttl=1.0) as cids:
        cids.acquire()
        transport.garbled = 1
        time.sleep(1.6)
        assert cids._session.state == "open", cids


def test_every_line_of_closing_tells_those_who_wait() -> None:
    waiting: list[tuple[str, threading.Event]] = []
    with contextlib.ExitStack() as stack:
        for at in itertools.count(1):
            bell, ended = Bell(at), threading.Event()
            model = Model()
            cids = stack.enter_context(Client(transport=model))
            sequence = cids.sequence("model", timeout=0.5)
            sequence.infer([])
            model.hold = True
            stack.callback(sequence.async_infer([]).cancel)
            stack.callback(sequence.close)
            worker = threading.Thread(target=wait_for_turn, args=(sequence, ended), daemon=True)
            worker.start()
            while len(sequence._core.on_way) < 2:
                time.sleep(0.001)
            time.sleep(0.002)
            bell.during(sequence._core.finish)
            sequence._core.finish()
            waiting.append((bell.rang.rpartition("/")[2], ended))
            if not bell.rang:
                break
        time.sleep(1.5)  # for all of them at once
        lost = [line for line, ended in waiting if not ended.is_set()]
    assert not lost, f"infer never ends after an exception at {lost}"


def wait_for_turn(sequence: Any, ended: threading.Event) -> None:
    with contextlib.suppress(CidError):
        sequence.infer([])
    ended.set()


def test_a_model_that_is_away_holds_ids_for_a_minute_at_most() -> None:
    world = World(Settings(first=1, capacity=1000, max_sessions=10, fresh=True))
    session = world.session(ahead=0)
    world.idle = {"away": Unavailable("no such model"), "here": 1.0}
    first, *others = world.acquire(session, 20)
    cache = session.lease.cache
    session.lease.release_unended(first, "away", 1.0, 1.0)
    for each in others:  # one of them each 30 s
        session.lease.release_unended(each, "here", 1.0, 1.0)
        world.keep(session, world.now + 30)
    waiting = {model: len(ids) for model, ids in cache.awaiting_model.items()}
    assert not waiting, f"after {30 * len(others)} s these IDs are still held: {waiting}"


def test_a_lost_id_that_another_sequence_got_gets_no_end_of_the_lost_one() -> None:
    model = Model()
    with Client(transport=model, ahead=0) as cids:
        sequence = cids.sequence("model", end_inputs=[])
        sequence.infer([])
        cid = sequence.cid
        lease = sequence._core.plan.lease
        with cids._runner.lock:
            cache = lease.cache
            cache.used.discard(
                cid
            )  # as `reconcile` does with an ID that the manager does not count
        with pytest.raises(SequenceLost):
            sequence.infer([])
        with cids._runner.lock:
            cache.fresh.append(cid)  # the next answer to HELD has it again
        other = cids.sequence("model")
        assert other.cid == cid
        other.infer([])
        model.sent.clear()
        sequence.close()
        assert not model.sent, model.sent


def test_a_sequence_stays_on_its_version() -> None:
    model = Model()
    with Client(transport=model) as cids, cids.sequence("model") as sequence:
        sequence.infer([], model_version="1")
        for other in ({}, {"model_version": "2"}):
            with pytest.raises(InvalidArgument, match="is on version '1'"):
                sequence.infer([], **other)
        sequence.infer([], model_version="1", end=True)
    assert [each["model_version"] for each in model.sent] == ["1", "1"]


def test_an_iterative_model_gets_no_end() -> None:
    """Its second iteration would not run."""
    model = Model()
    iterative = {"sequence_batching": {"iterative_sequence": True}}
    model.model_config = lambda model, timeout: {"name": model, **iterative}  # type: ignore
    with Client(transport=model) as cids, cids.sequence("model") as sequence:
        sequence.infer([], end=True)
    assert [each.get("sequence_end") for each in model.sent] == [None]
