"""A client as plain as the protocol allows: no session, no stock, one round trip for each call.

The tests of the manager use it, since they count every ID.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from cidalloc.client.sync.transport import Transport
from cidalloc.codes import Operation
from cidalloc.protocol import IDs, Parameter, Request, as_ids


class Anonymous:
    """Takes IDs without a session and gives them back."""

    def __init__(self, transport: Transport, model: str = "cidmgr") -> None:
        self.transport = transport
        self.model = model

    def __enter__(self) -> Anonymous:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.transport.close()

    def call(self, operation: Operation, ids: Iterable[int] = (), **parameters: Parameter) -> IDs:
        request = Request(operation, as_ids(ids), parameters)
        return self.transport.call(self.model, request, 30.0)[0]

    def acquire(self) -> int:
        return int(self.call(Operation.NEW)[0])

    def acquire_many(self, count: int) -> IDs:
        return self.call(Operation.NEW, count=count)

    def release(self, cid: int, **parameters: Parameter) -> None:
        self.release_many([cid], **parameters)

    def release_many(self, cids: Iterable[int], **parameters: Parameter) -> None:
        self.call(Operation.DELETE, cids, **parameters)

    def active(self) -> int:
        return int(self.call(Operation.ACTIVE)[0])

    def inactive(self) -> int:
        return int(self.call(Operation.INACTIVE)[0])

    def peak(self) -> int:
        return int(self.call(Operation.PEAK)[0])
