"""A fleet without its ways to wait: its servers, and which one a new sequence goes to.

Each server has a manager of its own, and a sequence stays on the server that issued its ID. So the
client chooses, and the servers share nothing.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from ...errors import (
    CidError,
    Exhausted,
    Forked,
    InvalidArgument,
    RegistryMismatch,
    RequestError,
    SessionExpired,
    Unavailable,
)
from .arguments import seconds, whole
from .effects import NEVER
from .fork_guard import ForkGuard, caller
from .lease import Lease
from .sequence import SequenceCore
from .transport import DAY_S, NO_MODEL, Address, boottime, parse_url

__all__ = [
    "RESOLVE_WAIT_S",
    "FleetBase",
    "FleetServer",
    "ServerUrl",
    "parse_name",
    "unresolved",
    "urls_at",
]

_log = logging.getLogger("cidalloc.client.fleet")

_BACK_OFF_S = (0.2, 10.0)  # the first and the longest pause; each is twice as long as before
_WAIT_S = 1.0  # for an ID on one server, before the others are tried again
_RESOLVE_S = 30.0  # between two looks at a name
_NO_ANSWER = (Unavailable, SessionExpired)
_HOST = re.compile(r"([^:/]+|\[.+\]):\d+")

RESOLVE_WAIT_S = 0.05
"""A new sequence waits so long for a look at a name, if older addresses are known: a client that
seldom begins a sequence would otherwise see the present ones with the next one."""

Choose = Callable[[list["FleetServer"]], "FleetServer"]


class ServerUrl(str):
    """A URL with an address, and the name that was resolved to it, which TLS checks."""

    name = ""


class FleetServer:
    """A server of a fleet.

    Attributes:
        url: its URL.
        client: the fleet's client of it; None until the first sequence goes there.
        trouble: why it was passed over when it was tried last; None if it worked.
        unique: a lease whose registry no other server had.
        left_at: when it left the fleet, if it did.
    """

    def __init__(self, url: ServerUrl) -> None:
        self.url = url
        self.client: Any = None
        self.trouble: CidError | None = None
        self.unique: Lease | None = None
        self.left_at = NEVER
        self._failed_at = self._retry_at = NEVER
        self._tries = 0

    def __repr__(self) -> str:
        return f"<FleetServer {self.url}, {self.sequences} sequences>"

    @property
    def sequences(self) -> int:
        """How many sequences of this fleet object are open there."""
        return 0 if self.client is None else len(self.client._runner.sequences)

    @property
    def registry(self) -> str:
        """The UUID of its manager's registry, while a session is open there; else empty."""
        lease = None if self.client is None else self.client._session.lease
        return lease.registry if lease is not None and lease.opened else ""

    @property
    def slice(self) -> int | None:
        """The number of its manager's slice, if it has a fixed one and a session is open there."""
        found: int | None = self.client._session.lease.slice if self.registry else None
        return found

    @property
    def is_silent(self) -> bool:
        """Whether it did not answer when it was tried last, nor since."""
        failed = isinstance(self.trouble, _NO_ANSWER)
        return failed and bool(self.client._session.link.heard_at <= self._failed_at)

    def is_usable(self, now: float) -> bool:
        """Whether it worked when it was tried last, or is to be tried again."""
        if self.trouble is None:
            return self.client is None or not self.client._session.lease.cache.draining
        if self.registry:
            if self.client._session.lease.cache.draining:
                return False
            if isinstance(self.trouble, _NO_ANSWER) and NO_MODEL not in str(self.trouble):
                return not self.is_silent  # the heartbeat finds out when it answers
        return now >= self._retry_at

    def works(self) -> None:
        """Note that a sequence begins there."""
        self.trouble, self._tries, self._retry_at = None, 0, NEVER

    def fails(self, error: CidError, now: float, rng: random.Random) -> None:
        """Note that it was passed over."""
        pause = min(_BACK_OFF_S[0] * 2.0 ** min(self._tries, 10), _BACK_OFF_S[1])
        if isinstance(error, Exhausted) and error.due_s:
            pause = min(error.due_s, pause)
        self.trouble, self._failed_at, self._tries = error, now, self._tries + 1
        self._retry_at = now + pause * rng.uniform(0.5, 1.0)
        if self.registry and isinstance(error, _NO_ANSWER):
            self.client._session.lease.renew_at = NEVER
            self.client._runner.wake()


class FleetBase(ForkGuard):
    """A fleet without its ways to wait. `Fleet` describes the arguments."""

    _new_client: ClassVar[Any]  # makes a client

    def __init__(
        self,
        servers: str | Iterable[str],
        *,
        choose: Choose | None = None,
        subset: int | None = None,
        connect: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self._opened_at = caller()
        if "transport" in options:
            raise InvalidArgument("transport= is for one server: a fleet makes one for each")
        if options.get("fallback") is not None:
            raise InvalidArgument("fallback= is for one server: a fleet has others")
        self._connect_s = seconds("connect", connect, DAY_S)
        self._subset = None if subset is None else whole("subset", subset)
        self._choose, self._options = choose, options
        self._rng = random.SystemRandom()
        self._id = str(options.get("label") or uuid.uuid4())
        self._servers: dict[ServerUrl, FleetServer] = {}
        self._leaving: list[FleetServer] = []  # not in the fleet any more, but may be in use
        self._resolved_at = NEVER
        self._name: Address | None = None
        self._why = ""
        self._lock, self._looking = threading.Lock(), threading.Lock()
        self.now = boottime
        self.closed = False
        if isinstance(servers, str):
            if not servers.startswith("dns:"):
                raise InvalidArgument(
                    f"servers={servers!r} is neither a list of URLs nor 'dns:' and one URL, whose"
                    " name has an address for each server"
                )
            self._name = parse_name(servers)
        else:
            self._set([ServerUrl(url) for url in _checked(servers)])
        # Wrong options are an error now, and not with the first sequence.
        self._new_client(self._name.url if self._name else next(iter(self._servers)), **options)

    def __repr__(self) -> str:
        state = "closed" if self.closed else ", ".join(self._servers) or "no server yet"
        return f"<cidalloc {type(self).__name__} of {state}>"

    @property
    def servers(self) -> list[FleetServer]:
        """The servers to which new sequences go."""
        return list(self._servers.values())

    # ---- Which servers there are

    def _set(self, urls: list[ServerUrl]) -> None:
        """Let these be the servers; with ``subset``, some of them."""
        if self._subset is not None:
            urls = sorted(urls, key=self._rank)[: self._subset]
        with self._lock:
            before = (*self._leaving, *self._servers.values())
            known = {each.url: each for each in before}
            for url in self._servers.keys() - urls:
                self._servers[url].left_at = self.now()
            self._servers = {url: known.get(url) or FleetServer(url) for url in urls}
            self._leaving = [each for each in before if each.url not in self._servers]

    def _rank(self, url: str) -> bytes:
        """Return the place of a server for this client: others have another order."""
        return hashlib.blake2b(f"{self._id} {url}".encode()).digest()

    def _resolves(self) -> bool:
        """Return whether to look the name up now, and note that this is done."""
        due = self._name is not None and self.now() >= self._resolved_at + _RESOLVE_S
        if due:
            self._resolved_at = self.now()
        return due

    def _unresolved(self, error: Unavailable) -> None:
        """Note that the name could not be looked up. The servers stay; it is tried again soon."""
        self._resolved_at = self.now() - _RESOLVE_S + _BACK_OFF_S[0]
        self._why = str(error)
        _log.warning("%s", self._why)

    def _left(self) -> list[Any]:
        """Return clients to close: of servers that left, and whose sequences have ended.

        A sequence may just begin on a server that was there a moment ago.
        """
        if not self._leaving:
            return []
        latest = self.now() - _RESOLVE_S
        with self._lock:
            gone = [each for each in self._leaving if each.left_at <= latest and not each.sequences]
            self._leaving = [each for each in self._leaving if each not in gone]
        return [each.client for each in gone if each.client is not None]

    def _close(self) -> list[Any]:
        """Close the fleet, and return the clients to close."""
        with self._lock:
            self.closed = True
            servers = (*self._servers.values(), *self._leaving)
        return [each.client for each in servers if each.client is not None]

    # ---- Where a sequence goes

    def _until(self, wait: float | None) -> float:
        """Return until when a call waits for an ID; `NEVER` if it does not."""
        found = 0.0 if wait is None else seconds("wait", wait, DAY_S, low=0.0)
        return self.now() + found if found else NEVER

    def _candidates(self, until: float) -> Iterator[tuple[FleetServer, float | None]]:
        """Iterate over the servers to try, and for how long to wait for an ID on each, if at all.

        If all have failed and some are exhausted, it waits for these in turns. When the time is
        over, no server is tried that failed the last time, since it may hang.
        """
        for server in self._order():
            if server.trouble is None or not NEVER < until <= self.now():
                yield server, None
        while (left := until - self.now()) > 0 and (soonest := self._soonest()) is not None:
            yield soonest, min(left, _WAIT_S)
            self._check_open()
            for server in self._order():
                if self.now() < until and server.is_usable(self.now()):
                    yield server, None

    def _order(self) -> Iterator[FleetServer]:
        """Iterate over all servers, those that worked first.

        Of two at random, the one with fewer of this client's sequences comes first. What managers
        tell of their load would be as old as a heartbeat.
        """
        left, now = list(self._servers.values()), self.now()
        if not left:
            raise Unavailable(self._why)
        among = 2 if self._choose is None else len(left)
        drawn: list[FleetServer] = []
        failed: list[FleetServer] = []
        while left or drawn:
            while left and len(drawn) < among:  # no more than needed: there may be a thousand
                place = int(self._rng.random() * len(left)) if len(left) > 1 else 0
                each, left[place] = left[place], left[-1]
                del left[-1]
                (drawn if each.is_usable(now) else failed).append(each)
            if drawn:
                chosen = self._chosen(drawn)
                drawn.remove(chosen)
                yield chosen if chosen.client is not None else self._with_client(chosen)
        for each in failed:
            yield self._with_client(each)

    def _chosen(self, drawn: list[FleetServer]) -> FleetServer:
        if self._choose is None:
            return min(drawn, key=_sequences) if len(drawn) > 1 else drawn[0]
        chosen = self._choose(list(drawn))
        if chosen not in drawn:
            raise InvalidArgument(f"choose() returned {chosen!r}, which it was not given")
        return chosen

    def _with_client(self, server: FleetServer) -> FleetServer:
        with self._lock:
            self._check_open()
            if server.client is None:
                client = self._new_client(server.url, **self._options)
                client._connect_s, client._opened_at = self._connect_s, self._opened_at
                server.client = client
        return server

    def _passes(self, server: FleetServer, error: CidError) -> None:
        """Note that a server takes no sequence. Raises the error if another one would not help."""
        left = server.client._session.closed and not self.closed
        if isinstance(error, RequestError | Forked) and not left:
            raise error
        _log.info("%s is passed over: %s", server.url, error)
        server.fails(error, self.now(), self._rng)

    def _begins(self, server: FleetServer, core: SequenceCore, until: float) -> None:
        """Note that a sequence begins on a server; it may wait for a slot until then."""
        if server.trouble is not None:
            server.works()
        if until > NEVER:
            core.plan = core.plan._replace(wait=max(until - self.now(), 0.0))

    def _twin(self, server: FleetServer) -> FleetServer | None:
        """Return another server with the same registry or slice, unless it is silent.

        A silent one may have moved to the address of the other one.

        It is searched once for each lease.
        """
        lease = server.client._session.lease
        if server.unique is lease:
            return None
        for each in (*self._servers.values(), *self._leaving):
            if each is server or not each.registry or each.is_silent:
                continue
            if each.registry == server.registry or each.slice == server.slice is not None:
                each.unique = None
                return each
        server.unique = lease
        return None

    def _same(self, server: FleetServer, twin: FleetServer) -> RegistryMismatch:
        both = f"{server.url} and {twin.url}"
        if server.registry != twin.registry:
            return RegistryMismatch(
                f"{both} have one slice, {server.slice}: give each manager another one"
            )
        return RegistryMismatch(
            f"{both} answer with one registry, {server.registry}: they are one server, or the disk"
            " of one is a copy of the other's"
        )

    def _nobody(self) -> CidError:
        """Return the error that no server takes a sequence."""
        troubles = {each.url: each.trouble for each in self._servers.values() if each.trouble}
        kinds = {type(each) for each in troubles.values()}
        kind = kinds.pop() if len(kinds) == 1 else Unavailable
        why = "; ".join(f"{url}: {error}" for url, error in troubles.items())
        return kind(f"no server of the fleet takes a new sequence: {why}")

    def _soonest(self) -> FleetServer | None:
        """Return the exhausted server whose next ID is due first; a random one if none cools."""
        due = [
            (each.trouble.due_s or DAY_S, self._rng.random(), each)
            for each in self._servers.values()
            if isinstance(each.trouble, Exhausted)
        ]
        return min(due)[-1] if due else None

    def _check_open(self) -> None:
        self._check_home()
        if self.closed:
            raise InvalidArgument("this fleet is closed")


def _sequences(server: FleetServer) -> int:
    return server.sequences


def urls_at(name: Address, found: list[tuple[Any, ...]]) -> list[ServerUrl]:
    """Return the URLs of the servers at a name's addresses, as `socket.getaddrinfo` found them."""
    urls, scheme = [], name.url.partition("://")[0]
    host, _, port = name.target.rpartition(":")
    for family, *_, (address, *_) in found:
        if family == found[0][0]:  # a server may have an address of each family
            text = f"[{address}]" if family == socket.AF_INET6 else address
            url = ServerUrl(f"{scheme}://{text}:{port}{name.path}")
            url.name = host
            urls.append(url)
    return sorted(set(urls))


def parse_name(text: str) -> Address:
    """Return the address for ``dns:`` and a URL, whose name has an address for each server.

    Raises:
        InvalidArgument: it is not valid.
    """
    name = parse_url(text.removeprefix("dns:"))
    if not _HOST.fullmatch(name.target):
        raise InvalidArgument(f"servers={text!r}: write host:port after 'dns:'")
    return name


def unresolved(name: Address, error: Exception) -> Unavailable:
    """Return the error that a name could not be looked up."""
    return Unavailable(f"{name.target} cannot be resolved: {error}")


def _checked(servers: Iterable[str]) -> list[str]:
    """Return the URLs of a list.

    Raises:
        InvalidArgument: there are none, one is not valid or there twice, or they are of different
            protocols.
    """
    urls: dict[str, str] = {}  # by the address
    kinds = set()
    for url in servers:
        address = parse_url(url)
        if address.url in urls:
            raise InvalidArgument(f"the server {url!r} is there twice")
        urls[address.url] = url
        kinds.add(address.kind)
    if not urls:
        raise InvalidArgument("a fleet needs one server at least")
    if len(kinds) > 1:
        raise InvalidArgument(
            f"some servers are HTTP and some gRPC, and inputs are of one protocol: {list(urls)}"
        )
    return list(urls.values())
