"""A sequence without its handle: its requests, their time limits, and how it is closed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...errors import InvalidArgument, SequenceLost, SessionExpired, Unavailable
from .id_cache import ENDED, need_ms
from .plan import Plan
from .requests import Requests
from .stream import Request
from .tensors import Inputs
from .transport import HURRY_S

if TYPE_CHECKING:
    from .runner import RunnerBase

__all__ = ["SequenceCore"]

_log = logging.getLogger("cidalloc.client")

_LOOK_S = 0.05  # between two looks whether it is known which server is there


class SequenceCore(Requests):
    """A sequence.

    Args:
        runner, plan, streaming: see `Requests`.
        end_inputs: inputs of the END request that is sent if the sequence is closed without END.

    Attributes:
        dropped: the handle was collected as garbage.
    """

    def __init__(
        self, runner: RunnerBase, plan: Plan, streaming: bool, end_inputs: Inputs | None
    ) -> None:
        self.end_inputs = None
        if end_inputs is not None and not plan.target.iterative:
            # Now, since the caller may use the arrays again.
            self.end_inputs = plan.target.tensors(end_inputs, runner.transport.library)
        self.dropped = False
        super().__init__(runner, plan, streaming)
        runner.sequences[self] = None

    def look(self, now: float) -> bool:
        """End the requests that got no answer in time; return whether to look again."""
        again = super().look(now)
        if self.dropped and not self.on_way:
            self.finish()
        return again

    def closing(self, patience: float) -> Iterator[tuple[list[Any], float]]:
        """Send END with the end_inputs if the model may keep state; then call `finish`.

        If Triton has forgotten the sequence, START goes with it. Yields futures and the seconds to
        wait for them, each time before it goes on.
        """
        refused = False
        until = self.runner.now() + patience
        while (request := self._end_request(refused)) is not None:
            why: object = None
            try:
                if request.drops and self._stream is not None and self._stream.over:
                    doubts = self.runner.session.doubts
                    while not self._knows_server(doubts, until):
                        yield [self.runner.future()], _LOOK_S
                    self._open_stream()
                future = self.submit(request)
                yield [future], max(until - self.runner.now(), 0.0)
                if future.cancel() or future.cancelled() or not future.done():
                    why = "no answer in time"
                else:
                    why = future.exception()
            except Exception as error:
                why = error
            refused = isinstance(why, SequenceLost) or "must specify the START flag" in str(why)
            if request.drops or not refused:
                if why is not None:
                    _log.warning("END of %s failed: %s", self.name, why)
                break
        if self.on_way:
            unanswered, cancelled = self._unanswered()
            left = max(until - self.runner.now(), 0.0)
            yield unanswered, min(HURRY_S, left) if cancelled else left

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to do: its END was answered, and its ID released."""
        return self.state.recycled and not self.on_way and self not in self.runner.sequences

    def _end_request(self, refused: bool) -> Request | None:
        """Return a request that ends the sequence; None if nothing has to be or may be sent.

        Args:
            refused: Triton has refused END alone.
        """
        end_inputs = self.end_inputs
        if end_inputs is None or self.id_lost:
            return None
        with self.runner.lock:
            try:
                needs_end, forgotten = self.state.needs_end(self.check_lease())
            except (SequenceLost, SessionExpired, InvalidArgument):
                return None  # another client may have the ID
        if not needs_end:
            return None
        options = {"model_version": self._version} if self._version else {}
        request = self.request(end_inputs, True, options, many=True)
        request.drops = forgotten or refused
        if request.drops:
            self.end_inputs = None  # never twice
        return request

    def _knows_server(self, doubts: int, until: float) -> bool:
        """Whether a new stream reaches the server of the sequence; else the heartbeat finds out.

        Raises `CidError` if it cannot, or if the ID may not be used any more.
        """
        session = self.runner.session
        with self.runner.lock:
            now = self.check_lease()
            failed = session.doubts > doubts and session.trouble is not None
            if session.suspected and (failed or now >= until):
                raise Unavailable(f"another server may be there: {session.trouble or 'no answer'}")
            known = not self._is_unsure()
        if not known:
            self.runner.wake()
        return known

    def _unanswered(self) -> tuple[list[Any], bool]:
        """Return the futures of all requests on their way, and whether the callers cancelled all.

        A request without a future, or with a cancelled one, gets a new future.
        """
        with self.runner.lock:
            lacking = [each for each in self.on_way if each.future is None or each.is_cancelled]
            cancelled = len(lacking) == len(self.on_way) and all(e.is_cancelled for e in lacking)
            for request in lacking:
                request.future = self.runner.future()
            return [request.future for request in self.on_way], cancelled

    def finish(self) -> None:
        """Release the ID, and fail all unanswered requests. Never waits. May be repeated."""
        self.give_back()
        with self.runner.lock:
            left = list(self.on_way)
            self._queue.clear()
        for request in left:
            words = f"{self.name} was closed before this request was answered"
            self._finish(request, None, SequenceLost(words))

    def give_back(self) -> None:
        """Release the ID, and end the stream. May be repeated."""
        runner, plan = self.runner, self.plan
        with runner.lock:
            if self in runner.sequences:
                self._release()
                del runner.sequences[self]  # the last, so that closing again completes it
        if self._stream is not None and not self._stream.ended:
            self._stream.end(runner.now() + HURRY_S)
            runner.watch(self)
        if plan.lease is not None and plan.lease.cache.needs_maintenance:
            with contextlib.suppress(Unavailable):  # no thread: the next call tries
                runner.wake()

    def _release(self) -> None:
        """Release the ID. Under the lock."""
        plan, lease = self.plan, self.plan.lease
        unended, idle_s = not self.state.close(), plan.target.idle_s
        timeout = max(plan.timeout, self._at_triton_until - self.runner.now())
        if lease is None:
            return
        if self.id_lost:
            lease.drop_lost(plan.cid)
        elif unended and plan.checked:
            lease.release_unended(plan.cid, self.model, idle_s, timeout)
        else:
            lease.release_from(plan.cid, need_ms(idle_s, timeout) if unended else ENDED)
