"""A server with Triton's HTTP and gRPC on one port of loopback, whose every answer can be spoilt.

Behind it are the real manager and a model that adds up, without Triton between.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
from adding_model import DEAD_END, AddingModel
from front_protocols import JUNK, Asked, Failure, Http1, Http2, Tensor
from spoilt import Fault

from cidalloc import protocol
from cidalloc.codes import Operation
from cidalloc.conformance import recorder
from cidalloc.errors import CidError
from cidalloc.manager.service import Service, boottime_ms
from cidalloc.manager.settings import Settings

T = TypeVar("T")
HOST = "127.0.0.2"  # so that no port is taken that another test has chosen for a server


class Network:
    """The event loop of all fronts, in a thread: so one thing happens at a time."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, what: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there, and return its result."""
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(10)

    def close(self) -> None:
        """End it."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()


class Front:
    """A server. All but the constructor and `close` run in the network's thread.

    Args:
        network: where it runs.
        settings: of the manager.
        spoilt: the fault of the n-th request of a name, by both. The number 0 means all of them.

    Attributes:
        asked: the names of the requests, in their order.
        met: the faults that were met.
        wrong: what breaks a promise.
        events: what the manager did, as `history.check` reads it.
        pending: requests that are late.
        lease_ends: no later than that the client stops to use its IDs.
        ahead_ms: the manager's clock is ahead of the others by so much.
    """

    def __init__(
        self, network: Network, settings: Settings, spoilt: dict[tuple[str, int], Fault]
    ) -> None:
        self.spoilt, self.settings = spoilt, settings
        self.asked: list[str] = []
        self.met: list[Fault] = []
        self.wrong: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.connections: set[Connection] = set()
        self.pending = self.ahead_ms = 0
        self.lease_ends, self._ttl_s = float("inf"), 0.0
        self.recording = True
        self.model = AddingModel(self.wrong, settings.cooldown_ms / 1000, self.now)
        self._recorder = recorder.Recorder("manager", self.events.append, self.now)
        self._counts: Counter[str] = Counter()
        self.network = network
        network.run(self._start())

    async def _start(self) -> None:
        recorder.writer = self._recorder
        self.service = Service(self.settings, lambda: boottime_ms() + self.ahead_ms)
        loop = self.network.loop
        self._server = await loop.create_server(lambda: Connection(self), HOST, 0)
        self.target = f"{HOST}:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        """End it."""

        async def end() -> None:
            self._server.close()
            for each in list(self.connections):
                each.wire.abort()
            recorder.writer = self._recorder
            self.service.close()
            await asyncio.sleep(0)

        self.network.run(end())

    def now(self) -> float:
        return boottime_ms() / 1000

    # ---- Requests

    def next_fault(self, what: str) -> Fault | None:
        """Count a request, and return its fault."""
        if self.recording:
            self.asked.append(what)
        self._counts[what] += 1
        fault = self.spoilt.get((what, self._counts[what])) or self.spoilt.get((what, 0))
        if fault is not None:
            self.met.append(fault)
        return fault

    def perform(self, asked: Asked) -> dict[str, Tensor] | dict[str, Any]:
        """Return the answer to a request; raise `Failure`."""
        if asked.what == "version":
            return {"name": "triton", "version": "2.51.0"}
        if asked.what == "config":
            return self.model.config(asked.model)
        if asked.model != protocol.MODEL:
            cid = asked.parameters["sequence_id"]
            dead = cid in self.model.dead or int(asked.inputs["INPUT"].flat[0]) == DEAD_END
            if not (dead or asked.parameters.get("late") or cid in self.held()):
                self.wrong.append(f"ID {cid} was used, and no session holds it")
            if not (dead or asked.parameters.get("late")) and self.now() > self.lease_ends + 0.3:
                self.wrong.append(f"ID {cid} was used after the lease")
            try:
                return {"OUTPUT": ("INT32", self.model.infer(asked.inputs, asked.parameters))}
            except ValueError as error:
                raise Failure(str(error), 400, 3) from None
        return self.manage(asked.inputs, asked.parameters)

    def manage(self, inputs: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Tensor]:
        """Ask the manager."""
        self._check(inputs, parameters)
        code, cids = inputs[protocol.CODE], inputs[protocol.CORRELATION_ID]
        answer = self._answer(code, cids, parameters)
        if isinstance(answer, CidError):
            name = answer.code.name
            away = name in ("EXHAUSTED", "UNAVAILABLE", "DRAINING")
            status = (503, 14) if away else (404, 5) if name == "SESSION_UNKNOWN" else (400, 3)
            raise Failure(protocol.error_text(answer), *status)
        self._note_lease(parameters)
        output, detail = answer
        text = np.array([[detail.encode()]], object)
        return {protocol.OUTPUT: ("UINT64", output), protocol.DETAIL: ("BYTES", text)}

    def _answer(self, code: Any, cids: Any, parameters: dict[str, Any]) -> Any:
        recorder.writer = self._recorder
        return self.service.answer(code, cids, json.dumps(parameters))

    def _note_lease(self, parameters: dict[str, Any]) -> None:
        if "session" in parameters:
            self._ttl_s = parameters.get("ttl_ms", self._ttl_s * 1000) / 1000
            self.lease_ends = self.now() + self._ttl_s

    def ask(self, operation: Operation, **parameters: Any) -> Any:
        """Ask the manager, as another client; return OUTPUT."""
        none = np.empty((1, 0), np.uint64)
        answer = self._answer(np.array([[operation]], np.int8), none, parameters)
        assert not isinstance(answer, CidError), answer
        return answer[0] if operation is not Operation.STATUS else json.loads(answer[1])

    async def held_and_sessions(self) -> tuple[int, int]:
        """Return how many IDs are held, and how many sessions are open."""
        self.ask(Operation.ACTIVE)  # lets time pass
        status = self.ask(Operation.STATUS)
        return status["held"], status["sessions_total"]

    def held_by(self, token: str) -> set[int]:
        """Return the IDs that a session holds."""
        registry = self.service._holder.registry()
        session = registry.sessions.named.get(registry._digest(bytes.fromhex(token)))
        if session is None:
            return set()
        return set(registry.store.shape.ids(registry.pool.held_by(session.number)).tolist())

    def held(self) -> set[int]:
        """Return the IDs that sessions hold."""
        registry = self.service._holder.registry()
        return set(registry.store.shape.ids(registry.pool.held()).tolist())

    def _check(self, inputs: dict[str, Any], parameters: dict[str, Any]) -> None:
        """Note a release as ended of what the model has, or may still get."""
        operation = int(inputs[protocol.CODE].flat[0])
        if parameters.get("ended") is not True:
            return
        of_delete = set(inputs[protocol.CORRELATION_ID].flat)
        released = of_delete if operation == Operation.DELETE else self.held()
        for cid in self.model.in_doubt:
            if cid in released:
                self.wrong.append(f"ID {cid} was released as ended, and the model may have it")


class Connection(asyncio.Protocol):
    """A connection of a client, over which HTTP/1.1 or HTTP/2 comes."""

    wire: asyncio.Transport

    def __init__(self, front: Front) -> None:
        self.front = front
        self._talk: Http1 | Http2 | None = None

    def connection_made(self, transport: Any) -> None:
        self.wire = transport
        self.front.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.front.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        if self._talk is None:
            self._talk = Http2(self) if data.startswith(b"PRI ") else Http1(self)
        self._talk.feed(data)

    def serve(self, talk: Http1 | Http2, asked: Asked, way: Any) -> None:
        """Serve a request, or spoil it."""
        fault = self.front.next_fault(asked.what)
        if fault is None:
            talk.answer(self._result(asked, 1), way)
            return
        if fault.at_once:
            result = self._result(asked, fault.runs)
        if not fault.delay_s:
            self._spoil(talk, fault, result, way)
            return
        self.front.pending += 1
        if not fault.at_once:
            self.front.model.expect(asked.parameters)

        def later() -> None:
            self.front.pending -= 1
            found = result if fault.at_once else self._result(asked, fault.runs)
            if not self.wire.is_closing():
                self._spoil(talk, fault, found, way)

        self.front.network.loop.call_later(fault.delay_s, later)

    def _result(self, asked: Asked, runs: int) -> Any:
        found: Any = {}
        for _ in range(runs):
            try:
                found = self.front.perform(asked)
            except Failure as failure:
                found = failure
        return found

    def _spoil(self, talk: Http1 | Http2, fault: Fault, result: Any, way: Any) -> None:
        if fault.does == "silence":
            pass
        elif fault.does == "close":
            self.wire.close()
        elif fault.does == "reset":
            self.reset()
        elif fault.does == "garbage":
            self.wire.write(JUNK)
        elif fault.does in ("cut", "cut_and_reset"):
            sent: list[bytes] = []
            talk.answer(result, way, sent.append)
            data = b"".join(sent)
            self.wire.write(data[: len(data) // 2])
            if fault.does == "cut":
                self.wire.close()
            else:
                self.reset()
        else:
            getattr(talk, fault.does)(result, way, fault.detail)

    def refuse(self, data: bytes) -> None:
        """Hang up: this is of another test that looks for its server."""
        self.front.connections.discard(self)
        self.wire.abort()

    def reset(self) -> None:
        """Break the connection, so that the client gets RST."""
        linger = struct.pack("ii", 1, 0)
        self.wire.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.wire.abort()
