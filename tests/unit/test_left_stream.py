"""A loop over answers that is left while the last answer comes."""

from __future__ import annotations

import queue
import sys
import threading
from types import SimpleNamespace
from typing import Any

from cidalloc.client.core.stream import Request
from cidalloc.client.sync.sequence import StreamedAnswers


def test_a_loop_that_is_left_at_its_last_answer() -> None:
    result: Any = SimpleNamespace(get_response=lambda: {"outputs": [1]})
    failures: list[BaseException] = []
    todo: queue.SimpleQueue[Request | None] = queue.SimpleQueue()

    def receive() -> None:  # as the thread that reads the stream
        while (request := todo.get()) is not None:
            try:
                request.tell(result, None)
            except BaseException as error:
                failures.append(error)

    reader = threading.Thread(target=receive)
    reader.start()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20_000):
            request = Request([], False, {}, 1.0, True)
            request.answers = queue.SimpleQueue()
            answers = StreamedAnswers(request, request.answers)
            todo.put(request)
            for _ in answers:
                break
            del answers
    finally:
        sys.setswitchinterval(before)
        todo.put(None)
        reader.join()
    assert not failures, f"{len(failures)} times {failures[0]!r}: the stream counts as broken"
