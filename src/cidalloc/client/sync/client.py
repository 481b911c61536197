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
    # A child of multiprocessing has imported it.
    if "multiprocessing.util" in sys.modules and _hooked is not ProcessIdentity.current:
        from multiprocessing import parent_process, util

        if parent_process() is not None:
            _hooked = ProcessIdentity.current
            util.Finalize(None, _close_all, exitpriority=100)


class Client(Base):
    """A client of the manager on a Triton server, for threads.

    A client has one session with the manager. The session is opened by the first call that needs
    it, is renewed in the background, and is closed by `close` or at the end of a ``with`` block.
    The client caches some IDs, so that most calls need no round trip. It may be used from many
    threads, and belongs to the process that made it.

    Args:
        url: ``host:port`` or ``grpc://host:port`` for gRPC, ``http://host:port`` for HTTP;
            ``grpcs`` and ``https`` with TLS.
        model: the name of the manager model.
        ttl: session TTL in seconds: the session expires at the manager if no heartbeat arrives for
            this time. The manager's settings limit it.
        label: the name of this client in the manager's status. Default: host and process ID.
        timeout: seconds that a call waits for the manager.
        headers: sent with every request.
        transport: used instead of a connection to ``url``.
        ahead: maximum number of unused IDs in the cache. With 0 the client acquires each ID when it
            is needed, and releases it when it is no longer used.
        fallback: with ``"random"``, `sequence` uses a random 63-bit ID if the manager cannot be
            reached and the model's correlation IDs have 64 bits. Such an ID is not managed.
        options: further arguments of tritonclient's ``InferenceServerClient``, such as TLS options.

    Raises:
        InvalidArgument: the URL or an argument is not valid.

    Every method may raise `Unavailable` (the server does not answer), `SessionExpired` (no
    heartbeat was answered for ``ttl`` seconds), `RegistryMismatch` (several managers answer) and
    `Forked` (the caller is a forked child process).
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
        """Release all IDs, close the session and the connections. A second call does nothing.

        IDs in use cool until their models have certainly forgotten them. Futures without an answer
        fail with `SequenceLost`. A request that blocks another thread ends with its answer. If the
        manager cannot be reached, it releases the IDs when the lease expires.
        """
        self._check_home()
        self._close(self._timeout)

    def _close(self, patience: float) -> None:
        try:
            self._runner.finish_all()
            self._runner.run(lambda: self._session.close(self._session.now() + patience))
        finally:
            if self._session.closed:  # if it was broken off before, closing again goes on
                self._runner.close()

    def acquire(self) -> int:
        """Acquire one ID and return it. Most calls need no round trip.

        Raises:
            Exhausted: all IDs of the pool are held or cooling.
        """
        if self._home is not ProcessIdentity.current:
            self._check_home()
        session, cid = self._session, 0
        try:
            with self._lock:
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
        """Acquire ``count`` IDs, all or none; return them as a uint64 array of shape [count].

        Raises:
            InvalidArgument: ``count`` is not a positive integer.
            LimitExceeded: ``count`` is more than one request may acquire.
            Exhausted: the pool has fewer free IDs.
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
                done = session.recycle(cid)
            if done:
                if session.needs_maintenance:
                    self._runner.wake()
                return
        self.release_many([cid], ended=ended, cooldown=cooldown)

    def release_many(
        self, cids: Iterable[int], *, ended: bool = False, cooldown: float | None = None
    ) -> None:
        """Release several IDs, all or none. See `release`.

        Raises:
            Duplicate: an ID is given twice.
            NotHeld, OutOfRange, SessionExpired: an ID cannot be released.
        """
        self._check_home()
        found = several(cids)
        try:
            with self._lock:
                self._give(found, bool(ended), cooldown)
        finally:
            self._runner.wake()

    def active(self) -> int:
        """Return the number of IDs that all clients hold, those in their caches included."""
        return self._number(Operation.ACTIVE)

    def inactive(self) -> int:
        """Return the number of IDs that were released and not issued again."""
        return self._number(Operation.INACTIVE)

    def peak(self) -> int:
        """Return the maximum number of IDs that were held at the same time."""
        return self._number(Operation.PEAK)

    def status(self) -> dict[str, Any]:
        """Return the status of the manager: pool, sessions and counters."""
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
        """Acquire an ID and return a sequence on ``model`` that uses it. Use it with ``with``.

        Args:
            model: a model with sequence batching, or an ensemble with such a step. The client reads
                its configuration.
            streaming: use a gRPC stream for the sequence.
            timeout: seconds that each request may take, including the wait for a slot.
            cooldown: seconds after the last request until the model has certainly forgotten the
                sequence. Needed only if this is more than the model's configuration says.
            check: use False for a model that keeps state by itself, is called by another model, or
                has a configuration that cannot be read. ``cooldown`` is then required.
            end_inputs: inputs of the END request that is sent if the sequence is closed without
                END.
            farewell: the former name of ``end_inputs``.

        Raises:
            InvalidArgument: the model has no sequence batching, its CORRID control is too narrow
                for the manager's pool, or streaming is used over HTTP.
            Exhausted: all IDs of the pool are held or cooling.
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
