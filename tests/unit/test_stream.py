"""Random answers on a stream beside a model: each request gets its own, whatever comes when."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from loopback import Loopback
from tritonclient.utils import InferenceServerException

from cidalloc.client import Client
from cidalloc.client.core import sequence as core_sequence
from cidalloc.client.core.transport import Receive
from cidalloc.errors import InvalidArgument, SequenceLost
from cidalloc.manager.settings import Settings

SETTINGS = Settings(first=1, capacity=1000, cooldown_ms=0, fresh=True)


class Wire:
    """A stream that sends nothing, and receives what the test says."""

    over = False

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.sent: list[str] = []

    def send(self, model: str, inputs: list[Any], /, **options: Any) -> None:
        assert options["tell_final"]
        self.sent.append(options["request_id"])

    def end(self) -> None:
        self.over = True

    def cut(self) -> None:
        self.over = True

    def suspect(self) -> None:
        pass


class Decoupled(Loopback):
    """A manager beside a decoupled model, whose stream is a `Wire`."""

    wire: Wire

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        policy = {"model_transaction_policy": {"decoupled": True}}
        return {**super().model_config(model, timeout), **policy}

    def open_stream(self, receive: Receive, /) -> Any:
        self.wire = Wire(receive)
        return self.wire


def answer(value: int | None) -> Any:
    outputs = [] if value is None else [value]
    return SimpleNamespace(get_response=lambda: SimpleNamespace(outputs=outputs), value=value)


class Asked:
    """What one request has to yield: the answers so far, and how it ended."""

    def __init__(self, answers: Any, end: bool) -> None:
        self.answers, self.end = answers, end
        self.wanted: list[int] = []
        self.error: type[BaseException] | None = None  # StopIteration: its final response came
        self.left = False


class Streams(RuleBasedStateMachine):
    """Random requests and answers of one sequence at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.transport = Decoupled(SETTINGS, lambda: 1_000_000)
        self.client = Client(transport=self.transport)
        self.values = iter(range(10**6))
        self.begin()

    def begin(self) -> None:
        self.sequence = self.client.sequence("asr", timeout=30.0)
        self.wire = self.transport.wire
        self.asked: dict[str, Asked] = {}
        self.ended = self.doubtful = False

    def teardown(self) -> None:
        for number in self.open():
            self.wire.receive(number, True, answer(None), None)
        self.client.close()

    def open(self) -> list[str]:
        return [number for number, each in self.asked.items() if each.error is None]

    @precondition(lambda self: not self.ended)
    @rule(end=st.sampled_from([False, False, False, True]))
    def ask(self, end: bool) -> None:
        answers = self.sequence.stream([], end=end)
        self.asked[self.wire.sent[-1]] = Asked(answers, end)
        self.ended = end

    @rule()
    def infer(self) -> None:
        try:
            self.sequence.infer([])
        except InvalidArgument:
            return
        raise AssertionError("one answer of a decoupled model")

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), final=st.booleans(), empty=st.booleans())
    def answers(self, data: st.DataObject, final: bool, empty: bool) -> None:
        """An answer to any request, also one that is over."""
        number = data.draw(st.sampled_from(sorted(self.asked)))
        each, value = self.asked[number], None if final and empty else next(self.values)
        self.wire.receive(number, final, answer(value), None)
        if each.error is None:
            each.wanted += [] if value is None else [value]
            each.error = StopIteration if final else None

    @rule(number=st.sampled_from(["0", "99", "x"]))
    def answers_to_nothing(self, number: str) -> None:
        self.wire.receive(number, True, answer(5), None)

    @precondition(lambda self: self.open())
    @rule(named=st.booleans(), data=st.data())
    def fails(self, named: bool, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.open())) if named else ""
        self.wire.receive(number, True, None, InferenceServerException("it broke"))
        for each in [number] if named else self.open():
            self.asked[each].error = InferenceServerException
            self.doubtful = True

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), most=st.integers(0, 3))
    def reads(self, data: st.DataObject, most: int) -> None:
        each = self.asked[data.draw(st.sampled_from(sorted(self.asked)))]
        if each.left:
            return
        for _ in range(min(most, len(each.wanted))):
            assert next(each.answers).value == each.wanted.pop(0)
        if not each.wanted and each.error is not None:
            for _ in range(2):
                try:
                    next(each.answers)
                except each.error:
                    continue
                raise AssertionError("an answer too many")

    @precondition(lambda self: self.open())
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        each = self.asked[data.draw(st.sampled_from(self.open()))]
        each.answers.close()
        each.left = True

    @rule()
    def closes(self) -> None:
        left = self.open()
        with mock.patch.object(core_sequence, "HURRY_S", 0.0):
            self.sequence._close(0.0)
        for number in left:
            self.asked[number].error = SequenceLost
        for each in self.asked.values():
            if each.left:
                continue
            found: list[int] = []
            try:
                while True:
                    found.append(next(each.answers).value)
            except (StopIteration, SequenceLost, InferenceServerException) as error:
                ended = type(error)
            assert (found, ended) == (each.wanted, each.error)
        cache = self.client._session.lease.cache
        certain = not self.asked or (self.ended and not left and not self.doubtful)
        assert certain == (self.sequence.cid in [cid for _, cid in cache.cooling])
        self.begin()

    @invariant()
    def the_id_is_used_until_the_end(self) -> None:
        used = self.client._session.lease.cache.used
        over = self.ended and not self.open() and not self.doubtful
        assert (self.sequence.cid in used) == (not over)


TestStreams = Streams.TestCase
TestStreams.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_an_error_that_names_no_request_ends_them_all() -> None:
    transport = Decoupled(SETTINGS, lambda: 1_000_000)
    with Client(transport=transport) as client, client.sequence("asr") as sequence:
        several = [sequence.stream([]) for _ in range(2)]
        transport.wire.receive("", True, None, InferenceServerException("the model failed"))
        for answers in several:
            with pytest.raises(InferenceServerException, match="the model failed"):
                next(answers)
