"""Histories: what clients and a manager did, as JSON lines, and the checker that judges them.

An operation is a line of type ``invoke`` when it begins and one of type ``ok`` or ``fail`` when it
returns; without the second one nobody knows whether it happened. What takes no time is a line
``ok`` alone. Times are seconds of one clock. The checker knows nothing of cidalloc's code.

By a client: ``message`` (`session`, `operation`; an ``OPEN`` has `first`, when its token was first
sent), ``hold`` (`cid`, `holder`, `session`, and `need`: seconds for which Triton may know a
sequence of it after its last request was sent), ``use`` (`cid`, `holder`, `session`), and ``ended``
(`holder`: END was answered). By a manager, with `session` and maybe `seq`: ``start``, ``open``
(`ttl`), ``issue`` (`cids`), ``release`` (`cids`, `cooldown`), ``renew``, ``held`` (`cids`), ``end``
(`why`, `cooldown`). A session is its generation; 0 is nobody's.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]
NEVER = float("inf")


class Recorder:
    """Writes what one process does. ``write`` takes a line's event; ``clock`` returns seconds."""

    def __init__(
        self, by: str, write: Callable[[Event], object], clock: Callable[[], float]
    ) -> None:
        self._by, self._write, self._clock = by, write, clock
        self._numbers = itertools.count(1)

    def invoke(self, what: str, **more: Any) -> int:
        number = next(self._numbers)
        self._write(
            {"at": self._clock(), "by": self._by, "op": number, "type": "invoke"}
            | {"what": what}
            | more
        )
        return number

    def done(self, number: int, outcome: str = "ok", **more: Any) -> None:
        self._write({"at": self._clock(), "by": self._by, "op": number, "type": outcome} | more)

    def note(self, what: str, **more: Any) -> None:
        """Write what takes no time."""
        self.done(next(self._numbers), what=what, **more)


@dataclass
class Op:
    """One operation of a history."""

    began: float
    ended: float = NEVER
    outcome: str = "unknown"
    more: Event = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.more[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Rules:
    """What was promised: times in seconds.

    Attributes:
        ttl: of the clients' sessions.
        grace: the manager's.
        cooldown: the least one.
        slack: what clocks are rounded to, and by how much they drift within a ttl.
    """

    ttl: float
    grace: float
    cooldown: float
    slack: float = 0.005


def ops(events: Iterable[Event]) -> list[Op]:
    """Return the operations of a history, those of each process in their order."""
    found: dict[tuple[str, int], Op] = {}
    for event in events:
        key = event["by"], event["op"]
        op = found.setdefault(key, Op(event.get("now", event["at"])))
        op.more |= event
        if event["type"] != "invoke":
            op.ended, op.outcome = event["at"], event["type"]
    return list(found.values())


def read(lines: Iterable[str]) -> list[Event]:
    """Return the events of a file; a process that was killed may have left half a line."""
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            if line.endswith("}\n"):
                raise
    return events


def check(events: Iterable[Event], rules: Rules) -> list[str]:
    """Return what breaks a rule, each with the rule's letter first: U, F, L, O, A or C."""
    events = list(events)
    managers = [each for each in events if each["by"].startswith("manager")]
    clients = [each for each in events if not each["by"].startswith("manager")]
    return [*_of_manager(_by_effect(managers), rules), *_of_clients(ops(clients), rules)]


def _by_effect(events: list[Event]) -> Iterator[Op]:
    """Return the operations as they returned: one that is within another before that.

    Those that were cut off come before the restart.
    """
    every = {(op.by, op.op): op for op in ops(events)}
    begun: dict[tuple[str, int], None] = {}
    for event in events:
        key = event["by"], event["op"]
        if event["type"] == "invoke":
            begun[key] = None
            continue
        begun.pop(key, None)
        if every[key].what == "start":
            yield from (every[each] for each in begun)
            begun.clear()
        yield every[key]
    yield from (every[each] for each in begun)


def _of_manager(every: Iterable[Op], rules: Rules) -> Iterator[str]:
    """Replay what the one writer did, in its order."""
    holder: dict[int, int] = {}  # by ID
    due: dict[int, float] = {}  # by ID, when it has cooled
    heard: dict[int, float] = {}  # by session, when it was last renewed
    ttl: dict[int, float] = {}
    seqs: dict[int, int] = defaultdict(int)
    vague: set[int] = set()  # sessions of which some operation was cut off
    for op in every:
        who = op.more.get("session", 0)
        where = f"{op.what} of session {who} at {op.began:.3f}"
        if op.what == "start":
            heard = dict.fromkeys(heard, op.began)
            continue
        if op.outcome == "fail":
            if op.more.get("code") == "SESSION_UNKNOWN" and who in heard and who not in vague:
                yield f"C: {where}: the manager does not know a session that never ended"
            continue
        if op.outcome == "unknown":
            vague.add(who)
        mine = {cid for cid, other in holder.items() if other == who}
        if op.what == "end":
            early = heard.get(who, 0.0) + ttl.get(who, 0.0) + rules.grace - op.began
            if op.why == "expired" and early > rules.slack and who:
                yield f"L: {where}: expired {early:.3f} s too early"
            for cid in mine:
                del holder[cid]
                due[cid] = op.began + op.cooldown
            heard.pop(who, None)
            continue
        if op.what == "open":
            ttl[who] = op.ttl
            heard.setdefault(who, op.began)  # a second one renews nothing
        else:
            heard[who] = op.began
        seq = op.more.get("seq") or 0
        if seq and op.outcome == "ok":
            if seq <= seqs[who]:
                yield f"A: {where}: seq {seq} was applied after {seqs[who]}"
            seqs[who] = seq
        if op.what == "issue":
            for cid in op.more.get("cids", ()):
                if cid in holder and holder[cid] not in vague:
                    yield f"U: {where}: ID {cid} is held by session {holder[cid]}"
                if due.get(cid, 0.0) - op.began > rules.slack:
                    yield f"F: {where}: ID {cid} cools for {due[cid] - op.began:.3f} s more"
                holder[cid] = who
        elif op.what == "release":
            for cid in op.cids:
                if holder.get(cid) != who and who not in vague:
                    yield f"O: {where}: ID {cid} is held by session {holder.get(cid)}"
                holder.pop(cid, None)
                due[cid] = op.began + op.cooldown
        elif op.what == "held" and op.outcome == "ok" and who not in vague and set(op.cids) != mine:
            yield f"O: {where}: it holds {sorted(mine)}, and {op.cids} was the answer"


def _of_clients(every: list[Op], rules: Rules) -> Iterator[str]:
    """See that no two used an ID at once, or too soon one after the other, or too late."""
    answers = defaultdict(list)
    uses = defaultdict(list)
    holds = defaultdict(list)
    ended = {op.holder: op.began for op in every if op.what == "ended"}
    for op in every:
        if op.what == "message" and op.outcome == "ok":
            answers[op.session].append((op.ended, op.more.get("first") or op.began))
        elif op.what == "use":
            uses[op.holder].append(op)
        elif op.what == "hold":
            holds[op.cid].append(op)
    for op in itertools.chain(*uses.values()):
        fence = max((sent for back, sent in answers[op.session] if back <= op.began), default=0.0)
        late = op.began - fence - rules.ttl
        if late > rules.slack:
            yield f"L: ID {op.cid} was used by {op.holder} {late:.3f} s after its lease"
    for cid, several in holds.items():
        several.sort(key=lambda op: op.began)
        for one, other in itertools.pairwise(several):
            last = max((op.began for op in uses[one.holder]), default=0.0)
            if last > other.began:
                yield f"U: ID {cid} was used by {one.holder} when {other.holder} had it"
            due = last + one.need if last else 0.0
            if one.holder in ended:  # which it may have learnt late
                due = min(due, ended[one.holder] + rules.cooldown)
            if due - other.began > rules.slack:
                yield (
                    f"F: ID {cid} went from {one.holder} to {other.holder} {due - other.began:.3f}"
                    " s too early"
                )


def gap(events: Iterable[Event]) -> float:
    """Return the longest time between two IDs that anybody acquired."""
    times = sorted(op.began for op in ops(events) if op.what == "hold")
    return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


def counts(events: Iterable[Event]) -> Counter[str]:
    """Return how many operations of each kind there are."""
    return Counter(op.what for op in ops(events))


writer: Recorder | None = None
"""Of the manager in this process."""


@contextmanager
def watched(registry: type) -> Iterator[None]:
    """Let `writer` record what is done to registries of this class, from within."""
    before = {name: getattr(registry, name) for name in (*_WATCHED, "_end")}

    def wrap(name: str, what: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **named: Any) -> Any:
            to = writer
            if to is None:
                return before[name](self, *args, **named)
            token = named.get("token", None if name in ("acquire", "release") else args[0])
            at = self.sessions.find(self._digest(token)) if token else 0
            who = self.sessions.generation(at) if at else 0
            now = max(self._now, args[1]) / 1000
            more = _asked(self, name, args, named)
            number = to.invoke(what, now=now, session=who, seq=named.get("seq"), **more)
            outer, self.cause = getattr(self, "cause", None), name
            try:
                result = before[name](self, *args, **named)
            except Exception as error:
                code = getattr(error, "code", None)
                to.done(number, "fail", code=getattr(code, "name", type(error).__name__))
                raise
            finally:
                self.cause = outer
            to.done(number, **_found(name, result))
            return result

        return call

    def end(self: Any, at: int, cooldown: int) -> Any:
        to = writer
        if to is None:
            return before["_end"](self, at, cooldown)
        why = "closed" if getattr(self, "cause", None) == "close_session" else "expired"
        if not hasattr(self, "_horizon") or not hasattr(self, "_anonymous"):
            why = "finished"  # what a process before had begun
        who = 0 if self.sessions.anonymous(at) else self.sessions.generation(at)
        seconds = max(cooldown, self.settings.cooldown_ms) / 1000
        number = to.invoke("end", now=self._now / 1000, session=who, why=why, cooldown=seconds)
        result = before["_end"](self, at, cooldown)
        to.done(number)
        return result

    for name, what in _WATCHED.items():
        setattr(registry, name, wrap(name, what))
    registry._end = end  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(registry, name, method)


_WATCHED = {
    "open": "open",
    "renew": "renew",
    "held": "held",
    "acquire": "issue",
    "release": "release",
    "close_session": "renew",
}


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
    return {"cids": result.tolist()} if name in ("acquire", "held") else {}
