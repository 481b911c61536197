"""The two drivers of flows: one blocks its thread, one awaits. They decide nothing.

A driver also owns what its client does in the background: the keeper, which looks after the
session, and the watch, which ends requests of sequences that get no answer in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ..errors import CidError, InvalidArgument, Unavailable
from ._aio_transport import AsyncTransport
from ._flow import Config, Effect, Event, Flow, Idle, Send
from ._session import Session, Taken
from ._talk import HURRY_S, Talk
from ._tasks import Tasks, outlast
from ._threads import spawn
from ._transport import SLACK_S, Transport

__all__ = ["AsyncDriver", "SyncDriver"]

T = TypeVar("T")

_DAY_S = 86_400.0
_KEEPER_S = 2.0  # for what the keeper has just sent
_LOOK_S = 0.15  # between two looks for requests that got no answer in time
_REST_S = 1.0  # for how long the watch's thread waits for more to look at


class _Driver:
    """What both drivers do alike."""

    def __init__(self, session: Session, model: str, now: Callable[[], float]) -> None:
        self.session = session
        self.model = model
        self.now = now
        self.lock = threading.Lock()
        self.talks: dict[Talk, None] = {}
        self._watched: dict[Talk, None] = {}

    def _step(self, steps: Flow[T], event: Event | None) -> Effect:
        session = self.session
        session.now, seen = self.now(), session.version
        try:
            # A generator takes nothing in its first step.
            return next(steps) if event is None else steps.send(event)
        finally:
            if session.version != seen:
                self._notify()

    def _look(self) -> bool:
        """Look at all sequences that wait for something; False if there are none."""
        now = self.now()
        for talk in list(self._watched):
            self._watched.pop(talk, None)  # first, since it may be watched anew at any time
            if talk.look(now):
                self._watched[talk] = None
        return bool(self._watched)

    def untake(self, taken: Taken, error: BaseException) -> None:
        """Take back what an exception kept from reaching the application."""
        for talk in list(self.talks):
            if talk.plan.cid in taken and talk.plan.epoch == taken.epoch:
                talk.finish()
        with self.lock:
            self.session.untake(taken, error)

    def finish_all(self) -> None:
        """End all sequences: their client is closed."""
        for talk in list(self.talks):
            talk.finish()

    def _notify(self) -> None:
        """Let those look again that wait."""
        raise NotImplementedError


class SyncDriver(_Driver):
    """Runs flows of a session in the threads that call, and its keeper in one of its own."""

    def __init__(self, session: Session, transport: Transport, model: str) -> None:
        super().__init__(session, model, transport.now)
        self.transport = transport
        self.future: Callable[[], Future[Any]] = Future
        self._changed = threading.Condition(self.lock)
        self._keeper: threading.Thread | None = None
        self._dropped: deque[Talk] = deque()
        # The watch rests on this queue; others put something into it, which locks nothing.
        self._rest: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._resting = False
        self._watcher: threading.Thread | None = None

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
                    if isinstance(effect, Idle):
                        left = effect.until - self.now()
                        self._changed.wait(min(max(left, 0.0), _DAY_S))
                if isinstance(effect, Idle):
                    self._finish_dropped()
                    event = Event()
                else:
                    event = self._perform(effect)
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            with self.lock:
                steps.close()
                self._changed.notify_all()

    def start(self) -> None:
        """Start the keeper, if it does not run yet.

        Raises:
            Unavailable: the system refuses its thread.
        """
        if self._keeper is None:
            with self.lock:
                if self._keeper is None and not self.session.closed:
                    self._keeper = spawn(self._keep, name="cidalloc-client")

    def wake(self) -> None:
        """Tell the keeper that there is something to do."""
        self.start()
        with self.lock:
            self.session.wants = False
            self._changed.notify_all()

    def watch(self, talk: Talk) -> None:
        """Look at a sequence every now and then, until nothing of it is on its way any more."""
        self._watched[talk] = None
        if self._watcher is None:
            with self.lock:
                if self._watcher is None:
                    self._watcher = spawn(self._keep_watch, name="cidalloc-watch")
        self._wake_watch()

    def drop(self, talk: Talk) -> None:
        """End a sequence whose handle was collected as garbage, which happens anywhere.

        So it takes no lock that somebody has, be it this very thread.
        """
        talk.dropped = True
        self._dropped.append(talk)
        self._poke()

    def abandon(self) -> None:
        """Let the keeper close the session and the connections: nobody has the client."""
        self.session.abandoned = True
        self._poke()

    def close(self) -> None:
        """Close the connections, after the keeper, which ends when its session is closed."""
        self._wake_watch()
        if self._keeper is not None and self._keeper is not threading.current_thread():
            self._keeper.join(_KEEPER_S)
        self.transport.close()

    def _keep(self) -> None:
        self.run(self.session.keep)
        if not self.session.closed:
            self.run(lambda: self.session.close(self.now() + self.session.timeout))
            self.close()

    def _poke(self) -> None:
        if self.lock.acquire(blocking=False):
            try:
                self._changed.notify_all()
            finally:
                self.lock.release()

    def _finish_dropped(self) -> None:
        while self._dropped:
            talk = self._dropped.popleft()
            if not talk.on_way:  # else the watch ends it
                talk.finish()

    def _keep_watch(self) -> None:
        while True:
            try:
                self._rest.get(timeout=_LOOK_S if self._watched else _REST_S)
                rested = False
            except queue.Empty:
                rested = not self._watched
            self._resting = False
            if self._look():
                continue
            if rested or self.session.closed:
                self._watcher = None  # first: who watches from now on starts another one
                with self.lock:
                    if self._watcher is not None or not self._watched:
                        return
                    self._watcher = threading.current_thread()
            self._resting = True

    def _wake_watch(self) -> None:
        if self._resting:
            self._resting = False
            self._rest.put(None)

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

    Only one task runs at a time, so its lock is never waited for. Requests and closings run in
    tasks of the driver's, which go on when the task that waits for them is cancelled.
    """

    def __init__(self, session: Session, transport: AsyncTransport, model: str) -> None:
        super().__init__(session, model, transport.now)
        self.transport = transport
        self.tasks = Tasks()
        self._waiting: set[asyncio.Future[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Task[None] | None = None
        self._ticking = False

    def future(self) -> asyncio.Future[Any]:
        """Return a new future."""
        return asyncio.get_running_loop().create_future()

    def check_loop(self) -> None:
        """See that this is the event loop that the client belongs to: the first one it is used in.

        Raises:
            InvalidArgument: it is another one, or none.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise InvalidArgument("no event loop runs here: call this in a coroutine") from None
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise InvalidArgument(
                f"the client of {self.transport.url} is used in another event loop: make one in"
                " each"
            )

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

    def start(self) -> None:
        """Start the keeper, if it does not run yet."""
        if self._keeper is None and not self.session.closed:
            self._keeper = self.tasks.start(self._keep())

    def wake(self) -> None:
        """Tell the keeper that there is something to do."""
        self.session.wants = False
        self.start()
        self._notify()

    def watch(self, talk: Talk) -> None:
        """Look at a sequence every now and then, until nothing of it is on its way any more."""
        self._watched[talk] = None
        if not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_later(_LOOK_S, self._tick)

    def drop(self, talk: Talk) -> None:
        """End a sequence whose handle was collected as garbage, which happens in any thread."""
        talk.dropped = True
        self._soon(lambda: None if talk.on_way else talk.finish())

    def abandon(self) -> None:
        """Let a task close the session and the connections: nobody has the client."""
        self._soon(lambda: self.tasks.start(self._close(0.0)))

    async def close(self, patience: float) -> None:
        """Close the session and the connections, even if the closing task is cancelled.

        Args:
            patience: seconds that the manager may take.
        """
        if self._closing is None:
            self._closing = self.tasks.start(self._close(patience))
        await outlast(self._closing)

    async def _keep(self) -> None:
        try:
            await self.run(self.session.keep)
        except asyncio.CancelledError:  # the event loop ends, and nobody has closed the client
            with contextlib.suppress(CidError):
                await self._close(HURRY_S)
            raise

    async def _close(self, patience: float) -> None:
        self.finish_all()
        await self.run(lambda: self.session.close(self.now() + patience))
        self._notify()
        # What is on its way ends by itself; if the event loop ends before, that cancels it.
        await self.tasks.wait(HURRY_S)
        await self.transport.close()

    def _soon(self, call: Callable[[], object]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(call)

    def _tick(self) -> None:
        self._ticking = self._look()
        if self._ticking:
            asyncio.get_running_loop().call_later(_LOOK_S, self._tick)

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
        # In a task of its own: a request that is on its way is not cancelled.
        work = self.tasks.start(self._ask(effect))
        await asyncio.wait({work}, timeout=effect.timeout + SLACK_S)
        if not work.done():
            return Event(error=Unavailable(f"no answer within {effect.timeout:g} s"))
        return work.result()

    async def _ask(self, effect: Send | Config) -> Event:
        try:
            if isinstance(effect, Config):
                config = await self.transport.model_config(effect.model, effect.timeout)
                return Event(config=config)
            output, detail = await self.transport.call(self.model, effect.request, effect.timeout)
            return Event(output, detail)
        except CidError as error:
            return Event(error=error)
