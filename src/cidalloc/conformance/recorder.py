"""Recorders: what clients and a manager do is written down as `history.py` reads it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cidalloc.manager.service import boottime_ms

Event = dict[str, Any]


class Recorder:
    """Writes what one process does. ``write`` takes a line's event; ``clock`` returns seconds."""

    def __init__(
        self, by: str, write: Callable[[Event], object], clock: Callable[[], float]
    ) -> None:
        self._by, self._write, self._clock = by, write, clock
        self._numbers = itertools.count(1)

    def invoke(self, what: str, **more: Any) -> int:
        """Write that an operation begins, and return its number."""
        number = next(self._numbers)
        head = {"at": self._clock(), "by": self._by, "op": number, "type": "invoke", "what": what}
        self._write(head | more)
        return number

    def done(self, number: int, outcome: str = "ok", **more: Any) -> None:
        """Write that it returned."""
        head = {"at": self._clock(), "by": self._by, "op": number, "type": outcome}
        self._write(head | more)

    def note(self, what: str, **more: Any) -> None:
        """Write what takes no time."""
        self.done(next(self._numbers), what=what, **more)


def append_to(file: Path, by: str) -> Recorder:
    """Return a recorder that writes to a file at once, so that what is killed is not lost."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(event: Event) -> None:
        os.write(fd, (json.dumps(event) + "\n").encode())

    return Recorder(by, write, lambda: boottime_ms() / 1000)


writer: Recorder | None = None
"""Of the manager in this process."""
booted = 0.0
"""When that manager's clock began, in seconds of the history's."""

_WATCHED = {
    "open": "open",
    "renew": "renew",
    "held": "held",
    "acquire": "issue",
    "release": "release",
    "close_session": "renew",
    "dead_ids": "named",
}


@contextmanager
def watched(registry: type) -> Iterator[None]:
    """Let `writer` record what is done to registries of this class, from within."""
    before = {name: getattr(registry, name) for name in (*_WATCHED, "_end", "__init__")}
    for name, what in _WATCHED.items():
        setattr(registry, name, _watch(name, what, before[name]))
    registry._end = _watch_end(before["_end"])  # type: ignore[attr-defined]
    registry.__init__ = _watch_start(before["__init__"])  # type: ignore[misc]
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(registry, name, method)


def _watch_start(method: Callable[..., Any]) -> Callable[..., Any]:
    def start(self: Any, *args: Any, **named: Any) -> None:
        if writer is not None:
            writer.note("start")
        method(self, *args, **named)

    return start


def _watch(name: str, what: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **named: Any) -> Any:
        assert writer is not None
        token = named.get("token", None if name in ("acquire", "release") else args[0])
        session = self.sessions.named.get(self._digest(token)) if token else None
        who = session.generation if session else 0
        now = booted + max(self.now, args[1]) / 1000
        more = _asked(self, name, args, named)
        number = writer.invoke(what, now=now, session=who, seq=named.get("seq"), **more)
        outer, self.cause = getattr(self, "cause", None), name
        try:
            result = method(self, *args, **named)
        except Exception as error:
            code = getattr(error, "code", None)
            writer.done(number, "fail", code=getattr(code, "name", type(error).__name__))
            raise
        finally:
            self.cause = outer
        writer.done(number, **_found(name, result))
        return result

    return call


def _watch_end(method: Callable[..., Any]) -> Callable[..., Any]:
    def end(self: Any, session: Any, cooldown: int) -> Any:
        assert writer is not None
        why = "closed" if getattr(self, "cause", None) == "close_session" else "expired"
        if not hasattr(self, "_closed"):
            why = "finished"  # what a process before had begun
        who = 0 if session.anonymous else session.generation
        seconds = max(cooldown, self.settings.cooldown_ms) / 1000
        more = {"now": booted + self.now / 1000, "why": why, "cooldown": seconds}
        number = writer.invoke("end", session=who, **more)
        result = method(self, session, cooldown)
        writer.done(number)
        return result

    return end


def _asked(registry: Any, name: str, args: tuple[Any, ...], named: Event) -> Event:
    if name != "release":
        return {}
    least, cooldown = registry.settings.cooldown_ms, named.get("cooldown_ms")
    if cooldown is None:
        cooldown = registry.settings.unended_cooldown_ms
    cooldown = least if named.get("ended") else max(least, cooldown)
    return {"cids": args[0].tolist(), "cooldown": cooldown / 1000}


def _found(name: str, result: Any) -> Event:
    if name == "open":
        return {"session": result.generation, "ttl": result.ttl_ms / 1000}
    return {"cids": result.tolist()} if name in ("acquire", "held", "dead_ids") else {}
