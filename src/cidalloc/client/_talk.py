"""What a blocking and an awaiting sequence have in common: everything but the sending."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from tritonclient.utils import InferenceServerException

from ..errors import CidError, InvalidArgument, SequenceLost, SessionExpired, Unavailable
from ._life import BackTo, Life
from ._process import BoundToProcess
from ._session import Session
from ._stock import ENDED
from ._target import Target
from ._transport import unreachable

__all__ = ["HURRY_S", "Plan", "Talk"]

HURRY_S = 2.0
"""How long a block that ends with an exception waits for a server that does not answer."""

_MARGIN_S = 5.0
"""For how long after Triton's own limit an answer is waited for."""

UNMANAGED = -1
"""The epoch of an ID that was drawn at random, without the manager."""

_SET_BY_US = {
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "request_id",
    "timeout",
    "client_timeout",
}


class _Driver(Protocol):
    session: Session

    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    @property
    def now(self) -> Callable[[], float]: ...

    def wake(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sequence is given to begin with.

    Args:
        target: the model.
        cid: the ID.
        epoch: of which of the client's sessions the ID is.
        timeout: seconds that a request may take.
    """

    target: Target
    cid: int
    epoch: int
    timeout: float


class Talk(BoundToProcess):
    """A sequence, but for how its requests are sent."""

    _plan: Plan
    _life: Life

    def __init__(self, driver: _Driver, url: str, model: str, farewell: list[Any] | None) -> None:
        super().__init__()
        self._driver = driver
        self._url = url
        self._model = model
        self._farewell = farewell

    def _begin(self, plan: Plan) -> None:
        self._plan = plan
        name = f"sequence {plan.cid} on {plan.target.name}"
        self._life = Life(name, plan.target.idle_s, plan.target.exact)

    def __repr__(self) -> str:
        if not hasattr(self, "_plan"):
            return f"<cidalloc {type(self).__name__} on {self._model}, not begun>"
        state = self._life.state.value
        return f"<cidalloc {type(self).__name__} {self._plan.cid} on {self._model}, {state}>"

    @property
    def cid(self) -> int:
        """The correlation ID, ``sequence_id`` in tritonclient."""
        return self._begun.cid

    @property
    def model(self) -> str:
        """The model that the sequence is on."""
        return self._model

    @property
    def state(self) -> str:
        """Where it is in its life, in a word or two."""
        return self._life.state.value if hasattr(self, "_plan") else "not begun"

    def flags(self, *, end: bool = False) -> dict[str, Any]:
        """Return the arguments that make a request of your own part of this sequence.

        They are ``sequence_id``, ``sequence_start``, ``sequence_end`` and ``timeout``. Since the
        sequence does not see the answer, its ID cools after use, as if END had not been answered.

        Raises what `infer` does, but for what Triton answers.
        """
        return self._flags(end, lend=True)

    @property
    def _begun(self) -> Plan:
        if not hasattr(self, "_plan"):
            raise InvalidArgument(f"{self!r}: enter it with async with, or await it")
        return self._plan

    @property
    def _patience(self) -> float:
        # Triton's own limit on a request comes first; ours is for a server that is away.
        return self._plan.timeout + _MARGIN_S

    def _prepare(self, end: bool, options: dict[str, Any]) -> dict[str, Any]:
        """Return the flags of the next request; it counts as sent from now on."""
        taken = _SET_BY_US & options.keys()
        if taken:
            raise InvalidArgument(f"the sequence sets {', '.join(sorted(taken))} by itself")
        return self._flags(end, lend=False)

    def _flags(self, end: bool, lend: bool) -> dict[str, Any]:
        self._check_fork()
        cid = self._begun.cid
        with self._driver.lock:
            now = self._check_lease()
            start = self._life.lend(now, end) if lend else self._life.send(now, end)
        # Without the timeout a request could wait in Triton for ever, and come to life when the ID
        # is somebody else's.
        return {
            "sequence_id": cid,
            "sequence_start": start,
            "sequence_end": end,
            "timeout": int(self._plan.timeout * 1e6),
        }

    def _check_lease(self) -> float:
        """Return the time, after seeing that the ID may be used. Under the lock."""
        session = self._driver.session
        session.now = now = self._driver.now()
        if self._plan.epoch != UNMANAGED and not self._life.closed:
            try:
                session.check(self._plan.epoch, self._plan.cid)
            except SequenceLost:
                self._life.lose()
                raise
        return now

    def _check_again(self) -> None:
        """See that the ID may still be used, right before a request that has waited is sent."""
        with self._driver.lock:
            self._check_lease()

    def _settle(self, end: bool, error: BaseException | None) -> None:
        with self._driver.lock:
            self._life.settle(self._driver.now(), end, error)

    def _explain(self, error: BaseException) -> BaseException:
        """Return what a failed request means, if it is something of ours."""
        if isinstance(error, CidError):
            return error
        text = str(error.message() or "") if isinstance(error, InferenceServerException) else ""
        name = f"sequence {self._plan.cid} on {self._model}"
        if "must specify the START flag" in text and self._life.answered:
            why = "the server was restarted or its model reloaded, or something else used this ID"
            if self._life.overdue:
                why = f"nothing was sent for its idle time, {self._plan.target.idle_s:g} s"
            lost: BaseException = SequenceLost(f"Triton has forgotten {name}: {why}")
        elif "timeout of the corresponding sequence has been expired" in text:
            lost = Unavailable(
                f"no slot for {name} within {self._plan.timeout:g} s: all slots of the model are"
                " taken by other sequences"
            )
        else:
            return unreachable(error, self._url) or error
        lost.__cause__ = error
        return lost

    def _no_answer(self) -> Unavailable:
        return Unavailable(f"no answer to {self!r} within {self._plan.timeout:g} s")

    def _may_part(self) -> bool:
        """Whether to send the farewell."""
        if self._farewell is None or not self._life.wants_end:
            return False
        with self._driver.lock:
            try:
                now = self._check_lease()
            except (SequenceLost, SessionExpired, InvalidArgument):
                return False
        return not self._life.must_be_forgotten(now)

    def _mark_closed(self) -> bool:
        """Give the ID back. False if that was done before."""
        driver, plan = self._driver, self._plan
        with driver.lock:
            if self._life.closed:
                return False
            back_to = self._life.close()
            driver.session.now = driver.now()
            if plan.epoch != UNMANAGED:
                cooldown_ms = ENDED if back_to is BackTo.STOCK else cooldown_of(plan)
                driver.session.give_from(plan.epoch, plan.cid, cooldown_ms)
        if driver.session.wants:
            driver.wake()
        return True


def cooldown_of(plan: Plan) -> int:
    """Return for how many milliseconds the ID cools if it is not known that the sequence ended."""
    return need_ms(plan.target, plan.timeout)


def need_ms(target: Target, timeout: float) -> int:
    """Return for how many milliseconds an ID cools after a sequence without END."""
    return math.ceil((target.idle_s + timeout) * 1000)  # never shorter than asked for
