"""The client for threads."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np

from ...codes import Operation
from ...protocol import IDs
from ..core.arguments import whole
from ..core.client import SEQUENCE_TIMEOUT_S, Base
from ..core.fork_guard import ProcessIdentity, caller
from ..core.lease import Acquired
from ..core.sequence import SequenceCore
from ..core.tensors import Inputs
from .runner import Runner
from .sequence import Sequence
from .transport import connect

__all__ = ["Client"]


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
            is needed, and releases it when its use ends.
        fallback: with ``"random"``, `sequence` uses a random 63-bit ID if the manager cannot be
            reached and the model's correlation IDs have 64 bits. Such an ID is not managed.
        tidy: for each model named, inputs of END. While its session is open, the client sends END
            for sequences on these models whose clients have died, in the background and over gRPC.
            These inputs are also the default of ``end_inputs`` of `sequence`.
        servers: URL of the models' servers, if ``url`` is only the manager's. Sequences go there,
            and the configurations of their models are read there, with the same headers and
            options. Through a load balancer use ``streaming=True``. Not together with ``tidy``.
        options: further arguments of tritonclient's ``InferenceServerClient``, such as TLS options.

    Raises:
        InvalidArgument: the URL or an argument is not valid.

    Every method may raise `Unavailable` (the server does not answer), `SessionExpired` (no
    heartbeat was answered for ``ttl`` seconds), `RegistryMismatch` (several managers answer) and
    `Forked` (the caller is a forked child process).
    """

    _connect = staticmethod(connect)
    _new_runner = Runner
    _runner: Runner

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
        self._runner.close(self._timeout)

    def acquire(self, *, timeout: float | None = None) -> int:
        """Acquire one ID and return it. Most calls need no round trip.

        Args:
            timeout: seconds to wait for an ID if the pool is exhausted. By default, and with 0,
                this does not wait. The time that the manager takes to answer comes on top.

        Raises:
            InvalidArgument: ``timeout`` is not a time of 0 seconds to a day.
            Draining: the server is being drained.
            Exhausted: all IDs of the pool are held or cooling, or others wait for the next ones.
                The text says when the next ID is due, and `Exhausted.due_s` is this time.
        """
        if self._home is not ProcessIdentity.current:
            self._check_home()
        if timeout is not None:  # not before the calls that wait
            return int(self.acquire_many(1, timeout=timeout)[0])
        lease, cid = self._session.lease, 0
        try:
            with self._runner.lock:
                cid = lease.take()
            if cid:
                if lease.cache.needs_maintenance:
                    self._runner.wake()
                return cid
        except BaseException as error:  # of a signal handler, or no thread can be started
            taken = Acquired([cid] if cid else [])
            taken.lease = lease
            self._runner.take_back(taken, error)
            raise
        return int(self._acquire(1, None)[0])

    def acquire_many(self, count: int, *, timeout: float | None = None) -> IDs:
        """Acquire ``count`` IDs, all or none; return them as a uint64 array of shape [count].

        Args:
            count: the number of IDs.
            timeout: seconds to wait if the pool has fewer free IDs; see `acquire`.

        Raises:
            InvalidArgument: ``count`` is not a positive integer, or ``timeout`` is not a time of 0
                seconds to a day.
            LimitExceeded: ``count`` is more than one request may acquire.
            Draining: the server is being drained.
            Exhausted: the pool has fewer free IDs, or others wait for them.
        """
        self._check_home()
        return self._acquire(whole("count", count), self._until("timeout", timeout))

    def release(self, cid: int, *, ended: bool = False, cooldown: float | None = None) -> None:
        """Release an ID. It needs no round trip: the heartbeat tells the manager.

        Args:
            cid: the ID.
            ended: END was sent and answered with success, on every model that the ID was used on.
                Then this client may use the ID again after the manager's minimum cooldown.
            cooldown: otherwise, seconds after which Triton has certainly forgotten the sequence:
                the model's idle time, plus the longest time that a request may take. Default: the
                manager's, which is two minutes by default. If the client dies before it has told
                the manager, the ID cools for the manager's default, or for the longest time that
                the client's sequences need.

        Raises:
            NotHeld: this client does not hold the ID.
            OutOfRange: the number is not an ID.
            SessionExpired: the ID was lost with its session, so the manager has it already.
        """
        self._release(cid, ended, cooldown)

    def release_many(
        self, cids: Iterable[int], *, ended: bool = False, cooldown: float | None = None
    ) -> None:
        """Release several IDs, all or none. See `release`.

        Raises:
            Duplicate: an ID is given twice.
            NotHeld, OutOfRange, SessionExpired: an ID cannot be released.
        """
        self._release_many(cids, ended, cooldown)

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
        return self._runner.run(self._session.status(self._deadline()))

    def sequence(
        self,
        model: str,
        *,
        streaming: bool = False,
        timeout: float = SEQUENCE_TIMEOUT_S,
        cooldown: float | None = None,
        check: bool = True,
        end_inputs: Inputs | None = None,
        wait: float | None = None,
        farewell: Inputs | None = None,
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
                END. Default: those of the client's ``tidy``, if it has any for the model.
            wait: seconds to wait for an ID if the pool is exhausted, and then for a slot of the
                model, if this is longer than ``timeout``. By default, and with 0, this waits for no
                ID, and for a slot as long as ``timeout``.
            farewell: the former name of ``end_inputs``.

        Raises:
            InvalidArgument: the model has no sequence batching, its CORRID control is too narrow
                for the manager's pool, or streaming is used over HTTP.
            Draining: the server is being drained.
            Exhausted: all IDs of the pool are held or cooling, or others wait for the next ones.
        """
        self._check_home()
        taken = Acquired()
        end_inputs = self._end_inputs(model, end_inputs, farewell)
        try:
            self._runner.start()
            plan = self._runner.run(
                self._begin_sequence(model, timeout, cooldown, check, taken, wait)
            )
            if self._session.lease.cache.needs_maintenance:
                self._runner.wake()
            core = SequenceCore(self._runner, plan, streaming, end_inputs)
            return Sequence(core, self, caller())
        except BaseException as error:
            self._runner.take_back(taken, error)
            raise

    def _acquire(self, count: int, until: float | None) -> IDs:
        session, taken = self._session, Acquired()
        try:
            self._runner.start()
            acquiring = session.acquire(count, None, self._deadline(), taken, until)
            self._runner.run(acquiring)
            if session.lease.cache.needs_maintenance:
                self._runner.wake()
            return np.array(taken, np.uint64)
        except BaseException as error:
            self._runner.take_back(taken, error)
            raise

    def _number(self, operation: Operation) -> int:
        self._check_home()
        return self._runner.run(self._session.number(operation, self._deadline()))
