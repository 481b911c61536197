"""Tasks that belong to a client. They go on when a task that waits for them is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from ...errors import Unavailable
from ..core.transport import Done

__all__ = ["Tasks", "deliver", "outlast"]

T = TypeVar("T")


class Tasks:
    """The tasks of one client."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine in a task of its own."""
        return self.add(asyncio.get_running_loop().create_task(coroutine, name="cidalloc"))

    def add(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        """Count a task as one of the client's."""
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def wait(self, seconds: float) -> None:
        """Wait at most so long until all tasks have ended, except the current one.

        This includes tasks that others start meanwhile: a request closes its connection at its end.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (others := self._running - {asyncio.current_task()}) and loop.time() < until:
            await asyncio.wait(others, timeout=until - loop.time())


async def outlast(task: asyncio.Task[T]) -> T:
    """Return the result of a task. If the current task is cancelled, it waits all the same.

    Raises:
        asyncio.CancelledError: the current task was cancelled meanwhile.
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
    """Await a request, and pass its result or its error on."""
    try:
        result = await coroutine
    except asyncio.CancelledError:  # the event loop ends
        done(None, Unavailable("the event loop ended before the answer came"))
        raise
    except Exception as error:
        done(None, error)
    else:
        done(result, None)
