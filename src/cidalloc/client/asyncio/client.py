"""The client for asyncio: the same names and arguments, to be awaited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from ...codes import Operation
from ...protocol import MODEL, IDs, as_ids
from ..core.client import Base, Fallback, several, whole
from ..core.fork_guard import caller
from ..core.id_cache import MAX_AHEAD
from ..core.sequence import Plan
from ..core.session import Acquired
from .runner import AsyncRunner
from .sequence import AsyncSequence
from .transport import AsyncTransport, connect_async

__all__ = ["AsyncClient"]


class AsyncClient(Base):
    """A client of the manager on a Triton server, for asyncio.

    It has the arguments and methods of `Client`. The methods are coroutines, except `held` and
    `sequence`; use `sequence` with ``async with``. A client belongs to the event loop that uses it
    first.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        model: str = MODEL,
        ttl: float = 120.0,
        label: str | None = None,
        timeout: float = 10.0,
        headers: Mapping[str, str] | None = None,
        transport: AsyncTransport | None = None,
        ahead: int = MAX_AHEAD,
        fallback: Fallback = None,
        **options: Any,
    ) -> None:
        transport = transport or connect_async(url, headers, options)
        super().__init__(model, ttl, label, timeout, ahead, fallback, transport, caller())
        self._runner = AsyncRunner(self._session, transport, model)

    def _abandon(self) -> None:
        self._runner.abandon()

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

    async def acquire(self) -> int:
        """Acquire one ID and return it. See `Client.acquire`."""
        self._check_home()
        session = self._session
        cid = session.take()
        if cid:
            if session.needs_maintenance:
                self._runner.wake()
            return cid
        return int((await self._run_acquire(1))[0])

    async def acquire_many(self, count: int) -> IDs:
        """Acquire ``count`` IDs, all or none. See `Client.acquire_many`."""
        return await self._run_acquire(whole("count", count))

    async def release(
        self, cid: int, *, ended: bool = False, cooldown: float | None = None
    ) -> None:
        """Release one ID. See `Client.release`."""
        self._check_home()
        session = self._session
        fast = ended and type(cid) is int and not session.closed
        if fast and session.recycle(cid):
            if session.needs_maintenance:
                self._runner.wake()
            return
        await self.release_many([cid], ended=ended, cooldown=cooldown)

    async def release_many(
        self, cids: Iterable[int], *, ended: bool = False, cooldown: float | None = None
    ) -> None:
        """Release several IDs, all or none. See `Client.release_many`."""
        self._check_home()
        found = several(cids)
        try:
            self._give(found, bool(ended), cooldown)
        finally:
            self._runner.wake()

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
        return await self._runner.run(lambda: self._session.status(self._deadline()))

    def sequence(
        self,
        model: str,
        *,
        streaming: bool = False,
        timeout: float = 60.0,
        cooldown: float | None = None,
        check: bool = True,
        end_inputs: list[Any] | None = None,
        farewell: list[Any] | None = None,
    ) -> AsyncSequence:
        """Return a sequence on ``model``. It acquires its ID when it is entered or awaited.

        Arguments and errors are those of `Client.sequence`.
        """
        super()._check_home()
        end_inputs = farewell if end_inputs is None else end_inputs

        async def begin(taken: Acquired) -> Plan:
            self._runner.start()
            plan = await self._runner.run(
                lambda: self._begin_sequence(model, timeout, cooldown, check, end_inputs, taken)
            )
            if self._session.needs_maintenance:
                self._runner.wake()
            return plan

        return AsyncSequence(self._runner, model, begin, streaming, end_inputs, self, caller())

    async def _run_acquire(self, count: int) -> IDs:
        self._check_home()
        taken = Acquired()
        try:
            self._runner.start()
            await self._runner.run(lambda: self._acquire(count, taken))
            if self._session.needs_maintenance:
                self._runner.wake()
            return as_ids(taken)
        except BaseException as error:
            self._runner.take_back(taken, error)
            raise

    async def _number(self, operation: Operation) -> int:
        self._check_home()
        event = await self._runner.run(lambda: self._session.read(operation, self._deadline()))
        return int(event.output[0])
