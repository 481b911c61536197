"""An exception out of a signal handler, at every line of a call: no ID, lock or turn is lost."""

from __future__ import annotations

import contextlib
import dis
import gc
import linecache
import sys
import time
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType
from typing import Any

import pytest
from loopback import Loopback

from cidalloc.client import Client, Sequence
from cidalloc.client.core.effects import runs
from cidalloc.errors import CidError, Exhausted
from cidalloc.manager.settings import Settings

SETTINGS = Settings(first=1, capacity=10_000, max_sessions=1000, fresh=True)


class Alarm(Exception):
    """What the handler raises."""


@cache
def starts(code: CodeType) -> dict[int, int]:
    """Return where each line of a function begins, in its bytecode."""
    found: dict[int, int] = {}
    for offset, line in dis.findlinestarts(code):
        found.setdefault(line, offset)
    return found


def is_harmless(frame: FrameType) -> bool:
    """Whether no handler can run here: at the end of a with block, and right before a try."""
    code, line = frame.f_code, frame.f_lineno
    text = linecache.getline(code.co_filename, line).lstrip()
    ends = text.startswith("with ") and frame.f_lasti > starts(code)[line]
    return ends or code.co_code[frame.f_lasti] == dis.opmap["NOP"]


class Bell:
    """Raises at the line of the client's code that comes as the ``at``-th."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.rang = ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if "/cidalloc/client/" not in frame.f_code.co_filename:
            return None
        if event == "line" and not self.rang and not is_harmless(frame):
            self.left -= 1
            if not self.left:
                self.rang = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise Alarm
        return self

    def during(self, call: Callable[[], Any]) -> Any:
        """Return what a call returns, or None if the bell rang."""
        before = sys.gettrace()
        gc.disable()  # else it may ring in there
        sys.settrace(self)
        try:
            return call()
        except Alarm:
            return None
        finally:
            sys.settrace(before)
            gc.enable()


Calls = dict[str, Callable[[Client, Sequence], Any]]
CALLS: Calls = {
    "acquire": lambda cids, _: cids.acquire(),
    "acquire_many": lambda cids, _: cids.acquire_many(9).tolist(),
    "acquire with a timeout": lambda cids, _: cids.acquire(timeout=5.0),
    "acquire_many with a timeout": lambda cids, _: cids.acquire_many(9, timeout=5.0).tolist(),
    "wait in vain": lambda cids, _: wait_in_vain(cids),
    "release": lambda cids, _: cids.release(cids.held().tolist()[0]),
    "release ended": lambda cids, _: cids.release(cids.held().tolist()[0], ended=True),
    "sequence": lambda cids, _: cids.sequence("model"),
    "flags": lambda _, sequence: sequence.infer_kwargs(),
    "infer": lambda _, sequence: sequence.infer([]),
    "infer END": lambda _, sequence: sequence.infer([], end=True),
    "async_infer": lambda _, sequence: sequence.async_infer([]),
    "close the sequence": lambda _, sequence: sequence.close(),
    "close": lambda cids, _: cids.close(),
}


def wait_in_vain(cids: Client) -> None:
    with contextlib.suppress(Exhausted):
        cids.acquire_many(SETTINGS.capacity, timeout=0.01)


@pytest.mark.parametrize("name", CALLS)
def test_every_line(name: str) -> None:
    at = 1
    while ring(name, at):
        at += 1
    assert at > 10


def knows_all(cids: Client, transport: Loopback) -> bool:
    """Whether the client knows all IDs that its session holds, or is in doubt."""
    with cids._runner.lock:
        lease = cids._session.lease
        registry = transport.service._holder.registry()
        held = registry.held(bytes.fromhex(lease.token), transport.clock()).tolist()
        return lease.doubtful or set(held) == lease.cache.known()


def ring(name: str, at: int) -> bool:
    """Interrupt a call at one line; return whether it has so many."""
    transport = Loopback(SETTINGS)
    cids = Client(transport=transport, label="interrupted")
    mine = cids.acquire()
    sequence = cids.sequence("model")
    sequence.infer([])
    bell = Bell(at)
    got = bell.during(lambda: CALLS[name](cids, sequence))
    where = bell.rang or "nowhere"
    if isinstance(got, Sequence):
        got.close()

    assert cids._runner.lock.acquire(timeout=5), (
        where
    )  # the heartbeat may have it, but not for long
    cids._runner.lock.release()
    deadline = time.monotonic() + 5
    while runs(cids._session._turn):
        assert time.monotonic() < deadline, where
    if name != "close":
        taken = [got] if isinstance(got, int) else got if isinstance(got, list) else []
        known = {mine, sequence.cid, *taken}
        assert set(cids.held().tolist()) <= known, f"{where}: an ID that nobody knows of"
        assert len(cids._session.lease.cache.fresh) < 200, "the manager is asked"
        assert len(cids.acquire_many(200)) == 200, where
        try:
            assert sequence.async_infer([]).result(1) is not None, where
        except CidError:  # it has ended, or was closed
            assert sequence.state not in ("live", "doubtful"), where
        sequence.close()
        assert sequence.state.startswith("closed"), where
        assert knows_all(cids, transport), f"{where}: an ID in no place"
    cids.close()
    assert not cids._runner.sequences, where
    with Client(transport=transport) as other:
        assert other.status()["sessions"] == [], where
    return bool(bell.rang)
