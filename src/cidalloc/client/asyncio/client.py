"""The client for asyncio: the same names and arguments, to be awaited."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from ...codes import Operation
from ...protocol import IDs
from ..core.arguments import whole
from ..core.client import SEQUENCE_TIMEOUT_S, Base
from ..core.fork_guard import caller
from ..core.lease import Acquired
from ..core.sequence import SequenceCore
from ..core.tensors import Inputs
from .runner import AsyncRunner
from .sequence import AsyncSequence
from .transport import connect_async

__all__ = ["AsyncClient"]


class AsyncClient(Base):
    """A client of the manager on a Triton server, for asyncio.

    It has the arguments and methods of `Client`. The methods are coroutines, except `held` and
    `sequence`; use `sequence` with ``async with``. A client belongs to the event loop that uses it
    first.
    """

    _connect = staticmethod(connect_async)
    _new_runner = AsyncRunner
    _runner: AsyncRunner

    def _check_home(self) -> None:
        super()._check_home()
        self._runner.check_loop()

    async def __aenter__(self) -> AsyncClient:
        self._check_home()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Release all IDs, close the session and the connections. See `Client.close`.

        If the task is cancelled, closing continues, and the cancellation is raised afterwards.
        """
        self._check_home()
        await self._runner.close(self._timeout)

    async def acquire(self, *, timeout: float | None = None) -> int:
        """Acquire one ID and return it. See `Client.acquire`."""
        self._check_home()
        if timeout is not None:  # not before the calls that wait
            return int((await self.acquire_many(1, timeout=timeout))[0])
        lease = self._session.lease
        cid = lease.take()
        if cid:
            if lease.cache.needs_maintenance:
                self._runner.wake()
            return cid
        return int((await self._acquire(1, None))[0])

    async def acquire_many(self, count: int, *, timeout: float | None = None) -> IDs:
        """Acquire ``count`` IDs, all or none. See `Client.acquire_many`."""
        self._check_home()
        return await self._acquire(whole("count", count), self._until("timeout", timeout))

    async def release(
        self, cid: int, *, ended: bool = False, cooldown: float | None = None
    ) -> None:
        """Release one ID. See `Client.release`."""
        self._release(cid, ended, cooldown)

    async def release_many(
        self, cids: Iterable[int], *, ended: bool = False, cooldown: float | None = None
    ) -> None:
        """Release several IDs, all or none. See `Client.release_many`."""
        self._release_many(cids, ended, cooldown)

    async def active(self) -> int:
        """Return the number of IDs that all clients hold, those in their caches included."""
        return await self._number(Operation.ACTIVE)

    async def inactive(self) -> int:
        """Return the number of IDs that were released and not issued again."""
        return await self._number(Operation.INACTIVE)

    async def peak(self) -> int:
        """Return the maximum number of IDs that were held at the same time."""
        return await self._number(Operation.PEAK)

    async def status(self) -> dict[str, Any]:
        """Return the manager's status. See `Client.status`."""
        self._check_home()
        return await self._runner.run(self._session.status(self._deadline()))

    def sequence(
        self,
        model: str,
        *,
        streaming: bool = False,
        timeout: float = SEQUENCE_TIMEOUT_S,
        cooldown: float | None = None,
        check: bool = True,
        end_inputs: Inputs | None = None,
        wait: float | None = None,
        farewell: Inputs | None = None,
    ) -> AsyncSequence:
        """Return a sequence on ``model``. It acquires its ID when it is entered or awaited.

        Arguments and errors are those of `Client.sequence`.
        """
        super()._check_home()
        end = self._end_inputs(model, end_inputs, farewell)
        begin = partial(self._begin, model, streaming, timeout, cooldown, check, end, wait)
        return AsyncSequence(model, begin, self, caller())

    async def _begin(
        self,
        model: str,
        streaming: bool,
        timeout: float,
        cooldown: float | None,
        check: bool,
        end_inputs: Inputs | None,
        wait: float | None,
    ) -> SequenceCore:
        """Acquire an ID, and begin a sequence with it."""
        self._check_home()
        taken = Acquired()
        try:
            self._runner.start()
            beginning = self._begin_sequence(model, timeout, cooldown, check, taken, wait)
            plan = await self._runner.run(beginning)
            if self._session.lease.cache.needs_maintenance:
                self._runner.wake()
            return SequenceCore(self._runner, plan, streaming, end_inputs)
        except BaseException as error:
            self._runner.take_back(taken, error)
            raise

    async def _acquire(self, count: int, until: float | None) -> IDs:
        session, taken = self._session, Acquired()
        try:
            self._runner.start()
            acquiring = session.acquire(count, None, self._deadline(), taken, until)
            await self._runner.run(acquiring)
            if session.lease.cache.needs_maintenance:
                self._runner.wake()
            return np.array(taken, np.uint64)
        except BaseException as error:
            self._runner.take_back(taken, error)
            raise

    async def _number(self, operation: Operation) -> int:
        self._check_home()
        return await self._runner.run(self._session.number(operation, self._deadline()))
