"""A sequence: one correlation ID through its life on one model, with blocking calls."""

from __future__ import annotations

import concurrent.futures
import logging
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from ..core.handle import SequenceHandle
from ..core.sequence import HURRY_S, Plan, SequenceCore
from .runner import Runner

__all__ = ["Sequence"]

_log = logging.getLogger("cidalloc.client")


class Sequence(SequenceHandle):
    """A sequence with an ID of its own; made by `Client.sequence`, used with ``with``.

    START goes with the first request. The ID goes back when END was answered with success, nothing
    is unanswered and nothing failed: it may soon be used again. Otherwise it goes back when the
    block ends, and cools until Triton has certainly forgotten the sequence.

    Several threads may use it: the model gets their requests one after the other, in the order of
    the calls.
    """

    def __init__(
        self,
        runner: Runner,
        plan: Plan,
        streaming: bool,
        end_inputs: list[Any] | None,
        client: object,
        opened_at: tuple[str, int],
    ) -> None:
        super().__init__(runner, plan.target.name, opened_at)
        self._client = client  # which would be closed if nobody had it any more
        self._transport = runner.transport
        self._core = SequenceCore(runner, plan, streaming, end_inputs)

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
            SequenceLost: Triton has forgotten the sequence, its ID was lost with its session, or
                it was closed meanwhile.
            SessionExpired: no heartbeat was answered in time; that may still change.
            Unavailable: no answer, or no slot, within the sequence's ``timeout``.
            tritonclient.utils.InferenceServerException: what else Triton answered.
        """
        self._check_home()
        core = self._begun
        request = core.request(inputs, end, options)
        try:
            if not core.enter(request):
                return request.future.result()
            result = self._transport.infer(core.limit, self._model, inputs, **request.options)
            core.over(request, result, None)
        except BaseException as error:
            meant = core.over(request, None, error)
            assert meant is not None
            raise meant from meant.__cause__
        return result

    def async_infer(self, inputs: list[Any], *, end: bool = False, **options: Any) -> Future[Any]:
        """Send a request and return the future of its result, in the manner of `infer`.

        The model gets the requests in the order of the calls. On a stream they are sent without
        waiting for answers; otherwise each is sent when the one before it was answered.

        Raises:
            InvalidArgument: as `infer`. What goes wrong with the request is in the future, which
                ends by itself within the sequence's ``timeout`` and half a second.
        """
        self._check_home()
        core = self._begun
        future: Future[Any] = core.submit(core.request(inputs, end, options))
        return future

    def close(self) -> None:
        """Send the end_inputs, wait for what is unanswered, and give the ID back.

        Closing again does nothing.
        """
        self._close(self._begun.limit)

    def _close(self, patience: float) -> None:
        self._check_home()
        core = self._begun
        try:
            if core.wants_end_inputs():
                assert core.end_inputs is not None
                try:
                    core.submit(core.request(core.end_inputs, True, {})).result(patience)
                except (Exception, concurrent.futures.CancelledError) as error:
                    text = error or type(error).__name__
                    _log.warning("the end_inputs of %r failed: %s", self, text)
            if core.on_way:
                patience = HURRY_S if core.abandoned else patience
                concurrent.futures.wait(core.unanswered(), patience)
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
