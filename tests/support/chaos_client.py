"""A client process of `chaos.py`: threads with one sequence after the other, and their history.

Runs until its standard input ends, and prints what it did as JSON.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from cidalloc.client import Client
from cidalloc.client.sync.transport import connect
from cidalloc.codes import Code, Operation
from cidalloc.conformance.recorder import Recorder, append_to
from cidalloc.devserver.demo import MODEL
from cidalloc.devserver.demo.sequences import number
from cidalloc.errors import CidError
from cidalloc.protocol import IDs, Request

THREADS = 3
TTL_S, LIMIT_S, IDLE_S = 4.0, 3.0, 2.0  # of the session, of a request, and of the model


class Watched:
    """A transport that notes each message to the manager, and whether one to the model was sent."""

    def __init__(self, url: str, recorder: Recorder) -> None:
        self._transport, self._recorder = connect(url), recorder
        self.url, self.now = self._transport.url, self._transport.now
        self.broke = self._transport.broke
        self.library, self.submit = self._transport.library, self._transport.submit
        self.open_stream = self._transport.open_stream
        self.model_config, self.close = self._transport.model_config, self._transport.close
        self.server_version = self._transport.server_version
        self.session_of: dict[int, int] = {}  # by ID
        self.here = threading.local()
        self._sessions: dict[Any, int] = {}  # by token
        self._first: dict[Any, float] = {}

    def call(self, model: str, request: Request, timeout: float) -> tuple[IDs, str]:
        token, operation = request.parameters.get("session"), request.operation
        more = {}
        if operation is Operation.OPEN:
            more["first"] = self._first.setdefault(token, self.now())
        number = self._recorder.invoke("message", operation=operation.name, **more)
        output, detail = self._transport.call(model, request, timeout)
        if operation is Operation.OPEN:
            self._sessions[token] = output.tolist()[1]
        if token in self._sessions:
            if operation in (Operation.NEW, Operation.HELD):
                self.session_of.update(dict.fromkeys(output.tolist(), self._sessions[token]))
            self._recorder.done(number, session=self._sessions[token])
        return output, detail

    def infer(self, limit: float, model: str, inputs: list[Any], /, **options: Any) -> Any:
        self.here.sent = True
        return self._transport.infer(limit, model, inputs, **options)


def work(
    cids: Client, transport: Watched, recorder: Recorder, stop: threading.Event, seen: Counter[str]
) -> None:
    """Run one sequence after the other."""
    for turn in itertools.count():
        if stop.is_set():
            return
        try:
            with cids.sequence(MODEL, timeout=LIMIT_S) as sequence:
                holder = f"{threading.current_thread().name}.{turn}"
                converse(sequence, holder, transport, recorder, seen)
        except CidError as error:
            seen[error.code.name] += 1
            if error.code in (Code.PROTOCOL, Code.INTERNAL):  # which chaos is no reason for
                print(f"{cids!r}: {error.code.name}: {error}", file=sys.stderr, flush=True)
            stop.wait(random.uniform(0.02, 0.2))
        except Exception as error:
            seen[f"unexpected {type(error).__name__}: {error}"] += 1


def converse(
    sequence: Any, holder: str, transport: Watched, recorder: Recorder, seen: Counter[str]
) -> None:
    """Send the requests of one sequence."""
    who = {"cid": sequence.cid, "holder": holder, "session": transport.session_of[sequence.cid]}
    recorder.note("hold", need=IDLE_S + LIMIT_S, **who)
    seen["sequences"] += 1
    total, length = 0, random.randint(1, 10)
    for step in range(length):
        value, end = random.randint(-1000, 1000), step == length - 1 and random.random() < 0.8
        total += value
        transport.here.sent = False
        use = recorder.invoke("use", **who)
        try:
            result = sequence.infer(number(value), end=end)
        except Exception as error:
            recorder.done(use, "fail" if transport.here.sent else "refused")
            if "CidError" in {each.__name__ for each in type(error).__mro__}:
                raise
            seen[f"the model: {type(error).__name__}"] += 1
            return
        recorder.done(use)
        seen["sums"] += 1
        seen["wrong"] += int(result.as_numpy("OUTPUT")[0, 0]) != total
        if end and sequence.state == "closed, recycled":
            recorder.note("ended", holder=holder)
        threading.Event().wait(random.choice([0, 0.01, random.uniform(0, 0.3)]))


def main(url: str, file: Path) -> None:
    """Work until standard input ends."""
    name = file.stem
    transport: Any = Watched(url, recorder := append_to(file, name))
    seen: Counter[str] = Counter(wrong=0)
    stop = threading.Event()
    cids = Client(url, ttl=TTL_S, timeout=3.0, label=name, transport=transport)
    threads = [
        threading.Thread(
            target=work, args=(cids, transport, recorder, stop, seen), name=f"{name}.{n}"
        )
        for n in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    cids.close()
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
