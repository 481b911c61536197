"""The fleet for asyncio: the same names and arguments, to be awaited."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from types import TracebackType
from typing import Any

from ...errors import CidError
from ..core.fleet import RESOLVE_WAIT_S, FleetBase, FleetServer, unresolved, urls_at
from ..core.fork_guard import caller
from ..core.sequence import SequenceCore
from .client import AsyncClient
from .sequence import AsyncSequence
from .tasks import Tasks

__all__ = ["AsyncFleet"]


class AsyncFleet(FleetBase):
    """A client of several servers, for asyncio. It has the arguments and methods of `Fleet`.

    `close` and `status` are coroutines; use `sequence` with ``async with``. A fleet belongs to the
    event loop that uses it first.
    """

    _new_client = AsyncClient

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tasks = Tasks()
        self._resolving: asyncio.Task[None] | None = None

    def sequence(self, model: str, *, wait: float | None = None, **options: Any) -> AsyncSequence:
        """Return a sequence, which acquires an ID on one of the servers when it is entered.

        Arguments and errors are those of `Fleet.sequence`.
        """
        self._check_open()

        async def begin() -> SequenceCore:
            if self._name is not None:
                await self._look_up()
            until = self._until(wait)
            for server, patience in self._candidates(until):
                try:
                    sequence = server.client.sequence(model, wait=patience, **options)
                    core: SequenceCore = await sequence._beginning()
                except CidError as error:
                    self._passes(server, error)
                    continue
                try:
                    await self._check_twin(server, core)
                except BaseException:
                    core.finish()
                    raise
                self._begins(server, core, until)
                return core
            raise self._nobody()

        return AsyncSequence(model, begin, self, caller())

    async def status(self) -> dict[str, dict[str, Any] | CidError]:
        """Return the status of each server's manager, or the error that it answers with."""
        self._check_open()
        await self._look_up()
        servers = [self._with_client(server) for server in self.servers]
        asking = (server.client.status() for server in servers)
        found = await asyncio.gather(*asking, return_exceptions=True)
        for each in found:
            if isinstance(each, BaseException) and not isinstance(each, CidError):
                raise each
        return dict(zip((server.url for server in servers), found, strict=True))

    async def close(self) -> None:
        """Close the clients of all servers; see `AsyncClient.close`."""
        self._check_home()
        await asyncio.gather(*map(_close, self._close()))

    async def __aenter__(self) -> AsyncFleet:
        self._check_open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _look_up(self) -> None:
        """Look the name up if it is time to; the first time this waits until it is done."""
        if self._resolves():
            self._resolving = self._tasks.start(self._resolve())
            if self._servers:
                await asyncio.wait({self._resolving}, timeout=RESOLVE_WAIT_S)
        if not self._servers and self._resolving is not None:
            await asyncio.wait({self._resolving})
        for client in self._left():
            self._tasks.start(_close(client))

    async def _resolve(self) -> None:
        assert self._name is not None
        host, _, port = self._name.target.rpartition(":")
        look_up = asyncio.get_running_loop().getaddrinfo
        try:
            found = await look_up(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            self._unresolved(unresolved(self._name, error))
        else:
            self._set(urls_at(self._name, list(found)))

    async def _check_twin(self, server: FleetServer, core: SequenceCore) -> None:
        """Check that no other server has the registry that the sequence's ID is from."""
        twin = self._twin(server)
        if twin is None:
            return
        try:
            session = twin.client._session
            await twin.client._runner.run(session.confirm(self.now() + self._connect_s, False))
        except CidError as error:
            twin.fails(error, self.now(), self._rng)
        if self._twin(server) is twin:
            raise self._same(server, twin)


async def _close(client: AsyncClient) -> None:
    with contextlib.suppress(CidError):
        await client.close()
