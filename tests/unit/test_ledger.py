"""The ledger of the conformance kit: what it finds in messages, and what it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cidalloc import errors
from cidalloc.codes import Operation
from cidalloc.conformance.faults import LOST, NO_FAULT, fate_of
from cidalloc.conformance.history import Event, Rules
from cidalloc.conformance.ledger import Ledger, Message
from cidalloc.conformance.recorder import Recorder
from cidalloc.errors import CidError

TOKEN, SESSION = "0a" * 16, 7


class Story:
    """A client that has opened a session; a tenth of a second passes with each message."""

    def __init__(self) -> None:
        self.now = 100.0
        self.events: list[Event] = []
        recorder = Recorder("client", self.events.append, lambda: self.now)
        self.ledger = Ledger(recorder, Rules(ttl=1.0, grace=0.3, cooldown=0.3), unended=3.0)
        self.send("OPEN", answer=[1, SESSION, 1000])

    def send(
        self, name: str, *ids: int, answer: list[int] | CidError | None = None, **given: Any
    ) -> Message:
        """Send a message; without an answer it is lost."""
        self.now += 0.1
        fate = LOST if answer is None else NO_FAULT
        given = {"session": TOKEN, **given}
        message = self.ledger.received(self.now, Operation[name], list(ids), given, fate)
        if answer is not None:
            self.answer(message, answer)
        return message

    def answer(self, message: Message, answer: list[int] | CidError) -> None:
        failed = isinstance(answer, CidError)
        found = answer if failed else (np.array([answer], np.uint64), "")
        self.ledger.applied(message, found)  # type: ignore[arg-type]
        self.ledger.answered(self.now, message)

    def take(self, *ids: int, seq: int = 1) -> None:
        """Acquire IDs and use them."""
        self.send("NEW", seq=seq, count=len(ids), answer=list(ids))
        self.ledger.acquired(list(ids))
        for cid in ids:
            self.ledger.used(self.now, cid, True)

    @property
    def found(self) -> list[str]:
        self.ledger.judge(self.events)
        return [each.kind for each in self.ledger.findings]


@pytest.fixture
def story() -> Story:
    return Story()


def test_a_good_client(story: Story) -> None:
    story.take(5, 6)
    story.ledger.releases(5, True)
    story.send("DELETE", 5, seq=2, ended=True, answer=[1])
    story.ledger.releases(6, False)
    story.send("DELETE", 6, seq=3, cooldown_ms=3000, answer=[1])
    story.send("CLOSE", ended=True, answer=[0])
    assert story.found == []


@pytest.mark.parametrize("given", [{"ended": True}, {"cooldown_ms": 2999}])
def test_too_short_a_cooldown_without_END(story: Story, given: dict[str, Any]) -> None:
    story.take(5)
    story.ledger.releases(5, False)
    story.send("DELETE", 5, seq=2, answer=[1], **given)
    assert story.found == ["released as ended"]


def test_CLOSE_with_ended_while_a_sequence_runs(story: Story) -> None:
    story.take(5)
    story.send("CLOSE", ended=True, answer=[1])
    assert story.found == ["released as ended"]


def test_release_of_an_ID_that_the_application_has(story: Story) -> None:
    story.take(5)
    story.send("DELETE", 5, seq=2, answer=[1])
    assert story.found == ["released wrongly"]


@pytest.mark.parametrize("error", [errors.NotHeld, errors.NotOwner, errors.Duplicate])
def test_release_of_what_it_does_not_hold(story: Story, error: type[CidError]) -> None:
    story.send("DELETE", 5, seq=1, answer=error("no"))
    assert story.found == ["released wrongly"]


def test_a_request_that_is_not_valid(story: Story) -> None:
    story.send("NEW", seq=1, count=0, answer=errors.InvalidArgument("no"))
    assert story.found == ["request refused"]


def test_a_token_after_CLOSE(story: Story) -> None:
    story.send("CLOSE", answer=[0])
    story.send("OPEN", answer=[1, SESSION + 1, 1000])
    assert story.found == ["token used again"]


def test_an_ID_twice(story: Story) -> None:
    story.take(5)
    story.ledger.acquired([5])
    assert story.found[0] == "used by two"


def test_an_ID_that_was_never_issued(story: Story) -> None:
    story.ledger.acquired([5])
    assert story.found == ["used by two"]


def test_an_ID_again_that_had_no_END(story: Story) -> None:
    story.take(5)
    story.ledger.releases(5, False)
    story.now += 10.0
    story.ledger.acquired([5])
    assert story.found == ["used too early"]


def test_use_after_the_lease(story: Story) -> None:
    story.take(5)
    assert story.ledger.may_use(story.now + 0.9, 5)
    story.now += 1.1
    assert not story.ledger.may_use(story.now, 5)
    story.ledger.used(story.now, 5, False)
    assert story.found == ["used too late"]
    lines = story.ledger.findings[0].lines
    assert [line.split()[2] for line in lines] == ["OPEN", "NEW"]


def test_an_answer_while_the_program_decides(story: Story) -> None:
    story.take(5)
    story.now += 1.1
    asked = story.now
    story.send("RENEW", answer=[SESSION, 1000, 0])
    story.ledger.used(asked, 5, False)
    assert story.found == []


class TestDoubt:
    def test_another_change(self, story: Story) -> None:
        story.send("NEW", seq=1)
        story.send("DELETE", 5, seq=2, answer=[1])
        assert story.found == ["change in doubt"]

    def test_a_retry(self, story: Story) -> None:
        story.send("NEW", seq=1)
        story.send("NEW", seq=1, answer=[5])
        story.send("NEW", seq=2, answer=[6])
        assert story.found == []

    def test_a_retry_that_was_applied(self, story: Story) -> None:
        """Its IDs are not known, so the doubt remains; that of DELETE ends."""
        story.send("DELETE", 5, seq=1)
        story.send("DELETE", 5, seq=1, answer=errors.Repeated("done"))
        story.send("NEW", seq=2)
        story.send("NEW", seq=2, answer=errors.Repeated("done"))
        assert story.found == []
        story.send("NEW", seq=3, answer=[6])
        assert story.found == ["change in doubt"]

    @pytest.mark.parametrize(("seq", "found"), [(2, []), (0, ["change in doubt"])])
    def test_HELD(self, story: Story, seq: int, found: list[str]) -> None:
        """Without a seq, HELD does not block what is on its way."""
        story.send("NEW", seq=1)
        story.send("HELD", answer=[], **({"seq": seq} if seq else {}))
        story.send("NEW", seq=3, answer=[5])
        assert story.found == found

    def test_a_change_that_comes_after_HELD(self, story: Story) -> None:
        story.send("HELD", seq=2, answer=[])
        story.send("NEW", seq=1)
        story.send("NEW", seq=3, answer=[5])
        assert story.found == []

    def test_the_end_of_the_session(self, story: Story) -> None:
        story.send("NEW", seq=1)
        story.send("NEW", seq=1, answer=errors.SessionUnknown("gone"))
        story.send("OPEN", answer=[1, SESSION + 1, 1000])
        story.send("NEW", seq=2, answer=[5])
        assert story.found == []


def test_a_seed_is_one_schedule() -> None:
    fates = [fate_of(3, number) for number in range(1000)]
    assert fates == [fate_of(3, number) for number in range(1000)]
    assert fates != [fate_of(4, number) for number in range(1000)]
    assert len({each.name for each in fates}) == 10
