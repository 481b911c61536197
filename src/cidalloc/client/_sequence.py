"""A sequence: one correlation ID through its life on one model."""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from tritonclient.grpc import InferenceServerClient as GrpcClient

from ..errors import CidError, InvalidArgument, Unavailable
from ._process import BoundToProcess
from ._target import Target
from ._transport import Transport

__all__ = ["Sequence"]

_log = logging.getLogger("cidalloc.client")


class Sequence(BoundToProcess):
    """A sequence with an ID of its own; made by `Client.sequence`, used with ``with``.

    START goes with the first request. When the block ends the ID goes back: at once if END was
    answered and nothing is unanswered; else it cools until Triton has certainly forgotten it.
    """

    def __init__(
        self,
        transport: Transport,
        target: Target,
        cid: int,
        release: Callable[..., None],
        streaming: bool,
        timeout: float,
    ) -> None:
        super().__init__()
        self._target = target
        self._cid = cid
        self._release = release
        self._timeout = timeout
        # Triton's own limit on a request comes first; ours is for a server that is away.
        self._patience = timeout + 5.0
        sender = _StreamSender if streaming else _UnarySender
        self._sender: _StreamSender | _UnarySender = sender(transport, self._patience)
        self._lock = threading.Lock()
        self._unanswered = 0
        self._sent = self._answered = self._failed = self._ended = False
        self._closed = self._released = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "ended" if self._ended else "open"
        return f"<cidalloc Sequence {self._cid} on {self._target.name}, {state}>"

    @property
    def cid(self) -> int:
        """The correlation ID, ``sequence_id`` in tritonclient."""
        return self._cid

    @property
    def model(self) -> str:
        """The model that the sequence is on."""
        return self._target.name

    def infer(self, inputs: list[Any], *, end: bool = False, **options: Any) -> Any:
        """Send a request and return its result.

        Args:
            inputs: tritonclient's ``InferInput`` objects, of the client's protocol.
            end: this is the last request of the sequence.
            options: further arguments of tritonclient's ``infer`` (``outputs``, ``priority``, …).

        Returns:
            tritonclient's ``InferResult``.

        Raises:
            InvalidArgument: the sequence has ended, or an argument is one that it sets itself.
            Unavailable: no answer within the sequence's ``timeout``.
            tritonclient.utils.InferenceServerException: what Triton answered.
        """
        future = self._submit(inputs, end, options, self._sender.infer)
        try:
            return future.result(self._patience)
        except (TimeoutError, concurrent.futures.TimeoutError):  # two classes up to Python 3.10
            raise Unavailable(f"no answer to {self!r} within {self._timeout} s") from None

    def async_infer(self, inputs: list[Any], *, end: bool = False, **options: Any) -> Future[Any]:
        """Send a request and return the future of its result, in the manner of `infer`.

        The model gets the requests in the order of the calls. On a stream they are sent without
        waiting for answers; otherwise each is sent when the one before it was answered.
        """
        return self._submit(inputs, end, options, self._sender.async_infer)

    def flags(self, *, end: bool = False) -> dict[str, Any]:
        """Return the arguments that make a request of your own part of this sequence.

        They are ``sequence_id``, ``sequence_start`` and ``sequence_end``. Since the sequence
        does not see the answer, its ID cools after use, as if END had not been answered.
        """
        flags = self._next_flags(end)
        with self._lock:
            self._failed = self._answered = True  # as far as can be known
            self._unanswered -= 1
        return flags

    def close(self) -> None:
        """Wait for what is unanswered, and give the ID back.

        If that fails, closing again tries it again; otherwise closing again does nothing.
        """
        self._check_fork()
        if self._released:
            return
        self._closed = True
        self._sender.close()
        forgotten = not self._sent or (self._ended and not self._failed and not self._unanswered)
        cooldown = self._target.idle_s + self._timeout
        self._release(self._cid, ended=forgotten, cooldown=cooldown)
        self._released = True

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CidError as failure:
            if error is None:
                raise
            # What went wrong in the block matters more.
            _log.warning("could not give back correlation ID %d: %s", self._cid, failure)

    def _submit(
        self,
        inputs: list[Any],
        end: bool,
        options: dict[str, Any],
        send: Callable[..., Future[Any]],
    ) -> Future[Any]:
        self._check_fork()
        taken = {"sequence_id", "sequence_start", "sequence_end", "request_id"} & options.keys()
        if taken:
            raise InvalidArgument(f"the sequence sets {', '.join(sorted(taken))} by itself")
        options.setdefault("timeout", int(self._timeout * 1e6))
        flags = self._next_flags(end)
        try:
            future = send(self.model, inputs, **flags, **options)
        except BaseException as error:
            self._settle(end, error)
            raise

        def settle(done: Future[Any]) -> None:
            self._settle(end, CancelledError() if done.cancelled() else done.exception())

        future.add_done_callback(settle)
        return future

    def _next_flags(self, end: bool) -> dict[str, Any]:
        with self._lock:
            if self._closed or self._ended:
                raise InvalidArgument(f"{self!r} takes no more requests: open a new one")
            start = not self._answered and not self._unanswered
            self._unanswered += 1
            self._sent = True
            self._ended = end
        return {"sequence_id": self._cid, "sequence_start": start, "sequence_end": end}

    def _settle(self, end: bool, error: BaseException | None) -> None:
        """Note how a request ended.

        One that failed may yet be on its way, or have been applied: only a new END after it
        could tell, and the ID cools anyway.
        """
        with self._lock:
            self._unanswered -= 1
            if error is None:
                self._answered = True
            else:
                self._failed = True
                self._ended = self._ended and not end


class _UnarySender:
    """Requests of their own; those sent without waiting go one after the other."""

    def __init__(self, transport: Transport, patience: float) -> None:
        self._transport = transport
        self._patience = patience
        self._worker: ThreadPoolExecutor | None = None

    def _send(self, model: str, inputs: list[Any], options: dict[str, Any]) -> Any:
        options = {**self._transport.deadline(self._patience), **options}
        return self._transport.triton(self._patience).infer(model, inputs, **options)

    def infer(self, model: str, inputs: list[Any], **options: Any) -> Future[Any]:
        if self._worker is not None:
            return self.async_infer(model, inputs, **options)
        future: Future[Any] = Future()
        try:
            future.set_result(self._send(model, inputs, options))
        except Exception as error:
            future.set_exception(error)
        return future

    def async_infer(self, model: str, inputs: list[Any], **options: Any) -> Future[Any]:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "cidalloc-sequence")
        return self._worker.submit(self._send, model, inputs, options)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()


class _StreamSender:
    """A gRPC stream; its answers are told apart by their request IDs."""

    def __init__(self, transport: Transport, patience: float) -> None:
        triton = transport.open_triton(patience)
        if not isinstance(triton, GrpcClient):
            triton.close()
            raise InvalidArgument(f"streaming needs gRPC, and {transport.url} is HTTP")
        self._triton = triton
        self._patience = patience
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: dict[str, Future[Any]] = {}
        self._last_sent = 0.0
        triton.start_stream(self._receive)

    def infer(self, model: str, inputs: list[Any], **options: Any) -> Future[Any]:
        number = str(next(self._numbers))
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # it is as good as sent
        with self._lock:
            self._waiting[number] = future
            self._last_sent = time.monotonic()
        try:
            self._triton.async_stream_infer(model, inputs, request_id=number, **options)
        except BaseException:
            with self._lock:
                self._waiting.pop(number, None)
            raise
        return future

    async_infer = infer

    def _receive(self, result: Any, error: Exception | None) -> None:
        with self._lock:
            if error is None:
                future = self._waiting.pop(result.get_response().id, None)
                settled = [] if future is None else [future]
            else:
                # The stream does not say whose error it is, and the sequence is broken anyway.
                settled, self._waiting = list(self._waiting.values()), {}
        for each in settled:
            if error is None:
                each.set_result(result)
            else:
                each.set_exception(error)

    def close(self) -> None:
        """Give what is unanswered its time, then cut it off."""
        with self._lock:
            waiting = list(self._waiting.values())
            left = self._last_sent + self._patience - time.monotonic()
        concurrent.futures.wait(waiting, max(0.0, left))
        self._triton.stop_stream(cancel_requests=bool(self._waiting))
        self._triton.close()
