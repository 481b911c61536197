"""Tidying: END for sequences of clients that died, so that models drop what they keep of them.

The manager names the IDs. All requests of a round go over one gRPC stream, which never reconnects
and reaches one server, also through a proxy: no other server ever gets an END meant for this one.
The server itself ends the stream after `END_WITHIN_MS`, also if this process is frozen meanwhile.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import CidError, InvalidArgument, Unavailable
from ...protocol import END_WITHIN_MS
from .effects import NEVER, Flow, Idle
from .model_info import ModelInfo
from .tensors import Inputs
from .transport import HURRY_S, NO_SLOT, Stream, encode, read_answer, translating

if TYPE_CHECKING:
    from .runner import RunnerBase

__all__ = ["Tidier"]

_log = logging.getLogger("cidalloc.client.tidy")

_ROUND_S = (4.0, 6.0)  # between two rounds
_SLOT_S = 1.0  # END waits so long for a slot of the model, which live sequences need more
_PAUSE_S = 60.0  # a model that refuses END is left alone: live requests may be in the same batch
_AT_ONCE = 1000  # IDs in one answer


class Tidier:
    """Asks the manager for dead clients' IDs on some models, and ends their sequences.

    Args:
        runner: runs the flows; its transport is gRPC.
        inputs: for each model, the inputs of END.

    Attributes:
        ended: the number of sequences that were ended, by model. Those of which the model knew
            nothing count, too.
        failed: the number of END requests that failed, by model.
    """

    def __init__(self, runner: RunnerBase, inputs: Mapping[str, Inputs]) -> None:
        self.ended: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self._runner, self._inputs = runner, inputs
        self._session = runner.session
        self._paused = dict.fromkeys(inputs, NEVER)
        self._trouble = ""
        self._answers: deque[tuple[Any, BaseException | None]] = deque()
        self._sent = 0  # the ID of the latest request

    def rounds(self) -> Flow[None]:
        """Make one round after the other until the client is closed. Never raises."""
        session, failures = self._session, 0
        while not self._over:
            try:
                yield from session.establish(session.now() + session.link.timeout)
                yield from self._round()
                failures, self._trouble = 0, ""
            except CidError as error:
                failures += 1
                self._warn(error)
            link = session.link
            pause = link.pause(failures) if failures else link.rng.uniform(*_ROUND_S)
            until = session.now() + pause
            while session.now() < until and not self._over:
                yield Idle(until)

    def check(self) -> Flow[None]:
        """Check that the inputs fit the models.

        Raises:
            InvalidArgument: they do not fit, or a model takes no END.
            Unavailable: the server does not answer, or does not serve a model.
        """
        for model in self._inputs:
            yield from self._prepare(model)

    @property
    def _over(self) -> bool:
        return self._session.closed or self._session.abandoned

    def _goes_on(self, until: float) -> bool:
        # What is sent must end before the stream does: then the server cancels it.
        return not self._over and bool(self._session.now() < until - HURRY_S)

    def _prepare(self, model: str) -> Flow[tuple[ModelInfo, list[Any]]]:
        """Return a model as it is now, and tritonclient's inputs of END."""
        session = self._session
        target = yield from session.models.look(model, session.now(), session.link.timeout)
        if target.iterative:
            raise InvalidArgument(f"model {model} is iterative: it takes no END")
        return target, target.tensors(self._inputs[model], self._runner.transport.library)

    def _round(self) -> Flow[None]:
        """End what is named for the models that are not paused."""
        now = self._session.now
        until = now() + END_WITHIN_MS / 1000
        answers = self._answers = deque[tuple[Any, BaseException | None]]()

        def receive(number: str, final: bool, result: Any, error: BaseException | None) -> None:
            # After an error, which has no ID, a decoupled model may send a final response, too.
            if final and number in ("", str(self._sent)):
                answers.append((result, error))
                self._runner.wake()

        trouble: CidError | None = None
        stream = self._runner.transport.open_stream(receive, END_WITHIN_MS / 1000)
        try:
            for model in [model for model, paused in self._paused.items() if now() >= paused]:
                yield from self._tidy(stream, model, until)
        except CidError as error:
            trouble = error
        finally:
            stream.end()
        while not stream.over and now() < until:
            if self._over:  # a server that hangs does not keep the client's connection open
                until = min(until, now() + HURRY_S)
            yield Idle(until)
        stream.cut()
        if trouble is not None:
            raise trouble

    def _tidy(self, stream: Stream, model: str, until: float) -> Flow[None]:
        """End the sequences on a model that the manager names; pause it if it fails.

        Raises:
            CidError: the manager does not answer, or the stream broke.
        """
        session, transport, manager = self._session, self._runner.transport, self._runner.model
        named = _AT_ONCE
        while named == _AT_ONCE and self._goes_on(until):
            asking = encode(transport.library, session.lease.ask_dead(model, _AT_ONCE))
            asking["secret"] = True
            result, error = yield from self._exchange(stream, manager, until, asking)
            with translating(manager, transport.url):
                if error is not None:
                    raise error
            cids = read_answer(result, manager, transport.url)[0].tolist()
            named = len(cids)
            if not cids:
                return
            try:
                yield from self._end(stream, model, cids, until)
            except CidError as failure:
                if stream.over:
                    raise
                if NO_SLOT not in str(failure):
                    self._paused[model] = session.now() + _PAUSE_S
                self._warn(failure)
                return

    def _end(self, stream: Stream, model: str, cids: list[int], until: float) -> Flow[None]:
        """Send END for sequences. Raises `CidError` if the model does not take one."""
        target, inputs = yield from self._prepare(model)
        for cid in cids:
            if not self._goes_on(until):
                return
            ending = {
                "inputs": inputs,
                "sequence_id": str(cid) if target.text_ids else cid,
                "sequence_start": True,
                "sequence_end": True,
                "timeout": int(_SLOT_S * 1e6),
                "tell_final": True,
            }
            _, error = yield from self._exchange(stream, model, until, ending)
            if error is not None:
                self.failed[model] += 1
                raise Unavailable(f"END of sequence {cid} on {model} failed: {error}")
            self.ended[model] += 1

    def _exchange(
        self, stream: Stream, model: str, until: float, request: dict[str, Any]
    ) -> Flow[tuple[Any, BaseException | None]]:
        """Send a request, and return its last answer and its error."""
        self._sent += 1
        self._answers.clear()  # of the request before
        stream.send(model, request.pop("inputs"), request_id=str(self._sent), **request)
        while not self._answers:
            if self._session.now() >= until or self._over:
                raise Unavailable(f"no answer of {model} in time")
            yield Idle(until)
        return self._answers.popleft()

    def _warn(self, error: CidError) -> None:
        """Log an error, but not again and again, and none of a session that is being closed."""
        if str(error) != self._trouble and not self._over:
            self._trouble = str(error)
            _log.warning("%r: sequences of dead clients are not ended: %s", self._session, error)
