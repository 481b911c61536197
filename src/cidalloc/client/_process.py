"""Objects that belong to the process that made them, and say so in a forked child."""

from __future__ import annotations

import os

from ..errors import Forked

__all__ = ["BoundToProcess"]


class BoundToProcess:
    """Remembers the process that made it."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def _check_fork(self) -> None:
        if os.getpid() != self._pid:
            raise Forked(f"{self!r} belongs to the parent process: make a new one after the fork")
