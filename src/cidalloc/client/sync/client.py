"""The client for threads."""

from __future__ import annotations

import atexit
import contextlib
import sys
import weakref
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from ...codes import Operation
from ...errors import CidError
from ...protocol import MODEL, IDs, as_ids
from ..core.client import Base, Fallback, several, whole
from ..core.fork_guard import ProcessIdentity, caller
from ..core.id_cache import MAX_AHEAD
from ..core.sequence import HURRY_S
from ..core.session import Acquired
from ..core.transport import boottime
from .runner import Runner
from .sequence import Sequence
from .transport import Transport, connect

__all__ = ["Client"]


_open: weakref.WeakSet[Client] = weakref.WeakSet()


def _close_all() -> None:
    """Close the clients that the process leaves open when it ends."""
    until = boottime() + HURRY_S  # for all of them
    for client in list(_open):
        if client._at_home and not client._session.closed:
            with contextlib.suppress(CidError):
                client._close(max(until - boottime(), 0.0))


atexit.register(_close_all)
_hooked: object = None  # the process in which multiprocessing closes them, which runs no atexit


def _close_at_exit(client: Client) -> None:
    global _hooked
    _open.add(client)
    if (
        "multiprocessing.util" in sys.modules and _hooked is not ProcessIdentity.current
    ):  # as in its children
        from multiprocessing import parent_process, util

        if parent_process() is not None:
            _hooked = ProcessIdentity.current
            util.Finalize(None, _close_all, exitpriority=100)


class Client(Base):
    """Correlation IDs from the manager on a Triton server.

    A client is one session with the manager: it is opened when it is first needed, kept alive in
    the background, and given back with all its IDs by `close`, or at the end of a ``with`` block.
    It keeps a small stock of IDs, so that most calls need no round trip.

    Args:
        url: ``host:port`` or ``grpc://host:port`` for gRPC, ``http://host:port`` for HTTP;
            ``grpcs`` and ``https`` with TLS.
        model: the manager's model name.
        ttl: seconds for which the session outlives its last answered heartbeat. The manager must
            allow it.
        label: what the manager's status shows for this client; by default its host and process.
        timeout: seconds that a call may take to get an answer of the manager.
        headers: go with every request.
        transport: speaks to the server in place of a connection to ``url``.
        ahead: the most IDs that it keeps in stock. 0: it takes one when it needs one, and gives it
            back at once; for pools with fewer IDs than clients have use for.
        fallback: ``"random"`` lets `sequence` draw a random ID of 63 bits when the manager cannot
            be reached and the model's correlation IDs have 64 bits. Nothing looks after such an ID.
        options: further arguments of tritonclient's ``InferenceServerClient``, as those for TLS.

    Raises:
        InvalidArgument: no such URL, or an argument that is not taken.

    Every method may raise `Unavailable` if the server does not answer, `SessionExpired` if no
    heartbeat was answered for ``ttl`` and none is now, `RegistryMismatch` if several managers
    answer in turns, and `Forked` in a child process: a client belongs to the process that made it.
    It may be used from many threads.
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
        transport: Transport | None = None,
        ahead: int = MAX_AHEAD,
        fallback: Fallback = None,
        **options: Any,
    ) -> None:
        transport = transport or connect(url, headers, options)
        super().__init__(model, ttl, label, timeout, ahead, fallback, transport, caller())
        self._runner = Runner(self._session, transport, model)
        self._lock = self._runner.lock
        self._clock = transport.now
        _close_at_exit(self)

    def _abandon(self) -> None:
        self._runner.abandon()

    def __enter__(self) -> Client:
        self._check_home()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back and close the connections. Closing again does nothing.

        IDs that are still in use cool until their models have certainly forgotten them. Futures
        that wait for answers fail with `SequenceLost`; a request that blocks another thread ends
        with its answer. If the manager cannot be reached, it takes all back when the lease is over.
        """
        self._check_home()
        self._close(self._timeout)

    def _close(self, patience: float) -> None:
        try:
            self._runner.finish_all()
            self._runner.run(lambda: self._session.close(self._clock() + patience))
        finally:
            if self._session.closed:  # if it was broken off before, closing again goes on
                self._runner.close()

    def acquire(self) -> int:
        """Return an ID that nobody else has. The usual call needs no round trip.

        Raises:
            Exhausted: the pool cannot give one now.
        """
        if self._home is not ProcessIdentity.current:
            self._check_home()
        session, cid = self._session, 0
        try:
            with self._lock:
                session.now = self._clock()
                cid = session.take()
            if cid:
                if session.needs_maintenance:
                    self._runner.wake()
                return cid
        except BaseException as error:  # out of a signal handler, say, or no thread can be started
            taken = Acquired([cid] if cid else [])
            taken.epoch = session.epoch
            self._runner.take_back(taken, error)
            raise
        return int(self._run_acquire(1)[0])

    def acquire_many(self, count: int) -> IDs:
        """Return ``count`` IDs as a uint64 array of shape [count], all or none.

        Raises:
            InvalidArgument: ``count`` is not a positive integer.
            LimitExceeded: more than one request may take.
            Exhausted: the pool cannot give so many now.
        """
        return self._run_acquire(whole("count", count))

    def release(self, cid: int, *, ended: bool = False, cooldown: float | None = None) -> None:
        """Give an ID back. It needs no round trip: the manager is told in the background.

        Args:
            cid: the ID.
            ended: END was sent and answered with success, on every model it was used on. Then this
                client may use the ID again after the manager's least cooldown.
            cooldown: otherwise, seconds after which Triton has certainly forgotten the
                sequence: its model's idle time, plus the longest time that a request may take.
                If it is not said, the manager takes a time of its own, two minutes by default. Of a
                client that dies before the manager hears of this, an ID cools for that time only,
                or for the longest that its sequences need.

        Raises:
            NotHeld: this client does not hold it.
            OutOfRange: no ID at all.
            SessionExpired: it was lost with its session; it is the manager's already.
        """
        if self._home is not ProcessIdentity.current:
            self._check_home()
        session = self._session
        if ended and type(cid) is int and not session.closed:
            with self._lock:
                done = session.recycle(cid, self._clock())
            if done:
                if session.needs_maintenance:
                    self._runner.wake()
                return
        self.release_many([cid], ended=ended, cooldown=cooldown)

    def release_many(
        self, cids: Iterable[int], *, ended: bool = False, cooldown: float | None = None
    ) -> None:
        """Give IDs back, all or none; as `release`.

        Raises:
            Duplicate: the same ID twice.
            NotHeld, OutOfRange, SessionExpired: one of them cannot be given back.
        """
        self._check_home()
        found = several(cids)
        try:
            with self._lock:
                self._session.now = self._clock()
                self._give(found, bool(ended), cooldown)
        finally:
            self._runner.wake()

    def active(self) -> int:
        """Return how many IDs are held, by all clients; those in their stocks count."""
        return self._number(Operation.ACTIVE)

    def inactive(self) -> int:
        """Return how many IDs have been given back and not been issued again."""
        return self._number(Operation.INACTIVE)

    def peak(self) -> int:
        """Return the most IDs that were held at once."""
        return self._number(Operation.PEAK)

    def status(self) -> dict[str, Any]:
        """Return how the manager is: its pool, its sessions, what it did. See the protocol."""
        self._check_home()
        return self._runner.run(lambda: self._session.status(self._deadline()))

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
    ) -> Sequence:
        """Acquire an ID and return a sequence on ``model`` that uses it; use it with ``with``.

        Args:
            model: a model with sequence batching, or an ensemble with such a step. Its
                configuration is read once.
            streaming: send over a gRPC stream of the sequence's own.
            timeout: seconds that each request may take, waiting for a slot included.
            cooldown: seconds without a request after which the model has certainly forgotten the
                sequence, if that is more than its configuration says.
            check: False for a model that keeps state by itself, is reached through another one, or
                whose configuration may not be read. ``cooldown`` must be said then.
            end_inputs: inputs to send with END if the sequence is closed without one.
            farewell: the former name of ``end_inputs``.

        Raises:
            InvalidArgument: the model keeps no sequences, its CORRID control is too narrow for
                the manager's pool, or streaming over HTTP is asked for.
            Exhausted: the pool cannot give an ID now.
        """
        self._check_home()
        taken = Acquired()
        end_inputs = farewell if end_inputs is None else end_inputs
        try:
            self._runner.start()
            plan = self._runner.run(
                lambda: self._begin_sequence(model, timeout, cooldown, check, end_inputs, taken)
            )
            if self._session.needs_maintenance:
                self._runner.wake()
            return Sequence(self._runner, plan, streaming, end_inputs, self, caller())
        except BaseException as error:
            self._runner.take_back(taken, error)
            raise

    def _run_acquire(self, count: int) -> IDs:
        self._check_home()
        taken = Acquired()
        try:
            self._runner.start()
            self._runner.run(lambda: self._acquire(count, taken))
            if self._session.needs_maintenance:
                self._runner.wake()
            return as_ids(taken)
        except BaseException as error:
            self._runner.take_back(taken, error)
            raise

    def _number(self, operation: Operation) -> int:
        self._check_home()
        event = self._runner.run(lambda: self._session.read(operation, self._deadline()))
        return int(event.output[0])
