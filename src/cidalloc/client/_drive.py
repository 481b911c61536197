"""The two drivers of flows: one blocks its thread, one awaits. They decide nothing."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from ..errors import CidError
from ._aio_transport import AsyncTransport
from ._flow import Config, Effect, Event, Flow, Idle
from ._session import Session
from ._transport import Transport

__all__ = ["AsyncDriver", "Driver"]

T = TypeVar("T")

_DAY_S = 86_400.0
_KEEPER_S = 2.0  # for what the keeper has just sent


class _Driver:
    """What both drivers do alike."""

    def __init__(self, session: Session, model: str, now: Callable[[], float]) -> None:
        self.session = session
        self.model = model
        self.now = now
        self.lock = threading.Lock()

    def abandon(self) -> None:
        """End the keeper with its next step, and so in time the session: nobody has the client.

        Takes no lock: in a forked child a thread that is not there may hold it.
        """
        self.session.closed = True

    def _step(self, steps: Flow[T], event: Event | None) -> Effect:
        session = self.session
        session.now, seen = self.now(), session.version
        try:
            # A generator takes nothing in its first step.
            return next(steps) if event is None else steps.send(event)
        finally:
            if session.version != seen:
                self._notify()

    def _notify(self) -> None:
        """Let those look again that wait."""
        raise NotImplementedError


class Driver(_Driver):
    """Runs flows of a session in the threads that call, and its keeper in one of its own."""

    def __init__(self, session: Session, transport: Transport, model: str) -> None:
        super().__init__(session, model, transport.now)
        self.transport = transport
        self._changed = threading.Condition(self.lock)
        self._keeper: threading.Thread | None = None

    def run(self, flow: Callable[[], Flow[T]]) -> T:
        """Run a flow to its end and return its value."""
        session = self.session
        event: Event | None = None
        with self.lock:
            session.now = self.now()
            steps = flow()
        try:
            while True:
                with self.lock:
                    effect = self._step(steps, event)
                    while isinstance(effect, Idle):
                        left = effect.until - self.now()
                        self._changed.wait(min(max(left, 0.0), _DAY_S))
                        effect = self._step(steps, Event())
                event = self._perform(effect)
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            with self.lock:
                steps.close()
                self._changed.notify_all()

    def wake(self) -> None:
        """Tell the keeper that there is something to do; start it if need be."""
        with self.lock:
            self.session.wants = False
            self._changed.notify_all()
            if self._keeper is None and self.session.opened and not self.session.closed:
                self._keeper = threading.Thread(
                    target=self.run, args=(self.session.keep,), name="cidalloc-client", daemon=True
                )
                self._keeper.start()

    def close(self) -> None:
        """Close the connections, after the keeper, which ends when its session is closed."""
        if self._keeper is not None:
            self._keeper.join(_KEEPER_S)
        self.transport.close()

    def _notify(self) -> None:
        self._changed.notify_all()

    def _perform(self, effect: Effect) -> Event:
        try:
            if isinstance(effect, Config):
                config = self.transport.model_config(effect.model, effect.timeout)
                return Event(config=config)
            assert not isinstance(effect, Idle)
            output, detail = self.transport.call(self.model, effect.request, effect.timeout)
            return Event(output, detail)
        except CidError as error:
            return Event(error=error)


class AsyncDriver(_Driver):
    """Runs flows of a session in the tasks that await, and its keeper in one of its own.

    Only one task runs at a time, so its lock is never waited for.
    """

    def __init__(self, session: Session, transport: AsyncTransport, model: str) -> None:
        super().__init__(session, model, transport.now)
        self.transport = transport
        self._waiting: set[asyncio.Future[None]] = set()
        self._keeper: asyncio.Task[None] | None = None

    async def run(self, flow: Callable[[], Flow[T]]) -> T:
        """Run a flow to its end and return its value."""
        self.session.now = self.now()
        steps = flow()
        event: Event | None = None
        try:
            while True:
                effect = self._step(steps, event)
                event = await self._perform(effect)
        except StopIteration as stop:
            value: T = stop.value
        finally:
            steps.close()
            self._notify()
        return value

    def wake(self) -> None:
        """Tell the keeper that there is something to do; start it if need be."""
        self.session.wants = False
        self._notify()
        if self._keeper is None and self.session.opened and not self.session.closed:
            self._keeper = asyncio.get_running_loop().create_task(
                self.run(self.session.keep), name="cidalloc-client"
            )

    async def close(self) -> None:
        """Close the connections, after the keeper, which ends when its session is closed."""
        if self._keeper is not None:
            await asyncio.wait({self._keeper}, timeout=_KEEPER_S)
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        await self.transport.close()

    def _notify(self) -> None:
        for each in self._waiting:
            if not each.done():
                each.set_result(None)
        self._waiting.clear()

    async def _perform(self, effect: Effect) -> Event:
        if isinstance(effect, Idle):
            left = min(max(effect.until - self.now(), 0.0), _DAY_S)
            changed = asyncio.get_running_loop().create_future()
            self._waiting.add(changed)
            await asyncio.wait({changed}, timeout=left)
            self._waiting.discard(changed)
            return Event()
        try:
            if isinstance(effect, Config):
                config = await self.transport.model_config(effect.model, effect.timeout)
                return Event(config=config)
            output, detail = await self.transport.call(self.model, effect.request, effect.timeout)
            return Event(output, detail)
        except CidError as error:
            return Event(error=error)
