"""The life of a sequence, and of its ID: states and events in one table.

`docs/client.md` shows the picture that `diagram` draws of it.
"""

from __future__ import annotations

from enum import Enum

from ...errors import InvalidArgument, SequenceLost

__all__ = ["TRANSITIONS", "BackTo", "Event", "Phase", "SequenceState", "diagram"]


class Phase(Enum):
    """Where a sequence is in its life."""

    FRESH = "fresh"
    """Nothing was sent yet."""
    STARTING = "starting"
    """START was sent, and not answered yet."""
    LIVE = "live"
    """Triton has it, and every answer was a success."""
    ENDING = "ending"
    """END was sent, and not answered yet."""
    ENDED = "ended"
    """END was answered with success, as was everything before."""
    DOUBTFUL = "doubtful"
    """What became of some request is not known. The sequence may go on."""
    DOUBTFUL_ENDING = "doubtful, ending"
    """The same, and END was sent."""
    DOUBTFUL_ENDED = "doubtful, ended"
    """The same, and END was answered, or sent by somebody who does not tell us."""
    LOST = "lost"
    """Triton has forgotten it, or its ID is ours no more."""
    RECYCLED = "closed, recycled"
    """Closed. The ID may be used again after the least cooldown."""
    COOLING = "closed, cooling"
    """Closed. The ID cools until Triton has certainly forgotten the sequence."""


class Event(Enum):
    """What happens to a sequence."""

    SEND = "send"
    SEND_END = "send END"
    LEND = "flags"
    LEND_END = "flags END"
    ANSWER = "answer"
    ANSWER_END = "answer to END"
    FAIL = "failure"
    FAIL_END = "failure of END"
    FORGET = "forgotten"
    CLOSE = "close"
    CUT = "close with something unanswered"


def _table() -> dict[tuple[Phase, Event], Phase]:
    """Return the state that follows; what is not in the table cannot happen, or is refused."""
    table: dict[tuple[Phase, Event], Phase] = {}

    def add(state: Phase, *events: Event, to: Phase | None = None) -> None:
        table.update(dict.fromkeys([(state, event) for event in events], to or state))

    for state in (Phase.FRESH, Phase.STARTING, Phase.LIVE, Phase.DOUBTFUL):
        doubtful = state is Phase.DOUBTFUL
        add(state, Event.LEND, to=Phase.DOUBTFUL)
        add(state, Event.LEND_END, to=Phase.DOUBTFUL_ENDED)
        add(state, Event.SEND, to=Phase.STARTING if state is Phase.FRESH else state)
        add(state, Event.SEND_END, to=Phase.DOUBTFUL_ENDING if doubtful else Phase.ENDING)
    add(Phase.STARTING, Event.ANSWER, to=Phase.LIVE)
    add(Phase.LIVE, Event.ANSWER)
    add(Phase.ENDING, Event.ANSWER)
    add(Phase.ENDING, Event.ANSWER_END, to=Phase.ENDED)
    add(Phase.ENDED, Event.ANSWER)
    for state in (Phase.STARTING, Phase.LIVE):
        add(state, Event.FAIL, to=Phase.DOUBTFUL)
    add(Phase.ENDING, Event.FAIL, to=Phase.DOUBTFUL_ENDING)
    add(Phase.ENDED, Event.FAIL, to=Phase.DOUBTFUL_ENDED)
    add(Phase.ENDING, Event.FAIL_END, to=Phase.DOUBTFUL)
    add(Phase.DOUBTFUL, Event.ANSWER, Event.FAIL)
    add(Phase.DOUBTFUL_ENDING, Event.ANSWER, Event.FAIL)
    add(Phase.DOUBTFUL_ENDING, Event.ANSWER_END, to=Phase.DOUBTFUL_ENDED)
    add(Phase.DOUBTFUL_ENDING, Event.FAIL_END, to=Phase.DOUBTFUL)
    add(Phase.DOUBTFUL_ENDED, Event.ANSWER, Event.FAIL)
    closed = (Phase.RECYCLED, Phase.COOLING)
    for state in Phase:
        if state in closed:
            continue
        add(state, Event.FORGET, to=Phase.LOST)
        certain = state in (Phase.FRESH, Phase.ENDED)
        add(state, Event.CLOSE, to=Phase.RECYCLED if certain else Phase.COOLING)
        if state is not Phase.FRESH:
            add(state, Event.CUT, to=Phase.COOLING)
    late = (Event.ANSWER, Event.ANSWER_END, Event.FAIL, Event.FAIL_END, Event.FORGET)
    for state in (Phase.LOST, *closed):
        add(state, *late)  # too late to matter
    return table


TRANSITIONS = _table()
"""The state that follows a state and an event."""


class BackTo(Enum):
    """What becomes of the ID when a sequence is closed."""

    STOCK = "stock"
    MANAGER = "manager"


class SequenceState:
    """One sequence's way through the table, and what time says of it. Times are seconds.

    Args:
        name: what the sequence is called in errors.
        idle: seconds after which Triton forgets it, counted from when it queued the last request.
        exact: that is when Triton does so, and not a guess that is long enough.
    """

    # Triton's own timer may be late by so much.
    _SLACK_S = 0.5

    def __init__(self, name: str, idle: float, exact: bool) -> None:
        self.phase = Phase.FRESH
        self.unanswered = 0
        self.answered = 0
        self._name = name
        self._idle = idle
        self._exact = exact
        self._late = ""  # why Triton may have forgotten it when the last request went out
        self._last_sent = float("inf")
        self._last_answered = float("-inf")
        # Triton had queued everything by then, or nobody knows.
        self._queued_by = float("inf")

    def send(self, now: float, end: bool, waits: bool = False) -> bool:
        """Note that a request is sent; return whether it is to carry START.

        If it ``waits`` for others, `goes_out` has to be told when it no longer does.

        Raises:
            InvalidArgument: the sequence has ended, or is closed.
            SequenceLost: Triton has forgotten it.
        """
        if (self.phase, Event.SEND) in TRANSITIONS and self.must_be_forgotten(now):
            self._go(Event.FORGET)
            raise SequenceLost(
                f"Triton has forgotten {self._name}: nothing was sent for its idle time,"
                f" {self._idle:g} s"
            )
        if self.phase is Phase.LOST:
            raise SequenceLost(f"{self._name} is lost: open a new sequence, and send all again")
        self._go(Event.SEND_END if end else Event.SEND)
        start = not self.answered and not self.unanswered
        self.unanswered += 1
        if not waits:
            self.goes_out(now)
        return start

    def goes_out(self, now: float) -> None:
        """Note that a request is handed to Triton."""
        self._late = ""
        if now >= self._last_answered + self._idle and now >= self._last_sent + self._idle:
            self._late = f"nothing was sent for its idle time, {self._idle:g} s"
        elif now >= self._last_sent + self._idle:
            # Waiting for a slot does not count, and nobody can tell it from the model's own time.
            self._late = (
                f"the request before may have kept the model busy for its idle time, {self._idle:g}"
                " s, which counts from when a request arrives"
            )
        self._last_sent = now

    @property
    def why_forgotten(self) -> str:
        """Why Triton has forgotten it, when it says so."""
        return self._late or (
            "the server was restarted or its model reloaded, or something else used this ID"
        )

    def lend(self, now: float, end: bool) -> bool:
        """The same for a request that others send, and of whose answer nobody tells us."""
        start = self.send(now, end=False)
        self.unanswered -= 1
        self.answered += 1  # for all that can be known
        self._queued_by = float("inf")
        self._go(Event.LEND_END if end else Event.LEND)
        return start

    def settle(self, now: float, end: bool, error: BaseException | None) -> None:
        """Note how a request ended; one that failed may have been applied, or be on its way yet."""
        self.unanswered -= 1
        if error is None:
            self.answered += 1
            self._queued_by = self._last_answered = now
            self._go(Event.ANSWER_END if end else Event.ANSWER)
        elif isinstance(error, SequenceLost):
            self._go(Event.FORGET)
        else:
            self._queued_by = float("inf")
            self._go(Event.FAIL_END if end else Event.FAIL)

    def doubt(self, unanswered: int, end: bool) -> None:
        """Note that a request was broken off in the middle of `send` or `settle`.

        Args:
            unanswered: how many others are unanswered.
            end: it would have been the last one.
        """
        self.unanswered = unanswered
        self._queued_by = float("inf")
        self.phase = TRANSITIONS.get(
            (self.phase, Event.FAIL_END if end else Event.FAIL), self.phase
        )

    def lose(self) -> None:
        """Its ID is ours no more."""
        self._go(Event.FORGET)

    def close(self) -> BackTo:
        """Note that nobody uses it any more; return where its ID goes. Again: the same."""
        if not self.closed:
            self._go(Event.CUT if self.unanswered else Event.CLOSE)
        return BackTo.STOCK if self.phase is Phase.RECYCLED else BackTo.MANAGER

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self.phase in (Phase.RECYCLED, Phase.COOLING)

    @property
    def wants_end(self) -> bool:
        """Whether Triton may still have it, and got no END."""
        return (self.phase, Event.SEND_END) in TRANSITIONS and self.phase is not Phase.FRESH

    def must_be_forgotten(self, now: float) -> bool:
        """Whether Triton has certainly forgotten it by now."""
        if self.phase is Phase.LOST:
            return True
        known = self._exact and self.answered > 0 and not self.unanswered
        return known and now > self._queued_by + self._idle + self._SLACK_S

    def _go(self, event: Event) -> None:
        to = TRANSITIONS.get((self.phase, event))
        if to is None:
            raise InvalidArgument(f"{self._name} takes no more requests: open a new one")
        self.phase = to


def diagram() -> str:
    """Return the table as a state diagram in Mermaid's language."""
    names = {state: state.name.lower() for state in Phase}
    lines = ["stateDiagram-v2", "    [*] --> fresh"]
    for state in Phase:
        lines.append(f"    {names[state]}: {state.value}")
    ways: dict[tuple[Phase, Phase], list[str]] = {}
    for (state, event), to in TRANSITIONS.items():
        as_closed = event is Event.CUT and TRANSITIONS[state, Event.CLOSE] is to
        if state is not to and not as_closed:
            ways.setdefault((state, to), []).append(event.value)
    for (state, to), events in ways.items():
        lines.append(f"    {names[state]} --> {names[to]}: {' / '.join(events)}")
    lines += [f"    {names[state]} --> [*]" for state in (Phase.RECYCLED, Phase.COOLING)]
    return "\n".join(lines) + "\n"
