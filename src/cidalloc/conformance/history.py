"""Histories: what clients and a manager did, as JSON lines, and the checker that judges them.

An operation is a line of type ``invoke`` when it begins and one of type ``ok`` or ``fail`` when it
returns, or ``refused`` if it was not even sent; without the second one nobody knows whether it
happened. What takes no time is a line ``ok`` alone. Times are seconds of one clock. The checker
knows nothing of cidalloc's code.

By a client: ``message`` (`session`, `operation`; an ``OPEN`` has `first`, when its token was first
sent), ``hold`` (`cid`, `holder`, `session`, and `need`: seconds for which Triton may know a
sequence of it after its last request was sent), ``use`` (`cid`, `holder`, `session`), and ``ended``
(`holder`: END was answered). By a manager, with `session` and maybe `seq`: ``start``, ``open``
(`ttl`), ``issue`` (`cids`), ``release`` (`cids`, `cooldown`), ``renew``, ``held`` (`cids`), ``end``
(`why`, `cooldown`), ``named`` (`cids` of the dead, which need END); and ``power``: it was cut, all
sessions are over, and some of what was written is lost, so only the clients know what is in use. A
session is its generation; 0 is nobody's. By ``triton``, the model's server: ``end_dead`` (`cids`:
END that a client sent for the dead took effect).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]
NEVER = float("inf")


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
        op = found.setdefault(key, Op(event["now"] if "now" in event else event["at"]))
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
    managers = [each for each in events if each["by"].startswith(("manager", "triton"))]
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
        if op.what == "power":
            vague |= {*heard, *holder.values()}
            heard.clear()
            holder.clear()
            continue
        seq, code = op.more.get("seq") or 0, op.more.get("code")
        if op.outcome == "fail":
            if code not in ("SESSION_UNKNOWN", "REPEATED"):
                seqs[who] = max(seqs[who], seq)
            if code == "SESSION_UNKNOWN" and who in heard and who not in vague:
                yield f"C: {where}: the manager does not know a session that never ended"
            continue
        if op.what in ("end_dead", "named"):
            for cid in op.more.get("cids", ()):
                if cid in holder and holder[cid] not in vague:
                    yield f"U: {where}: ID {cid} is held by session {holder[cid]}"
            if op.what == "end_dead":
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
        elif op.what == "use" and op.outcome != "refused":
            uses[op.holder].append(op)
        elif op.what == "hold":
            holds[op.cid].append(op)
    for op in itertools.chain(*uses.values()):
        lease_deadline = max(
            (sent for back, sent in answers[op.session] if back <= op.began), default=0.0
        )
        late = op.began - lease_deadline - rules.ttl
        if late > rules.slack:
            yield f"L: ID {op.cid} was used by {op.holder} {late:.3f} s after its lease"

    def due(one: Op) -> float:
        """Return when the ID of a holder may be used again; 0 if it sent nothing."""
        last = max((op.began for op in uses[one.holder]), default=0.0)
        due = last + one.need if last else 0.0
        if one.holder in ended:  # which it may have learnt late
            due = min(due, ended[one.holder] + rules.cooldown)
        return due

    for op in every:
        for one in holds[op.cids[0]] if op.what == "end_dead" else ():
            if one.began < op.began < due(one) - rules.slack:
                yield f"F: ID {one.cid} got END at {op.began:.3f}, while {one.holder} had it"
    for cid, several in holds.items():
        several.sort(key=lambda op: op.began)
        for one, other in itertools.pairwise(several):
            last = max((op.began for op in uses[one.holder]), default=0.0)
            if last > other.began:
                yield f"U: ID {cid} was used by {one.holder} when {other.holder} had it"
            early = due(one) - other.began
            if early > rules.slack:
                yield (
                    f"F: ID {cid} went from {one.holder} to {other.holder} {early:.3f} s too early"
                )


def gap(events: Iterable[Event]) -> float:
    """Return the longest time between two IDs that anybody acquired."""
    times = sorted(op.began for op in ops(events) if op.what == "hold")
    return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


def counts(events: Iterable[Event]) -> Counter[str]:
    """Return how many operations of each kind there are."""
    return Counter(op.what for op in ops(events))
