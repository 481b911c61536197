"""Requests of a sequence, and the stream over which they may go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent import futures
from typing import Any

from ...errors import InvalidArgument
from .transport import Receive, Stream

__all__ = ["Request", "SequenceStream"]


class Request:
    """One request of a sequence.

    Attributes:
        future: gets the result; None if the calling thread sends the request itself.
        until: the time at which the request ends without an answer.
        number: its number on a stream.
    """

    __slots__ = ("end", "future", "inputs", "number", "options", "until")

    def __init__(self, inputs: list[Any], end: bool, options: dict[str, Any]) -> None:
        self.inputs, self.end, self.options = inputs, end, options
        self.future: Any = None
        self.until = 0.0
        self.number = ""

    @property
    def is_cancelled(self) -> bool:
        """Whether its caller has cancelled it."""
        return self.future is not None and bool(self.future.cancelled())

    def starts(self) -> bool:
        """Note that it is sent; return False if its caller has cancelled it."""
        begin = getattr(self.future, "set_running_or_notify_cancel", None)  # not in asyncio
        return not self.is_cancelled if begin is None else bool(begin())

    def tell(self, result: Any, error: BaseException | None) -> None:
        """Pass the result or the error on to its caller, which may have cancelled it."""
        if self.future is None:
            return
        with contextlib.suppress(futures.InvalidStateError, asyncio.InvalidStateError):
            if error is None:
                self.future.set_result(result)
            else:
                self.future.set_exception(error)


class SequenceStream:
    """The stream of one sequence. It numbers the requests, and finds the request of an answer.

    Args:
        opener: opens the stream.
        model: the model.
        checked: the model's configuration was read, so it answers each request once.
        over: is called with each request that is over, and its result or error.

    Raises:
        InvalidArgument: streaming needs gRPC, and the transport is HTTP.
        Unavailable: the system refuses a thread.
    """

    def __init__(
        self,
        opener: Callable[[Receive], Stream],
        model: str,
        checked: bool,
        over: Callable[[Request, Any, BaseException | None], object],
    ) -> None:
        self._model = model
        self._checked = checked
        self._over = over
        self._waiting: dict[str, Request] = {}
        self._count = 0
        self._cut_at = float("inf")
        self._stream = opener(self._receive)

    def send(self, request: Request) -> None:
        """Send a request.

        Raises:
            Unavailable: the stream broke.
        """
        self._count += 1
        request.number = str(self._count)
        self._waiting[request.number] = request
        options = {**request.options, "request_id": request.number}
        if not self._checked:
            options["tell_final"] = True
        self._stream.send(self._model, request.inputs, **options)

    def forget(self, request: Request) -> None:
        """Drop all answers to a request."""
        self._waiting.pop(request.number, None)

    def end(self, cut_at: float) -> None:
        """Send nothing more. A server that has stopped never closes its side: cut it then."""
        self._cut_at = cut_at
        self._stream.end()

    def look(self, now: float) -> bool:
        """Cut the stream if its server did not close it in time; return whether to look again."""
        if self._stream.over or now >= self._cut_at:
            self._stream.cut()
            self._cut_at = float("inf")
        return self._cut_at < float("inf")

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
        one = error or self._checked or (final and result.get_response().outputs)
        if not one:
            result = None
            error = InvalidArgument(
                f"model {self._model} is decoupled: it answers a request any number of times, which"
                " a sequence cannot tell apart yet; acquire an ID and send the requests by yourself"
            )
        for request in whose:
            self._over(request, result, error)
