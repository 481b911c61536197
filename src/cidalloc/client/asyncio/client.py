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
    """Correlation IDs from the manager on a Triton server, for asyncio.

    As `Client`, whose arguments it takes and whose methods it has: they are to be awaited, but for
    `sequence`, which is used with ``async with``, and `held`. It may be made anywhere, and belongs
    to the event loop that first uses it.
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
        self._clock = transport.now

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
        """Give everything back and close the connections; as `Client.close`.

        It goes on when the task is cancelled, be it often; the cancellation arrives afterwards.
        """
        self._check_home()
        await self._runner.close(self._timeout)

    async def acquire(self) -> int:
        """Return an ID that nobody else has; as `Client.acquire`."""
        self._check_home()
        session = self._session
        session.now = self._clock()
        cid = session.take()
        if cid:
            if session.needs_maintenance:
                self._runner.wake()
            return cid
        return int((await self._run_acquire(1))[0])

    async def acquire_many(self, count: int) -> IDs:
        """Return ``count`` IDs as a uint64 array; as `Client.acquire_many`."""
        return await self._run_acquire(whole("count", count))

    async def release(
        self, cid: int, *, ended: bool = False, cooldown: float | None = None
    ) -> None:
        """Give an ID back; as `Client.release`."""
        self._check_home()
        session = self._session
        fast = ended and type(cid) is int and not session.closed
        if fast and session.recycle(cid, self._clock()):
            if session.needs_maintenance:
                self._runner.wake()
            return
        await self.release_many([cid], ended=ended, cooldown=cooldown)

    async def release_many(
        self, cids: Iterable[int], *, ended: bool = False, cooldown: float | None = None
    ) -> None:
        """Give IDs back, all or none; as `Client.release_many`."""
        self._check_home()
        found = several(cids)
        self._session.now = self._clock()
        try:
            self._give(found, bool(ended), cooldown)
        finally:
            self._runner.wake()

    async def active(self) -> int:
        """Return how many IDs are held, by all clients; those in their stocks count."""
        return await self._number(Operation.ACTIVE)

    async def inactive(self) -> int:
        """Return how many IDs have been given back and not been issued again."""
        return await self._number(Operation.INACTIVE)

    async def peak(self) -> int:
        """Return the most IDs that were held at once."""
        return await self._number(Operation.PEAK)

    async def status(self) -> dict[str, Any]:
        """Return how the manager is; as `Client.status`."""
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
        """Return a sequence on ``model``, which acquires its ID when it is entered or awaited.

        The arguments, and what may go wrong then, are those of `Client.sequence`.
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
