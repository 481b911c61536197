"""Works a registry's file as fast as it can, and says what it does: see test_registry_kill.py.

Reads a path, a seed and the names of open sessions from each line, and forks a process that opens
the file and works until it is killed. Each operation is written to a pipe before it begins and
again after it has ended: what a pipe has survives the process.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from crash_model import BOOT, token

from cidalloc.errors import CidError
from cidalloc.manager.registry import Registry
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file_format import Shape

SHAPE = Shape(1, 2048 + 200)
FULL = "full"
"""A session that holds most IDs, so that the file soon grows."""
SETTINGS = Settings(
    first=SHAPE.first,
    capacity=SHAPE.capacity,
    cooldown_ms=2,
    unended_cooldown_ms=15,
    min_ttl_ms=1,
    grace_ms=20,
    anonymous_age_ms=1_000,
    fresh=True,
)
MORTAL = 30
"""The ttl of sessions that nobody renews; the others outlive any test."""
AT_ONCE = 60  # IDs, more or less


def clock() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class Child:
    """A registry, and what its sessions hold."""

    def __init__(self, path: Path, seed: int, names: list[str]) -> None:
        self.chance = random.Random(seed)
        self.seed = seed
        self.opened = 0
        self.seq = time.monotonic_ns()  # above those of all children before
        self.registry = Registry.in_file(path, SETTINGS, clock(), BOOT)
        say("ready")
        self.ids: dict[str, list[int]] = {"": []}
        for name in names:
            self.do("held", name=name)

    def do(self, what: str, **facts: Any) -> None:
        now = clock()
        say(what, now=now, **facts)
        try:
            result = getattr(self, what)(now, **facts)
        except CidError as error:
            say("error", code=error.code.name)
            if error.code.name == "SESSION_UNKNOWN":
                self.ids.pop(facts["name"], None)
        else:
            say("done", result=result)

    def step(self) -> None:
        draw, every = self.chance.random(), sum(map(len, self.ids.values()))
        name = self.chance.choice([*self.ids])
        if len(self.ids) < (12 if draw < 0.08 else 3):
            self.opened += 1
            ttl = self.chance.choice([MORTAL, 600_000])
            self.do("open", name=f"{self.seed} {self.opened}", ttl=ttl)
        elif draw < 0.12 and name:
            self.do("close", name=name, ended=self.chance.random() < 0.5)
        elif draw < 0.14:
            self.do("tick")
        elif draw < 0.17 and name:
            self.do("held", name=name)
        elif draw < 0.17 + 0.8 * (every < self.chance.random() * 2 * AT_ONCE):
            count = self.chance.choice([1, 1, 1, 2, 5, 20])
            self.do("acquire", name=name, count=count, cooldown=self.chance.choice([3, 15, 40]))
        elif mine := self.ids[name]:
            count = self.chance.choice([1, 1, 2, len(mine)])
            ids = self.chance.sample(mine, min(count, len(mine)))
            if self.chance.random() < 0.1:  # refused at the end, and all is undone
                ids.append(self.chance.choice([ids[0], 10**9, *chain(*self.ids.values())]))
            ended, cooldown = self.chance.random() < 0.5, self.chance.choice([3, 15, 40])
            self.do("release", name=name, ids=ids, ended=ended, cooldown=cooldown)

    # ---- One for each operation

    def key(self, name: str) -> dict[str, Any]:
        self.seq += 1
        return {"token": token(name), "seq": self.seq} if name else {}

    def open(self, now: int, name: str, ttl: int) -> int:
        grant = self.registry.open(token(name), now, ttl_ms=ttl)
        self.ids[name] = []
        return grant.generation

    def held(self, now: int, name: str) -> list[int]:
        self.ids[name] = self.registry.held(token(name), now).tolist()
        return self.ids[name]

    def close(self, now: int, name: str, ended: bool) -> int:
        released = self.registry.close_session(token(name), now, ended=ended)
        del self.ids[name]
        return released

    def tick(self, now: int) -> None:
        self.registry.tick(now)

    def acquire(self, now: int, name: str, count: int, cooldown: int) -> list[int]:
        ids: list[int] = self.registry.acquire(
            count, now, cooldown_ms=cooldown, used=count, **self.key(name)
        ).tolist()
        self.ids[name] += ids
        return ids

    def release(self, now: int, name: str, ids: list[int], ended: bool, cooldown: int) -> int:
        done = self.registry.release(
            np.array(ids, np.uint64), now, ended=ended, cooldown_ms=cooldown, **self.key(name)
        )
        self.ids[name] = [cid for cid in self.ids[name] if cid not in {*ids}]
        return done


def say(what: str, **facts: Any) -> None:
    os.write(1, json.dumps([what, facts]).encode() + b"\n")


def main() -> None:
    for line in sys.stdin:
        path, seed, names = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                child = Child(Path(path), seed, names)
                while True:
                    child.step()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        say("pid", pid=pid)
        say("gone", status=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main()
