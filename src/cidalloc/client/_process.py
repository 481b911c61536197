"""Objects that belong to the process that made them, and say so in a forked child."""

from __future__ import annotations

import os

from ..errors import Forked

__all__ = ["BoundToProcess", "Process"]


class Process:
    """Stands for this process; a forked child has another one."""

    here = object()


def _in_child() -> None:
    Process.here = object()


os.register_at_fork(after_in_child=_in_child)


class BoundToProcess:
    """Remembers the process that made it."""

    def __init__(self) -> None:
        self._home = Process.here

    def _check_fork(self) -> None:
        if self._home is not Process.here:
            raise Forked(f"{self!r} belongs to the parent process: make a new one after the fork")
