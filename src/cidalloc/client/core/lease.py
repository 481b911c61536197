"""The lease: one session with the manager, and every decision on requests, time and errors.

It has no socket and no thread, and its clock is given to it: seconds of a clock that runs on in
suspend. A runner runs one step at a time.
"""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable, Generator, Iterable
from typing import Any
from uuid import UUID

from ...codes import Operation
from ...errors import (
    CidError,
    InvalidArgument,
    ProtocolError,
    RegistryMismatch,
    Repeated,
    SessionExpired,
    SessionUnknown,
    Unavailable,
)
from ...protocol import PROTOCOL, TOKEN_BYTES, Parameter, Request, as_ids
from .effects import Flow, Idle, Reply, Send

__all__ = ["NEVER", "Lease", "runs"]

_log = logging.getLogger("cidalloc.client")

NEVER = float("-inf")
_BACK_OFF_S = 0.05  # the first pause before another try; each is twice the one before
_BACK_OFF_MOST_S = 2.0
_AWAY_S = 5.0  # for so long a manager that did not answer is taken to be away
_LOOK_S = 1.0  # whether a flow that had the turn was broken off, which nobody is told
_STRANGERS = 3  # so many answers of another registry prove that ours is gone
_TIMES_MS = (5_000, 120_000)  # cooldowns of a manager that does not say them


def runs(flow: Flow[Any] | None) -> bool:
    """Whether a flow has neither ended nor been broken off, be it by a signal handler."""
    return flow is not None and inspect.getgeneratorstate(flow) != inspect.GEN_CLOSED


class Lease:
    """A session, opened when it is first needed and again when it was lost.

    Args:
        ttl: seconds that the session lives without a word from us.
        label: what the manager shows for it.
        timeout: seconds that a request may take.
        rng: draws tokens and pauses.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        *,
        ttl: float,
        label: str,
        timeout: float,
        rng: random.Random,
        clock: Callable[[], float],
    ) -> None:
        self.now = clock
        self.ttl = ttl
        self.label = label
        self.timeout = timeout
        self.lease_deadline = NEVER  # from this time on its IDs must not be used
        self.epoch = 0  # counts our sessions
        self.lost_why = ""
        self.away_until = NEVER
        self.version = 0  # rises when something changes that a flow may wait for
        self.closed = False
        self.abandoned = False  # nobody has the client any more
        self._rng = rng
        self._token = ""
        self._first_sent = NEVER  # when this token was first sent
        self._generation = 0  # 0 until OPEN is answered
        self._registry: UUID | None = None
        self._turn: Flow[None] | None = None  # the flow that has it, until that has ended
        self._met = False  # the manager has answered once
        self._renew_at = NEVER
        self._retry_at = NEVER

    def __repr__(self) -> str:  # never with the token
        return f"<Session {self.label!r}, {self.state}>"

    @property
    def opened(self) -> bool:
        """Whether there is a session, be it one whose lease has run out."""
        return self._generation != 0

    @property
    def state(self) -> str:
        """How it is, in a word."""
        if self.closed:
            return "closed"
        if not self.opened:
            return "not opened"
        return "open" if self.now() < self.lease_deadline else "expired"

    def _once(
        self,
        operation: Operation,
        deadline: float,
        cids: Iterable[int] = (),
        *,
        session: bool = True,
        **parameters: Parameter,
    ) -> Flow[Reply]:
        """Send one request of the session, and note what its answer means for it."""
        epoch, sent = self.epoch, self.now()
        if session:
            parameters["session"] = self._token
            if self._registry is not None and operation is not Operation.OPEN:
                parameters["registry"] = str(self._registry)
        request = Request(operation, as_ids(list(cids)), parameters)
        event = yield Send(request, self._limit(deadline))
        error = event.error
        if error is None or error.answered:
            self._met = True
        if session and epoch != self.epoch:
            raise SessionUnknown(self.lost_why)
        if error is not None:
            if isinstance(error, Unavailable):
                self.away_until = self.now() + _AWAY_S
            if session and isinstance(error, SessionUnknown):
                self._lose(f"the manager does not know its session any more ({error})")
            raise error
        if session and operation is not Operation.OPEN:
            self._renewed(sent)
        return event

    def _limit(self, deadline: float) -> float:
        return min(self.timeout, max(deadline - self.now(), self.timeout / 16))

    def _renewed(self, sent: float) -> None:
        self.lease_deadline = max(self.lease_deadline, sent + self.ttl)
        self._renew_at = sent + self.ttl * self._rng.uniform(0.25, 0.35)
        self._retry_at = NEVER

    def _establish(self, deadline: float) -> Flow[None]:
        """Open the session if there is none; renew it if its lease has run out."""
        if not self.opened:
            yield from self._open(deadline)
        elif self.now() >= self.lease_deadline:
            try:
                yield from self._renew(deadline)
            except Unavailable as error:
                raise SessionExpired(f"{self._expired()}; {error}") from error
        if self.opened and self.now() >= self.lease_deadline:
            slow = Unavailable("the manager takes longer to answer than the lease lasts")
            raise SessionExpired(f"{self._expired()}; {slow}") from slow

    def _open(self, deadline: float) -> Flow[None]:
        if not self._token or self.now() >= self._first_sent + self.ttl:
            self._token = f"{self._rng.getrandbits(8 * TOKEN_BYTES):0{2 * TOKEN_BYTES}x}"
            self._first_sent = self.now()
        event = yield from self._once(
            Operation.OPEN, deadline, ttl_ms=int(self.ttl * 1000), label=self.label
        )
        answer = event.output.tolist()
        if len(answer) < 5 or answer[0] != PROTOCOL:
            raise ProtocolError(f"OPEN was answered with {answer}: a manager of another version?")
        _, generation, _, high, low, *times = answer
        self._registry = UUID(int=high << 64 | low)
        self._begin(*(times[:2] if len(times) >= 2 else _TIMES_MS))
        # The first OPEN of this token that arrived began the lease, and none since renewed it.
        self.lease_deadline, self._renew_at = NEVER, NEVER
        self._renewed(self._first_sent)
        self._generation = generation  # the last, so that all is done or nothing
        self.version += 1
        _log.info("%r: opened, generation %d of %s", self, self._generation, self._registry)

    def _renew(self, deadline: float, **parameters: Any) -> Flow[None]:
        generation = self._generation
        event = yield from self._once(Operation.RENEW, deadline, **parameters)
        if event.output.tolist()[:1] != [generation] and self._generation == generation:
            # An OPEN that was late on its way: nothing of before is in that session.
            self._lose("the manager has another session under its name")
            raise SessionUnknown(self.lost_why)

    def _recover(self, error: CidError, tries: int, deadline: float) -> Flow[None]:
        """Return when another try may help; raise the error if none can, or if it is too late."""
        if isinstance(error, RegistryMismatch):
            yield from self._probe(error, deadline)
            return
        # With a new session; or this very request was repeated by something on the way. That
        # others failed before says nothing, but in the long run it is no use.
        again = isinstance(error, SessionUnknown | Repeated)
        if again and tries <= 3:
            return
        passes = again or isinstance(error, Unavailable) or isinstance(error.__cause__, Unavailable)
        # A manager that was never there is more likely a wrong address.
        if not passes or not (error.answered or self._met):
            raise error
        wait = self._pause(tries)
        if self.now() + wait >= deadline:
            raise error
        yield from self._sleep(wait)

    def _probe(self, error: RegistryMismatch, deadline: float) -> Flow[None]:
        """Another registry answers: has it replaced ours, or are there two?

        Raises:
            RegistryMismatch: ours still answers, too.
        """
        epoch = self.epoch
        for _ in range(_STRANGERS):
            try:
                yield from self._once(Operation.RENEW, deadline)
            except RegistryMismatch:
                continue
            except CidError:
                return
            raise error
        if epoch == self.epoch:
            self._lose(
                "another registry answers in place of its manager's: was the manager restarted"
                " without a file to remember by?"
            )

    def _lose(self, why: str) -> None:
        """The session is gone, and with it all that it held."""
        _log.warning("%r: lost, since %s", self, why)
        self._drop()
        self.lost_why = why
        self.epoch += 1
        self.version += 1
        self.lease_deadline = self._first_sent = NEVER
        self._token, self._generation, self._registry = "", 0, None

    def _expired(self) -> str:
        return (
            f"no heartbeat was answered for {self.ttl:g} s: until one is, the IDs of this session"
            " may be somebody else's"
        )

    def _pause(self, tries: int) -> float:
        """Return how long to wait before another try; not the same for all clients."""
        most = min(_BACK_OFF_S * 2.0 ** min(tries - 1, 10), _BACK_OFF_MOST_S, self.ttl / 8)
        return most * self._rng.uniform(0.5, 1.0)

    def _sleep(self, seconds: float) -> Generator[Idle, Reply, None]:
        until = self.now() + seconds
        while self.now() < until:
            yield Idle(until)

    def _in_turn(self, flow: Flow[None], deadline: float) -> Flow[None]:
        """Run a flow while no other has the turn."""
        began = self.now()
        while runs(self._turn):
            if self.now() >= deadline:
                flow.close()
                raise Unavailable(
                    f"no answer within {self.now() - began:.1f} s: other requests come first"
                )
            yield Idle(min(deadline, self.now() + _LOOK_S))
        self.check_open()
        try:
            self._turn = flow
            yield from flow
        finally:
            flow.close()
            self.version += 1

    def check_open(self) -> None:
        """Raise `InvalidArgument` if the client is closed."""
        if self.closed:
            raise InvalidArgument("this client is closed")

    # ---- What a session does on the occasion

    def _begin(self, cooldown_ms: int, default_ms: int) -> None:
        """The session was opened; the manager's cooldowns are these."""

    def _drop(self) -> None:
        """The session is lost."""
