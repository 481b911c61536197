"""Kills the process that writes a registry, at any moment, and looks what the next one finds.

CIDALLOC_KILLS says how often, CIDALLOC_SEED from which seed on.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import killed_child
import pytest
from crash_model import BOOT, token
from killed_child import FULL, SETTINGS, clock

from cidalloc.errors import Exhausted
from cidalloc.manager.inspection import look
from cidalloc.manager.registry import Registry
from cidalloc.manager.sessions import Session as Holder

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("CIDALLOC_KILLS", "240"))
SEED = int(os.environ.get("CIDALLOC_SEED", time.time_ns() % 10**6))
A_FILE = 20  # kills of it, more or less
GRACE = SETTINGS.grace_ms

Line = tuple[str, dict[str, Any]]


@dataclass
class Session:
    generation: int
    ttl: int
    cooldown: int
    lapse: int  # it does not expire before
    opened: int


@dataclass
class Hold:
    name: str
    lapse: int = 0  # the same of an ID without a session


class Model:
    """What must be so, by all that the killed processes have said."""

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.closed: set[str] = set()
        self.generation = 0
        self.holds: dict[int, Hold] = {}
        self.due: dict[int, int] = {}

    def fill(self, path: Path) -> None:
        """Let most of the IDs be held for as long as the test takes."""
        now, ttl = clock(), 600_000
        registry = Registry.in_file(path, SETTINGS, now, BOOT)
        self.opened(FULL, registry.open(token(FULL), now, ttl_ms=ttl).generation, ttl, now)
        self.issued(FULL, registry.acquire(2000, now, token=token(FULL), seq=1).tolist(), now)
        self.sessions[FULL].cooldown = SETTINGS.unended_cooldown_ms
        registry.close()

    def ids(self, name: str) -> set[int]:
        return {cid for cid, hold in self.holds.items() if hold.name == name}

    def free(self, ids: set[int], due: int) -> None:
        for cid in ids:
            del self.holds[cid]
            self.due[cid] = max(due, self.due.get(cid, 0))

    def end(self, name: str, due: int) -> None:
        self.free(self.ids(name), due)
        del self.sessions[name]
        self.closed.add(name)

    def lapsed(self, name: str, now: int) -> None:
        """A session is gone: that must be because nobody renewed it."""
        session = self.sessions[name]
        assert session.lapse <= now, f"session {name!r} is lost"
        self.end(name, session.lapse + session.cooldown)

    def lapsed_one(self, cid: int, now: int) -> None:
        """The same of an ID without a session."""
        assert self.holds[cid].lapse <= now, f"the hold of {cid} is lost"
        self.free({cid}, self.holds[cid].lapse + SETTINGS.unended_cooldown_ms)

    def renewed(self, name: str, now: int) -> None:
        self.sessions[name].lapse = now + self.sessions[name].ttl + GRACE

    def issued(self, name: str, ids: list[int], now: int) -> None:
        for cid in ids:
            if hold := self.holds.get(cid):
                if hold.name:
                    self.lapsed(hold.name, now)
                else:
                    self.lapsed_one(cid, now)
            assert self.due.get(cid, 0) <= now, f"{cid} is issued too early"
            self.holds[cid] = Hold(name, now + SETTINGS.anonymous_age_ms)

    def opened(self, name: str, generation: int, ttl: int, now: int) -> None:
        assert generation > self.generation, "a generation came twice"
        self.generation = generation
        self.sessions[name] = Session(generation, ttl, SETTINGS.cooldown_ms, now + ttl + GRACE, now)

    def raised(self, name: str, cooldown: int) -> None:
        self.sessions[name].cooldown = max(cooldown, self.sessions[name].cooldown)

    def cool(self, ended: bool, cooldown: int) -> int:
        return SETTINGS.cooldown_ms if ended else max(cooldown, SETTINGS.cooldown_ms)

    def done(self, what: str, now: int, result: Any, name: str = "", **facts: Any) -> None:
        """An operation was done."""
        if name and what != "open":
            self.renewed(name, now)
        if what == "open":
            self.opened(name, result, facts["ttl"], now)
        elif what == "close":
            ended, session = facts["ended"], self.sessions[name]
            self.end(name, now + self.cool(ended, session.cooldown))
        elif what == "held":
            assert {*result} == self.ids(name)
        elif what == "acquire":
            self.issued(name, result, now)
            if name:
                self.raised(name, facts["cooldown"])
        elif what == "release":
            self.free({*facts["ids"]}, now + self.cool(facts["ended"], facts["cooldown"]))

    def refused(self, code: str, what: str, now: int, name: str = "", **facts: Any) -> None:
        if code == "SESSION_UNKNOWN":
            self.lapsed(name, now)
        elif name:
            self.renewed(name, now)
        if code == "EXHAUSTED" and name:  # its cooldown was raised before
            self.raised(name, facts["cooldown"])
        assert code in {
            *("SESSION_UNKNOWN", "EXHAUSTED", "DUPLICATE", "NOT_OWNER", "NOT_HELD"),
            "OUT_OF_RANGE",
        }

    def find(self, registry: Registry, under_way: Line | None, now: int) -> None:
        """Compare with what the next process finds, and go on from there."""
        what, facts = under_way or ("", {})
        at_it = facts.get("name")
        if what == "open" and (found := _find(registry, at_it)):
            self.opened(at_it, found.generation, facts["ttl"], facts["now"])
        if what == "acquire" and at_it in self.sessions:
            session = self.sessions[at_it]  # its cooldown may have been raised
            found = _find(registry, at_it)
            if found:
                noted = found.cooldown
                assert session.cooldown <= noted <= max(session.cooldown, facts["cooldown"])
                session.cooldown = noted
        everybody = 0
        for name in [*self.sessions]:
            found = _find(registry, name)
            if found is None:
                session = self.sessions[name]
                if what == "close" and name == at_it:
                    # Should the end have been under way, it was ended now, as if it had expired.
                    due = facts["now"] + self.cool(facts["ended"], session.cooldown)
                    if session.lapse <= now:
                        due = min(due, session.lapse + session.cooldown)
                    self.end(name, due)
                else:
                    self.lapsed(name, now)
                continue
            assert found.generation == self.sessions[name].generation
            ids = {*registry.pool.held_by(found.number).tolist()}
            self.compare(name, ids, what if name == at_it else "", facts)
            everybody += len(ids)
            self.renewed(name, now)
        for name in self.closed:
            assert not _find(registry, name), f"session {name!r} is back"
        anonymous = registry.sessions.anonymous
        ids = {cid for number in anonymous for cid in registry.pool.held_by(number).tolist()}
        for cid in self.ids("") - ids - {*facts.get("ids", ())}:
            self.lapsed_one(cid, now)
        self.compare("", ids, what if at_it == "" else "", facts)
        assert everybody + len(ids) == registry.pool.active, "somebody unknown holds IDs"

    def compare(self, name: str, ids: set[int], what: str, facts: dict[str, Any]) -> None:
        more, less = ids - self.ids(name), self.ids(name) - ids
        if what == "acquire":
            assert len(more) <= facts["count"]
            self.issued(name, [*more], facts["now"])
            if name and more:
                assert self.sessions[name].cooldown >= facts["cooldown"]
        else:
            assert not more, f"{name!r} holds {more}, which it was not given"
        if what == "release":
            assert less <= {*facts["ids"]}
            self.free(less, facts["now"] + self.cool(facts["ended"], facts["cooldown"]))
        else:
            assert not less, f"{name!r} has lost {less}"

    def take_all(self, registry: Registry, now: int) -> None:
        """Take all that is free of a copy of the registry."""
        with suppress(Exhausted):
            while True:
                cid = registry.pool.acquire(2**24 - 1, now)
                assert cid not in self.holds, f"{cid} was issued twice"
                assert self.due.get(cid, 0) <= now, f"{cid} was issued too early"


def _find(registry: Registry, name: str) -> Holder | None:
    return registry.sessions.named.get(registry._digest(token(name)))


class Killed:
    """The process that forks those which are killed."""

    def __init__(self) -> None:
        script = str(Path(killed_child.__file__).with_name("killed_child.py"))
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.operations = 0

    def run(self, path: Path, seed: int, model: Model) -> Line | None:
        """Let one work and kill it; returns what it had begun and not ended."""
        chance = random.Random(seed)
        assert self.process.stdin
        names = [name for name in model.sessions if name != FULL]
        self.process.stdin.write(json.dumps([str(path), seed, names]).encode() + b"\n")
        self.process.stdin.flush()
        kill_early = chance.random() < 0.15  # while it opens the file
        reports, pid, done = chance.choice([1, 10, 100, 400]) * chance.random(), 0, 0
        begun: Line | None = None
        while True:
            what, facts = self.read()
            if what == "pid":
                pid = facts["pid"]
                if kill_early:
                    time.sleep(chance.random() * 0.004)
                    os.kill(pid, signal.SIGKILL)
            elif what == "gone":
                assert facts["status"] == -signal.SIGKILL, facts
                return begun
            elif what == "done":
                assert begun
                model.done(begun[0], result=facts["result"], **begun[1])
                begun = None
                self.operations += 1
            elif what == "error":
                assert begun
                model.refused(facts["code"], begun[0], **begun[1])
                begun = None
            elif what != "ready":
                begun = what, facts
            done += 1
            if pid and done > reports and not kill_early:
                time.sleep(chance.random() ** 3 * 0.002)
                os.kill(pid, signal.SIGKILL)
                pid = 0

    def read(self) -> Line:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the child has ended"
        what, facts = json.loads(line)
        return what, facts


@pytest.fixture
def killed() -> Iterator[Killed]:
    killed = Killed()
    yield killed
    killed.process.kill()
    killed.process.communicate()


@pytest.mark.timeout(120 + KILLS)
def test_killed_at_any_moment(killed: Killed, tmp_path: Path) -> None:
    path, model, files, amid = tmp_path / "it", Model(), 0, 0
    for number in range(KILLS):
        seed = SEED + number
        if random.Random(-seed).random() < 1 / A_FILE:
            path, model, files = tmp_path / f"{seed}", Model(), files + 1
            if seed % 2:
                model.fill(path)
        try:
            under_way = killed.run(path, seed, model)
            amid += under_way is not None
            now = clock()
            registry = Registry.in_file(path, SETTINGS, now, BOOT)
            registry._check()
            model.find(registry, under_way, now)
            registry.close()
            model.take_all(look(path, now, BOOT), now)
        except Exception as error:
            raise AssertionError(f"kill {number}, CIDALLOC_SEED={seed}, {under_way}") from error
    print(
        f"{KILLS} kills, {amid} of them amid an operation; {files} files;"
        f" {killed.operations} operations"
    )
    assert amid > KILLS / 4
    assert killed.operations > 10 * KILLS
