"""The line of threads and tasks that wait for an ID of an `Allocator`: first come, first served.

A caller that waits is in the line. Each call that may have made an ID available serves the line: it
issues IDs to the first callers while there are any. Whoever removes a caller from the line decides:
`serve` has given it an ID, or `leave` has given up. Both may run in any thread, also in a
destructor in the middle of the other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, SupportsIndex

from .errors import Exhausted

if TYPE_CHECKING:
    from ._alloc import Allocator


class Caller:
    """One that waits for an ID: for whom it is, how to wake it up, and the ID when it is there."""

    __slots__ = ("cids", "owner", "wake")

    def __init__(self, owner: SupportsIndex, wake: Callable[[], object]) -> None:
        self.owner, self.wake = owner, wake
        self.cids: list[int] = []

    def take(self) -> int:
        """Return the ID, or 0 if it is not there. Only one of several threads gets it."""
        try:
            return self.cids.pop()
        except IndexError:
            return 0


class WaitingLine:
    """The callers that wait for an ID of one pool, which is given to each method."""

    __slots__ = ("_again", "_callers", "_serving")

    def __init__(self) -> None:
        self._callers: deque[Caller] = deque()
        self._serving = threading.Lock()  # only one thread at a time serves
        self._again = False

    def wait(
        self, pool: Allocator, owner: SupportsIndex, now: SupportsIndex, timeout: float
    ) -> int:
        """Wait in this thread for an ID, for at most so many seconds. Raises `Exhausted`."""
        woken = threading.Lock()
        woken.acquire()
        caller = Caller(owner, woken.release)
        try:
            self.join(pool, caller)
            woken.acquire(timeout=timeout if timeout < threading.TIMEOUT_MAX else -1)
            return self.result(pool, caller, now)
        except BaseException:
            self.give_up(pool, caller)
            raise

    async def wait_async(
        self, pool: Allocator, owner: SupportsIndex, now: SupportsIndex, timeout: float
    ) -> int:
        """Issue an ID, or wait in this task for one, for at most so many seconds.

        Raises `Exhausted`.
        """
        import asyncio

        with suppress(Exhausted):
            return pool.acquire(owner, now)
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        caller = Caller(owner, lambda: loop.call_soon_threadsafe(woken.set))
        try:
            self.join(pool, caller)
            if not caller.cids:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(
                        woken.wait(), timeout if timeout < threading.TIMEOUT_MAX else None
                    )
            return self.result(pool, caller, now)
        except BaseException:
            self.give_up(pool, caller)
            raise

    def join(self, pool: Allocator, caller: Caller) -> None:
        """Put a caller at the end of the line, and serve the line."""
        self._callers.append(caller)
        pool._set_queued(True)
        self.serve(pool)

    def leave(self, caller: Caller) -> bool:
        """Remove a caller from the line; return False if it has been served."""
        try:
            self._callers.remove(caller)
        except ValueError:
            return False
        return True

    def give_up(self, pool: Allocator, caller: Caller) -> None:
        """Remove a caller, which does not want its ID any more if it has one."""
        if self.leave(caller):
            self.serve(pool)  # the next may be for an owner with room, or there is none
        elif cid := caller.take():
            pool.release(cid, caller.owner)

    def result(self, pool: Allocator, caller: Caller, now: SupportsIndex) -> int:
        """Return the ID of a caller whose wait is over; if there is none, try once more."""
        if not self.leave(caller):
            return caller.cids[0]
        self.serve(pool)  # as in give_up()
        return pool.acquire(caller.owner, now)

    def serve(self, pool: Allocator) -> None:
        """Issue IDs to the callers in their order, while there are any.

        If another thread does it, or this thread in a call further out, that is told to go on.
        """
        self._again = True
        while self._again and self._serving.acquire(blocking=False):
            try:
                self._again = False
                while self._callers and self._serve_first(pool):
                    pass
                if not self._callers:
                    pool._set_queued(False)
                    if self._callers:  # one that came just now, and serves the line after this
                        pool._set_queued(True)
            finally:
                self._serving.release()

    def _serve_first(self, pool: Allocator) -> bool:
        # Return False if no ID can be issued to the first caller.
        try:
            caller = self._callers[0]
        except IndexError:
            return False
        cid = pool._take(caller.owner)
        if not cid:
            return False
        caller.cids.append(cid)
        try:
            self._callers.remove(caller)
            caller.wake()
        except (ValueError, RuntimeError):  # it left meanwhile, or its event loop is closed
            if caller.take():  # and has not given the ID back itself
                pool.release(cid, caller.owner)
        return True
