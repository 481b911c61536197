"""Runs flows in the tasks that await, and the heartbeat in a task of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from ...errors import CidError, InvalidArgument, Unavailable
from ..core.effects import Config, Effect, Flow, Idle, Reply, Send, ServerVersion
from ..core.requests import Requests
from ..core.runner import LOOK_S, RunnerBase
from ..core.sequence import SequenceCore
from ..core.session import Session
from ..core.transport import DAY_S, HURRY_S, SLACK_S, Transport
from .tasks import Tasks, outlast

__all__ = ["AsyncRunner"]

T = TypeVar("T")


class AsyncRunner(RunnerBase):
    """Runs flows of a session in the tasks that await, and its heartbeat in a task of its own.

    Only one task runs at a time, so the lock is always free. Requests and closings run in tasks of
    the runner, which go on when a task that waits for them is cancelled.
    """

    def __init__(
        self,
        session: Session,
        manager: Transport,
        model: str,
        servers: Transport | None = None,
    ) -> None:
        super().__init__(session, manager, model, servers)
        self.tasks = Tasks()
        self._waiting: set[asyncio.Future[None]] = set()
        self._heartbeat: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Task[None] | None = None
        self._ticking = False
        # Not in the heartbeat's task: a transport of the application may raise errors.
        session.on_confirmed = lambda: self._soon(self._look)

    def future(self) -> asyncio.Future[Any]:
        """Return a new future."""
        return asyncio.get_running_loop().create_future()

    def check_loop(self) -> None:
        """Check that this is the event loop in which the client was used first.

        Raises:
            InvalidArgument: another event loop runs here, or none does.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise InvalidArgument("no event loop runs here: call this in a coroutine") from None
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise InvalidArgument(
                f"the client of {self.manager.url} is used in another event loop: make one in each"
            )

    async def run(self, flow: Flow[T]) -> T:
        """Run a flow to its end and return its value."""
        session = self.session
        began = session.version
        reply: Any = None  # a generator begins with None
        try:
            while True:
                seen = session.version
                try:
                    effect = flow.send(reply)
                finally:
                    if session.version != seen:
                        self._notify()
                reply = await self._perform(effect)
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            flow.close()
            if session.version != began:
                self._notify()

    def start(self) -> None:
        """Start the heartbeat, if it does not run yet."""
        if self._heartbeat is None and not self.session.closed:
            self._heartbeat = self.tasks.start(self._keep())
            if self.tidier is not None:
                self.tasks.start(self.run(self.tidier.rounds()))

    def wake(self) -> None:
        """Tell the heartbeat that there is something to do. It starts if it does not run yet."""
        self.session.lease.cache.needs_maintenance = False
        self.start()
        self._notify()

    def watch(self, core: Requests) -> None:
        """Call `Requests.look` of a sequence repeatedly until it returns False."""
        self._watched[core] = None
        if not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_later(LOOK_S, self._tick)

    def drop(self, core: SequenceCore) -> None:
        """End a sequence whose handle was collected as garbage, in any thread."""
        core.dropped = True
        self._soon(lambda: None if core.on_way else core.finish())

    def abandon(self) -> None:
        """Let a task close the session, since the client was collected as garbage."""
        self._soon(lambda: self.tasks.start(self._close(0.0)))

    async def close(self, patience: float) -> None:
        """Close the session and the connections, also if the task that waits is cancelled.

        Args:
            patience: seconds that the manager may take.
        """
        if self._closing is None:
            self._closing = self.tasks.start(self._close(patience))
        await outlast(self._closing)

    async def _keep(self) -> None:
        try:
            await self.run(self.session.heartbeat())
        except asyncio.CancelledError:  # the event loop ends, and the client is still open
            with contextlib.suppress(CidError):
                await self._close(HURRY_S)
            raise

    async def _close(self, patience: float) -> None:
        self.finish_all()
        await self.run(self.session.close(self.now() + patience))
        # Requests on their way end by themselves; if the event loop ends before, it cancels them.
        await self.tasks.wait(HURRY_S)
        for transport in self.transports:
            await transport.close()

    def _soon(self, call: Callable[[], object]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(call)

    def _tick(self) -> None:
        self._ticking = self._look()
        if self._ticking:
            asyncio.get_running_loop().call_later(LOOK_S, self._tick)

    def _notify(self) -> None:
        for each in self._waiting:
            if not each.done():
                each.set_result(None)
        self._waiting.clear()

    async def _perform(self, effect: Effect) -> Reply:
        if isinstance(effect, Idle):
            left = min(max(effect.until - self.now(), 0.0), DAY_S)
            changed = asyncio.get_running_loop().create_future()
            self._waiting.add(changed)
            await asyncio.wait({changed}, timeout=left)
            self._waiting.discard(changed)
            return Reply()
        # In a task of its own, since a request on its way must not be cancelled.
        work = self.tasks.start(self._ask(effect))
        await asyncio.wait({work}, timeout=effect.timeout + SLACK_S)
        if not work.done():
            return Reply(error=Unavailable(f"no answer within {effect.timeout:g} s"))
        return work.result()

    async def _ask(self, effect: Send | Config | ServerVersion) -> Reply:
        try:
            if isinstance(effect, Config):
                config = await self.transport.model_config(effect.model, effect.timeout)
                return Reply(config=config)
            if isinstance(effect, ServerVersion):
                return Reply(detail=await self.transport.server_version(effect.timeout))
            output, detail = await self.manager.call(self.model, effect.request, effect.timeout)
            return Reply(output, detail)
        except CidError as error:
            return Reply(error=error)
