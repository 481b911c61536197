"""Requests of a sequence, and the stream over which they may go."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any

from ...errors import InvalidArgument, Unavailable
from .model_info import ModelInfo
from .result import Result, has_outputs
from .transport import Receive, Stream

__all__ = ["Answers", "Request", "SequenceStream", "decoupled"]


class Request:
    """One request of a sequence.

    Args:
        inputs: tritonclient's inputs.
        end: END goes with it.
        options: further arguments of tritonclient's ``infer``, checked.
        timeout: its time limit in seconds.
        many: it may have any number of answers.

    Attributes:
        drops: START and END go with it, for what the model may keep of a forgotten sequence.
        future: gets the result; None if nothing but the calling thread waits for it.
        waiter: the calling thread waits here; None if it sends the request itself.
        answers: the queue for answers before the last one; None if nothing reads them.
        left: its caller does not read its answers any more.
        until: the time at which the request ends without an answer.
        doubt: the last `Session.doubts` for which it waited.
        handed_over: a transport has it, and tells when it is over.
        number: its ID on a stream.
    """

    __slots__ = (
        *("answers", "doubt", "drops", "end", "future", "handed_over", "inputs", "left", "many"),
        *("number", "options", "timeout", "until", "waiter"),
    )

    def __init__(
        self, inputs: list[Any], end: bool, options: dict[str, Any], timeout: float, many: bool
    ) -> None:
        self.inputs, self.end, self.options = inputs, end, options
        self.timeout, self.many = timeout, many
        self.future: Any = None
        self.waiter: Waiter | None = None
        self.answers: Any = None
        self.drops = self.left = self.handed_over = False
        self.until, self.doubt = 0.0, 0
        self.number = ""

    @property
    def is_awaited(self) -> bool:
        """Whether something waits for it that `Requests.look` can end."""
        return self.future is not None or self.waiter is not None

    @property
    def is_cancelled(self) -> bool:
        """Whether its caller does not wait for it any more."""
        return self.left or (self.future is not None and bool(self.future.cancelled()))

    def starts(self) -> bool:
        """Note that it is sent; return False if its caller has cancelled it."""
        begin = getattr(self.future, "set_running_or_notify_cancel", None)  # not in asyncio
        if begin is not None:
            return bool(begin())
        return self.future is None or not self.future.cancelled()

    def tell(self, result: Any, error: BaseException | None) -> None:
        """Pass the result or the error on to its caller, which may have cancelled it."""
        answers = self.answers  # another thread may leave the loop over them
        if answers is not None:
            if error is None and has_outputs(result):
                answers.put_nowait((result, None))
            answers.put_nowait((None, error or StopIteration()))
        if self.waiter is not None:
            self.waiter.tell(result, error)
        if self.future is None:
            return
        with contextlib.suppress(futures.InvalidStateError, asyncio.InvalidStateError):
            if error is None:
                self.future.set_result(result)
            else:
                self.future.set_exception(error)
                self.future.exception()  # so that asyncio does not log an error nobody looks at


class Waiter:
    """One result for one thread. It costs a third of a `concurrent.futures.Future`."""

    __slots__ = ("_outcome", "_told")

    def __init__(self) -> None:
        self._outcome: tuple[Any, BaseException | None] = None, None
        self._told = threading.Lock()
        self._told.acquire()

    def tell(self, result: Any, error: BaseException | None) -> None:
        """Pass the result or the error on; called once."""
        self._outcome = result, error
        self._told.release()

    def result(self, limit: float) -> Any:
        """Wait for the result and return it, or raise the error; called once.

        Raises:
            Unavailable: it did not come within ``limit`` seconds. `Requests.look` tells it before,
                unless an exception of a signal handler has broken that off.
        """
        if not self._told.acquire(timeout=limit):
            raise Unavailable("no answer in time")
        result, error = self._outcome
        if error is not None:
            raise error
        return result


class Answers:
    """The answers to one request, in their order. `Sequence.stream` makes it.

    Args:
        request: the request, which is sent.
        answers: the queue of the answers; one for threads, or one of asyncio.
    """

    def __init__(self, request: Request, answers: Any) -> None:
        self._request = request
        self._answers = answers
        self._over: BaseException | None = None

    def _next(self, answer: tuple[Any, BaseException | None]) -> Result:
        """Return an answer; raise the error or `StopIteration` that the queue ends with."""
        result: Result
        result, self._over = answer
        if self._over is not None:
            raise self._over
        return result

    def close(self) -> None:
        """Read no more answers. The request goes on, and END counts only with its last answer."""
        self._request.left, self._request.answers = True, None

    def __del__(self) -> None:
        self.close()


class SequenceStream:
    """The stream of one sequence. It numbers the requests, and finds the request of an answer.

    Args:
        opener: opens the stream.
        target: the model.
        checked: the model's configuration was read: if it is not decoupled, it answers once.
        more: is called with a request and an answer that is not the last one.
        over: is called with each request that is over, and its last answer or its error.

    Attributes:
        ended: `end` was called.

    Raises:
        InvalidArgument: streaming needs gRPC, and the transport is HTTP.
        Unavailable: the system refuses a thread.
    """

    def __init__(
        self,
        opener: Callable[[Receive], Stream],
        target: ModelInfo,
        checked: bool,
        more: Callable[[Request, Any], object],
        over: Callable[[Request, Any, BaseException | None], object],
    ) -> None:
        self._model = target.name
        self._checked = checked
        self._more = more
        self._over = over
        self._waiting: dict[str, Request] = {}
        self._count = 0
        self._cut_at = float("inf")
        self.ended = False
        try:
            self._stream = opener(self._receive)
        except InvalidArgument as error:
            if target.decoupled:
                raise InvalidArgument(f"model {target.name} is decoupled: {error}") from None
            raise

    def send(self, request: Request) -> None:
        """Send a request.

        Raises:
            Unavailable: the stream broke.
        """
        self._count += 1
        name = request.options.get("request_id")
        request.number = f"{name}/{self._count}" if name else str(self._count)
        self._waiting[request.number] = request
        options = {**request.options, "request_id": request.number}
        if request.many or not self._checked:
            options["tell_final"] = True
        self._stream.send(self._model, request.inputs, **options)

    def forget(self, request: Request) -> None:
        """Drop all answers to a request."""
        self._waiting.pop(request.number, None)

    def end(self, cut_at: float) -> None:
        """Send nothing more. A server that has stopped never closes its side: cut it then."""
        self.ended = True
        self._cut_at = cut_at
        self._stream.end()

    def look(self, now: float) -> bool:
        """Cut the stream if its server did not close it in time; return whether to look again."""
        if self._stream.over or now >= self._cut_at:
            self._stream.cut()
            self._cut_at = float("inf")
        return self._cut_at < float("inf")

    @property
    def over(self) -> bool:
        """Whether it is closed."""
        return self._stream.over

    def suspect(self) -> None:
        """Note that an answer did not come in time: the next stream takes a new connection."""
        self._stream.suspect()

    def _receive(self, number: str, final: bool, result: Any, error: BaseException | None) -> None:
        if number:
            found = self._waiting.get(number)
            whose = [] if found is None else [found]
        else:
            # The stream does not tell which request failed, and the sequence is broken anyway.
            whose = list(self._waiting.values())
        one = self._checked or error is not None or (final and has_outputs(result))
        for request in whose:
            if result is not None:
                result.get_response().id = request.options.get("request_id", "")
            if not (one or request.many):
                self._over(request, None, decoupled(self._model))
            elif final or not request.many:
                self._over(request, result, error)
            else:
                self._more(request, result)


def decoupled(model: str) -> InvalidArgument:
    """Return the error of a request that takes one answer of a model with any number."""
    return InvalidArgument(
        f"model {model} is decoupled: it answers a request any number of times. Use stream(), which"
        " returns all answers"
    )
