"""The sessions of a registry that expired: their number, the latest ones, and lines in the log."""

from __future__ import annotations

import logging
from collections import deque
from itertools import islice
from typing import Any, NamedTuple

__all__ = ["ExpiredSessions"]

_log = logging.getLogger("cidalloc.manager.expired")

_REMEMBERED = 100
_REMEMBERED_MS = 3_600_000
_LINES = 10  # in the log, within _LINES_MS
_LINES_MS = 60_000


class _Expired(NamedTuple):
    label: str
    held: int
    used: int | None
    at: int  # ms, by the registry's clock


class ExpiredSessions:
    """The sessions that expired since the registry was opened. It is only in memory.

    Attributes:
        count: the number of sessions.
        in_use: the number of them that had IDs in use.
    """

    def __init__(self) -> None:
        self.count = self.in_use = 0
        self._latest: deque[_Expired] = deque(maxlen=_REMEMBERED)
        self._lines = self._suppressed = 0
        self._lines_since = 0

    def add(self, label: str, held: int, used: int | None, now: int) -> None:
        """Note that a session has expired, with so many IDs held and in use."""
        self.count += 1
        self._latest.append(_Expired(label, held, used, now))
        if not used:
            return
        self.in_use += 1
        self.log_suppressed(now)
        if not self._lines:
            self._lines_since = now
        if self._lines == _LINES:
            self._suppressed += 1
            return
        self._lines += 1
        _log.warning("the session %r expired with IDs in use: %d of %d", label, used, held)

    def log_suppressed(self, now: int) -> None:
        """Log how many sessions had no line, once a minute at most. Call it from time to time."""
        if self._lines and now - self._lines_since >= _LINES_MS:
            if self._suppressed:
                _log.warning(
                    "more sessions that expired with IDs in use within a minute: %d",
                    self._suppressed,
                )
            self._lines = self._suppressed = 0

    def latest(self, now: int, most: int) -> list[dict[str, Any]]:
        """Return at most so many sessions that expired within the last hour, the latest first."""
        while self._latest and now - self._latest[0].at > _REMEMBERED_MS:
            self._latest.popleft()
        return [
            {
                "label": each.label,
                "held": each.held,
                "used": each.used,
                "ago_s": (now - each.at) / 1000,
            }
            for each in islice(reversed(self._latest), most)
        ]
