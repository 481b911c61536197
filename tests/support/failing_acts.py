"""The operations in which `failing_child.py` lets calls fail."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import stepped_child
from crash_model import BOOT, NEXT_BOOT, TTL, adopted, reopen, settings, token
from sparse import content
from stepped_child import EIGHT, NOW, ROTATED, SCENARIOS, SEQS, SIX, Scenario

from cidalloc import Allocator, cli
from cidalloc.errors import CidError, RegistryCorrupt
from cidalloc.manager.inspection import look, status_of
from cidalloc.manager.registry import Registry
from cidalloc.manager.sessions import ENDING, _word
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file import Storage, enlarge
from cidalloc.manager.storage.file_format import RECORD, Part, Shape, Word
from cidalloc.manager.takeover import RegistryHolder, boot_id

# Not while memory fails: in an import CPython 3.11 itself crashes then.
for command in ("drain", "registry"):
    import_module(f"cidalloc.cli.{command}")

MODELS = ("asr",)
ROW = 40
"""The first row that gets a session."""
"""When a look at a file takes what is free."""


@dataclass
class Operation:
    """Something that is done while a call fails.

    Args:
        prepare: gets a path, and returns a subject for the others.
        act: does it.
        check: audits the subject after it.
        end: closes all that is open.
        state: what must be the same after a failure as before it, besides the file.
        shape: the pool of the file.
        boot: the boot of the machine in which the file is looked at.
        partial: a part of it may be done after a failure.
        damaged: the file is damaged from the beginning.
    """

    prepare: Callable[[Path], Any]
    act: Callable[[Any], object]
    check: Callable[[Any], object] = lambda subject: None
    end: Callable[[Any], object] = lambda subject: None
    state: Callable[[Any], object] = lambda subject: None
    shape: Shape = SIX
    boot: bytes = BOOT
    partial: bool = False
    damaged: bool = False


# ---- Of an open registry


class World(stepped_child.World):
    """As that one, but a refused release is an error.

    And its numbers are not so small that Python has an object for them already.
    """

    def __init__(self, path: Path, shape: Shape) -> None:
        super().__init__(path, shape)
        self.registry.store.write(Word.GENERATION, 1_000)
        self.registry.sessions._rows_used = ROW

    def release(self, name: str, *ids: int, ended: bool = False) -> None:
        numbers, whose = np.array(ids, np.uint64), self.of(name)
        self.registry.release(numbers, self.time, token=whose, seq=next(SEQS), ended=ended)


def _check(world: World) -> None:
    world.registry._check()
    table = world.registry.sessions
    leases = [lease[-1] for lease in table._leases]
    assert all(each in leases for each in table), "a session that does not expire"
    assert {each.number for each in table}.isdisjoint(table._free), "a row with two sessions"


def _of(scenario: Scenario, partial: bool = False) -> Operation:
    def prepare(path: Path) -> World:
        world = World(path, scenario.shape)
        scenario.prepare(world)
        world.time = NOW
        return world

    def end(world: World) -> None:
        world.registry.close()
        del world.registry

    return Operation(prepare, scenario.act, _check, end, shape=scenario.shape, partial=partial)


def _three(world: World) -> None:
    for name in "ab":
        world.open(name)
        world.acquire(name, 3)


def _two_ages(world: World) -> None:
    """IDs without a session, of two sessions of the registry."""
    world.acquire("", 1)
    age = world.registry.settings.anonymous_age_ms
    world.registry.acquire(1, age // 4)


def _dying(world: World) -> None:
    """A session that has a model, and is about to expire, and one that asks for its IDs."""
    world.open("a", 5_000)
    world.acquire("a", 2)
    world.registry.renew(token("a"), 0, models=MODELS)
    world.open("b")
    world.registry.dead_ids(token("b"), 0, *MODELS, 10)


MORE = {
    "acquire in another order": Scenario(
        lambda w: w.acquire("a", 2), lambda w: (w.open("a"), w.acquire("a", 2)), shape=ROTATED
    ),
    "acquire one in another order": Scenario(
        lambda w: w.acquire("a", 1), lambda w: w.open("a"), shape=ROTATED
    ),
    "acquire for a waiting session": Scenario(
        lambda w: w.registry.acquire(
            1, NOW, token=token("b"), seq=next(SEQS), wait_ms=1_000, used=2
        ),
        lambda w: (
            _three(w),
            w.registry.renew(token("b"), 0, used=3),
            w.release("b", 4, ended=True),
        ),
    ),
    "release and say what is used": Scenario(
        lambda w: w.registry.release(
            np.array([4, 5], np.uint64), NOW, token=token("b"), seq=next(SEQS), used=1
        ),
        lambda w: (_three(w), w.registry.renew(token("b"), 0, used=3)),
    ),
    "release without a session of two ages": Scenario(
        lambda w: w.release("", 1, 2), _two_ages, shape=EIGHT
    ),
    "held": Scenario(lambda w: w.registry.held(token("a"), NOW, seq=next(SEQS)), _three),
    "name models": Scenario(lambda w: w.registry.renew(token("a"), NOW, models=MODELS), _three),
    "name the dead": Scenario(
        lambda w: w.registry.dead_ids(token("b"), NOW + 500, *MODELS, 10),
        lambda w: (_dying(w), w.registry.tick(NOW + 500)),
        shape=EIGHT,
    ),
    "grow by rows": Scenario(
        lambda w: w.open("z"), lambda w: [w.open(f"{i}") for i in range(512 - ROW)]
    ),
    "status": Scenario(lambda w: status_of(w.registry, NOW), _three),
}
EXPIRE = {
    "expire": SCENARIOS["expire"],
    "expire with models": Scenario(lambda w: w.registry.tick(9_999_999), _dying, shape=EIGHT),
}
REFUSED = ("release a foreign one", "release one twice")


# ---- Of a file


class Opening:
    """A path at which a registry is opened."""

    def __init__(self, path: Path, open_it: Callable[[Path], Any]) -> None:
        self.path, self._open = path, open_it
        self.found: Any = None

    def act(self) -> None:
        self.found = self._open(self.path)

    def check(self) -> None:
        if isinstance(self.found, Registry):
            self.found._check()

    def end(self) -> None:
        if isinstance(self.found, Registry):
            self.found.close()
        self.found = None


def _left(path: Path, damage: Callable[[World], object] = lambda world: None) -> None:
    """Leave a file of a registry that was killed."""
    other = path.with_name("other")
    world = World(other, SIX)
    for name in "abc":
        world.open(name)
        world.acquire(name, 1)
    world.acquire("", 1)
    world.release("b", 2)
    damage(world)
    left = content(other)
    world.registry.close()
    other.unlink()
    adopted(left.put(path))


def _amid_the_end(world: World) -> None:
    words, place = world.registry.sessions._words, world.number("b") * 16
    words[place] = _word(place, words[place] & (1 << 48) - 4 | ENDING)


def _beyond(world: World) -> None:
    """Store a record beyond what is said to be in use."""
    store = world.registry.store
    place = Part.RECORDS.place + (store.ready_ids + 4_000) * RECORD
    os.pwrite(store._fd, b"x", place)


def _file(
    open_it: Callable[[Path], Any],
    damage: Callable[[World], object] = lambda world: None,
    **more: Any,
) -> Operation:
    def prepare(path: Path) -> Opening:
        _left(path, damage)
        return Opening(path, open_it)

    return Operation(prepare, Opening.act, Opening.check, Opening.end, **more)


def _make(path: Path) -> Registry:
    return Registry.in_file(path, settings(SIX), NOW, BOOT)


def _refused(path: Path) -> None:
    """Open a damaged file."""
    try:
        Storage.open(path, SIX, boot=BOOT)
    except RegistryCorrupt:
        return
    raise AssertionError("a damaged file was accepted")


class Failed(CidError):
    """The command has failed, as it should."""


def _command(*words: str, refused: bool = False) -> Callable[[Path], None]:
    """Return what runs a command on a file; it raises an error for an error of the command."""

    def run(path: Path) -> None:
        out, err, status = io.StringIO(), io.StringIO(), 0
        arguments, sys.argv = sys.argv, ["cidalloc", *words, str(path)]
        try:
            with redirect_stdout(out), redirect_stderr(err):
                try:
                    cli.run()
                except SystemExit as end:
                    status = int(end.code or 0)
        finally:
            sys.argv = arguments
        if status == 0:
            assert not refused, "a damaged file was accepted"
            assert not err.getvalue(), err.getvalue()
            assert out.getvalue()
            return
        assert re.fullmatch(r"error: [A-Z_]+: .+\n", err.getvalue()), err.getvalue()
        if not refused or "REGISTRY_CORRUPT" not in err.getvalue():
            raise Failed(err.getvalue())

    return run


# ---- Of a manager


class Clock:
    now = 0

    def __call__(self) -> int:
        return self.now


class Holders:
    """A process that has the registry, and one that is to get it, though both are this one."""

    def __init__(self, path: Path) -> None:
        values = {
            "first": SIX.first,
            "capacity": SIX.capacity,
            "cooldown_ms": 50,
            "grace_ms": 1_000,
        }
        self.settings = Settings(**values, state=str(path.parent), fresh=True)  # type: ignore[arg-type]
        self.clock = Clock()
        self.old, self.new = self.holder(), None
        registry = self.old.registry()
        registry.open(token("a"), 0, ttl_ms=TTL, label="a")
        registry.acquire(2, 0, token=token("a"), seq=1)

    def holder(self) -> RegistryHolder:
        return RegistryHolder(self.settings, "it", self.clock)

    def act(self) -> None:
        self.clock.now += 4_000
        self.new = self.new or self.holder()
        self.old.poll()
        self.new.poll()
        self.new.registry()

    def end(self) -> None:
        for each in (self.old, self.new):
            if each:
                each.close()
        self.old = self.new = None


class Drained:
    """A process with the registry, in which nothing fails, and a command that drains it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        parent = os.getpid()
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            holders = Holders(path)
            os.write(writing, b"!")
            while os.getppid() == parent:
                holders.old.poll()
                time.sleep(0.002)
            os._exit(0)
        os.read(reading, 1)
        os.close(reading)
        os.close(writing)

    def act(self) -> None:
        _command("drain")(self.path)

    def end(self) -> None:
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)


# ---- Of a pool alone


def _pool(act: Callable[[Any], object]) -> Operation:
    def prepare(path: Path) -> Allocator:
        pool = Allocator(100_000, 1_000)
        for _ in range(700):
            pool.acquire(owner=1_000)
        pool.release_many(range(1_100, 1_300, 3), 1_000, reuse_at=10_000)
        return pool

    def state(pool: Allocator) -> object:
        held = pool.held_by(1_000).tolist() + pool.held_by(2_000).tolist()
        return pool.capacity, sorted(held), pool.free, pool.cooling

    return Operation(prepare, act, Allocator._check, state=state)


def _of_file(kind: Any) -> Operation:
    return Operation(kind, kind.act, end=kind.end, boot=boot_id(), partial=True)


OPERATIONS: dict[str, Operation] = {
    **{n: _of(each) for n, each in SCENARIOS.items() if n not in (*REFUSED, *EXPIRE)},
    **{name: _of(each) for name, each in MORE.items()},
    **{name: _of(each, partial=True) for name, each in EXPIRE.items()},
    "make": Operation(lambda path: Opening(path, _make), Opening.act, Opening.check, Opening.end),
    "make with folders": Operation(
        lambda path: Opening(path.with_name("folder") / "of it" / "it.cidalloc", _make),
        Opening.act,
        Opening.check,
        Opening.end,
    ),
    "make in memory": Operation(
        lambda path: Opening(path, lambda path: Registry(settings(SIX), NOW)),
        Opening.act,
        Opening.check,
        Opening.end,
    ),
    "reopen": _file(lambda path: reopen(path, SIX, NOW)),
    "reopen amid an end": _file(lambda path: reopen(path, SIX, NOW), _amid_the_end, partial=True),
    "reboot": _file(lambda path: reopen(path, SIX, NOW, NEXT_BOOT), boot=NEXT_BOOT),
    "close": _of(Scenario(lambda w: w.registry.close(), _three)),
    "look": _file(lambda path: look(path, NOW, BOOT)),
    "enlarge": _file(lambda path: enlarge(path, 6)),
    "open a damaged file": _file(_refused, _beyond, damaged=True),
    "registry show": _file(_command("registry", "show")),
    "registry check": _file(_command("registry", "check")),
    "registry check of a damaged file": _file(
        _command("registry", "check", refused=True), _beyond, damaged=True
    ),
    "registry upgrade": _file(_command("registry", "upgrade", "--capacity", "6")),
    "drain": _of_file(Drained),
    "take over": _of_file(Holders),
    "pool: make": Operation(lambda path: None, lambda subject: Allocator(10_000)),
    "pool: resize": _pool(lambda pool: pool.resize(200_000)),
    "pool: reserve": _pool(lambda pool: pool.reserve([5_000, 6_000, 1_103], 1_000)),
    "pool: release owner": _pool(lambda pool: pool.release_owner(1_000, 10_000)),
    "pool: clear": _pool(lambda pool: pool.clear(10_000)),
    "pool: release many": _pool(lambda pool: pool.release_many([1_000, 1_001, 1_500], 1_000)),
    "pool: acquire many": _pool(lambda pool: pool.acquire_many(300, 2_000)),
    "pool: snapshot": _pool(lambda pool: pool.snapshot()),
    "pool: restore": _pool(lambda pool: Allocator.restore(pool.snapshot())),
}
