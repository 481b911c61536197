"""The link to the manager: how long to wait for an answer, and when to send a request again."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator

from ...errors import CidError, Repeated, SessionUnknown, Unavailable
from .effects import NEVER, Flow, Idle, Reply

__all__ = ["Link"]

_BACK_OFF_S = 0.05  # the first pause between two tries; each further pause is twice as long
_BACK_OFF_MOST_S = 2.0
_AWAY_S = 5.0  # a manager that did not answer is taken to be away for so long
_TRIES_WITHOUT_PAUSE = 3  # after errors that a new session or a new number cures


class Link:
    """What a client knows of the way to its manager.

    Args:
        timeout: seconds to wait for an answer.
        ttl: TTL of the client's sessions in seconds.
        rng: draws tokens and the length of pauses.
        clock: returns the time in seconds, by a clock that runs on in suspend.

    Attributes:
        away_until: the manager is taken to be unreachable until this time.
        heard_at: when the server answered last.
    """

    def __init__(
        self, timeout: float, ttl: float, rng: random.Random, clock: Callable[[], float]
    ) -> None:
        self.now = clock
        self.timeout = timeout
        self.ttl = ttl
        self.rng = rng
        self.away_until = self.heard_at = NEVER
        self._met = False  # the manager has answered at least once

    def limit(self, deadline: float) -> float:
        """Return how many seconds to wait for the answer to a request that is sent now."""
        return min(self.timeout, max(deadline - self.now(), self.timeout / 16))

    def note(self, reply: Reply) -> CidError | None:
        """Note what a reply says of the link; return the reply's error."""
        error = reply.error
        if error is None or error.answered:
            self._met = True
            self.heard_at = self.now()
        if isinstance(error, Unavailable):
            self.away_until = self.now() + _AWAY_S
        return error

    def pause(self, tries: int) -> float:
        """Return the seconds to wait before another try; they differ between clients."""
        most = min(_BACK_OFF_S * 2.0 ** min(tries - 1, 10), _BACK_OFF_MOST_S, self.ttl / 8)
        return most * self.rng.uniform(0.5, 1.0)

    def recover(self, error: CidError, tries: int, deadline: float) -> Flow[None]:
        """Wait until another try may help; raise the error if no try can help in time."""
        # A new session, or a new number of the request, may cure these. That earlier tries failed
        # says little, but after some of them a pause is due.
        cured = isinstance(error, SessionUnknown | Repeated)
        if cured and tries <= _TRIES_WITHOUT_PAUSE:
            return
        passes = cured or isinstance(error, Unavailable) or isinstance(error.__cause__, Unavailable)
        # A manager that has never answered probably has another address.
        if not passes or not (error.answered or self._met):
            raise error
        wait = self.pause(tries)
        if self.now() + wait >= deadline:
            raise error
        yield from self.sleep(wait)

    def sleep(self, seconds: float) -> Generator[Idle, Reply, None]:
        """Wait for so many seconds."""
        until = self.now() + seconds
        while self.now() < until:
            yield Idle(until)
