"""What the blocking and the asyncio runner have in common. Runners decide nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .lease import Acquired
from .requests import Requests
from .sequence import SequenceCore
from .session import Session
from .tidy import Tidier
from .transport import Transport

__all__ = ["LOOK_S", "RunnerBase"]

LOOK_S = 0.15
"""Seconds between two looks for requests that got no answer in time."""


class RunnerBase:
    """What both runners do alike.

    Args:
        session: the client's session.
        manager: the way to the manager.
        model: the name of the manager model.
        servers: the way to the servers of the sequences; None: they are on the manager's server.

    Attributes:
        transport: the way of sequences, and of the configurations of their models.
        sequences: the sequences that hold an ID.
        lock: held during each step of a flow, and while a sequence changes.
        tidier: ends sequences of dead clients; None if nobody asked for that.
    """

    def __init__(
        self,
        session: Session,
        manager: Transport,
        model: str,
        servers: Transport | None = None,
    ) -> None:
        self.session = session
        self.manager = manager
        self.transport = manager if servers is None else servers
        self.model = model
        self.now: Callable[[], float] = manager.now
        self.lock = threading.Lock()
        self.sequences: dict[SequenceCore, None] = {}
        self.tidier: Tidier | None = None
        self._watched: dict[Requests, None] = {}

    def future(self) -> Any:
        """Return a new future."""
        raise NotImplementedError

    def unsure(self) -> bool:
        """Whether requests have to wait until it is known which server is there.

        With ``servers`` they never wait: no manager is there to ask.
        """
        if self.transport is not self.manager:
            return False
        return self.session.confirming or self.session.unsure(self.manager.broke())

    @property
    def transports(self) -> list[Transport]:
        """All ways to servers, each once."""
        return [self.manager] if self.transport is self.manager else [self.transport, self.manager]

    def drop(self, core: SequenceCore) -> None:
        """End a sequence whose handle was collected as garbage."""
        raise NotImplementedError

    def watch(self, core: Requests) -> None:
        """Call `Requests.look` of a sequence repeatedly until it returns False."""
        raise NotImplementedError

    def wake(self) -> None:
        """Tell the heartbeat that there is something to do. It starts if it does not run yet.

        Raises:
            Unavailable: the system refuses its thread.
        """
        raise NotImplementedError

    def _look(self) -> bool:
        """Look at all watched sequences; return whether to look again."""
        now = self.now()
        for core in list(self._watched):
            self._watched.pop(core, None)  # first, since it may be watched again at any time
            if core.look(now):
                self._watched[core] = None
        return bool(self._watched)

    def take_back(self, taken: Acquired, error: BaseException) -> None:
        """Take back IDs that an exception kept from reaching the application."""
        for core in list(self.sequences):
            if core.plan.cid in taken and core.plan.lease is taken.lease:
                core.finish()
        with self.lock:
            (taken.lease or self.session.lease).take_back(taken, error)

    def finish_all(self) -> None:
        """End all sequences, since the client is closed."""
        for core in list(self.sequences):
            core.finish()
