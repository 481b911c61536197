"""The client: acquire and release correlation IDs, and open sequences that use them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from types import TracebackType
from typing import SupportsIndex

import numpy as np

from ..codes import Operation
from ..errors import InvalidArgument, LimitExceeded, ProtocolError
from ..wire import MAX_COOLDOWN_MS, MODEL, IDs, Parameter, Request, as_ids
from ._process import BoundToProcess
from ._sequence import Sequence
from ._target import Target
from ._transport import Transport, connect

__all__ = ["Client"]

_DAY_S = 86_400.0


class Client(BoundToProcess):
    """Correlation IDs from the manager on a Triton server.

    Args:
        url: ``host:port`` or ``grpc://host:port`` for gRPC, ``http://host:port`` for HTTP;
            ``grpcs`` and ``https`` with TLS.
        model: the manager's model name.
        timeout: seconds to wait for an answer of the manager.
        transport: speaks to the server in place of a connection to ``url``.

    Raises:
        InvalidArgument: no such URL.

    Every method may raise `Unavailable` if the server does not answer, and `Forked` in a child
    process: a client belongs to the process that made it. It may be used from many threads.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        model: str = MODEL,
        timeout: float = 10.0,
        transport: Transport | None = None,
    ) -> None:
        super().__init__()
        self._model = model
        self._timeout = _seconds("timeout", timeout, _DAY_S)
        self._closed = False
        self._targets: dict[str, Target] = {}
        self._transport = transport or connect(url)

    def __repr__(self) -> str:
        return f"<cidalloc Client of {self._model} at {self._transport.url}>"

    def __enter__(self) -> Client:
        self._check_fork()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. What is held stays held: close sequences first."""
        self._check_fork()
        self._closed = True
        self._transport.close()

    def acquire(self) -> int:
        """Return an ID that nobody else has.

        Raises:
            Exhausted: the pool cannot give one now.
        """
        return int(self.acquire_many(1)[0])

    def acquire_many(self, count: int) -> IDs:
        """Return ``count`` IDs as a uint64 array of shape [count], all or none.

        Raises:
            InvalidArgument: ``count`` is not a positive integer.
            LimitExceeded: more than one request may take.
            Exhausted: the pool cannot give so many now.
        """
        count = _integer("count", count)
        ids = self._call(Operation.NEW, count=count)
        if len(ids) != count:
            raise ProtocolError(f"asked for {count} IDs, got {len(ids)}")
        return ids

    def release(self, cid: int, *, ended: bool = False, cooldown: float | None = None) -> None:
        """Give an ID back.

        If the manager does not answer, it may have been done: trying again could take the ID from
        its next holder.

        Args:
            cid: the ID.
            ended: END was sent and answered with success, on every model it was used on.
            cooldown: otherwise, seconds after which Triton has certainly forgotten the
                sequence: its model's idle time, plus the longest time that a request may take.
                If it is not said, the manager takes a time of its own, two minutes by default.

        Raises:
            OutOfRange: not an ID of the pool.
            NotHeld: nobody holds it.
        """
        self.release_many([cid], ended=ended, cooldown=cooldown)

    def release_many(
        self, cids: Iterable[int], *, ended: bool = False, cooldown: float | None = None
    ) -> None:
        """Give IDs back, all or none; as `release`.

        Raises:
            Duplicate: the same ID twice.
            OutOfRange, NotHeld: one of them cannot be given back.
        """
        parameters: dict[str, Parameter] = {"ended": bool(ended)}
        if cooldown is not None:
            seconds = _seconds("cooldown", cooldown, MAX_COOLDOWN_MS / 1000, low=0.0)
            parameters["cooldown_ms"] = math.ceil(seconds * 1000)  # never shorter than asked for
        self._call(Operation.DELETE, as_ids(cids), **parameters)

    def active(self) -> int:
        """Return how many IDs are held, by all clients."""
        return int(self._call(Operation.ACTIVE)[0])

    def inactive(self) -> int:
        """Return how many IDs have been given back and not been issued again."""
        return int(self._call(Operation.INACTIVE)[0])

    def peak(self) -> int:
        """Return the most IDs that were held at once."""
        return int(self._call(Operation.PEAK)[0])

    def sequence(self, model: str, *, streaming: bool = False, timeout: float = 60.0) -> Sequence:
        """Acquire an ID and return a sequence on ``model`` that uses it; use it with ``with``.

        Args:
            model: a model with sequence batching. Its configuration is read once.
            streaming: send over a gRPC stream of the sequence's own.
            timeout: seconds that each request may take, waiting for a slot included.

        Raises:
            InvalidArgument: the model keeps no sequences, its CORRID control is too narrow for
                the manager's pool, or streaming over HTTP is asked for.
            Exhausted: the pool cannot give an ID now.
        """
        timeout = _seconds("timeout", timeout, _DAY_S)
        self._check_open()
        target = self._targets.get(model)
        if target is None:
            target = Target.from_config(self._transport.model_config(model, self._timeout))
            if target.idle_s > MAX_COOLDOWN_MS / 1000 - _DAY_S:
                raise InvalidArgument(
                    f"model {model} keeps idle sequences for {target.idle_s} s: longer than an ID"
                    " can cool"
                )
            self._targets[model] = target
        cid = self.acquire()
        if cid > target.highest_cid:
            self.release(cid, ended=True)
            raise InvalidArgument(
                f"model {model} takes correlation IDs up to {target.highest_cid}, and {cid} would"
                " be cut: give the manager a lower pool, or the model a wider CORRID"
            )
        try:
            return Sequence(self._transport, target, cid, self.release, streaming, timeout)
        except BaseException:
            self.release(cid, ended=True)
            raise

    def _call(self, operation: Operation, ids: IDs | None = None, **parameters: Parameter) -> IDs:
        self._check_open()
        request = Request(operation, as_ids([]) if ids is None else ids, parameters)
        return self._transport.call(self._model, request, self._timeout)

    def _check_open(self) -> None:
        self._check_fork()
        if self._closed:
            raise InvalidArgument(f"{self!r} is closed")


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, SupportsIndex):
        raise InvalidArgument(f"{name}={value!r} is not an integer")
    number = operator.index(value)
    if number < 1:
        raise InvalidArgument(f"{name}={number} is less than 1")
    if number >= 2**63:
        raise LimitExceeded(f"{name}={number} is more than any pool has")
    return number


def _seconds(name: str, value: object, high: float, low: float = 1e-6) -> float:
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = math.nan
    if isinstance(value, str | bytes | bool) or not low <= seconds <= high:
        raise InvalidArgument(f"{name}={value!r} is not a time of {low:g} to {high:g} seconds")
    return seconds
