"""What a crash may leave of a registry: reads a file as the next process would, and judges it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cidalloc import Allocator
from cidalloc.errors import Exhausted
from cidalloc.manager.registry import Registry
from cidalloc.manager.sessions import Session as Holder
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file import Storage, _identity
from cidalloc.manager.storage.file_format import Shape, Word

BOOT, NEXT_BOOT, LAST_BOOT = (bytes([n]) * 16 for n in (1, 2, 3))
ENDED, UNENDED, GRACE, TTL = 50, 100, 1_000, 600_000
"""The times of `settings`."""
NEVER = 2**62
MOST = 300  # IDs that a look at what is free takes at a time


def settings(shape: Shape, fresh: bool = True) -> Settings:
    return Settings(
        first=shape.first,
        capacity=shape.capacity,
        cooldown_ms=ENDED,
        unended_cooldown_ms=UNENDED,
        grace_ms=GRACE,
        max_ttl_ms=TTL,
        fresh=fresh,
    )


def token(name: str) -> bytes:
    return name.encode().ljust(16, b".")


def reopen(path: Path, shape: Shape, now: int, boot: bytes = BOOT) -> Registry:
    """As `Registry.in_file`, but for any shape; the file is opened, or made."""
    store = Storage.open(path, shape, boot=boot)
    try:
        return Registry(settings(shape), now, store, boot)
    except BaseException:
        store.close()
        raise


def adopted(path: Path, of: Path | None = None) -> Path:
    """Let a copy of a registry's file pass for the file itself; return its path.

    If ``of`` is given, it does only if that file is what its writer took it for.
    """

    def identity(file: Path) -> bytes:
        with file.open("rb") as opened:
            return _identity(opened.fileno()).to_bytes(8, sys.byteorder)

    with path.open("r+b") as file:
        file.seek(Word.FILE * 8)
        found = file.read(8)
        if found == identity(of) if of else any(found):
            file.seek(Word.FILE * 8)
            file.write(identity(path))
    return path


class Session(NamedTuple):
    ttl: int
    cooldown: int
    label: str
    digest: bytes
    opened_at: int
    used: int | None

    @property
    def anonymous(self) -> bool:
        return not self.digest


@dataclass
class Facts:
    """What a registry knows. Sessions go by their generation, which no two ever share."""

    holds: dict[int, int] = field(default_factory=dict)  # an ID, and whose it is
    sessions: dict[int, Session] = field(default_factory=dict)
    seqs: dict[int, int] = field(default_factory=dict)
    first: dict[int, int] = field(default_factory=dict)  # at which time a free ID was issued
    generation: int = 0  # the first one given to a new session
    horizon: int = 0

    def held_by(self, generation: int) -> set[int]:
        return {cid for cid, holder in self.holds.items() if holder == generation}


def facts_of(path: Path, shape: Shape, now: int, times: list[int], boot: bytes = BOOT) -> Facts:
    """Reopen a file, see what it holds, and then take all that can be had at each of `times`."""
    registry = reopen(path, shape, now, boot)
    try:
        registry._check()
        table, facts = registry.sessions, Facts()
        facts.horizon = registry.store.read(Word.HORIZON)
        for each in table:
            assert each.generation not in facts.sessions, "a generation came twice"
            assert each.expires == now + each.ttl + GRACE, "not its whole time again"
            facts.sessions[each.generation] = Session(
                each.ttl, each.cooldown, each.label, each.digest, each.opened_at, each.used
            )
            facts.seqs[each.generation] = each.seq
            for cid in shape.ids(registry.pool.held_by(each.number)).tolist():
                assert cid not in facts.holds, "an ID with two holders"
                facts.holds[cid] = each.generation
        for time in times:
            registry.tick(time)
            grant = registry.open(token(f"look {time}"), time, ttl_ms=TTL)
            facts.generation = facts.generation or grant.generation
            for each in table:
                for cid in shape.ids(np.array(_all_free(registry, each), np.uint64)).tolist():
                    assert cid not in facts.holds, "a held ID was issued"
                    facts.first.setdefault(cid, time)
        registry._check()
        holders = {each.number: each.generation for each in table}
        for cid, generation in facts.holds.items():
            (number,) = shape.numbers(np.array([cid], np.uint64)).tolist()
            holder = registry.pool.owner_of(number)
            assert holders[holder] == generation, "a new holder"
        return facts
    finally:
        registry.close()


def facts_of_pool(memory: bytes, shape: tuple[int, int, int], times: list[int]) -> Facts:
    """The same of a pool alone, whose owners 1 and 2 may hold IDs."""
    pool = Allocator(*shape, buffer=bytearray(memory), holders=b"\0\1\1")
    pool._check()
    facts = Facts()
    for owner in (1, 2):
        for cid in pool.held_by(owner).tolist():
            assert cid not in facts.holds, "an ID with two holders"
            facts.holds[cid] = owner
    for time in times:
        try:
            while True:
                cid = pool.acquire(3, time)
                assert cid not in facts.holds, "a held ID was issued"
                facts.first.setdefault(cid, time)
        except Exhausted:
            pool._check()
    return facts


def _all_free(registry: Registry, session: Holder) -> list[int]:
    got: list[int] = []
    while len(got) < MOST:
        try:
            got += registry._issue(1, session, False).tolist()
        except Exhausted:
            break
    return got


def judge(state: Facts, before: Facts, after: Facts, under_way: dict[int, int]) -> None:
    """Check that a state may lie between two others.

    `under_way` are IDs that are given back meanwhile, and from when on they may be issued, though
    that may be undone in the end.
    """
    for cid, holder in state.holds.items():
        assert holder in (before.holds.get(cid), after.holds.get(cid)), f"{cid} is not theirs"
    for cid, holder in before.holds.items():
        if after.holds.get(cid) == holder and cid not in under_way:
            assert state.holds.get(cid) == holder, f"the hold of {cid} is lost"
    for cid, time in state.first.items():
        due = min(facts.first.get(cid, NEVER) for facts in (before, after))
        assert time >= min(due, under_way.get(cid, NEVER)), f"{cid} is issued too early"
    assert {*before.sessions} & {*after.sessions} <= {*state.sessions}, "a session is lost"
    for generation, session in state.sessions.items():
        was, will = before.sessions.get(generation), after.sessions.get(generation)
        assert session in (was, will), "a session that never was like that"
        if will is None:
            assert state.held_by(generation) == before.held_by(generation), "half alive"
        if will and state.held_by(generation) - before.held_by(generation):
            assert session.cooldown >= will.cooldown, "IDs before their cooldown is noted"
        seq = state.seqs[generation]
        assert seq in (before.seqs.get(generation), after.seqs.get(generation))
        changed = state.held_by(generation) != before.held_by(generation)
        if changed and not session.anonymous:  # these have their `floor` there
            assert seq == after.seqs.get(generation), "the effect before its seq is noted"
        longest = min(session.ttl, TTL) + GRACE + session.cooldown
        assert state.horizon >= longest, "a session before the horizon is noted"


def judge_reboot(path: Path, shape: Shape, state: Facts, boot: bytes = NEXT_BOOT) -> None:
    """Check what another boot of the machine makes of a file of which no store was lost."""
    store = Storage.look(path)
    ready = store.ready_ids
    horizon = store.read(Word.HORIZON)
    now = 7
    facts = facts_of(path, shape, now, [now, now + horizon - 1, now + horizon], boot)
    anonymous = {key for key, session in state.sessions.items() if session.anonymous}
    kept = {cid: holder for cid, holder in state.holds.items() if holder in anonymous}
    assert facts.holds == kept, "what is held without a session, and nothing else"
    assert {*facts.sessions} == anonymous
    assert facts.generation > max(state.sessions, default=0) | 2**32 - 1, "generations leap"
    for cid, time in facts.first.items():
        (number,) = shape.numbers(np.array([cid], np.uint64)).tolist()
        if number - shape.first < ready:
            assert time >= now + horizon, f"{cid} was below the mark"
