"""gRPC streams of a simulated fleet, over which clients end sequences of the dead."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from sometimes import sometimes
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from cidalloc import protocol
from cidalloc.client.core.transport import Receive
from cidalloc.errors import Unavailable

if TYPE_CHECKING:
    from nodes import Node

THERE, BACK = range(2)
SLOT_S = 1.0  # END waits at most so long for a slot of the model


class SimStream:
    """A stream to the server that has the address when the stream is opened.

    Messages arrive in their order. A fault of the network delays them, or breaks the stream. The
    server takes nothing after the time limit, which counts from when the stream reached it.

    Attributes:
        over: the client knows that it is closed.
        closes: when the server closes it.
    """

    def __init__(self, node: Node, receive: Receive, /, limit: float) -> None:
        self.over = False
        self.closes = float("inf")
        self._node, self._fleet, self._receive = node, node.fleet, receive
        self._here = self._fleet.here
        self._on_way: tuple[deque[Callable[[], None]], ...] = deque(), deque()
        self._carry(THERE, lambda: setattr(self, "closes", self._fleet.now + limit))
        self._fleet.at(self._fleet.now + limit, lambda: self._told(self._break))

    def send(self, model: str, inputs: list[Any], /, **options: Any) -> None:
        if self.over:
            raise Unavailable("the stream broke")
        if "sequence_end" in options:  # the process may be stopped before the message leaves it
            self._fleet.nemesis.provoke(self._node, self)
        self._carry(THERE, lambda: self._serve(inputs, options))

    def end(self) -> None:
        self._carry(THERE, self._close)

    def cut(self) -> None:
        self.over = True
        self.end()

    def suspect(self) -> None:
        """Do nothing: each stream of a simulation has a connection of its own."""

    # ---- The network

    def _carry(self, way: int, what: Callable[[], None]) -> None:
        fleet, node = self._fleet, self._node

        def leave() -> None:
            if way == BACK or node.alive:
                self._on_way[way].append(what)
                fleet.at(fleet.now + fleet.delay(), lambda: self._arrive(way))

        fleet.at(max(fleet.now, node.frozen_until if way == THERE else 0.0), leave)

    def _arrive(self, way: int) -> None:
        """Let the first message on this way arrive, or lose the stream."""
        fleet, on_way = self._fleet, self._on_way[way]
        if fleet.now < self._node.cut_until:
            if fleet.dice.random() < 0.5:
                self._lose()
            else:  # TCP sends it again
                fleet.at(self._node.cut_until + fleet.delay(), lambda: self._arrive(way))
        elif fleet.dice.random() < fleet.lost:
            self._lose()
        elif way == BACK and self._node.deaf:
            sometimes("a client without answers")
            on_way.clear()
        elif on_way:
            on_way.popleft()()

    def _lose(self) -> None:
        self.closes = float("-inf")
        for on_way in self._on_way:
            on_way.clear()
        self._told(self._break)

    def _told(self, what: Callable[[], None]) -> None:
        """Let the client's process do something as soon as it runs."""
        fleet, node = self._fleet, self._node
        if node.alive and fleet.now < node.frozen_until:
            fleet.at(node.frozen_until, lambda: self._told(what))
        elif node.alive and not self.over:
            what()
            node.wake()

    def _break(self) -> None:
        self.over = True
        self._receive("", True, None, Unavailable("the stream was closed"))

    # ---- The server

    def _close(self) -> None:
        self.closes = float("-inf")
        self._carry(BACK, lambda: self._told(self._break))

    def _serve(self, inputs: list[Any], options: dict[str, Any]) -> None:
        fleet, cid = self._fleet, options.get("sequence_id")
        if fleet.now > self.closes:
            self._close()
        elif cid is None:
            self._answer(*self._ask(inputs, options))
        else:

            def end() -> None:
                fleet.end_dead(self._node.name, cid, self._here)
                self._answer(SimpleNamespace(), None)

            # It may wait for a slot: often, if it comes late.
            waits = fleet.dice.random() < (0.7 if self.closes - fleet.now < 0.5 else 0.1)
            fleet.at(fleet.now + fleet.dice.choice([0.5, 1.0]) * SLOT_S * waits, end)

    def _ask(
        self, inputs: list[Any], options: dict[str, Any]
    ) -> tuple[Any, InferenceServerException | None]:
        """Return the answer of the server's manager, or its error."""
        tensors = {
            each.name(): np.frombuffer(each._get_content(), triton_to_np_dtype(each.datatype()))
            for each in inputs
        }
        code, ids = (
            tensors[name].reshape(1, -1) for name in (protocol.CODE, protocol.CORRELATION_ID)
        )
        request = protocol.Request.decode(code, ids, json.dumps(options["parameters"]))
        reply = self._fleet.manage(request, self._here, self._node.name)
        if reply.error is not None:
            return None, InferenceServerException(protocol.error_text(reply.error))
        self._fleet.named.update(reply.output.tolist())
        outputs = {
            protocol.OUTPUT: reply.output.reshape(1, -1),
            protocol.DETAIL: np.array([[reply.detail.encode()]], object),
        }
        return SimpleNamespace(as_numpy=outputs.get), None

    def _answer(self, result: Any, error: InferenceServerException | None) -> None:
        def take() -> None:
            self._receive("", True, result, error)

        self._carry(BACK, lambda: self._told(take))
