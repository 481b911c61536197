"""What the blocking and the asyncio runner share; runners decide nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from .effects import Effect, Flow, Reply
from .sequence import SequenceCore
from .session import Acquired, Session

__all__ = ["DAY_S", "LOOK_S", "RunnerBase"]

T = TypeVar("T")

DAY_S = 86_400.0
LOOK_S = 0.15
"""Seconds between two looks for requests that got no answer in time."""


class RunnerBase:
    """What both runners do alike."""

    def __init__(self, session: Session, model: str, now: Callable[[], float]) -> None:
        self.session = session
        self.model = model
        self.now = now
        self.lock = threading.Lock()
        self.sequences: dict[SequenceCore, None] = {}
        self._watched: dict[SequenceCore, None] = {}

    def _step(self, steps: Flow[T], event: Reply | None) -> Effect:
        session = self.session
        seen = session.version
        try:
            # A generator takes nothing in its first step.
            return next(steps) if event is None else steps.send(event)
        finally:
            if session.version != seen:
                self._notify()

    def _look(self) -> bool:
        """Look at all sequences that wait for something; False if there are none."""
        now = self.now()
        for core in list(self._watched):
            self._watched.pop(core, None)  # first, since it may be watched anew at any time
            if core.look(now):
                self._watched[core] = None
        return bool(self._watched)

    def take_back(self, taken: Acquired, error: BaseException) -> None:
        """Take back what an exception kept from reaching the application."""
        for core in list(self.sequences):
            if core.plan.cid in taken and core.plan.epoch == taken.epoch:
                core.finish()
        with self.lock:
            self.session.take_back(taken, error)

    def finish_all(self) -> None:
        """End all sequences: their client is closed."""
        for core in list(self.sequences):
            core.finish()

    def _notify(self) -> None:
        """Let those look again that wait."""
        raise NotImplementedError
