"""The requests of a sequence that wait or are on their way, and its state.

Threads, streams and futures refer to this object and never to the handle that the application has,
so a handle can be collected as garbage while requests are on their way. Nothing here blocks or
awaits: what must be waited for is a future, and `Requests.look` ends the futures that get no
answer in time.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from tritonclient.utils import InferenceServerException

from ...errors import CidError, InvalidArgument, SequenceLost, Unavailable
from .arguments import check_request_options
from .plan import Plan
from .result import version_of
from .sequence_state import SequenceState
from .stream import Request, SequenceStream, Waiter, decoupled
from .tensors import Inputs
from .transport import NO_SLOT, SLACK_S, foreign, unreachable

if TYPE_CHECKING:
    from .runner import RunnerBase

__all__ = ["Requests"]

_REFUSED = ("StatusCode.INVALID_ARGUMENT", "400")

_LATE_S = SLACK_S / 2
"""A future waits so many seconds longer than Triton's own limit, then `look` ends it."""


class Requests:
    """The requests of one sequence.

    Args:
        runner: the client's runner.
        plan: what the sequence begins with.
        streaming: use a stream for this sequence.

    Attributes:
        id_lost: its ID was lost, and another sequence may have it.
        iterative: its first request is its only one.
        on_way: the requests that are not answered yet, in the order in which they were sent.

    Raises:
        InvalidArgument: streaming needs gRPC, and the transport is HTTP.
        Unavailable: the system refuses the stream's thread.
    """

    def __init__(self, runner: RunnerBase, plan: Plan, streaming: bool) -> None:
        self.plan = plan
        target = plan.target
        self.model, self.iterative = target.name, target.iterative
        self.name = f"sequence {plan.cid} on {self.model}"
        self.state = SequenceState(self.name, target.idle_s, target.exact, not self.iterative)
        self.on_way: dict[Request, None] = {}
        self.runner = runner
        # Without the timeout a request could wait in Triton for ever, and run when another client
        # has the ID.
        self._bounds = {
            "sequence_id": str(plan.cid) if target.text_ids else plan.cid,
            "timeout": int(plan.timeout * 1e6),
        }
        self._turn: Request | None = None  # the request that Triton has; without a stream
        self._queue: deque[Request] = deque()  # requests that wait for their turn
        self._version: str | None = None
        self.id_lost = False
        self._at_triton_until = 0.0  # Triton starts no request after this time
        self._order = threading.Lock()  # requests are sent in the order in which they were counted
        self._stream: SequenceStream | None = None
        if streaming or target.decoupled:
            self._open_stream()

    def give_back(self) -> None:
        """Release the ID, and end the stream. May be repeated."""
        raise NotImplementedError

    def _open_stream(self) -> None:
        open_stream, plan = self.runner.transport.open_stream, self.plan
        self._stream = SequenceStream(open_stream, plan.target, plan.checked, self._more, self.over)

    # ---- Sending

    def request(
        self, inputs: Inputs, end: bool, options: dict[str, Any], many: bool = False
    ) -> Request:
        """Return a request that is not sent yet.

        Raises:
            InvalidArgument: the inputs or the options are not valid; or the model is decoupled,
                and the caller does not take ``many`` answers.
        """
        plan, library = self.plan, self.runner.transport.library
        if plan.target.decoupled and not many:
            raise decoupled(self.model)
        try:
            inputs = plan.target.tensors(inputs, library)
        except InvalidArgument:
            self.runner.session.models.forget(self.model)  # it may have been reloaded
            raise
        timeout = self._timeout
        if options:
            streaming = self._stream is not None
            options = check_request_options(options, library, streaming, timeout)
            timeout = options.get("timeout", timeout)
        if timeout != plan.timeout:
            options["timeout"] = int(timeout * 1e6)
        return Request(inputs, end or self.iterative, options, timeout, many)

    @property
    def limit(self) -> float:
        """Seconds that a request may take; Triton's own limit comes first."""
        return self._timeout + SLACK_S

    @property
    def _timeout(self) -> float:  # before the first answer, requests wait for a slot
        return max(self.plan.timeout, 0.0 if self.state.answered else self.plan.wait)

    def enter(self, request: Request) -> bool:
        """Count a request as sent.

        Returns:
            True if the caller has to send it now; False if its waiter tells the result.

        Raises what `Sequence.infer` does, except what Triton answers.
        """
        if self._stream is None:
            with self.runner.lock:
                has_turn = self._begin(request, False)
            if not has_turn:
                self._post(request, False)
            return has_turn
        with self._order:
            with self.runner.lock:
                self._begin(request, False)
            self._post(request, False)
        return False

    def submit(self, request: Request) -> Any:
        """Count a request as sent, and send it when its turn comes; return its future.

        Raises what `Sequence.async_infer` does.
        """
        try:
            with self._order:
                with self.runner.lock:
                    has_turn = self._begin(request, True)
                self._post(request, has_turn)
        except BaseException as error:
            self.over(request, None, error)
            raise
        return request.future

    def stream(self, inputs: Inputs, end: bool, options: dict[str, Any], answers: Any) -> Request:
        """Send a request whose answers go into a queue; raises the same as `submit`."""
        request = self.request(inputs, end, options, many=True)
        request.answers = answers
        self.submit(request)
        return request

    def lend(self, end: bool) -> dict[str, Any]:
        """Return the arguments for a request that the application sends itself."""
        with self.runner.lock:
            now, timeout = self.check_lease(), self._timeout
            start = self.state.lend(now, end or self.iterative)
            self._allow(now, timeout)
            flags = {"sequence_start": start, "sequence_end": end and not self.iterative}
            return {**self._bounds, **flags, "timeout": int(timeout * 1e6)}

    def _begin(self, request: Request, with_future: bool) -> bool:
        """Count a request as sent, and return whether it has the turn. Under the lock."""
        version = request.options.get("model_version", "")
        if self._version not in (None, version):
            raise InvalidArgument(
                f"{self.name} is on version {self._version or 'latest'!r}, and its state with it:"
                f" model_version={version!r} needs a new sequence"
            )
        now = self.check_lease()
        state = self.state
        try:
            has_turn = self._turn is None and not self._queue and self._stream is None
            if has_turn and self._is_unsure():
                has_turn = False
            if has_turn:
                self._turn = request
            waits = not has_turn and self._stream is None
            if request.drops:
                start = True
                state.drop(now)
            else:
                start = state.send(now, request.end, waits)
            self._version = version
            if request.timeout > self.plan.timeout:
                self._allow(now, request.timeout)
            request.until = now + request.timeout + _LATE_S
            options = request.options = {**self._bounds, **request.options}
            if start:
                options["sequence_start"] = True
            if request.end and not self.iterative:  # else its second iteration would not run
                options["sequence_end"] = True
            self.on_way[request] = None
            if with_future:
                request.future = self.runner.future()
            elif not has_turn:
                request.waiter = Waiter()
            if waits:
                self._queue.append(request)
        except CidError:  # nothing has changed
            if self._turn is request:
                self._turn = None
            raise
        except BaseException:
            self._doubt(request)
            raise
        return has_turn

    def _doubt(self, request: Request) -> None:
        """Restore a consistent state after an exception that may come from any line."""
        self.on_way.pop(request, None)
        if self._stream is not None:
            self._stream.forget(request)
        if request in self._queue:
            self._queue.remove(request)
        if self._turn is request:
            self._turn = None
        self.state.doubt(len(self.on_way), request.end)

    def _post(self, request: Request, has_turn: bool) -> None:
        """Send a request, over the stream or when its turn comes."""
        if self._stream is None:
            self.runner.watch(self)
            self._advance(request if has_turn else None)
            return
        request.starts()
        try:
            self._stream.send(request)
            self.runner.watch(self)
        except Exception as error:
            # Also if the stream broke before: the caller cannot know when it breaks.
            self._finish(request, None, error)

    def _allow(self, now: float, timeout: float) -> None:
        """Note that Triton may start a request so late."""
        self._at_triton_until = max(self._at_triton_until, now + timeout)

    def _advance(self, ready: Request | None = None) -> None:
        """Send the request that is next.

        Args:
            ready: a request that has the turn, and whose lease was just checked.
        """
        while True:
            request = ready
            try:
                if request is None:
                    with self.runner.lock:
                        if self._turn is not None or not self._queue:
                            return
                        waits = self._refusal(self._queue[0]) is None and self._is_unsure()
                        if waits:
                            for each in self._queue:
                                each.doubt = self.runner.session.doubts
                        else:
                            request = self._turn = self._queue.popleft()
                    if request is None:
                        with contextlib.suppress(Unavailable):  # no thread: `look` tries again
                            self.runner.wake()
                        return
                error = self._launch(request, request is not ready)
                if error is None:
                    return
                if foreign(error) or not isinstance(error, Exception):
                    raise error
            except BaseException:  # of a signal handler, which knows nothing of this request
                if request is not None and request is not ready and not request.handed_over:
                    text = f"{self.name}: this request was not sent, since another was broken off"
                    self._finish(request, None, Unavailable(text), True)
                raise
            ready = None
            self._finish(request, None, self._explain(error), True)

    def _launch(self, request: Request, has_waited: bool) -> BaseException | None:
        """Hand a request to the transport; return an error if it was not sent."""
        if request not in self.on_way or not request.starts():
            return Unavailable(f"{self.name}: this request was not sent any more")
        try:
            if has_waited:
                with self.runner.lock:
                    now = self.check_lease()
                    if (trouble := self._refusal(request)) is not None:
                        raise type(trouble)(str(trouble)) from trouble  # each its own
                    self.state.goes_out(now)
                    self._allow(now, request.timeout)
            limit = max(request.until - self.runner.now(), 0.001) + SLACK_S
            done = partial(self.over, request)
            request.handed_over = True
            self.runner.transport.submit(limit, self.model, request.inputs, done, **request.options)
        except BaseException as error:
            request.handed_over = False
            return error
        return None

    # ---- Answers

    def _more(self, request: Request, result: Any) -> None:
        """Pass on an answer that is not the last one, and wait as long again for the next one."""
        with self.runner.lock:
            if request not in self.on_way:
                return
            request.until = self.runner.now() + request.timeout + _LATE_S
            answers = request.answers
        if answers is not None:
            answers.put_nowait((result, None))

    def over(
        self, request: Request, result: Any, error: BaseException | None
    ) -> BaseException | None:
        """Note that a request is over, and send the next one; return the error in our terms."""
        if error is not None:
            error = self._explain(error)
        self._finish(request, result, error, True)
        if self._queue:
            self._advance()
        return error

    def leave(self, request: Request, error: BaseException) -> BaseException:
        """Note that the caller waits no more; return the error in our terms.

        If Triton has the request, the next one still waits for its answer.
        """
        meant = self._explain(error)
        self._finish(request, None, meant)
        return meant

    def _finish(
        self, request: Request, result: Any, error: BaseException | None, over: bool = False
    ) -> None:
        """Settle a request with its result or error; what comes later for it is dropped.

        If Triton does not have it any more, it is ``over``, and the next one has the turn.
        """
        with self.runner.lock:
            if over and self._turn is request:
                self._turn = None
            if request not in self.on_way:
                return
            try:
                self.state.settle(self.runner.now(), request.end, error)
                del self.on_way[request]
                if self._stream is not None:
                    self._stream.forget(request)
                if error is None and self.state.answered == 1:
                    self.runner.session.models.answered_by(self.model, version_of(result))
                if error is None:
                    self.runner.session.link.heard_at = self.runner.now()
            except BaseException:
                self._doubt(request)
                raise
            ended = self.state.ended and not self.on_way
        if request.is_awaited or request.answers is not None:
            request.tell(result, error)
        if ended:
            self.give_back()

    # ---- Checks

    def check_lease(self) -> float:
        """Check that the ID may be used, and return the time. Under the lock."""
        session, lease = self.runner.session, self.plan.lease
        now = session.now()
        if session.closed:
            raise InvalidArgument("the client of this sequence is closed")
        if lease is not None and not self.state.closed:
            try:
                lease.check(self.plan.cid, now)
            except SequenceLost:
                self.id_lost = True
                self.state.lose()
                raise
        return now

    def _is_unsure(self) -> bool:
        """Whether it is not known which server is there. Under the lock."""
        return self.plan.lease is not None and self.runner.unsure()  # a random ID is of no registry

    def _refusal(self, request: Request) -> CidError | None:
        """Return why a request is not sent that waited until it was known which server is there."""
        session = self.runner.session
        return session.trouble if request.doubt == session.doubts else None

    def look(self, now: float) -> bool:
        """End the requests that got no answer in time; return whether to look again."""
        if self._queue:  # requests may have waited until it was known who is there
            self._advance()
        with self.runner.lock:
            late = [each for each in self.on_way if each.until <= now and each.is_awaited]
        stream = self._stream
        if late and stream is not None:
            stream.suspect()
        for request in late:
            text = f"no answer to {self.name} within {request.timeout:g} s"
            self._finish(request, None, Unavailable(text))
        return (stream is not None and stream.look(now)) or bool(self.on_way)

    def _explain(self, error: BaseException) -> BaseException:
        """Return one of our errors for a failed request if it is not Triton's own matter."""
        if isinstance(error, CidError):
            return error
        text = ""
        if isinstance(error, InferenceServerException):
            text = str(error.message() or "")
            if error.status() in _REFUSED or "unknown model" in text.lower():
                self.runner.session.models.forget(self.model)  # it may have been reloaded
        if "must specify the START flag" in text and self.state.answered:
            lost: BaseException = SequenceLost(
                f"Triton has forgotten {self.name}: {self.state.why_forgotten}"
            )
        elif NO_SLOT in text:
            lost = Unavailable(
                f"no slot for {self.name} within {self._timeout:g} s: all slots of the model"
                " are taken by other sequences"
            )
        else:
            return unreachable(error, self.runner.transport.url) or error
        lost.__cause__ = error
        return lost
