"""A sequence: one correlation ID through its life on one model, with blocking calls."""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

from tritonclient.utils import InferenceServerException

from ..errors import Unavailable
from ._drive import Driver
from ._talk import HURRY_S, Plan, Talk
from ._transport import Transport

__all__ = ["Sequence"]

_log = logging.getLogger("cidalloc.client")


class _Watch(NamedTuple):
    """What a sender asks its sequence."""

    check: Callable[[], None]
    explain: Callable[[BaseException], BaseException]


class Sequence(Talk):
    """A sequence with an ID of its own; made by `Client.sequence`, used with ``with``.

    START goes with the first request. When the block ends the ID goes back: it may soon be used
    again if END was answered, nothing is unanswered and nothing failed; else it cools until Triton
    has certainly forgotten the sequence.
    """

    def __init__(
        self,
        driver: Driver,
        model: str,
        begin: Callable[[], Plan],
        streaming: bool,
        farewell: list[Any] | None,
        client: object,
    ) -> None:
        super().__init__(driver, driver.transport.url, model, farewell)
        self._client = client  # which would be closed if nobody had it any more
        self._begin(begin())
        sender = _StreamSender if streaming else _UnarySender
        watch = _Watch(self._check_again, self._explain)
        try:
            self._sender: _StreamSender | _UnarySender = sender(
                driver.transport, self._patience, watch
            )
        except BaseException:
            self._mark_closed()
            raise

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
            SequenceLost: Triton has forgotten the sequence, or its ID was lost with its session.
            SessionExpired: no heartbeat was answered in time; that may still change.
            Unavailable: no answer, or no slot, within the sequence's ``timeout``.
            tritonclient.utils.InferenceServerException: what else Triton answered.
        """
        future = self._submit(inputs, end, options, self._sender.infer)
        try:
            return future.result(self._patience)
        except (TimeoutError, concurrent.futures.TimeoutError):  # two classes up to Python 3.10
            raise self._no_answer() from None

    def async_infer(self, inputs: list[Any], *, end: bool = False, **options: Any) -> Future[Any]:
        """Send a request and return the future of its result, in the manner of `infer`.

        The model gets the requests in the order of the calls. On a stream they are sent without
        waiting for answers; otherwise each is sent when the one before it was answered.

        Raises:
            InvalidArgument: as `infer`. What goes wrong with the request is in the future.
        """
        return self._submit(inputs, end, options, self._sender.async_infer)

    def close(self) -> None:
        """Send the farewell, wait for what is unanswered, and give the ID back.

        Closing again does nothing.
        """
        self._close(self._patience)

    def _close(self, patience: float) -> None:
        self._check_fork()
        if self._life.closed:
            return
        if self._may_part():
            assert self._farewell is not None
            try:
                self._submit(self._farewell, True, {}, self._sender.async_infer).result(patience)
            except (Exception, CancelledError) as error:
                _log.warning("the farewell of %r failed: %s", self, error or type(error).__name__)
        self._sender.close(patience)
        self._mark_closed()

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(self._patience if error is None else HURRY_S)

    def _submit(
        self,
        inputs: list[Any],
        end: bool,
        options: dict[str, Any],
        send: Callable[..., Future[Any]],
    ) -> Future[Any]:
        flags = self._prepare(end, options)
        try:
            future = send(self.model, inputs, **flags, **options)
        except BaseException as error:
            self._settle(end, error)
            raise

        def settle(done: Future[Any]) -> None:
            self._settle(end, CancelledError() if done.cancelled() else done.exception())

        future.add_done_callback(settle)
        return future


class _UnarySender:
    """Requests of their own; those sent without waiting go one after the other."""

    def __init__(self, transport: Transport, patience: float, watch: _Watch) -> None:
        self._transport = transport
        self._patience = patience
        self._watch = watch
        self._worker: ThreadPoolExecutor | None = None
        self._queue: set[Future[Any]] = set()

    def _send(self, model: str, inputs: list[Any], options: dict[str, Any]) -> Any:
        try:
            self._watch.check()
            return self._transport.infer(self._patience, model, inputs, **options)
        except Exception as error:
            raise self._watch.explain(error)  # noqa: B904 it has its cause

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

    def __init__(self, transport: Transport, patience: float, watch: _Watch) -> None:
        self._url = transport.url
        self._watch = watch
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
                unsettled = self._waiting.pop(number, None) is not None
            if not (isinstance(error, InferenceServerException) and "valid state" in str(error)):
                raise
            # It broke before this request, not after: the caller cannot know which, so need not.
            if unsettled:  # or the stream's own thread was faster
                broke = Unavailable(f"the stream to {self._url} broke: open a new sequence")
                broke.__cause__ = error
                future.set_exception(broke)
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
                each.set_exception(self._watch.explain(error))

    def close(self, patience: float) -> None:
        """Give what is unanswered so many seconds, then cut it off."""
        with self._lock:
            waiting = list(self._waiting.values())
        concurrent.futures.wait(waiting, patience)
        # In order first: tritonclient leaves a thread behind when it cancels a stream. But a server
        # that has stopped never closes its side; with nothing unanswered, nothing is lost by that.
        stop = threading.Thread(target=self._triton.stop_stream, daemon=True)
        stop.start()
        stop.join(0 if self._waiting else HURRY_S)
        if stop.is_alive():
            self._triton.stop_stream(cancel_requests=True)
        self._triton.close()
