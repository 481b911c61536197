"""Does one thing after another to registries, under a tracer: see test_registry_stores.py.

Reads the name of a scenario and a path from each line; gets the file ready, stops, does it, stops
again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from crash_model import BOOT, ENDED, NEXT_BOOT, TTL, UNENDED, reopen, settings, token

from cidalloc import Allocator
from cidalloc.errors import CidError
from cidalloc.manager.registry import Registry
from cidalloc.manager.storage.file_format import Shape

FORBIDDEN = 77
"""What it exits with if it may not be traced."""
NOW = 10_000
"""When the thing is done; everything before it is at 0."""
TIMES = [NOW, *(NOW + after + by for after in (ENDED, UNENDED, 300) for by in (-1, 0)), NOW + 1_000]
"""When what is free is looked at."""
SEQS = iter(range(1, 10**9))


SIX, EIGHT = Shape(1, 6), Shape(1, 8)
LARGE = Shape(1, 2047 + 9)  # 2047 IDs, and then the file grows
ROTATED = Shape(1, 6, offset=4)


class World:
    """A registry and what was done to it."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.registry = reopen(path, shape, 0)
        self.time = 0

    def open(self, name: str, ttl: int = TTL) -> None:
        self.registry.open(token(name), self.time, ttl_ms=ttl, label=name)

    def acquire(self, name: str, count: int, cooldown: int | None = None) -> None:
        self.registry.acquire(
            count, self.time, token=self.of(name), seq=next(SEQS), cooldown_ms=cooldown
        )

    def release(self, name: str, *ids: int, ended: bool = False) -> None:
        with suppress(CidError):
            self.registry.release(
                np.array(ids, np.uint64),
                self.time,
                token=self.of(name),
                seq=next(SEQS),
                ended=ended,
            )

    def number(self, name: str) -> int:
        registry = self.registry
        return registry.sessions.named[registry._digest(token(name))].number

    def of(self, name: str) -> bytes | None:
        return token(name) if name else None


@dataclass(frozen=True)
class Scenario:
    """Something to be done, and what was done before."""

    act: Callable[[World], object]
    prepare: Callable[[World], object] = lambda world: None
    snapshots: int = 2  # so many states at least must have been seen
    shape: Shape = SIX
    under_way: dict[int, int] = field(default_factory=dict)


def _three(world: World) -> None:
    """Two sessions with three IDs each, 1-3 and 4-6."""
    for name in "ab":
        world.open(name)
        world.acquire(name, 3)


def _some_free(world: World) -> None:
    """No ID is new, and some are due."""
    _three(world)
    world.open("c")
    world.release("a", 2, ended=True)
    world.release("b", 4)
    world.release("b", 5)


def _everything(world: World) -> None:
    """Sessions with and without IDs, IDs without a session, free ones and cooling ones."""
    world.open("a")
    world.acquire("a", 3)
    world.open("idle")
    world.acquire("", 1)
    world.open("b")
    world.acquire("b", 2)
    world.release("b", *world.registry.held(token("b"), 0).tolist()[:1])


def _without(world: World) -> None:
    _three(world)
    world.release("a", 1, ended=True)
    world.time = NOW - 1
    world.acquire("", 1)


def _back(*ids: int, after: int = UNENDED) -> dict[int, int]:
    return dict.fromkeys(ids, NOW + after)


MIDDLE = "close amid others"
"""What the next process finds that is stepped through itself."""

SCENARIOS: dict[str, Scenario] = {
    "acquire the first": Scenario(lambda w: w.acquire("a", 1), lambda w: w.open("a"), 5),
    "acquire a new one": Scenario(
        lambda w: w.acquire("a", 1), lambda w: (w.open("a"), w.acquire("a", 1)), 3
    ),
    "acquire a used one": Scenario(lambda w: w.acquire("a", 1), _some_free, 4),
    "acquire many": Scenario(lambda w: w.acquire("c", 3), _some_free, 4),
    "acquire many new": Scenario(lambda w: w.acquire("a", 4), lambda w: w.open("a"), 10),
    "release one": Scenario(lambda w: w.release("a", 2, ended=True), _three, 3),
    # A registry takes and gives back many at a time; the pool knows a way for one, too.
    "acquire one of the pool": Scenario(
        lambda w: w.registry.pool.acquire(w.number("a"), w.time), _some_free, 3
    ),
    "release one to the pool": Scenario(
        lambda w: w.registry.pool.release(2, w.number("a"), w.time + ENDED), _three, 3
    ),
    "release many": Scenario(lambda w: w.release("a", 3, 1), _three, 4),
    "release all": Scenario(lambda w: w.release("a", 1, 2, 3), _three, 3),
    "release a foreign one": Scenario(
        lambda w: w.release("a", 1, 3, 4),
        _three,
        6,
        under_way=_back(1, 3),
    ),
    "release one twice": Scenario(
        lambda w: w.release("a", 3, 1, 2, 1), _three, 6, under_way=_back(1, 2, 3)
    ),
    "open the first": Scenario(lambda w: w.open("a"), snapshots=6),
    "take the first without a session": Scenario(lambda w: w.acquire("", 1), snapshots=10),
    "open": Scenario(lambda w: w.open("c"), _three, 4),
    "open where one was": Scenario(
        lambda w: w.open("c"),
        lambda w: (_three(w), w.registry.close_session(token("a"), 0)),
        5,
    ),
    "renew": Scenario(lambda w: w.registry.renew(token("a"), w.time), _three, 1),
    "say what is used": Scenario(lambda w: w.registry.renew(token("a"), w.time, used=2), _three, 2),
    "close": Scenario(lambda w: w.registry.close_session(token("a"), w.time), _three, 5),
    "close an ended one": Scenario(
        lambda w: w.registry.close_session(token("a"), w.time, ended=True),
        lambda w: (_three(w), w.release("a", 2)),
        5,
    ),
    MIDDLE: Scenario(
        lambda w: w.registry.close_session(token("a"), w.time),
        _everything,
        5,
        ROTATED,
    ),
    "expire": Scenario(
        lambda w: w.registry.tick(w.time),
        lambda w: (_three(w), w.open("c", 5_000), w.acquire("c", 2, 300)),
        6,
        shape=EIGHT,
    ),
    "acquire without a session": Scenario(lambda w: w.acquire("", 2), _three, 8, EIGHT),
    "acquire one more without": Scenario(lambda w: w.acquire("", 1), _without, 3, EIGHT),
    "release without a session": Scenario(lambda w: w.release("", 1), _without, 3, EIGHT),
    "raise the cooldown": Scenario(lambda w: w.acquire("a", 1, 10**7), lambda w: w.open("a"), 5),
    "grow by blocks": Scenario(
        lambda w: w.acquire("a", 12),
        lambda w: (w.open("a"), w.acquire("a", 2040)),
        20,
        shape=LARGE,
    ),
    "grow by rows": Scenario(
        lambda w: w.open("z"),
        lambda w: [w.open(f"{i}") for i in range(511)],
        7,
    ),
}


WIDE = (192, 1, 64)
"""A pool of three blocks of 64 IDs, which a file has without a registry."""

POOLS: dict[str, tuple[Callable[[Allocator], object], Callable[[Allocator], object]]] = {
    "acquire a new one": (lambda p: p.acquire(1), lambda p: p.acquire(1)),
    "acquire from a new block": (lambda p: p.acquire_many(64, 1), lambda p: p.acquire(1)),
    "acquire one of a used block": (
        lambda p: (p.acquire_many(192, 1), p.release_many(range(65, 129), 1)),
        lambda p: p.acquire(2, NOW),
    ),
    "acquire many": (lambda p: p.acquire(2), lambda p: p.acquire_many(100, 1)),
    "release one": (lambda p: p.acquire_many(3, 1), lambda p: p.release(2, 1, NOW + ENDED)),
    "release many": (
        lambda p: p.acquire_many(100, 1),
        lambda p: p.release_many(range(1, 100, 3), 1, NOW + ENDED),
    ),
    "release whole blocks": (
        lambda p: (p.acquire_many(64, 2), p.acquire_many(100, 1)),
        lambda p: p.release_owner(1, NOW + ENDED),
    ),
}
"""What is done to a pool before, and what is looked at."""


def steps(name: str, path: Path) -> Iterator[None]:
    """Do it, with a pause before, one after, and one when all is over."""
    kind, _, what = name.partition(": ")
    if kind == "pool":
        prepare, act = POOLS[what]
        path.write_bytes(bytes(Allocator.buffer_size(WIDE[0], WIDE[2])))
        with path.open("r+b") as file:
            pool = Allocator(*WIDE, buffer=mmap.mmap(file.fileno(), 0))
        prepare(pool)
        yield
        act(pool)
        yield
        yield
        return
    scenario = SCENARIOS.get(name)
    if scenario:
        world = World(path, scenario.shape)
        scenario.prepare(world)
        world.time = NOW
        yield
        scenario.act(world)
        yield
        world.registry.close()
        yield
        return
    # Whatever Python does but once is not what is looked at.
    for _ in range(3):
        Registry.in_file(path.with_name("other"), settings(SIX), NOW, BOOT).close()
        path.with_name("other").unlink()
    yield
    if name.startswith("make"):
        registry = Registry.in_file(path, settings(SIX, fresh=name == "make"), NOW, BOOT)
    else:
        boot = NEXT_BOOT if name == "reboot" else BOOT
        registry = reopen(path, SCENARIOS[MIDDLE].shape, NOW, boot)
    yield
    registry.close()
    yield


def main() -> None:
    if ctypes.CDLL(None).ptrace(0, 0, None, None):  # trace me
        sys.exit(FORBIDDEN)
    os.kill(os.getpid(), signal.SIGSTOP)
    for line in sys.stdin:
        name, path = line.rstrip("\n").split("\t")
        for _ in steps(name, Path(path)):
            os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    main()
