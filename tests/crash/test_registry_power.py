"""Cuts the power: of what was stored since the last sync, any page or sector may be missing.

CIDALLOC_CUTS says how often, CIDALLOC_SEED from which seed on.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash_model import BOOT, GRACE, NEXT_BOOT, TTL, UNENDED, facts_of, settings, token
from disk import Disk
from sparse import PAGE, Content, content

from cidalloc.errors import Exhausted, SessionUnknown, Unavailable
from cidalloc.manager.registry import Registry
from cidalloc.manager.storage import file
from cidalloc.manager.storage.file import Storage
from cidalloc.manager.storage.file_format import Part, Shape, Word

pytestmark = pytest.mark.slow

CUTS = int(os.environ.get("CIDALLOC_CUTS", "120"))
SEED = int(os.environ.get("CIDALLOC_SEED", time.time_ns() % 10**6))
A_FILE = 10  # cuts of it, more or less
SHAPE = Shape(1, 4 * 2048, offset=100)  # 2047 IDs, and then the file grows
SETTINGS = replace(settings(SHAPE), anonymous_age_ms=10**6)


class World:
    """A registry, and for how long each ID may be in use from now on."""

    def __init__(self, path: Path, chance: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chance = chance
        self.boots = self.number = self.generation = 0
        self.now = chance.choice([0, 10**9])
        self.in_use: dict[int, int] = {}  # until when, at least, an ID must not be issued
        self.sessions: dict[str, list[int]] = {}
        self.cooldowns: dict[str, int] = {}
        self.path = path
        Storage.open(path, SHAPE, boot=self.boot).close()
        self.disk = Disk(path, chance)
        monkeypatch.setitem(file._AHEAD, Part.RECORDS, 1)
        monkeypatch.setattr(os, "fsync", self.disk.sync)
        self.registry = self.opened()

    @property
    def boot(self) -> bytes:
        return self.boots.to_bytes(16, "little")

    def opened(self) -> Registry:
        return Registry.in_file(self.path, SETTINGS, self.now, self.boot)

    def step(self) -> None:
        chance, registry = self.chance, self.registry
        self.now += chance.choice([0, 1, 10, 60, 200] * 40 + [10**6])
        draw, self.number = chance.random(), self.number + 1
        name = chance.choice(["", *self.sessions])
        key: dict[str, Any] = {"token": token(name), "seq": self.number} if name else {}
        try:
            if draw < 0.15:
                name = f"{self.number}"
                grant = registry.open(token(name), self.now, ttl_ms=chance.choice([1_000, TTL]))
                assert grant.generation > self.generation, "a generation came twice"
                self.generation = grant.generation
                self.sessions[name], self.cooldowns[name] = [], SETTINGS.cooldown_ms
            elif draw < 0.2 and name:
                registry.close_session(token(name), self.now)
                self.cool(self.sessions.pop(name), self.cooldowns[name])
            elif draw < 0.7:
                cooldown = chance.choice([UNENDED, 7_000, 3 * 10**6])
                ids = registry.acquire(
                    chance.choice([1, 3, 15]), self.now, cooldown_ms=cooldown, **key
                ).tolist()
                for cid in ids:
                    assert self.in_use.get(cid, 0) <= self.now, f"{cid} is issued too early"
                    self.in_use[cid] = self.now
                if name:
                    self.sessions[name] += ids
                    self.cooldowns[name] = max(cooldown, self.cooldowns[name])
                else:
                    # Nobody knows for how long, but not shorter than a session.
                    self.cool(ids, SETTINGS.max_ttl_ms + GRACE + UNENDED)
            elif name and (mine := self.sessions[name]):
                some = [mine.pop() for _ in range(chance.randint(1, len(mine)))]
                registry.release(np.array(some, np.uint64), self.now, **key)
                self.cool(some, UNENDED)
        except Exhausted:
            pass
        except SessionUnknown:
            self.cool(self.sessions.pop(name), 0)

    def cool(self, ids: list[int], after: int) -> None:
        for cid in ids:
            self.in_use[cid] = self.now + after

    def cut(self) -> None:
        """Cut the power, and look what the next boot makes of it."""
        for name, ids in self.sessions.items():
            session = self.registry.sessions.named.get(self.registry._digest(token(name)))
            if session:
                left = session.ttl + GRACE + self.cooldowns[name]
                self.cool(ids, left)
        self.registry.close()
        self.disk.cut()
        then, self.now = self.now, self.chance.choice([0, 5, self.now])
        self.in_use = {cid: until - then + self.now for cid, until in self.in_use.items()}
        self.sessions = {}
        self.boots += 1
        kept, ready = surviving(self.path)
        for cid in self.in_use:
            assert number_of(cid) < SHAPE.first + ready, f"{cid} is above the mark"
        if self.chance.random() < 0.5:  # the power goes again, before anything was done
            registry = self.opened()
            self.disk.note()
            registry.close()
            if self.chance.random() < 0.5:
                self.disk.cut()
                self.boots += 1
                kept, ready = surviving(self.path)
        self.registry = registry = self.opened()
        registry._check()
        horizon = registry.store.read(Word.HORIZON)
        assert max(self.in_use.values(), default=0) <= self.now + horizon, "beyond the horizon"
        held = {
            cid
            for session in registry.sessions
            for cid in SHAPE.ids(registry.pool.held_by(session.number)).tolist()
        }
        assert held == kept, "what is held without a session, and nothing else"
        assert not registry.sessions.named
        for cid in range(SHAPE.first, SHAPE.first + SHAPE.capacity):
            if number_of(cid) < SHAPE.first + ready:
                self.in_use[cid] = max(self.in_use.get(cid, 0), self.now + horizon)


def surviving(path: Path) -> tuple[set[int], int]:
    """Return the IDs whose records say that they are held without a session; and the ready ones."""
    store = Storage.look(path)
    rows = memoryview(store.rows)
    found = set()
    for at in range(1, store.ready_ids + 1):
        used, _, link = struct.unpack_from("=QqQ", memoryview(store.records), at * 32)
        life, kind = (struct.unpack_from("=Q", rows, (link >> 40) * 128 + n)[0] for n in (0, 56))
        if used >> at % 64 & 1 and kind & 1 and life & 3 == 1:
            found.update(SHAPE.ids(np.array([SHAPE.first + at - 1], np.uint64)).tolist())
    return found, store.ready_ids


def number_of(cid: int) -> int:
    """Return the allocator's number of an ID."""
    return int(SHAPE.numbers(np.array([cid], np.uint64))[0])


def test_power_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = grown = files = 0
    world: World | None = None
    for number in range(CUTS):
        seed = SEED + number
        chance = random.Random(seed)
        if world is None or chance.random() < 1 / A_FILE:
            if world:
                world.registry.close()
            with monkeypatch.context():
                world, files = World(tmp_path / f"{seed}", chance, monkeypatch), files + 1
        world.chance = world.disk.chance = chance
        try:
            for _ in range(chance.choice([0, 5, 60])):
                world.step()
                world.disk.note()
            world.cut()
        except Exception as error:
            raise AssertionError(f"cut {number}, CIDALLOC_SEED={seed}") from error
        kept += world.registry.pool.active
        grown += world.registry.pool.ready > 2047
    print(f"{CUTS} cuts, {files} files; {kept} IDs without a session were kept")
    assert kept
    assert grown


# ---- Every subset of the pages that something changed


ANONYMOUS = 3  # the row of the IDs without a session


def _expire(registry: Registry) -> None:
    registry.tick(10 * TTL)
    registry.acquire(2, 10 * TTL, token=token("b"), seq=9)


CHANGES: dict[str, Any] = {
    "open a session": lambda registry: registry.open(token("c"), 5, ttl_ms=TTL),
    "acquire": lambda registry: registry.acquire(3, 5, token=token("b"), seq=9),
    "acquire without a session": lambda registry: registry.acquire(3, 5),
    "raise the horizon": lambda registry: registry.acquire(
        3, 5, token=token("b"), seq=9, cooldown_ms=10 * TTL
    ),
    "grow by IDs": lambda registry: registry.acquire(2_100, 5, token=token("b"), seq=9),
    "grow by sessions": lambda registry: [
        registry.open(token(f"{n}"), 5, ttl_ms=TTL) for n in range(600)
    ],
    "expire": _expire,
    "close": lambda registry: registry.close_session(token("a"), 5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_subset_of_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Before, between and after the syncs of a change, any page may be old or new."""
    path, fsync = tmp_path / "it", os.fsync
    monkeypatch.setitem(file._AHEAD, Part.RECORDS, 1)
    registry = Registry.in_file(path, settings(SHAPE), 0, BOOT)
    for name, ttl in (("a", 5_000), ("b", 100 * TTL)):
        registry.settings = replace(registry.settings, max_ttl_ms=100 * TTL)
        registry.open(token(name), 0, ttl_ms=ttl)
        registry.acquire(200, 0, token=token(name), seq=1)
    registry.acquire(1, 0)
    assert [*registry.sessions.anonymous] == [ANONYMOUS]
    os.fsync(registry.store._fd)
    versions = [content(path)]
    held: list[set[int]] = []  # by sessions, at each version but the first

    def note() -> None:
        held.append({*registry.pool.held().tolist()} - {*registry.pool.held_by(ANONYMOUS).tolist()})
        versions.append(content(path))

    def synced(fd: int) -> None:
        note()
        fsync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    CHANGES[change](registry)
    note()
    registry.close()
    monkeypatch.setattr(os, "fsync", fsync)
    tried = 0
    for (old, new), numbers in zip(pairwise(versions), held, strict=True):
        ids = {*SHAPE.ids(np.array([*numbers], np.uint64)).tolist()}
        differ = [at for at in {**old.pages, **new.pages} if old.pages.get(at) != new.pages.get(at)]
        for kept in _subsets(differ):
            pages = {**new.pages, **{at: old.pages.get(at, bytes(PAGE)) for at in kept}}
            Content(new.size, pages).put(path)
            facts = facts_of(path, SHAPE, 7, [7, 7 + TTL], NEXT_BOOT)
            assert all(session.anonymous for session in facts.sessions.values())
            early = ids & facts.first.keys()
            assert not early, f"{len(early)} IDs were issued early; old pages: {sorted(kept)}"
            tried += 1
    print(change, tried, "files")
    assert tried >= 2


def _subsets(places: list[int]) -> Iterator[tuple[int, ...]]:
    """All subsets of the pages, or of many pages 30 at random."""
    if len(places) <= 7:
        for size in range(len(places) + 1):
            yield from combinations(places, size)
    else:
        for seed in range(30):
            chance = random.Random(seed)
            yield tuple(place for place in places if chance.random() < 0.5)


# ---- Each found by the above, or by reading


def lost(path: Path, shape: Shape, act: Any, fresh: bool = True) -> Content:
    """Return what is on the disk for certain when `act` has been done to a new registry."""
    on_disk: list[Content] = []
    fsync = os.fsync

    def synced(fd: int) -> None:
        fsync(fd)
        if stat.S_ISREG(os.fstat(fd).st_mode):  # and not its folder
            on_disk.append(content(Path(f"/proc/self/fd/{fd}")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        registry = Registry.in_file(path, settings(shape, fresh), 0, BOOT)
        act(registry)
        registry.close()
    return on_disk[-1]


def test_ids_without_a_session_cool_after_a_power_cut(tmp_path: Path) -> None:
    shape = Shape(1, 3)
    path = tmp_path / "it"
    lost(path, shape, lambda registry: registry.acquire(1, 0)).put(path)
    registry = Registry.in_file(path, settings(shape), 0, NEXT_BOOT)
    assert registry.pool.active == 0, "that ID was lost"
    with pytest.raises(Exhausted):
        registry.acquire(1, TTL + GRACE + UNENDED - 1)
    registry.close()


def test_a_new_registry_waits_although_the_power_is_cut(tmp_path: Path) -> None:
    path, shape = tmp_path / "it", Shape(1, 3)
    lost(path, shape, lambda registry: None, fresh=False).put(path)
    registry = Registry.in_file(path, settings(shape, fresh=False), 0, NEXT_BOOT)
    assert registry.issues_in_ms == TTL + GRACE
    registry.close()


def test_an_id_without_a_session_that_is_released_after_a_power_cut(tmp_path: Path) -> None:
    """It may have been released and issued to a session before, of which nothing is left."""
    shape, path = Shape(1, 1), tmp_path / "it"
    registry = Registry.in_file(path, settings(shape), 0, BOOT)
    ids = registry.acquire(1, 0)
    horizon = registry.store.read(Word.HORIZON)
    registry.close()
    for _ in range(2):  # also if the process dies then
        registry = Registry.in_file(path, settings(shape), 0, NEXT_BOOT)
        registry.close()
    registry = Registry.in_file(path, settings(shape), 0, NEXT_BOOT)
    assert registry.release(ids, 0, ended=True) == 1
    with pytest.raises(Exhausted):
        registry.acquire(1, horizon - 1)
    assert registry.acquire(1, horizon).tolist() == [1]
    registry.close()


def test_ids_without_a_session_have_their_whole_age_after_a_reboot(tmp_path: Path) -> None:
    shape = Shape(1, 8)
    path, age = tmp_path / "it", settings(shape).anonymous_age_ms
    registry = Registry.in_file(path, settings(shape), 10**10, BOOT)
    registry.acquire(1, 10**10)
    registry.close()
    registry = Registry.in_file(path, settings(shape), 0, NEXT_BOOT)
    now = age * 9 // 8  # just before the one of before goes
    registry.tick(now)
    cid = registry.pool.held_by(next(iter(registry.sessions.anonymous)))[0]
    later = int(registry.acquire(1, now)[0])
    assert later != cid
    registry.tick(now + age - 1)
    assert later in registry.pool
    assert cid not in registry.pool
    registry.close()


def test_a_horizon_beyond_the_longest_cooldown(tmp_path: Path) -> None:
    month = 30 * 86_400_000
    shape = Shape(1, 3)
    values = replace(settings(shape), max_ttl_ms=month)
    path = tmp_path / "it"
    registry = Registry.in_file(path, values, 0, BOOT)
    registry.open(token("a"), 0, ttl_ms=month)
    registry.acquire(1, 0, token=token("a"), seq=1)
    registry.close()
    for _ in range(2):  # the second time the same boot finds those times
        registry = Registry.in_file(path, values, 0, NEXT_BOOT)
        with pytest.raises(Exhausted):
            registry.acquire(1, month)
        registry.close()


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "it failed"), MemoryError()], ids=repr)
def test_a_disk_that_fails_while_the_file_grows(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fsync, calls = tmp_path / "it", os.fsync, iter(range(100))

    def failing(fd: int) -> None:
        if next(calls) == 1:  # space was had, and what is said of it does not reach the disk
            raise fault
        fsync(fd)

    Storage.open(path, SHAPE, boot=BOOT).close()
    registry = Registry.in_file(path, SETTINGS, 0, BOOT)
    registry.open(token("a"), 0, ttl_ms=TTL)
    registry.acquire(2040, 0, token=token("a"), seq=1)
    before = registry.store.granules(Part.RECORDS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises((Unavailable, MemoryError)):
            registry.acquire(20, 0, token=token("a"), seq=2)
    assert registry.store.granules(Part.RECORDS) == before, "used, though it may not be on the disk"
    registry.acquire(20, 0, token=token("a"), seq=3)
    held = registry.held(token("a"), 0).tolist()
    registry.close()
    registry = Registry.in_file(path, SETTINGS, 0, BOOT)
    registry._check()
    assert registry.held(token("a"), 0).tolist() == held
    registry.close()


@pytest.mark.parametrize("made_as_well", [False, True])
def test_a_folder_that_could_not_be_synced(
    made_as_well: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before an ID is issued, the file is sure to be found after a power cut."""
    path, fsync = tmp_path / "it", os.fsync
    if made_as_well:
        path = tmp_path / "its" / "folder" / "it"
    fails, synced = True, []

    def noted(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            if fails:
                raise OSError(errno.EIO, "it failed")
            synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    with pytest.raises(Unavailable, match="it failed"):
        Registry.in_file(path, SETTINGS, 0, BOOT)
    fails = False
    Registry.in_file(path, SETTINGS, 0, BOOT).close()
    parents = [each for each in path.parents if each.is_relative_to(tmp_path)]
    assert {*synced} >= {str(each) for each in parents}
