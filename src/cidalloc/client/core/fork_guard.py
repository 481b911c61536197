"""Objects that belong to one process, and raise `Forked` in a forked child."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from ...errors import Forked, InvalidArgument

__all__ = ["ForkGuard", "ProcessIdentity", "caller"]


class ProcessIdentity:
    """Identifies this process: a forked child gets another object."""

    current = object()


def _in_child() -> None:
    ProcessIdentity.current = object()


os.register_at_fork(after_in_child=_in_child)


class ForkGuard:
    """An object of one process, which cannot be copied or sent to another process."""

    def __init__(self) -> None:
        self._home = ProcessIdentity.current

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise InvalidArgument(
            f"{self!r} cannot be copied or pickled, since it has one session with the manager; make"
            " a new one where you need it"
        )

    @property
    def _at_home(self) -> bool:
        return self._home is ProcessIdentity.current

    def _check_home(self) -> None:
        if self._home is not ProcessIdentity.current:
            raise Forked(f"{self!r} belongs to the parent process: make a new one after the fork")


def caller() -> tuple[str, int]:
    """Return the file and the line of the application's call."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__")):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _is_ours(module: object) -> bool:
    return isinstance(module, str) and module.startswith("cidalloc.client.")
