"""Runs flows in the calling threads, and the heartbeat and the watch in threads of its own.

The heartbeat keeps the session alive; the watch ends requests of sequences that are not answered in
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
from ..core.effects import Config, Flow, Idle, Reply, Send, ServerVersion
from ..core.requests import Requests
from ..core.runner import LOOK_S, RunnerBase
from ..core.sequence import SequenceCore
from ..core.session import Session
from ..core.transport import DAY_S, HURRY_S, Transport
from .at_exit import close_at_exit
from .threads import spawn

__all__ = ["Runner"]

T = TypeVar("T")

_REST_S = 1.0  # the watch's thread waits so long for another sequence before it ends


class Runner(RunnerBase):
    """Runs flows of a session in the calling threads, and its heartbeat in a thread of its own."""

    future: Callable[[], Future[Any]] = Future

    def __init__(
        self,
        session: Session,
        manager: Transport,
        model: str,
        servers: Transport | None = None,
    ) -> None:
        super().__init__(session, manager, model, servers)
        self._changed = threading.Condition(self.lock)
        self._heartbeat: threading.Thread | None = None
        self._tidying: threading.Thread | None = None
        self._dropped: deque[SequenceCore] = deque()
        # The watch sleeps on this queue; other threads wake it by an entry, which needs no lock.
        self._rest: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._resting = False
        self._watcher: threading.Thread | None = None
        session.on_confirmed = self._wake_watch
        close_at_exit(self)

    def run(self, flow: Flow[T]) -> T:
        """Run a flow to its end and return its value."""
        session = self.session
        began = session.version
        reply: Any = None  # a generator begins with None
        try:
            while True:
                with self.lock:
                    seen = session.version
                    try:
                        effect = flow.send(reply)
                    finally:
                        if session.version != seen:
                            self._changed.notify_all()
                    if isinstance(effect, Idle):
                        left = effect.until - self.now()
                        self._changed.wait(min(max(left, 0.0), DAY_S))
                if isinstance(effect, Idle):
                    self._finish_dropped()
                    reply = Reply()
                else:
                    reply = self._perform(effect)
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            with self.lock:
                flow.close()
                if session.version != began:
                    self._changed.notify_all()

    def start(self) -> None:
        """Start the heartbeat, if it does not run yet.

        Raises:
            Unavailable: the system refuses its thread.
        """
        if self._heartbeat is None:
            with self.lock:
                if self._heartbeat is None and not self.session.closed:
                    if self.tidier is not None and self._tidying is None:
                        self._tidying = spawn(self.run, self.tidier.rounds(), name="cidalloc-tidy")
                    self._heartbeat = spawn(self._keep, name="cidalloc-client")

    def wake(self) -> None:
        """Tell the heartbeat that there is something to do. It starts if it does not run yet."""
        self.start()
        with self.lock:
            self.session.lease.cache.needs_maintenance = False
            self._changed.notify_all()

    def watch(self, core: Requests) -> None:
        """Call `Requests.look` of a sequence repeatedly until it returns False."""
        self._watched[core] = None
        if self._watcher is None:
            with self.lock:
                if self._watcher is None:
                    self._watcher = spawn(self._keep_watch, name="cidalloc-watch")
        self._wake_watch()

    def drop(self, core: SequenceCore) -> None:
        """End a sequence whose handle was collected as garbage.

        Garbage is collected at any line, so this waits for no lock: this thread may have it.
        """
        core.dropped = True
        self._dropped.append(core)
        self._poke()

    def abandon(self) -> None:
        """Let the heartbeat close the session, since the client was collected as garbage."""
        self.session.abandoned = True
        self._poke()

    def close(self, patience: float) -> None:
        """Close the session and the connections. If it is broken off, closing again completes it.

        Args:
            patience: seconds that the manager may take.
        """
        try:
            self.finish_all()
            self.run(self.session.close(self.now() + patience))
        finally:
            if self.session.closed:
                self._wake_watch()
                # The heartbeat ends when its session is closed.
                heartbeat = self._heartbeat
                if heartbeat is not None and heartbeat is not threading.current_thread():
                    heartbeat.join(HURRY_S)
                for transport in self.transports:
                    transport.close()

    def _keep(self) -> None:
        self.run(self.session.heartbeat())
        if not self.session.closed:
            self.close(self.session.link.timeout)

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
                self._watcher = None  # first, so that `watch` starts another one from now on
                with self.lock:
                    if self._watcher is not None or not self._watched:
                        return
                    self._watcher = threading.current_thread()
            self._resting = True

    def _wake_watch(self) -> None:
        if self._resting:
            self._resting = False
            self._rest.put(None)

    def _perform(self, effect: Send | Config | ServerVersion) -> Reply:
        try:
            if isinstance(effect, Config):
                config = self.transport.model_config(effect.model, effect.timeout)
                return Reply(config=config)
            if isinstance(effect, ServerVersion):
                return Reply(detail=self.transport.server_version(effect.timeout))
            output, detail = self.manager.call(self.model, effect.request, effect.timeout)
            return Reply(output, detail)
        except CidError as error:
            return Reply(error=error)
