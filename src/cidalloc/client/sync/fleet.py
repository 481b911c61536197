"""The fleet for threads."""

from __future__ import annotations

import contextlib
import socket
from types import TracebackType
from typing import Any

from ...errors import CidError, Unavailable
from ..core.fleet import RESOLVE_WAIT_S, FleetBase, FleetServer, ServerUrl, unresolved, urls_at
from ..core.transport import Address
from .client import Client
from .sequence import Sequence
from .threads import spawn

__all__ = ["Fleet", "resolve"]


class Fleet(FleetBase):
    """A client of several servers, each with a manager of its own, for threads.

    A new sequence goes to one of the servers, and stays there; `Sequence.server` tells which one.
    The fleet has one `Client` for each server, which is made when it is needed. A server that does
    not answer, is drained, or has no free ID is passed over, and tried again later.

    Args:
        servers: the URLs of the servers, all gRPC or all HTTP. Or one text ``dns:`` and a URL such
            as ``dns:triton.ns.svc:8001``: the name has an address for each server, and is looked up
            every 30 s when sequences begin. Running sequences stay on servers that have left.
        choose: is called with a list of `FleetServer` and returns the one to try next. Default: of
            two at random, the one with fewer open sequences of this fleet object.
        subset: the number of servers to use, for many clients of many servers. Clients with
            different labels use different ones.
        connect: seconds in which a server has to show that it is there, before a sequence begins.
        options: further arguments of `Client`, for all servers.

    Raises:
        InvalidArgument: an argument is not valid.
    """

    _new_client = Client

    def sequence(self, model: str, *, wait: float | None = None, **options: Any) -> Sequence:
        """Acquire an ID on one of the servers, and return a sequence there. Use it with ``with``.

        Args:
            model: a model that is on all servers.
            wait: as for `Client.sequence`: if all servers are exhausted, it waits for one of them.
            options: further arguments of `Client.sequence`.

        Raises:
            Exhausted, Draining: all servers are.
            Unavailable: no server takes a sequence. The text has the reason of each.
            RegistryMismatch: two servers have one registry.
            InvalidArgument: as `Client.sequence`.
        """
        self._check_open()
        if self._name is not None:
            self._look_up()
        until = self._until(wait)
        for server, patience in self._candidates(until):
            try:
                sequence: Sequence = server.client.sequence(model, wait=patience, **options)
            except CidError as error:
                self._passes(server, error)
                continue
            self._check_twin(server, sequence)
            self._begins(server, sequence._begun, until)
            return sequence
        raise self._nobody()

    def status(self) -> dict[str, dict[str, Any] | CidError]:
        """Return the status of each server's manager, or the error that it answers with."""
        self._check_open()
        self._look_up()
        found: dict[str, dict[str, Any] | CidError] = {}
        for server in self.servers:
            try:
                found[server.url] = self._with_client(server).client.status()
            except CidError as error:
                found[server.url] = error
        return found

    def close(self) -> None:
        """Close the clients of all servers; see `Client.close`. A second call does nothing."""
        self._check_home()
        closing = [spawn(_close, client, name="cidalloc-fleet") for client in self._close()]
        for thread in closing:
            thread.join()

    def __enter__(self) -> Fleet:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _look_up(self) -> None:
        """Look the name up if it is time to; the first time this waits until it is done."""
        if not self._servers:
            with self._looking:  # others wait for it, too
                if not self._servers and self._resolves():
                    self._resolve()
        elif self._resolves():
            spawn(self._resolve, name="cidalloc-fleet").join(RESOLVE_WAIT_S)
        for client in self._left():
            spawn(_close, client, name="cidalloc-fleet")

    def _resolve(self) -> None:
        assert self._name is not None
        try:
            self._set(resolve(self._name))
        except Unavailable as error:
            self._unresolved(error)

    def _check_twin(self, server: FleetServer, sequence: Sequence) -> None:
        """Check that no other server has the registry that the sequence's ID is from."""
        twin = self._twin(server)
        if twin is None:
            return
        try:
            session = twin.client._session
            twin.client._runner.run(session.confirm(self.now() + self._connect_s, False))
        except CidError as error:
            twin.fails(error, self.now(), self._rng)
        if self._twin(server) is twin:
            sequence.close()
            raise self._same(server, twin)


def resolve(name: Address) -> list[ServerUrl]:
    """Return the URLs of the servers at all addresses of a name.

    Raises:
        Unavailable: the name cannot be resolved.
    """
    host, _, port = name.target.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise unresolved(name, error) from None
    return urls_at(name, list(found))


def _close(client: Client) -> None:
    with contextlib.suppress(CidError):
        client.close()
