"""Runs a million random calls of the allocator core beside the plain-Python model of its rules."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from test_alloc_model import Model

from cidalloc import Allocator, CidError, errors

pytestmark = pytest.mark.slow

CALLS = 1_000_000
SHAPES = [
    (capacity, width)
    for width in (1, 2, 4, 8, 16, 32, 64)
    for capacity in (100 + 5 * width, 2**38)  # soon used up; never used up
]
OWNERS = [0, 1, 2, 3, 2**24 - 1]


class History:
    """A pool, its model, and what each owner holds."""

    def __init__(self, capacity: int, width: int) -> None:
        self.chance = random.Random(capacity * width)
        self.draw = self.chance.random
        first = self.chance.choice([1, 2**31, 2**63 - 2**38])
        self.pool = Allocator(capacity, first, width)
        self.model = Model(capacity, first, width)
        self.held: dict[int, list[int]] = {owner: [] for owner in OWNERS}
        self.now = self.chance.choice([-(10**6), 0, 2**60])

    def later(self) -> int:
        """A time to reuse at: often at once, mostly soon, rarely late or long ago."""
        return self.now + self.chance.choice((0, 0, -5, 1, 3, 20, 20, 90, 700))

    def some(self, owner: int) -> list[int]:
        """Take IDs of an owner off our list: neighbours, in order or not."""
        mine = self.held[owner]
        at = int(self.draw() * len(mine))
        ids = mine[at : at + int(self.draw() * 40)]
        del mine[at : at + len(ids)]
        if self.draw() < 0.5:
            self.chance.shuffle(ids)
        return ids

    def acquire(self, owner: int) -> None:
        self.model.now = max(self.model.now, self.now)
        if self.model.candidates(owner):
            cid = self.pool.acquire(owner, self.now)
            self.model.issue(owner, cid)
            self.held[owner].append(cid)
        else:
            self.refused(errors.Exhausted, lambda: self.pool.acquire(owner, self.now))

    def acquire_many(self, owner: int) -> None:
        self.model.now = max(self.model.now, self.now)
        n = int(self.draw() * 40)
        if n <= self.model.fresh or n <= self.model.available(owner):
            ids = self.pool.acquire_many(n, owner, self.now).tolist()
            self.model.issue_many(owner, ids)
            self.held[owner] += ids
        else:
            self.refused(errors.Exhausted, lambda: self.pool.acquire_many(n, owner, self.now))

    def release(self, owner: int) -> None:
        if mine := self.held[owner]:
            at = int(self.draw() * len(mine))
            mine[at], mine[-1] = mine[-1], mine[at]
            cid, when = mine.pop(), self.later()
            self.pool.release(cid, owner, when)
            self.model.release(cid, when)

    def release_many(self, owner: int) -> None:
        ids, when = self.some(owner), self.later()
        self.pool.release_many(np.array(ids, np.uint64), owner, when)
        for cid in ids:
            self.model.release(cid, when)

    def release_owner(self, owner: int) -> None:
        if self.draw() < 0.1:
            when = self.later()
            assert self.pool.release_owner(owner, when) == len(self.held[owner])
            self.model.release_owner(owner, when)
            self.held[owner].clear()

    def release_wrong(self, owner: int) -> None:
        pool, model = self.pool, self.model
        ids = self.some(owner)
        wrong: list[tuple[int, type[CidError]]] = [
            (model.first - 1, errors.OutOfRange),
            (model.first + model.capacity, errors.OutOfRange),
        ]
        other = model.first + int(self.draw() * min(model.capacity, 1000))
        if other not in model.holder:
            wrong.append((other, errors.NotHeld))
        elif model.holder[other] != owner:
            wrong.append((other, errors.NotOwner))
        cid, error = self.chance.choice(wrong)
        late = self.now + 10**6
        self.refused(error, lambda: pool.release(cid, owner, late))
        if ids and self.draw() < 0.5:
            cid, error = self.chance.choice(ids), errors.Duplicate
        self.refused(error, lambda: pool.release_many([*ids, cid], owner, late))
        self.held[owner] += ids

    def refused(self, error: type[CidError], call: Callable[[], object]) -> None:
        with pytest.raises(CidError) as caught:
            call()
        assert type(caught.value) is error

    def agree(self) -> None:
        """Compare all that can be compared."""
        pool, model = self.pool, self.model
        pool._check()
        assert pool.inactive == len(model.issued) - len(model.holder)
        assert (pool.cooling, pool.pinned) == (model.cooling(), model.pinned())
        every: list[int] = []
        for owner, ids in self.held.items():
            mine = pool.held_by(owner).tolist()
            assert sorted(mine) == sorted(ids)
            every += mine
        assert len(every) == len(set(every)) == len(model.holder)


@pytest.mark.parametrize(("capacity", "width"), SHAPES)
def test_a_million_calls(capacity: int, width: int) -> None:
    history = History(capacity, width)
    pool, model = history.pool, history.model
    grow = [history.acquire] * 9 + [history.acquire_many]
    shrink = [history.release] * 8 + [history.release_many] + [history.release_owner]
    odd = [history.release_wrong, history.acquire, history.release, history.acquire_many]
    for i in range(CALLS // len(SHAPES) + 1):
        if history.draw() < 0.2:
            history.now += int(history.draw() * 10)
        calls = odd if history.draw() < 0.05 else grow if i // 500 % 5 < 3 else shrink
        calls[int(history.draw() * len(calls))](OWNERS[int(history.draw() * 5)])
        assert len(pool) == len(model.holder)
        assert pool.peak == model.peak
        assert pool.high_water == capacity - model.fresh
        assert pool.next_due == (model.queue[0][0] if model.queue else None)
        if i % 997 == 0:
            history.agree()
    history.agree()
