"""A sequence: one correlation ID through its life on one model."""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from tritonclient.utils import InferenceServerException

from ..errors import InvalidArgument, Unavailable
from ._process import BoundToProcess
from ._target import Target
from ._transport import Transport, unreachable

__all__ = ["Sequence"]

# How long a block that ends with an exception waits for a server that does not answer, in seconds.
_HURRY_S = 2.0
_SET_BY_US = {
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "request_id",
    "timeout",
    "client_timeout",
}

_log = logging.getLogger("cidalloc.client")


class Sequence(BoundToProcess):
    """A sequence with an ID of its own; made by `Client.sequence`, used with ``with``.

    START goes with the first request. When the block ends the ID goes back: it may soon be used
    again if END was answered, nothing is unanswered and nothing failed; else it cools until Triton
    has certainly forgotten the sequence.
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
        self._sent = False  # a request may have reached Triton
        self._answered = False  # one has
        self._unanswered = 0
        self._certain = True  # how every other request ended is known
        self._ended = False
        self._closed = False

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
            Unavailable: no answer, within the sequence's ``timeout`` or at all.
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

        They are ``sequence_id``, ``sequence_start``, ``sequence_end`` and ``timeout``. Since the
        sequence does not see the answer, its ID cools after use, as if END had not been answered.
        """
        flags = self._next_flags(end)
        with self._lock:
            self._unanswered -= 1
            self._answered = True  # for all that can be known
            self._certain = False
        return flags

    def close(self) -> None:
        """Wait for what is unanswered, and give the ID back. Closing again does nothing.

        Raises:
            Unavailable: the manager did not answer. Then the ID may have gone back, or not: trying
                again could take it from its next holder.
        """
        self._close(self._patience)

    def _close(self, patience: float) -> None:
        self._check_fork()
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._sender.close(patience)
        with self._lock:
            settled = self._ended and self._certain and not self._unanswered
        cooldown = self._target.idle_s + self._timeout
        self._release(self._cid, ended=settled or not self._sent, cooldown=cooldown)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self._close(_HURRY_S)
        except Exception as failure:
            # What went wrong in the block matters more.
            _log.warning("could not give back correlation ID %d: %s", self._cid, failure)

    def _submit(
        self,
        inputs: list[Any],
        end: bool,
        options: dict[str, Any],
        send: Callable[..., Future[Any]],
    ) -> Future[Any]:
        taken = _SET_BY_US & options.keys()
        if taken:
            raise InvalidArgument(f"the sequence sets {', '.join(sorted(taken))} by itself")
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
        self._check_fork()
        with self._lock:
            if self._closed or self._ended:
                raise InvalidArgument(f"{self!r} takes no more requests: open a new one")
            start = not self._answered and not self._unanswered
            self._unanswered += 1
            self._sent = True
            self._ended = end
        # Without the timeout a request could wait in Triton for ever, and come to life when the ID
        # is somebody else's.
        return {
            "sequence_id": self._cid,
            "sequence_start": start,
            "sequence_end": end,
            "timeout": int(self._timeout * 1e6),
        }

    def _settle(self, end: bool, error: BaseException | None) -> None:
        """Note how a request ended; one that failed may have been applied, or be on its way yet."""
        with self._lock:
            self._unanswered -= 1
            if error is None:
                self._answered = True
            else:
                self._certain = False
                self._ended = self._ended and not end


class _UnarySender:
    """Requests of their own; those sent without waiting go one after the other."""

    def __init__(self, transport: Transport, patience: float) -> None:
        self._transport = transport
        self._patience = patience
        self._worker: ThreadPoolExecutor | None = None
        self._queue: set[Future[Any]] = set()

    def _send(self, model: str, inputs: list[Any], options: dict[str, Any]) -> Any:
        try:
            return self._transport.infer(self._patience, model, inputs, **options)
        except Exception as error:
            raise unreachable(error, self._transport.url) or error from error

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
        future = self._worker.submit(self._send, model, inputs, options)
        self._queue.add(future)
        future.add_done_callback(self._queue.discard)
        return future

    def close(self, patience: float) -> None:
        """Give what is unanswered so many seconds, and drop what has not been sent by then."""
        if self._worker is not None:
            concurrent.futures.wait(set(self._queue), patience)
            self._worker.shutdown(wait=False, cancel_futures=True)


class _StreamSender:
    """A gRPC stream; its answers are told apart by their request IDs."""

    def __init__(self, transport: Transport, patience: float) -> None:
        self._url = transport.url
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: dict[str, Future[Any]] = {}
        self._triton = transport.open_stream(self._receive)

    def infer(self, model: str, inputs: list[Any], **options: Any) -> Future[Any]:
        number = str(next(self._numbers))
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # it is as good as sent
        with self._lock:
            self._waiting[number] = future
        try:
            self._triton.async_stream_infer(model, inputs, request_id=number, **options)
        except BaseException as error:
            with self._lock:
                self._waiting.pop(number, None)
            if isinstance(error, InferenceServerException) and "valid state" in str(error):
                raise Unavailable(
                    f"the stream to {self._url} broke: open a new sequence"
                ) from error
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
                each.set_exception(unreachable(error, self._url) or error)

    def close(self, patience: float) -> None:
        """Give what is unanswered so many seconds, then cut it off."""
        with self._lock:
            waiting = list(self._waiting.values())
        concurrent.futures.wait(waiting, patience)
        # In order first: tritonclient leaves a thread behind when it cancels a stream. But a server
        # that has stopped never closes its side; with nothing unanswered, nothing is lost by that.
        stop = threading.Thread(target=self._triton.stop_stream, daemon=True)
        stop.start()
        stop.join(0 if self._waiting else _HURRY_S)
        if stop.is_alive():
            self._triton.stop_stream(cancel_requests=True)
        self._triton.close()
