"""A sequence: one correlation ID through its life on one model, with blocking calls."""

from __future__ import annotations

import queue
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any

from ..core.fork_guard import ProcessIdentity
from ..core.handle import SequenceHandle
from ..core.result import Result
from ..core.sequence import SequenceCore
from ..core.stream import Answers
from ..core.tensors import Inputs
from ..core.transport import HURRY_S, SLACK_S

__all__ = ["Sequence", "StreamedAnswers"]


class StreamedAnswers(Answers):
    """An iterator over the answers to one request. `Sequence.stream` returns it."""

    def __iter__(self) -> StreamedAnswers:
        return self

    def __next__(self) -> Result:
        return self._next(self._answers.get() if self._over is None else (None, self._over))


class Sequence(SequenceHandle):
    """A sequence with its own correlation ID. `Client.sequence` makes it; use it with ``with``.

    The first request carries START. The ID is released for quick reuse when END was answered with
    success, no request is unanswered and none failed. Otherwise it is released when the block ends,
    and cools until Triton has certainly forgotten the sequence.

    Several threads may use a sequence. The model gets their requests one at a time, in the order of
    the calls.
    """

    def __init__(self, core: SequenceCore, client: object, opened_at: tuple[str, int]) -> None:
        super().__init__(core.model, client, opened_at)
        self._transport: Any = core.runner.transport
        self._core = core

    def infer(self, inputs: Inputs, *, end: bool = False, **options: Any) -> Result:
        """Send a request and return its result.

        Args:
            inputs: arrays or lists by the names of the inputs, each with the batch dimension if the
                model has one; or tritonclient's ``InferInput`` objects of the client's protocol.
            end: send END with this request, which is the last one of the sequence.
            options: further arguments of tritonclient's ``infer`` (``outputs``, ``priority``, …);
                ``timeout`` is in seconds. docs/client.md lists them.

        Returns:
            tritonclient's ``InferResult``; ``result["NAME"]`` is an output as an array.

        Raises:
            InvalidArgument: the sequence has ended, or the inputs or an option are not valid.
            SequenceLost: Triton has forgotten the sequence, its ID was lost with its session, or
                it was closed while the request was unanswered.
            SessionExpired: no heartbeat was answered in time. A later heartbeat may change that.
            Unavailable: no answer, or no slot, within the sequence's ``timeout``.
            tritonclient.utils.InferenceServerException: Triton answered with another error.
        """
        if self._home is not ProcessIdentity.current:
            self._check_home()
        core = self._core or self._begun
        request = core.request(inputs, end, options)
        try:
            if not core.enter(request):
                assert request.waiter is not None
                answer: Result = request.waiter.result(request.timeout + SLACK_S)
                return answer
            result: Result = self._transport.infer(
                request.timeout + SLACK_S, self._model, request.inputs, **request.options
            )
            core.over(request, result, None)
        except BaseException as error:
            waited = request.waiter is not None
            meant = core.leave(request, error) if waited else core.over(request, None, error)
            assert meant is not None
            raise meant from meant.__cause__
        return result

    def async_infer(self, inputs: Inputs, *, end: bool = False, **options: Any) -> Future[Result]:
        """Send a request and return a future of its result. See `infer`.

        The model gets the requests in the order of the calls. A stream sends them without waiting
        for answers. Without a stream, each request is sent when the one before it was answered.

        Raises:
            InvalidArgument: as `infer`. All other errors are raised by the future. It ends within
                the sequence's ``timeout`` and half a second.
        """
        self._check_home()
        core = self._begun
        future: Future[Result] = core.submit(core.request(inputs, end, options))
        return future

    def stream(self, inputs: Inputs, *, end: bool = False, **options: Any) -> StreamedAnswers:
        """Send a request and return an iterator over its answers, of which there may be none.

        For decoupled models. It also works for other models: these answer once. The iteration ends
        with the final response. If it is left before, the request continues, its other answers are
        dropped, and END counts as answered only with the final response.

        The arguments are those of `infer`.

        Raises:
            InvalidArgument: as `infer`. The iterator raises all other errors, also after some
                answers; `Unavailable` if no answer comes for the sequence's ``timeout``.
        """
        self._check_home()
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        return StreamedAnswers(self._begun.stream(inputs, end, options, answers), answers)

    def close(self) -> None:
        """Send END with ``end_inputs`` if needed, wait for answers, and release the ID.

        A second call does nothing.
        """
        self._close(self._begun.limit)

    def _close(self, patience: float) -> None:
        self._check_home()
        core = self._begun
        if core.is_over:
            return
        try:
            for futures, limit in core.closing(patience):
                wait(futures, limit)
        finally:
            core.finish()

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(self._begun.limit if error is None else HURRY_S)
