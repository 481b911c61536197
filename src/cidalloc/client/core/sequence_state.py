"""The state of a sequence, which decides where the sequence's ID goes.

It has two parts: the *phase*, which follows a table, and the flag *doubtful*, which is set when the
result of a request is not known and is never cleared. `diagram` draws the table as the picture in
`docs/client.md`.
"""

from __future__ import annotations

from enum import Enum

from ...errors import InvalidArgument, SequenceLost

__all__ = ["OPEN", "TRANSITIONS", "Event", "Phase", "SequenceState", "diagram"]


class Phase(Enum):
    """Where a sequence is in its life."""

    __hash__ = object.__hash__  # each member is one object, and this costs less

    FRESH = "fresh"
    """Nothing was sent yet."""
    LIVE = "live"
    """START was sent. END was not sent, or END failed."""
    ENDING = "ending"
    """END was sent, and is not answered yet."""
    ENDED = "ended"
    """END was answered with success."""
    LOST = "lost"
    """Triton has forgotten the sequence, or the client has lost its ID."""
    CLOSED = "closed"
    """The sequence is closed, and its ID was released."""


class Event(Enum):
    """What happens to a sequence."""

    __hash__ = object.__hash__

    SEND = "send"
    SEND_END = "send END"
    ANSWER_END = "answer to END"
    FAIL_END = "failure of END"
    FORGET = "forgotten"
    CLOSE = "close"


_LIVE = Phase.LIVE  # a global costs less than an attribute

OPEN = (Phase.FRESH, Phase.LIVE, Phase.ENDING, Phase.ENDED)

TRANSITIONS: dict[tuple[Phase, Event], Phase] = {
    (Phase.FRESH, Event.SEND): Phase.LIVE,
    (Phase.FRESH, Event.SEND_END): Phase.ENDING,
    (Phase.LIVE, Event.SEND): Phase.LIVE,
    (Phase.LIVE, Event.SEND_END): Phase.ENDING,
    (Phase.ENDING, Event.ANSWER_END): Phase.ENDED,
    (Phase.ENDING, Event.FAIL_END): Phase.LIVE,
    **{(phase, Event.FORGET): Phase.LOST for phase in OPEN},
    **{(phase, Event.CLOSE): Phase.CLOSED for phase in (*OPEN, Phase.LOST)},
    # These come too late to matter.
    **{
        (phase, event): phase
        for phase in (Phase.LOST, Phase.CLOSED)
        for event in (Event.ANSWER_END, Event.FAIL_END, Event.FORGET)
    },
}
"""The next phase. An event that is not in the table is refused. Other answers change no phase."""


class SequenceState:
    """The state of one sequence. Times are seconds.

    Args:
        name: the name of the sequence in errors.
        idle: seconds without a request after which Triton forgets the sequence.
        exact: Triton forgets the sequence after ``idle``, and not earlier.
        at_once: Triton forgets it before it answers END.

    Attributes:
        phase: see `Phase`.
        doubtful: the result of a request is not known.
        recycled: the sequence is closed, and its ID may be used again after the minimum cooldown.
        unanswered: requests that are not answered yet.
        answered: requests that were answered with success.
    """

    # Triton's own timer may be late by so many seconds.
    _SLACK_S = 0.5

    def __init__(self, name: str, idle: float, exact: bool, at_once: bool = True) -> None:
        self.phase = Phase.FRESH
        self.doubtful = self.recycled = False
        self.unanswered = 0
        self.answered = 0
        self._name = name
        self._idle = idle
        self._exact = exact
        self._at_once = at_once
        self._late = ""  # why Triton may have forgotten it before the last request
        self._last_sent = float("inf")
        self._last_answered = float("-inf")
        # Triton has forgotten it after this time, if all is answered; infinite if it is not known.
        self._forgotten_at = float("inf")

    @property
    def words(self) -> str:
        """The state in words."""
        if self.phase is Phase.CLOSED:
            return "closed, recycled" if self.recycled else "closed, cooling"
        if self.doubtful and self.phase is not Phase.LOST:
            return "doubtful" if self.phase is Phase.LIVE else f"doubtful, {self.phase.value}"
        if self.phase is Phase.LIVE and not self.answered:
            return "starting"
        return str(self.phase.value)

    def send(self, now: float, end: bool, waits: bool = False) -> bool:
        """Note that a request is sent; return whether it carries START.

        A request that ``waits`` for others needs a call of `goes_out` later.

        Raises:
            InvalidArgument: the sequence has ended, or is closed.
            SequenceLost: Triton has forgotten it.
        """
        phase = self.phase
        if now > self._forgotten_at and not self.unanswered and phase is _LIVE:
            self._go(Event.FORGET)
            raise SequenceLost(
                f"Triton has forgotten {self._name}: nothing was sent for its idle time,"
                f" {self._idle:g} s"
            )
        if end or phase is not _LIVE:  # else it stays live
            if phase is Phase.LOST:
                raise SequenceLost(f"{self._name} is lost: open a new sequence, and send all again")
            self._go(Event.SEND_END if end else Event.SEND)
        start = not self.answered and not self.unanswered
        self.unanswered += 1
        if not waits:
            self.goes_out(now)
        return start

    def goes_out(self, now: float) -> None:
        """Note that a request is passed to Triton."""
        self._late = ""
        if now >= self._last_sent + self._idle:
            if now >= self._last_answered + self._idle:
                self._late = f"nothing was sent for its idle time, {self._idle:g} s"
            else:
                # Waiting for a slot does not count, but it looks like the model's own time.
                self._late = (
                    "the request before may have kept the model busy for its idle time,"
                    f" {self._idle:g} s, which counts from when a request arrives"
                )
        self._last_sent = now

    @property
    def why_forgotten(self) -> str:
        """Why Triton has forgotten the sequence, once Triton has said so."""
        return self._late or (
            "the server was restarted or its model reloaded, another server got the request, or"
            " something else used this ID"
        )

    def drop(self, now: float) -> None:
        """Note that START and END go out in one request, so that the model deletes what it keeps.

        Its ID cools as without END.
        """
        if self.phase is not Phase.LOST:
            self._go(Event.SEND_END)
        self.doubtful = True
        self._forgotten_at = float("inf")
        self.unanswered += 1
        self.goes_out(now)

    def lend(self, now: float, end: bool) -> bool:
        """Note a request that the application sends, and whose answer the sequence never sees."""
        start = self.send(now, end)
        self.unanswered -= 1
        self.answered += 1  # it may have been answered
        self.doubtful = True
        self._forgotten_at = float("inf")
        if end:
            self._go(Event.ANSWER_END)
        return start

    def settle(self, now: float, end: bool, error: BaseException | None) -> None:
        """Note the end of a request. A failed one may be applied already, or later."""
        self.unanswered -= 1
        if error is None:
            self.answered += 1
            self._last_answered = now
            if self._exact:
                self._forgotten_at = now + self._idle + self._SLACK_S
            if end:
                self._go(Event.ANSWER_END)
        elif isinstance(error, SequenceLost):
            self._go(Event.FORGET)
        else:
            self.doubtful = True
            self._forgotten_at = float("inf")
            if end:
                self._go(Event.FAIL_END)

    def doubt(self, unanswered: int, end: bool) -> None:
        """Note that an exception broke off `send` or `settle`.

        Args:
            unanswered: the number of other requests without an answer.
            end: the request carries END.
        """
        self.unanswered = unanswered
        self.doubtful = self.doubtful or self.phase is not Phase.FRESH
        self._forgotten_at = float("inf")
        if end:
            self.phase = TRANSITIONS.get((self.phase, Event.FAIL_END), self.phase)

    def lose(self) -> None:
        """Note that the client has lost the ID."""
        self._go(Event.FORGET)

    def close(self) -> bool:
        """Note that the sequence is closed; return whether its ID is recycled. May be repeated."""
        if not self.closed:
            self.recycled = self.phase is Phase.FRESH or self.ended
            self._go(Event.CLOSE)
        return self.recycled

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self.phase is Phase.CLOSED

    @property
    def ended(self) -> bool:
        """Whether Triton has certainly ended it, and nothing is unanswered."""
        certain = self._at_once and not self.doubtful
        return self.phase is Phase.ENDED and certain and not self.unanswered

    def needs_end(self, now: float) -> tuple[bool, bool]:
        """Return whether the model may keep state, and whether Triton has forgotten the sequence.

        The model keeps what got no END: Triton does not tell it of sequences that it forgets. And
        it refuses END alone for these.
        """
        lost = self.phase is Phase.LOST
        forgotten = now > self._forgotten_at and not self.unanswered
        return lost or self.phase is Phase.LIVE, lost or forgotten

    def _go(self, event: Event) -> None:
        to = TRANSITIONS.get((self.phase, event))
        if to is None:
            raise InvalidArgument(f"{self._name} takes no more requests: open a new one")
        self.phase = to


def diagram() -> str:
    """Return the table as a state diagram in Mermaid's language."""
    lines = ["stateDiagram-v2", "    state open {", "        [*] --> fresh"]
    ways: dict[tuple[str, str], list[str]] = {}
    for (phase, event), to in TRANSITIONS.items():
        if phase is not to:
            source = "open" if phase in OPEN and to not in OPEN else phase.value
            words = ways.setdefault((source, to.value), [])
            if event.value not in words:
                words.append(event.value)
    for (source, target), words in ways.items():
        inside = source != "open" and source != Phase.LOST.value
        lines.append(f"{'    ' * (1 + inside)}{source} --> {target}: {' / '.join(words)}")
    # The inner arrows come first in the table.
    lines.insert(3 + sum(line.startswith("        ") for line in lines[3:]), "    }")
    return "\n".join([*lines, "    closed --> [*]"]) + "\n"
