"""Servers and clients of a simulated fleet, and the network between, on a loop with virtual time.

Clients, fleets and managers are the real ones; the network with its names, and Triton, are not.
"""

from __future__ import annotations

import asyncio
import selectors
import socket
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from loopback import Loopback
from sometimes import sometimes
from tritonclient.utils import InferenceServerException

from cidalloc import protocol
from cidalloc.client.asyncio.client import AsyncClient
from cidalloc.client.asyncio.fleet import AsyncFleet
from cidalloc.client.core.fleet import FleetServer
from cidalloc.client.core.grpc_calls import LIBRARY
from cidalloc.client.core.sequence import SequenceCore
from cidalloc.client.core.transport import _INSIDE, Done, translating
from cidalloc.codes import Operation
from cidalloc.errors import CidError
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage import drain
from cidalloc.manager.storage.file_format import Word

if TYPE_CHECKING:
    from many_servers import World

START_S = 1000.0  # of the virtual clock
IDLE_S, TIMEOUT_S = 60.0, 10.0  # of the model, and of a request to it
DELAY_S = 0.002  # there and back
LAG_S = 60.0  # clients see new addresses up to so late
SETTINGS = Settings(first=1, capacity=2**20, fresh=True)
NAME = "triton"
_INSIDE.add(__name__)  # errors of the transport here are not the application's
_ANSWER = SimpleNamespace(get_response=dict)  # of the model; it does not say its version


class Jump(selectors.SelectSelector):
    """Waits by moving the clock."""

    now = START_S

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nobody waits for anything")
        self.now += max(timeout, 0.0)
        return []


class Loop(asyncio.SelectorEventLoop):
    """An event loop with virtual time, and with the names of the servers."""

    def __init__(self) -> None:
        self._jump = Jump()
        super().__init__(self._jump)
        self._names: list[tuple[float, list[Any]]] = []

    def time(self) -> float:
        return self._jump.now

    def publish(self, hosts: list[str]) -> None:
        """Let the name have these addresses from now on."""
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 8001)) for each in hosts]
        self._names.append((self.time() if self._names else 0.0, found))

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:
        """Return the addresses that a client sees; its name says how late it sees them."""
        await asyncio.sleep(DELAY_S)
        seen = self.time() - float(host.removeprefix(f"{NAME}-"))
        return next((found for since, found in reversed(self._names) if since <= seen), [])


class Server:
    """A process of Triton with a manager."""

    def __init__(self, world: World, zone: int, loopback: Loopback | None = None) -> None:
        self.zone, self.dark = zone, False  # dark: no message arrives, and none comes back
        self.loopback = loopback or Loopback(SETTINGS, world.clock_ms)
        self._world = world
        self._states: dict[int, tuple[str, float]] = {}  # sequence and last request, by ID
        self.requests: Counter[Operation] = Counter()

    def infer(self, key: str, options: dict[str, Any]) -> Exception | None:
        """Take a request of a sequence; return Triton's error."""
        cid, now = options["sequence_id"], self._world.now
        owner, last = self._states.get(cid, ("", 0.0))
        known = bool(owner) and now <= last + IDLE_S
        if known and owner != key:
            self._world.wrong.append(f"{key} met the state of {owner} at {now:.3f}")
        if not options.get("sequence_start") and not known:
            text = f"inference request for sequence {cid} must specify the START flag"
            return InferenceServerException(text, "StatusCode.INVALID_ARGUMENT")
        if options.get("sequence_end"):
            del self._states[cid]
        else:
            self._states[cid] = key, now
        return None

    def drain(self) -> None:
        header = self.loopback.service._holder.registry().store.header
        header[Word.DRAIN] = drain._name_of(header)

    @property
    def sessions(self) -> int:
        return len(self.loopback.service._holder.registry().sessions.named)


class SimTransport:
    """A client's connection to an address, where one process after the other may listen."""

    library, streams = LIBRARY, True

    def __init__(self, url: str, world: World) -> None:
        self.url, self._world = url, world
        self.now = world.loop.time
        self._process: Server | None = None  # the connection is to this one
        self._broken = False

    def broke(self) -> bool:
        process = self._process
        if process is not None and not process.dark and self._world.at.get(self.url) is not process:
            self._process, self._broken = None, True
        broke, self._broken = self._broken, False
        return broke

    def _arrive(self) -> Server | None:
        """Return the process that a message reaches; None: it is not answered."""
        server = self._world.at.get(self.url)
        if server is not None and server.dark:
            return None
        if self._process not in (None, server):
            self._process, self._broken = None, True
            raise ConnectionResetError
        if server is None:
            raise ConnectionRefusedError
        self._process = server
        return server

    async def _reach(self, model: str, timeout: float) -> Server:
        await asyncio.sleep(DELAY_S)
        with translating(model, self.url):
            server = self._arrive()
            if server is None:
                await asyncio.sleep(timeout)
                raise TimeoutError
            return server

    async def call(self, model: str, request: protocol.Request, timeout: float) -> tuple[Any, str]:
        server = await self._reach(model, timeout)
        server.requests[request.operation] += 1
        return server.loopback.call(model, request, timeout)

    async def model_config(self, model: str, timeout: float) -> dict[str, Any]:
        await self._reach(model, timeout)
        batching = {"max_sequence_idle_microseconds": int(IDLE_S * 1e6)}
        return {"name": model, "sequence_batching": batching}

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Done, /, **options: Any
    ) -> None:
        self._world.loop.call_later(DELAY_S, self._infer, limit, done, options)

    def _infer(self, limit: float, done: Done, options: dict[str, Any]) -> None:
        try:
            server = self._arrive()
        except OSError as error:
            done(None, error)
            return
        if server is None:
            self._world.loop.call_later(limit, done, None, TimeoutError())
            return
        error = server.infer(options["request_id"], options)
        done(None if error else _ANSWER, error)

    async def close(self) -> None:
        pass


class SimClient(AsyncClient):
    """A client of one server, over a simulated network."""

    _connect = staticmethod(lambda url, headers, options: SimTransport(url, **options))

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._rng = self._session.link.rng = options["world"].dice


class SimFleet(AsyncFleet):
    """A client of all servers."""

    _new_client = SimClient

    def __init__(self, world: World, number: int, subset: int | None) -> None:
        name = f"dns:{NAME}-{world.dice.uniform(0, LAG_S):.2f}:8001"
        super().__init__(name, subset=subset, label=f"client{number}", world=world)
        self._rng, self.now = world.dice, world.loop.time
        self._moved: set[asyncio.Task[Any] | None] = set()  # tasks whose server was passed over

    def _passes(self, server: FleetServer, error: CidError) -> None:
        super()._passes(server, error)
        self._moved.add(asyncio.current_task())

    def _begins(self, server: FleetServer, core: SequenceCore, until: float) -> None:
        super()._begins(server, core, until)
        sometimes("moved before START", asyncio.current_task() in self._moved)
        self._moved.discard(asyncio.current_task())
