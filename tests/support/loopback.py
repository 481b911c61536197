"""A transport into the real service, without Triton between: through the same tensors and texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from cidalloc import protocol
from cidalloc.client.core.tensors import Library
from cidalloc.client.core.transport import Done, Receive
from cidalloc.codes import Operation
from cidalloc.errors import CidError, ProtocolError
from cidalloc.manager.service import Service, boottime_ms
from cidalloc.manager.settings import Settings


class Loopback:
    """What `cidalloc.client.Client` takes in place of a connection."""

    url = "loopback"
    library = Library(object, object, frozenset())

    def __init__(self, settings: Settings, clock: Callable[[], int] = boottime_ms) -> None:
        self.service = Service(settings, clock)
        self.clock = clock

    def now(self) -> float:
        return self.clock() / 1000

    def call(
        self, model: str, request: protocol.Request, timeout: float
    ) -> tuple[protocol.IDs, str]:
        tensors = request.encode()
        answer = self.service.answer(
            tensors[protocol.CODE],
            tensors[protocol.CORRELATION_ID],
            json.dumps(dict(request.parameters)),
        )
        if isinstance(answer, CidError):
            error = protocol.parse_error(f"in ensemble 'x', {protocol.error_text(answer)}")
            raise error or ProtocolError(f"no error in {answer!r}")
        output, detail = answer
        assert output.dtype == np.uint64 and output.ndim == 2 and output.shape[0] == 1
        status = request.operation is Operation.STATUS
        words = [word for word in detail.split() if len(word) != protocol.STAMP_DIGITS]
        assert status or words in ([], [protocol.DRAINING])
        assert not status or detail.startswith("{")
        return output[0], detail

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        return {"name": model, "sequence_batching": {"max_sequence_idle_microseconds": 2_000_000}}

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        return SimpleNamespace(get_response=dict)

    def submit(self, limit: float, model: str, inputs: list[Any], done: Done, /, **_: Any) -> None:
        done(self.infer(limit, model, inputs), None)

    def broke(self) -> bool:
        return False

    def open_stream(self, receive: Receive, /) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        pass


class AsyncLoopback:
    """The same for `cidalloc.client.AsyncClient`."""

    url = "loopback"
    library = Library(object, object, frozenset())

    def __init__(self, settings: Settings, clock: Callable[[], int] = boottime_ms) -> None:
        self.loopback = Loopback(settings, clock)
        self.now = self.loopback.now

    async def call(self, model: str, request: protocol.Request, timeout: float) -> tuple[Any, str]:
        return self.loopback.call(model, request, timeout)

    async def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        return self.loopback.model_config(model, timeout)

    async def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        return self.loopback.infer(limit, model, inputs, **options)

    def submit(self, limit: float, model: str, inputs: list[Any], done: Done, /, **_: Any) -> None:
        self.loopback.submit(limit, model, inputs, done)

    def broke(self) -> bool:
        return False

    def open_stream(self, receive: Receive, /) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        pass
