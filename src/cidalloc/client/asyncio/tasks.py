"""Tasks that belong to a client: whoever waits for one may be cancelled, the task is not."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from ...errors import Unavailable
from ..core.transport import Done

__all__ = ["CLOSE_S", "Tasks", "deliver", "outlast"]

CLOSE_S = 2.0
"""Seconds for which a client that is closed waits for what is on its way."""

T = TypeVar("T")


class Tasks:
    """The tasks of one client."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine in a task of its own."""
        task = asyncio.get_running_loop().create_task(coroutine, name="cidalloc")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def wait(self, seconds: float) -> None:
        """Wait at most so long until all have ended, but for the one that waits."""
        others = self._running - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=seconds)


async def outlast(task: asyncio.Task[T]) -> T:
    """Return what a task returns, which goes on when the waiting one is cancelled, be it often.

    Raises:
        asyncio.CancelledError: the waiting task was cancelled meanwhile.
    """
    cancelled: BaseException | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()


async def deliver(coroutine: Any, done: Done) -> None:
    """Await a request, and hand on what became of it."""
    try:
        result = await coroutine
    except asyncio.CancelledError:  # the event loop ends
        done(None, Unavailable("the event loop ended before the answer came"))
        raise
    except Exception as error:
        done(None, error)
    else:
        done(result, None)
