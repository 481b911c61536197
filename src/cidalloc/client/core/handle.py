"""The handle of a sequence that the application has: what `Sequence` and `AsyncSequence` share."""

from __future__ import annotations

import warnings
from typing import Any

from ...errors import InvalidArgument
from ...protocol import ROUTE_HEADER
from .fork_guard import ForkGuard
from .sequence import SequenceCore

__all__ = ["SequenceHandle", "warn_unclosed"]

_START, _END = 1, 2  # TRITONSERVER_REQUEST_FLAG_SEQUENCE_START and _END


class SequenceHandle(ForkGuard):
    """A sequence without its ways to wait.

    Args:
        model: the model.
        client: the client or fleet, which is not collected as garbage before the sequence.
        opened_at: the file and the line of the application's call.
    """

    _core: SequenceCore | None = None

    def __init__(self, model: str, client: object, opened_at: tuple[str, int]) -> None:
        super().__init__()
        self._model = model
        self._client = client
        self._opened_at = opened_at

    def __repr__(self) -> str:
        name = type(self).__name__
        if self._core is None:
            return f"<cidalloc {name} on {self._model}, not begun>"
        return f"<cidalloc {name} {self._core.plan.cid} on {self._model}, {self.state}>"

    def __del__(self) -> None:
        core = self._core
        if core is None or core not in core.runner.sequences or not self._at_home:
            return
        # The ID cools, and requests on their way may still be answered.
        core.runner.drop(core)
        warn_unclosed(self, f"unclosed sequence {core.plan.cid} on {self._model}", self._opened_at)

    @property
    def cid(self) -> int:
        """The correlation ID, ``sequence_id`` in tritonclient."""
        return self._begun.plan.cid

    @property
    def key(self) -> str:
        """A short name for logs. No other sequence ever has it, while IDs are used again.

        It contains the end of the registry's UUID, the ID, and two rising numbers.
        """
        return self._begun.plan.key

    @property
    def model(self) -> str:
        """The model that the sequence is on."""
        return self._model

    @property
    def server(self) -> str:
        """The URL of the server that the sequence is on."""
        return str(self._begun.runner.transport.url)

    @property
    def headers(self) -> dict[str, str]:
        """The headers that your own requests of the sequence need behind a proxy; may be empty."""
        number = self._begun.runner.transport.route()
        return {} if number is None else {ROUTE_HEADER: str(number)}

    @property
    def state(self) -> str:
        """The state of the sequence in a word or two; docs/client.md has the diagram."""
        return "not begun" if self._core is None else self._core.state.words

    def infer_kwargs(self, *, end: bool = False) -> dict[str, Any]:
        """Return the arguments that make your own ``infer`` call a part of this sequence.

        The arguments are ``sequence_id``, ``sequence_start``, ``sequence_end`` and ``timeout``. The
        sequence does not see the answer, so its ID cools after use, as if END was not answered.

        Raises the errors of `infer`, except those that Triton answers.
        """
        self._check_home()
        return self._begun.lend(end)

    flags = infer_kwargs  # the former name

    def bls_kwargs(self, *, end: bool = False) -> dict[str, Any]:
        """Return the arguments that make a BLS call a part of this sequence.

        They are the ``correlation_id``, ``flags`` and ``timeout`` (in microseconds) of
        ``pb_utils.InferenceRequest``. With the timeout the call does not wait for a free slot for
        ever. In all other respects this is `infer_kwargs`.
        """
        given = self.infer_kwargs(end=end)
        return {
            "correlation_id": given["sequence_id"],
            "flags": _START * given["sequence_start"] | _END * given["sequence_end"],
            "timeout": given["timeout"],
        }

    @property
    def _begun(self) -> SequenceCore:
        if self._core is None:
            raise InvalidArgument(f"{self!r}: enter it with async with, or await it")
        return self._core


def warn_unclosed(thing: object, words: str, opened_at: tuple[str, int]) -> None:
    """Warn that something was collected as garbage while it was open."""
    file, line = opened_at
    warnings.warn(f"{words}, opened at {file}:{line}", ResourceWarning, stacklevel=3, source=thing)
