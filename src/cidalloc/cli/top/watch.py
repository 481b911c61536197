"""What ``top`` knows about a manager: its last status, and figures over the last minutes."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ...errors import CidError, Unavailable
from ..ask import Manager
from ..screen import Rates, duration, rates_between, status_view

__all__ = ["FIGURES", "MINUTES", "Answer", "Watch", "ask"]

MINUTES = 3
"""For how long figures are kept."""

FIGURES = ("held", "cooling", "acquired", "requests")
"""The figures that are kept: two counts, and two rates per second."""

Answer = dict[str, Any] | CidError
"""A status, or why there is none."""


def ask(manager: Manager) -> Answer:
    """Request the status once. This waits for as long as the manager's timeout."""
    try:
        return manager.status()
    except CidError as error:
        return error


class Watch:
    """The last status of a manager, the error since, and the figures of the last minutes.

    Args:
        manager: what is watched.
        interval: seconds between two answers.
    """

    def __init__(self, manager: Manager, interval: float = 1.0) -> None:
        self.manager = manager
        self.status: dict[str, Any] | None = None
        self.error: CidError | None = None
        self.rates: Rates | None = None
        kept = max(2, round(MINUTES * 60 / interval))
        self.figures = {name: deque[float](maxlen=kept) for name in FIGURES}
        self._answered = time.monotonic()

    def take(self, answer: Answer) -> None:
        """Store an answer."""
        if isinstance(answer, CidError):
            self.error = answer
            self.rates = None
            return
        self.error = None
        self.rates = rates_between(self.status, answer)
        self.status = answer
        self._answered = time.monotonic()
        for name in FIGURES[:2]:
            self.figures[name].append(answer[name])
        if self.rates is not None:
            for name in FIGURES[2:]:
                self.figures[name].append(self.rates[name])

    @property
    def state(self) -> str:
        """Whether the manager answers, in a few words."""
        if self.error is None:
            if self.status is None:
                return "…"
            return "draining" if self.status.get("draining") else "ok"
        if not isinstance(self.error, Unavailable):
            return self.error.code.name
        return f"no answer {duration(time.monotonic() - self._answered)}"

    def page(self) -> RenderableType:
        """Return all that is known, under a title."""
        title = Text(f"{self.manager.model} at {self.manager.url}", style="bold")
        return Group(title, self.details(None))

    def details(self, most: int | None = 0) -> RenderableType:
        """Return the error and the last status, with at most so many sessions."""
        parts: list[RenderableType] = []
        if self.error is not None:
            parts.append(Text(f"{self.state}: {self.error}", style="bold red"))
        if self.status is not None:
            parts.append(status_view(self.status, None, most))
        return Group(*parts)
