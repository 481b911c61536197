"""The life of a sequence: its table, what it says of its ID, and what time says of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cidalloc.client.core.sequence_state import (
    OPEN,
    TRANSITIONS,
    Event,
    Phase,
    SequenceState,
    diagram,
)
from cidalloc.errors import InvalidArgument, SequenceLost, Unavailable

IDLE = 5.0


def life(exact: bool = True) -> SequenceState:
    return SequenceState("sequence 7 on m", IDLE, exact)


def test_the_picture_in_the_guide_is_the_table() -> None:
    page = Path(__file__).parent.parent.parent / "docs" / "client.md"
    (drawn,) = re.findall(r"^```mermaid\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert drawn == diagram()


def test_the_picture_shows_every_change() -> None:
    lines = [line.strip() for line in diagram().splitlines()]
    for (phase, event), to in TRANSITIONS.items():
        if phase is not to:
            source = "open" if phase in OPEN and to not in OPEN else phase.value
            (line,) = [line for line in lines if line.startswith(f"{source} --> {to.value}: ")]
            assert event.value in line.partition(": ")[2].split(" / ")
    assert len([line for line in lines if "-->" in line]) <= 10, "a person can read it"


def test_every_phase_is_reached_and_can_be_left() -> None:
    reached, before = {Phase.FRESH}, 0
    while len(reached) > before:
        before = len(reached)
        reached |= {to for (phase, _), to in TRANSITIONS.items() if phase in reached}
    assert reached == set(Phase)
    for phase in OPEN:
        assert TRANSITIONS[phase, Event.CLOSE] is Phase.CLOSED
        assert TRANSITIONS[phase, Event.FORGET] is Phase.LOST
    assert {to for (phase, _), to in TRANSITIONS.items() if phase is Phase.CLOSED} == {Phase.CLOSED}


@given(st.lists(st.sampled_from(["send", "end", "answer", "fail", "lend", "lost"]), max_size=12))
def test_a_doubt_never_goes_away(actions: list[str]) -> None:
    it, doubtful = life(), False
    for action in actions:
        with contextlib.suppress(InvalidArgument, SequenceLost):
            if action in ("send", "end"):
                it.send(0.0, action == "end")
            elif action == "lend":
                it.lend(0.0, False)
            elif action == "lost":
                it.lose()
            elif it.unanswered:
                it.settle(0.0, False, None if action == "answer" else Unavailable("no answer"))
        assert it.doubtful >= doubtful
        doubtful = it.doubtful
    if doubtful:
        assert not it.close()


@given(st.lists(st.sampled_from(["send", "end", "answer", "fail", "lend"]), max_size=12))
def test_an_id_is_recycled_only_if_all_is_certain(actions: list[str]) -> None:
    """Against the rule in words: END answered with success, nothing unanswered, nothing failed."""
    it = life()
    waiting: list[bool] = []
    sent = failed = lent = ended = 0
    for action in actions:
        if action in ("send", "end", "lend"):
            try:
                (it.lend if action == "lend" else it.send)(0.0, action == "end")
            except InvalidArgument:
                assert ended or True in waiting
                continue
            sent += 1
            lent += action == "lend"
            if action != "lend":
                waiting.append(action == "end")
        elif waiting:
            end = waiting.pop(0)
            it.settle(0.0, end, None if action == "answer" else Unavailable("no answer"))
            failed += action == "fail"
            ended += action == "answer" and end
    certain = not sent or (ended and not waiting and not failed and not lent)
    assert it.close() == bool(certain)


def test_an_answered_end_is_not_enough_after_a_failure() -> None:
    it = life()
    it.send(0.0, False)
    it.settle(0.0, False, Unavailable("no answer"))
    it.send(0.0, True)
    it.settle(0.0, True, None)
    assert it.phase is Phase.ENDED and it.doubtful and not it.close()


def test_an_answered_end_is_not_enough_after_a_request_of_the_application() -> None:
    it = life()
    it.lend(0.0, False)
    it.send(0.0, True)
    it.settle(0.0, True, None)
    assert it.phase is Phase.ENDED and not it.close()


def test_an_answered_end_is_not_enough_after_one_that_was_broken_off() -> None:
    it = life()
    it.send(0.0, False)
    it.doubt(0, False)
    it.send(0.0, True)
    it.settle(0.0, True, None)
    assert it.phase is Phase.ENDED and not it.close()


def test_start_and_end_in_one_request_are_not_enough() -> None:
    it = life()
    it.send(0.0, False)
    it.settle(0.0, False, None)
    it.drop(9.0)
    it.settle(9.0, True, None)
    assert it.phase is Phase.ENDED and not it.close()


def test_an_answered_end_is_not_enough_while_something_is_unanswered() -> None:
    it = life()
    it.send(0.0, False)
    it.send(0.0, True)
    it.settle(0.0, True, None)
    assert it.phase is Phase.ENDED and not it.close()
    assert it.words == "closed, cooling"


def test_an_answered_end_is_not_enough_if_triton_forgets_later() -> None:
    it = SequenceState("sequence 7 on m", IDLE, exact=True, at_once=False)
    it.send(0, True)
    it.settle(1, True, None)
    assert it.words == "ended" and not it.doubtful
    assert not it.close()


def test_an_answer_before_that_to_end_ends_nothing() -> None:
    it = life()
    it.send(0.0, False)
    it.send(0.0, True)
    it.settle(0.0, False, None)
    assert it.phase is Phase.ENDING and it.answered == 1
    it.settle(0.0, True, None)
    assert it.answered == 2 and it.unanswered == 0 and it.close()


def test_a_request_that_the_application_sends() -> None:
    it = life()
    assert it.lend(0.0, False) and not it.lend(0.0, False)
    assert (it.unanswered, it.answered) == (0, 2)
    it.lend(0.0, True)
    assert it.phase is Phase.ENDED
    with pytest.raises(InvalidArgument):
        it.lend(0.0, False)


@pytest.mark.parametrize(("end", "after"), [(False, Phase.ENDING), (True, Phase.LIVE)])
def test_an_end_that_was_broken_off(end: bool, after: Phase) -> None:
    it = life()
    it.doubt(0, end)
    assert it.phase is Phase.FRESH and not it.doubtful, "nothing was sent"
    it.send(0.0, False)
    it.send(0.0, True)
    it.doubt(1, end)
    assert it.phase is after and it.doubtful and it.unanswered == 1


def test_what_the_model_may_keep() -> None:
    it = life()
    assert it.needs_end(0.0) == (False, False)
    it.send(0.0, False)
    assert it.needs_end(99.0) == (True, False), "it may be on its way"
    it.settle(0.0, False, None)
    assert it.needs_end(IDLE + 0.5) == (True, False)
    assert it.needs_end(IDLE + 0.6) == (True, True)
    it.send(5.0, False)
    it.drop(6.0)
    assert it.unanswered == 2
    it.lose()
    assert it.phase is Phase.LOST and it.needs_end(6.0) == (True, True)


def test_start_goes_with_the_first_and_again_if_that_failed() -> None:
    it = life()
    assert it.send(0, False) is True
    assert it.send(0, False) is False
    it.settle(0, False, Unavailable("no"))
    it.settle(0, False, Unavailable("no"))
    assert it.send(0, False) is True
    it.settle(0, False, None)
    assert it.send(0, False) is False
    it.settle(0, False, Unavailable("no"))
    assert it.send(0, True) is False


def send(it: SequenceState, at: float, answered: float | None) -> None:
    it.send(at, False)
    if answered is not None:
        it.settle(answered, False, None)


def test_when_triton_must_have_forgotten() -> None:
    it = life()
    send(it, 10, 13)
    assert not it.needs_end(18.4)[1]
    assert it.needs_end(18.6) == (True, True)
    it.send(18.4, False)
    assert "nothing was sent" in it.why_forgotten
    it.settle(18.41, False, None)
    with pytest.raises(SequenceLost, match="sequence 7 on m"):
        it.send(30, False)
    assert it.phase is Phase.LOST
    assert not it.close()


def test_the_edges_of_the_idle_time() -> None:
    it = life()
    send(it, 0.0, answered=0.0)
    it.goes_out(IDLE)
    assert it.why_forgotten == "nothing was sent for its idle time, 5 s"
    it = life()
    send(it, 0.0, answered=0.0)
    it.send(IDLE + 0.5, False)
    assert it.phase is Phase.LIVE


@pytest.mark.parametrize(
    "then",
    [
        lambda it: send(it, 10, None),  # it may be queued at any time
        lambda it: it.lend(10, False),  # somebody else knows
        lambda it: (it.send(10, False), it.settle(11, False, Unavailable("no answer"))),
    ],
)
def test_when_nobody_knows_it_never_must(then: Callable[[SequenceState], object]) -> None:
    it = life()
    send(it, 8, 9)
    then(it)
    assert not it.needs_end(1e6)[1]


def test_a_time_that_is_a_guess_never_must() -> None:
    it = life(exact=False)
    send(it, 10, 13)
    assert not it.needs_end(1e6)[1]


def test_after_its_end_time_does_not_matter() -> None:
    it = life()
    it.send(0, True)
    it.settle(1, True, None)
    with pytest.raises(InvalidArgument, match="no more"):
        it.send(1e6, False)
    assert it.close()


def test_what_was_forgotten_stays_so() -> None:
    it = life()
    send(it, 0, 1)
    it.send(2, False)
    it.send(2, True)
    it.settle(3, False, SequenceLost("x"))
    it.settle(3, True, None)
    assert it.phase is Phase.LOST
    with pytest.raises(SequenceLost, match="is lost: open a new sequence, and send all again"):
        it.send(3, False)


def test_no_answer_at_all_is_no_idle_time() -> None:
    it = life()
    it.send(0, False)
    it.send(100, False)
    assert "nothing was sent for its idle time" in it.why_forgotten


def test_waiting_for_a_slot_is_no_idle_time() -> None:
    """Triton does not count it; and who does not know blames nobody for being idle."""
    it = life()
    send(it, 10, 30)  # it waited for 20 s, four times the idle time
    assert not it.needs_end(30.1)[1]
    it.send(30.1, False)
    assert "nothing was sent" not in it.why_forgotten
    assert "kept the model busy" in it.why_forgotten
    it.settle(30.2, False, None)
    it.send(30.3, False)
    assert "server was restarted" in it.why_forgotten


def test_waiting_for_others_is_no_idle_time() -> None:
    """A request counts as sent when it goes out, and not when it was asked for."""
    it = life()
    send(it, 0, 1)
    it.send(2, False)
    it.send(2, False, waits=True)
    it.settle(4, False, None)
    it.goes_out(4)
    it.settle(4.5, False, None)
    it.send(8, False)
    assert "server was restarted" in it.why_forgotten
