"""At the exit of the process, the clients that are still open are closed."""

from __future__ import annotations

import atexit
import contextlib
import sys
import weakref
from typing import TYPE_CHECKING

from ...errors import CidError
from ..core.fork_guard import ProcessIdentity
from ..core.transport import HURRY_S, boottime

if TYPE_CHECKING:
    from .runner import Runner

__all__ = ["close_at_exit"]

_open: weakref.WeakKeyDictionary[Runner, object] = weakref.WeakKeyDictionary()
_hooked: object = None  # the process in which multiprocessing, which runs no atexit, closes them


def close_at_exit(runner: Runner) -> None:
    """Close a client when the process ends."""
    global _hooked
    _open[runner] = ProcessIdentity.current
    # A child process of multiprocessing has imported its module.
    if "multiprocessing.util" in sys.modules and _hooked is not ProcessIdentity.current:
        from multiprocessing import parent_process, util

        if parent_process() is not None:
            _hooked = ProcessIdentity.current
            util.Finalize(None, _close_all, exitpriority=100)


def _close_all() -> None:
    until = boottime() + HURRY_S  # for all of them
    for runner, process in list(_open.items()):
        if process is ProcessIdentity.current and not runner.session.closed:
            with contextlib.suppress(CidError):
                runner.close(max(until - boottime(), 0.0))


atexit.register(_close_all)
