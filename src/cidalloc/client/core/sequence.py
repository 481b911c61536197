"""A sequence without its handle: its state, and its requests that wait or are on their way.

Threads, streams and futures hold on to this, and never to the handle that the application has; so a
handle that nobody has any more is noticed. It does not block and does not await: what must be
waited for is a future, and `SequenceCore.look` ends those that get no answer in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent import futures
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from tritonclient.utils import InferenceServerException

from ...errors import CidError, InvalidArgument, SequenceLost, SessionExpired, Unavailable
from .id_cache import ENDED, need_ms
from .model_info import ModelInfo
from .sequence_state import BackTo, SequenceState
from .session import Session
from .transport import SLACK_S, Stream, check_inputs, foreign, unreachable

__all__ = ["HURRY_S", "UNMANAGED", "Plan", "Request", "SequenceCore"]

HURRY_S = 2.0
"""How long a block that ends with an exception waits for a server that does not answer, and a
stream that ends for its server."""

_LATE_S = SLACK_S / 2
"""For how long after Triton's own limit a future waits for the answer, until it is looked at."""

UNMANAGED = -1
"""The epoch of an ID that was drawn at random, without the manager."""

_DECOUPLED = (
    "model {model} is decoupled: it answers a request any number of times, which a sequence cannot"
    " tell apart yet; acquire an ID and send the requests by yourself"
)

_SET_BY_US = {
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "request_id",
    "timeout",
    "client_timeout",
    "tell_final",
}


class SequenceRunner(Protocol):
    """What a sequence needs of its client's runner."""

    session: Session
    transport: Any
    sequences: dict[SequenceCore, None]
    """The sequences that hold an ID."""

    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    @property
    def now(self) -> Callable[[], float]: ...

    def future(self) -> Any:
        """Return a new future."""

    def watch(self, core: SequenceCore) -> None:
        """Let somebody call `SequenceCore.look` every now and then until it returns False."""

    def wake(self) -> None:
        """Tell the heartbeat that there is something to do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sequence is given to begin with.

    Args:
        target: the model.
        cid: the ID.
        epoch: of which of the client's sessions the ID is.
        timeout: seconds that a request may take.
        checked: the model's configuration was read.
    """

    target: ModelInfo
    cid: int
    epoch: int
    timeout: float
    checked: bool = True


class Request:
    """One request of a sequence.

    Attributes:
        future: what its user waits for; None if a thread sends it by itself.
        until: the time at which it ends without an answer.
    """

    __slots__ = ("end", "future", "inputs", "number", "options", "until")

    def __init__(self, inputs: list[Any], end: bool, options: dict[str, Any]) -> None:
        self.inputs, self.end, self.options = inputs, end, options
        self.future: Any = None
        self.until = 0.0
        self.number = ""


class SequenceCore:
    """The state of one sequence.

    Args:
        runner: of its client.
        plan: what it begins with.
        streaming: send over a stream of its own.
        end_inputs: inputs to send with END if nobody else does.

    Raises:
        InvalidArgument: a stream, and this is HTTP.
        Unavailable: the system refuses the stream a thread.
    """

    def __init__(
        self, runner: SequenceRunner, plan: Plan, streaming: bool, end_inputs: list[Any] | None
    ) -> None:
        self.plan = plan
        self.model = plan.target.name
        self.name = f"sequence {plan.cid} on {self.model}"
        self.state = SequenceState(self.name, plan.target.idle_s, plan.target.exact)
        self.end_inputs = end_inputs
        self.dropped = False  # nobody has the handle any more
        self.on_way: dict[Request, None] = {}  # not answered yet, in the order of their times
        self._runner = runner
        self._queue: deque[Request] = deque()  # of those, the ones that wait for their turn
        self._turn: Request | None = None  # and the one that has it
        self._by_number: dict[str, Request] = {}
        self._count = 0
        self._version: str | None = None
        self._order = threading.Lock()  # what is sent first goes first
        self._cut_at = float("inf")
        self._stream: Stream | None = None
        if streaming:
            self._stream = runner.transport.open_stream(self._receive)
        runner.sequences[self] = None

    # ---- Sending

    def request(self, inputs: list[Any], end: bool, options: dict[str, Any]) -> Request:
        """Return a request that is well-formed, and not sent yet.

        Raises:
            InvalidArgument: inputs that are none, or an argument that is the sequence's own.
        """
        check_inputs(inputs, self._runner.transport.inputs)
        if not _SET_BY_US.isdisjoint(options):
            taken = ", ".join(sorted(_SET_BY_US & options.keys()))
            raise InvalidArgument(f"the sequence sets {taken} by itself")
        return Request(inputs, end, options)

    @property
    def limit(self) -> float:
        """Seconds that a request may take; Triton's own limit comes first."""
        return self.plan.timeout + SLACK_S

    def enter(self, request: Request) -> bool:
        """Note a request as sent. True: send it at once; else its future tells what becomes of it.

        Raises what `Sequence.infer` does, but for what Triton answers.
        """
        with self._order:
            with self._runner.lock:
                free = self._turn is None and not self._queue and self._stream is None
                if free:
                    self._turn = request
                self._begin(request, free)
            if not free:
                self._post(request)
        return free

    def submit(self, request: Request) -> Any:
        """Note a request as sent, and send it when its turn comes; return its future.

        Raises what `Sequence.async_infer` does.
        """
        try:
            with self._order:
                with self._runner.lock:
                    self._begin(request, False)
                self._post(request)
        except BaseException as error:
            self.over(request, None, error)
            raise
        return request.future

    def lend(self, end: bool) -> dict[str, Any]:
        """Return the flags for a request that somebody else sends."""
        with self._runner.lock:
            now = self.check_lease()
            return self._flags(self.state.lend(now, end), end)

    def _begin(self, request: Request, at_once: bool) -> None:
        """Count a request as sent. Under the lock, so that START goes first."""
        version = request.options.get("model_version", "")
        if self._version not in (None, version):
            raise InvalidArgument(
                f"{self.name} is on version {self._version or 'latest'!r}, and its state with it:"
                f" model_version={version!r} needs a new sequence"
            )
        now = self.check_lease()
        try:
            start = self.state.send(now, request.end, not at_once and self._stream is None)
            self._version = version
            request.until = now + self.plan.timeout + _LATE_S
            request.options.update(self._flags(start, request.end))
            self.on_way[request] = None
            if not at_once:
                self._line_up(request)
        except CidError:  # nothing has changed
            raise
        except BaseException:
            self._doubt(request)
            raise

    def _line_up(self, request: Request) -> None:
        request.future = self._runner.future()
        if self._stream is None:
            self._queue.append(request)
        else:
            self._count += 1
            request.number = str(self._count)
            self._by_number[request.number] = request

    def _doubt(self, request: Request) -> None:
        """Put things right after an exception that may have come from anywhere."""
        self.on_way.pop(request, None)
        self._by_number.pop(request.number, None)
        if request in self._queue:
            self._queue.remove(request)
        if self._turn is request:
            self._turn = None
        self.state.doubt(len(self.on_way), request.end)

    def _post(self, request: Request) -> None:
        """Send a request over the stream, or when its turn comes."""
        if self._stream is None:
            self._runner.watch(self)
            self._advance()
            return
        options = {**request.options, "request_id": request.number}
        if not self.plan.checked:
            options["tell_final"] = True
        _starts(request.future)
        try:
            self._stream.send(self.model, request.inputs, **options)
            self._runner.watch(self)
        except Exception as error:
            # Also if it broke before this request: the caller cannot know which, so need not.
            self._finish(request, None, error)

    def _flags(self, start: bool, end: bool) -> dict[str, Any]:
        # Without the timeout a request could wait in Triton for ever, and come to life when the ID
        # is somebody else's.
        return {
            "sequence_id": self.plan.cid,
            "sequence_start": start,
            "sequence_end": end,
            "timeout": int(self.plan.timeout * 1e6),
        }

    def _advance(self) -> None:
        """Send the next request whose turn it is."""
        while True:
            with self._runner.lock:
                if self._turn is not None or not self._queue:
                    return
                request = self._turn = self._queue.popleft()
                waiting = request in self.on_way
            error: Exception
            if waiting and _starts(request.future):
                try:
                    self.check_again()
                    limit = max(request.until - self._runner.now(), 0.001) + SLACK_S
                    done = partial(self.over, request)
                    self._runner.transport.submit(
                        limit, self.model, request.inputs, done, **request.options
                    )
                    return
                except Exception as failed:
                    error = failed
            else:
                error = Unavailable(f"{self.name}: this request was not sent any more")
            self._end_turn(request, None, error)
            if foreign(error):
                raise error

    def over(
        self, request: Request, result: Any, error: BaseException | None
    ) -> BaseException | None:
        """Note that a request is over, and send the next one; return what its error means."""
        meant = self._end_turn(request, result, error)
        if self._queue:
            self._advance()
        return meant

    def _end_turn(
        self, request: Request, result: Any, error: BaseException | None
    ) -> BaseException | None:
        with self._runner.lock:
            if self._turn is request:
                self._turn = None
        return self._finish(request, result, None if error is None else self._explain(error))

    def _receive(self, number: str, final: bool, result: Any, error: BaseException | None) -> None:
        """Take what came over the stream."""
        with self._runner.lock:
            if number:
                found = self._by_number.get(number)
                whose = [] if found is None else [found]
            else:
                # The stream does not say whose error it is, and the sequence is broken anyway.
                whose = list(self._by_number.values())
        one = error or self.plan.checked or (final and result.get_response().outputs)
        if not one:
            result, error = None, InvalidArgument(_DECOUPLED.format(model=self.model))
        for request in whose:
            self._finish(request, result, None if error is None else self._explain(error))

    def _finish(
        self, request: Request, result: Any, error: BaseException | None
    ) -> BaseException | None:
        """Settle what became of a request, once: later news of it are dropped."""
        with self._runner.lock:
            if request not in self.on_way:
                return error
            try:
                self.state.settle(self._runner.now(), request.end, error)
                del self.on_way[request]
                self._by_number.pop(request.number, None)
                if error is None and self.state.answered == 1:
                    self._runner.session.models.answered_by(self.model, _version_of(result))
            except BaseException:
                self._doubt(request)
                raise
            ended = self.state.ended and not self.on_way
        if request.future is not None:
            # Whoever waited for it may have cancelled it.
            with contextlib.suppress(futures.InvalidStateError, asyncio.InvalidStateError):
                if error is None:
                    request.future.set_result(result)
                else:
                    request.future.set_exception(error)
        if ended:  # nothing is left to be done
            self.give_back()
        return error

    # ---- Looking

    def check_lease(self) -> float:
        """Return the time, after seeing that the ID may be used. Under the lock."""
        session = self._runner.session
        now = session.now()
        if session.closed:
            raise InvalidArgument("the client of this sequence is closed")
        if self.plan.epoch != UNMANAGED and not self.state.closed:
            try:
                session.check(self.plan.epoch, self.plan.cid)
            except SequenceLost:
                self.state.lose()
                raise
        return now

    def check_again(self) -> None:
        """See that the ID may still be used, right before a request that has waited is sent."""
        with self._runner.lock:
            self.state.goes_out(self.check_lease())

    def look(self, now: float) -> bool:
        """End what got no answer in time. False: there is nothing more to look at."""
        late = []
        with self._runner.lock:
            for request in self.on_way:
                if request.until > now:
                    break
                if request.future is not None:
                    late.append(request)
        if late and self._stream is not None:
            self._stream.suspect()
        for request in late:
            self._finish(request, None, self.no_answer())
        if self.dropped and not self.on_way:
            self.finish()
        if self._stream is not None and (self._stream.over or now >= self._cut_at):
            self._stream.cut()
            self._cut_at = float("inf")
        return bool(self.on_way) or self._cut_at < float("inf")

    def no_answer(self) -> Unavailable:
        """Return the error of a request that got no answer in time."""
        return Unavailable(f"no answer to {self.name} within {self.plan.timeout:g} s")

    def _explain(self, error: BaseException) -> BaseException:
        """Return what a failed request means, if it is something of ours."""
        if isinstance(error, CidError):
            return error
        text = str(error.message() or "") if isinstance(error, InferenceServerException) else ""
        if "must specify the START flag" in text and self.state.answered:
            self._runner.session.models.forget(self.model)
            lost: BaseException = SequenceLost(
                f"Triton has forgotten {self.name}: {self.state.why_forgotten}"
            )
        elif "timeout of the corresponding sequence has been expired" in text:
            lost = Unavailable(
                f"no slot for {self.name} within {self.plan.timeout:g} s: all slots of the model"
                " are taken by other sequences"
            )
        elif "unknown model" in text.lower():
            self._runner.session.models.forget(self.model)
            return error
        else:
            return unreachable(error, self._runner.transport.url) or error
        lost.__cause__ = error
        return lost

    # ---- Closing

    def wants_end_inputs(self) -> bool:
        """Whether to send the end_inputs."""
        if self.end_inputs is None or not self.state.wants_end:
            return False
        with self._runner.lock:
            try:
                now = self.check_lease()
            except (SequenceLost, SessionExpired, InvalidArgument):
                return False
        return not self.state.must_be_forgotten(now)

    def unanswered(self) -> list[Any]:
        """Return the futures of all that is on its way; those of cancelled ones are new."""
        with self._runner.lock:
            for request in self.on_way:
                if request.future is None or request.future.cancelled():
                    request.future = self._runner.future()
            return [request.future for request in self.on_way]

    @property
    def abandoned(self) -> bool:
        """Whether all that is on its way was cancelled by who waited for it."""
        with self._runner.lock:
            futures = [request.future for request in self.on_way]
        return all(future is not None and future.cancelled() for future in futures)

    def finish(self) -> None:
        """End it, whatever is unanswered; the ID goes back. Does not wait. Again: does nothing."""
        self.give_back()
        with self._runner.lock:
            left = list(self.on_way)
            self._queue.clear()
        for request in left:
            words = f"{self.name} was closed before this request was answered"
            self._finish(request, None, SequenceLost(words))

    def give_back(self) -> None:
        """Give the ID back, and end the stream."""
        runner, plan = self._runner, self.plan
        with runner.lock:
            if self not in runner.sequences:
                return
            back_to = self.state.close()
            session = runner.session
            if plan.epoch == UNMANAGED:
                pass
            elif back_to is BackTo.MANAGER and plan.checked:
                idle_s = plan.target.idle_s
                session.release_unended(plan.epoch, plan.cid, self.model, idle_s, plan.timeout)
            else:
                cooldown_ms = ENDED
                if back_to is BackTo.MANAGER:
                    cooldown_ms = need_ms(plan.target.idle_s, plan.timeout)
                session.release_from(plan.epoch, plan.cid, cooldown_ms)
            del runner.sequences[self]  # the last, so that closing again completes it
        if self._stream is not None:
            self._stream.end()
            # A server that has stopped never closes its side.
            self._cut_at = runner.now() + HURRY_S
            runner.watch(self)
        if session.needs_maintenance:
            with contextlib.suppress(Unavailable):  # no thread: the next call tries
                runner.wake()


def _version_of(result: Any) -> str:
    """Return which version of the model has answered, or "" if it does not say."""
    response = result.get_response()
    if isinstance(response, dict):
        return str(response.get("model_version", ""))
    return str(getattr(response, "model_version", ""))


def _starts(future: Any) -> bool:
    """Note that a request goes out; False if nobody wants it any more."""
    begin = getattr(future, "set_running_or_notify_cancel", None)
    if begin is None:
        return not future.cancelled()
    return bool(begin())
