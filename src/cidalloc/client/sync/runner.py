"""Runs flows in the threads that call, and the heartbeat and the watch in threads of its own.

The heartbeat looks after the session; the watch ends requests of sequences that are not answered in
time.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ...errors import CidError
from ..core.effects import Config, Effect, Event, Flow, Idle
from ..core.runner import DAY_S, LOOK_S, Driver
from ..core.sequence import Talk
from ..core.session import Session
from .threads import spawn
from .transport import Transport

__all__ = ["SyncDriver"]

T = TypeVar("T")

_KEEPER_S = 2.0  # for what the keeper has just sent
_REST_S = 1.0  # for how long the watch's thread waits for more to look at


class SyncDriver(Driver):
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
                        self._changed.wait(min(max(left, 0.0), DAY_S))
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
                self._rest.get(timeout=LOOK_S if self._watched else _REST_S)
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
