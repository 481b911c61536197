"""What the blocking and the asyncio runner share; runners decide nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from .effects import Effect, Event, Flow
from .sequence import Talk
from .session import Session, Taken

__all__ = ["DAY_S", "LOOK_S", "Driver"]

T = TypeVar("T")

DAY_S = 86_400.0
LOOK_S = 0.15
"""Seconds between two looks for requests that got no answer in time."""


class Driver:
    """What both drivers do alike."""

    def __init__(self, session: Session, model: str, now: Callable[[], float]) -> None:
        self.session = session
        self.model = model
        self.now = now
        self.lock = threading.Lock()
        self.talks: dict[Talk, None] = {}
        self._watched: dict[Talk, None] = {}

    def _step(self, steps: Flow[T], event: Event | None) -> Effect:
        session = self.session
        session.now, seen = self.now(), session.version
        try:
            # A generator takes nothing in its first step.
            return next(steps) if event is None else steps.send(event)
        finally:
            if session.version != seen:
                self._notify()

    def _look(self) -> bool:
        """Look at all sequences that wait for something; False if there are none."""
        now = self.now()
        for talk in list(self._watched):
            self._watched.pop(talk, None)  # first, since it may be watched anew at any time
            if talk.look(now):
                self._watched[talk] = None
        return bool(self._watched)

    def untake(self, taken: Taken, error: BaseException) -> None:
        """Take back what an exception kept from reaching the application."""
        for talk in list(self.talks):
            if talk.plan.cid in taken and talk.plan.epoch == taken.epoch:
                talk.finish()
        with self.lock:
            self.session.untake(taken, error)

    def finish_all(self) -> None:
        """End all sequences: their client is closed."""
        for talk in list(self.talks):
            talk.finish()

    def _notify(self) -> None:
        """Let those look again that wait."""
        raise NotImplementedError
