"""An exception of a signal handler while the next request of a sequence gets its turn."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import pytest
from test_every_line import Alarm, Bell
from test_sequence_faults import Model

from cidalloc.client import Client
from cidalloc.errors import CidError

ENDLESS = 10**9


class CtrlC(Bell):
    """Raises what Ctrl-C does, which is no `Exception`."""

    def __call__(self, *given: Any) -> Any:
        try:
            return super().__call__(*given)
        except Alarm:
            raise KeyboardInterrupt from None


class Shared(Model):
    """While a thread's request is on its way, another thread's comes and waits for its turn."""

    sequence: Any = None
    other: threading.Thread | None = None
    told = False
    bell: Any = None
    sent_at = 0  # the line at which the request is sent

    def infer(self, *given: Any, **options: Any) -> Any:
        if self.sequence is not None:
            sequence, self.sequence = self.sequence, None
            self.sent_at = ENDLESS - self.bell.left
            self.other = threading.Thread(target=self._wait_for_turn, args=(sequence,))
            self.other.start()
            while len(sequence._core.on_way) < 2:
                time.sleep(0.001)
            time.sleep(0.002)
        return super().infer(*given, **options)

    def submit(self, *given: Any, **options: Any) -> None:
        # The answer comes in another thread, where no signal handler runs.
        threading.Thread(target=super().submit, args=given, kwargs=options).start()

    def _wait_for_turn(self, sequence: Any) -> None:
        with contextlib.suppress(CidError):
            sequence.infer([])
        self.told = True


@pytest.mark.parametrize("kind", [Bell, CtrlC])
def test_a_sequence_goes_on_wherever_a_turn_is_broken_off(kind: type[Bell]) -> None:
    waited, at = 0, ENDLESS  # first without an exception
    while True:
        bell, model = kind(at), Shared()
        model.bell = bell
        with Client(transport=model) as cids, cids.sequence("model", timeout=0.4) as sequence:
            sequence.infer([])
            model.sequence = sequence
            with contextlib.suppress(KeyboardInterrupt):
                bell.during(lambda: sequence.infer([]))
            model.sequence = None
            if model.other is not None:
                waited += 1
                model.other.join(2.0)
                assert model.told, f"infer in another thread never ends after {bell.rang}"
            try:
                sequence.async_infer([]).result(0.3)
            except FutureTimeoutError:
                pytest.fail(f"the turn never ends after {bell.rang}")
        if at == ENDLESS:
            at = model.sent_at
        elif not bell.rang:
            assert waited > 20
            return
        at += 1
