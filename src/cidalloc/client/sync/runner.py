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
from ..core.effects import Config, Effect, Flow, Idle, Reply
from ..core.runner import DAY_S, LOOK_S, RunnerBase
from ..core.sequence import SequenceCore
from ..core.session import Session
from .threads import spawn
from .transport import Transport

__all__ = ["Runner"]

T = TypeVar("T")

_HEARTBEAT_JOIN_S = 2.0  # for what the heartbeat has just sent
_REST_S = 1.0  # for how long the watch's thread waits for more to look at


class Runner(RunnerBase):
    """Runs flows of a session in the threads that call, and its heartbeat in one of its own."""

    def __init__(self, session: Session, transport: Transport, model: str) -> None:
        super().__init__(session, model, transport.now)
        self.transport = transport
        self.future: Callable[[], Future[Any]] = Future
        self._changed = threading.Condition(self.lock)
        self._heartbeat: threading.Thread | None = None
        self._dropped: deque[SequenceCore] = deque()
        # The watch rests on this queue; others put something into it, which locks nothing.
        self._rest: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._resting = False
        self._watcher: threading.Thread | None = None

    def run(self, flow: Callable[[], Flow[T]]) -> T:
        """Run a flow to its end and return its value."""
        event: Reply | None = None
        with self.lock:
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
                    event = Reply()
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
        """Start the heartbeat, if it does not run yet.

        Raises:
            Unavailable: the system refuses its thread.
        """
        if self._heartbeat is None:
            with self.lock:
                if self._heartbeat is None and not self.session.closed:
                    self._heartbeat = spawn(self._keep, name="cidalloc-client")

    def wake(self) -> None:
        """Tell the heartbeat that there is something to do."""
        self.start()
        with self.lock:
            self.session.needs_maintenance = False
            self._changed.notify_all()

    def watch(self, core: SequenceCore) -> None:
        """Look at a sequence every now and then, until nothing of it is on its way any more."""
        self._watched[core] = None
        if self._watcher is None:
            with self.lock:
                if self._watcher is None:
                    self._watcher = spawn(self._keep_watch, name="cidalloc-watch")
        self._wake_watch()

    def drop(self, core: SequenceCore) -> None:
        """End a sequence whose handle was collected as garbage, which happens anywhere.

        So it takes no lock that somebody has, be it this very thread.
        """
        core.dropped = True
        self._dropped.append(core)
        self._poke()

    def abandon(self) -> None:
        """Let the heartbeat close the session and the connections: nobody has the client."""
        self.session.abandoned = True
        self._poke()

    def close(self) -> None:
        """Close the connections, after the heartbeat, which ends when its session is closed."""
        self._wake_watch()
        if self._heartbeat is not None and self._heartbeat is not threading.current_thread():
            self._heartbeat.join(_HEARTBEAT_JOIN_S)
        self.transport.close()

    def _keep(self) -> None:
        self.run(self.session.heartbeat)
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
            core = self._dropped.popleft()
            if not core.on_way:  # else the watch ends it
                core.finish()

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

    def _perform(self, effect: Effect) -> Reply:
        try:
            if isinstance(effect, Config):
                config = self.transport.model_config(effect.model, effect.timeout)
                return Reply(config=config)
            assert not isinstance(effect, Idle)
            output, detail = self.transport.call(self.model, effect.request, effect.timeout)
            return Reply(output, detail)
        except CidError as error:
            return Reply(error=error)
