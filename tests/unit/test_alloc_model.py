"""Runs random histories of the allocator core beside a plain-Python model of the same rules."""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cidalloc import Allocator, errors
from cidalloc.waiting_line import Caller

LOWEST, HIGHEST = -(2**63), 2**63 - 1


@dataclass
class Block:
    """IDs that one owner at a time gets one after the other."""

    number: int
    ids: range
    owner: int = 0
    bump: int = 0
    reuse_at: int = LOWEST
    held: set[int] = field(default_factory=set)

    @property
    def idle(self) -> bool:
        return not self.held and self.bump < len(self.ids)


class Model:
    """What the pool must do: every choice of an ID is forced, but for which idle block is taken."""

    def __init__(self, capacity: int, first: int, width: int) -> None:
        self.capacity, self.first, self.width = capacity, first, width
        self.count = -(-capacity // width)
        self.blocks: dict[int, Block] = {}
        self.queue: list[tuple[int, int, Block]] = []  # a heap of key, order of coming, block
        self.current: dict[int, Block] = {}
        self.lists: dict[int, dict[int, Block]] = defaultdict(dict)  # per owner, the latest last
        self.holder: dict[int, int] = {}
        self.not_before: dict[int, int] = {}  # per ID, from its own last release
        self.now = self.last = LOWEST
        self.order = self.peak = 0
        self.fresh = capacity  # IDs in the blocks that were never opened
        self.issued: set[int] = set()

    def block_of(self, number: int) -> Block:
        low = self.first + number * self.width
        return Block(number, range(low, min(low + self.width, self.first + self.capacity)))

    def candidates(self, owner: int) -> list[Block]:
        """The blocks from which the owner's next ID may come."""
        current = self.current.get(owner)
        if current and current.bump < len(current.ids):
            return [current]
        if self.queue and self.queue[0][0] <= self.now:
            return [self.queue[0][2]]
        if idle := [block for block in self.current.values() if block.idle]:
            return idle
        if len(self.blocks) < self.count:
            return [self.block_of(len(self.blocks))]
        return []

    def next_id(self, block: Block, owner: int) -> int:
        """The ID that the owner would get from this block."""
        keeps = self.current.get(owner) is block or (block.idle and block.reuse_at > self.now)
        return block.ids[block.bump if keeps else 0]

    def available(self, owner: int) -> int:
        """How many IDs the owner could get."""
        due = sum(len(block.ids) for key, _, block in self.queue if key <= self.now)
        idle = sum(
            len(b.ids) - (b.bump if b.reuse_at > self.now else 0)
            for b in self.current.values()
            if b.idle
        )
        mine = self.current.get(owner)
        return self.fresh + due + idle + (len(mine.ids) - mine.bump if mine and mine.held else 0)

    def issue(self, owner: int, cid: int) -> None:
        """Follow the pool, which issued `cid`, if it was allowed to."""
        wanted = {self.next_id(block, owner): block for block in self.candidates(owner)}
        assert cid in wanted, f"issued {cid}, not one of {sorted(wanted)}"
        assert cid not in self.holder
        assert self.not_before.get(cid, LOWEST) <= self.now
        block = wanted[cid]
        if block is not self.current.get(owner):
            self.open(block, owner)
        block.bump += 1
        block.held.add(cid)
        self.holder[cid] = owner
        self.issued.add(cid)
        self.peak = max(self.peak, len(self.holder))

    def open(self, block: Block, owner: int) -> None:
        """Hand a block to its new owner."""
        if block.number not in self.blocks:
            self.blocks[block.number] = block
            self.fresh -= len(block.ids)
            block.reuse_at = self.last
        elif self.queue and self.queue[0][2] is block:
            self.last = heapq.heappop(self.queue)[0]
            block.bump = 0
        else:
            del self.lists[block.owner][block.number]
            del self.current[block.owner]
            block.bump = 0 if block.reuse_at <= self.now else block.bump
        block.owner = owner
        self.lists[owner][block.number] = block
        self.current[owner] = block

    def issue_many(self, owner: int, cids: list[int]) -> None:
        """The same for a bulk, for which an owner's idle block that is due starts again."""
        mine = self.current.get(owner)
        short = mine is not None and len(mine.ids) - mine.bump < len(cids)
        if mine is not None and short and mine.idle and mine.reuse_at <= self.now:
            mine.bump = 0
        for cid in cids:
            self.issue(owner, cid)

    def release(self, cid: int, reuse_at: int) -> None:
        block = self.blocks[(cid - self.first) // self.width]
        block.reuse_at = max(block.reuse_at, reuse_at)
        self.not_before[cid] = reuse_at
        block.held.remove(cid)
        del self.holder[cid]
        if not block.held and block.bump == len(block.ids):
            self.enqueue(block)

    def enqueue(self, block: Block) -> None:
        del self.lists[block.owner][block.number]
        if self.current.get(block.owner) is block:
            del self.current[block.owner]
        block.reuse_at = max(block.reuse_at, self.last)
        self.order += 1
        heapq.heappush(self.queue, (block.reuse_at, self.order, block))

    def release_owner(self, owner: int, reuse_at: int) -> int:
        released = 0
        for block in reversed(list(self.lists[owner].values())):
            if block.held:
                block.reuse_at = max(block.reuse_at, reuse_at)
            for cid in block.held:
                del self.holder[cid]
                self.not_before[cid] = reuse_at
                released += 1
            block.held.clear()
            self.enqueue(block)
        return released

    def clear(self, reuse_at: int) -> int:
        return sum(
            self.release_owner(block.owner, reuse_at)
            for _, block in sorted(self.blocks.items())
            if block.number in self.lists[block.owner]
        )

    def refused(self, ids: list[int], owner: int) -> tuple[int, type[errors.CidError]] | None:
        """The first ID that cannot be reserved, and why."""
        for i, cid in enumerate(ids):
            if not self.first <= cid < self.first + self.capacity:
                return i, errors.OutOfRange
            if cid in self.holder or cid in ids[:i]:
                return i, errors.Duplicate
            block = self.blocks.get((cid - self.first) // self.width)
            if block and block.held and block.owner != owner:
                return i, errors.NotOwner
        return None

    def reserve(self, ids: list[int], owner: int) -> None:
        wanted = sorted({(cid - self.first) // self.width for cid in ids})
        for number in range(len(self.blocks), wanted[-1] + 1):
            block = self.blocks[number] = self.block_of(number)
            self.fresh -= len(block.ids)
            block.reuse_at = self.last
            self.order += 1
            heapq.heappush(self.queue, (block.reuse_at, self.order, block))
        room = self.current.get(owner)
        for number in wanted:
            block = self.blocks[number]
            if not block.held and block.number in self.lists[block.owner]:
                room = None if room is block else room
                self.enqueue(block)
            if not block.held:
                block.owner = owner
                self.lists[owner][number] = self.current[owner] = block
            block.bump = len(block.ids)
            self.issued.update(block.ids)
        for cid in ids:
            self.blocks[(cid - self.first) // self.width].held.add(cid)
            self.holder[cid] = owner
        self.queue = [each for each in self.queue if not each[2].held]
        heapq.heapify(self.queue)
        if room:
            self.current[owner] = room
        self.peak = max(self.peak, len(self.holder))

    def resize(self, capacity: int) -> None:
        last = self.blocks.get(self.count - 1)
        self.fresh += capacity - self.capacity
        self.capacity, self.count = capacity, -(-capacity // self.width)
        if last:
            ids = self.block_of(last.number).ids
            self.fresh -= len(ids) - len(last.ids)
            wider = len(ids) > len(last.ids)
            last.ids = ids
            owned = last.number in self.lists[last.owner]
            if wider and owned and self.current.get(last.owner) is not last:
                last.bump = len(ids)
                self.issued.update(ids)

    def restore(self) -> None:
        """Idle blocks are queued, and the lists of owners are in order."""
        for _, block in sorted(self.blocks.items()):
            if not block.held and block.number in self.lists[block.owner]:
                self.enqueue(block)
        self.current.clear()
        for owner, blocks in self.lists.items():
            self.lists[owner] = dict(sorted(blocks.items()))
            room = [block for block in blocks.values() if block.bump < len(block.ids)]
            if blocks:
                self.current[owner] = room[0] if room else self.lists[owner][min(blocks)]

    def cooling(self) -> int:
        return sum(len(block.ids) for key, _, block in self.queue if key > self.now) + sum(
            block.bump
            for block in self.current.values()
            if block.idle and block.reuse_at > self.now
        )

    def pinned(self) -> int:
        return sum(len(block.ids) - len(block.held) for block in self.blocks.values() if block.held)


owners = st.integers(0, 5)
small = st.tuples(st.integers(1, 130), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
large = st.sampled_from([(2**30 - 1, 1), (2**30 - 1, 64), (2**38, 1), (2**38, 8), (2**38, 64)])
delays = st.one_of(st.sampled_from([0, 1, 5, 60, 3600]), st.integers(-20, 200))


class Histories(RuleBasedStateMachine):
    """Random calls, allowed and not; `now` is the caller's clock and mostly rises."""

    @initialize(
        shape=st.one_of(small, small, large),
        first=st.sampled_from([1, 2, 10_000, 2**31, 2**63 - 2**38]),
        now=st.sampled_from([0, 0, -1000, 2**40, LOWEST, HIGHEST - 10_000]),
    )
    def make(self, shape: tuple[int, int], first: int, now: int) -> None:
        capacity, block = shape
        self.pool = Allocator(capacity, first, block)
        self.model = Model(capacity, first, block)
        self.now = now
        self.line: list[Caller] = []

    def seen(self, now: int) -> int:
        self.model.now = max(self.model.now, now)
        if self.line:
            self.pool.acquire_many(0, 0, now)
            self.follow_line()
        return now

    def follow_line(self) -> None:
        """Let the first callers in the line have what the pool gave them."""
        while self.line and self.model.available(int(self.line[0].owner)):
            caller = self.line.pop(0)
            self.model.issue(int(caller.owner), caller.cids[0])
        assert not any(caller.cids for caller in self.line)

    @rule(owner=owners)
    def wait(self, owner: int) -> None:
        self.line.append(Caller(owner, lambda: None))
        self.pool._line.join(self.pool, self.line[-1])
        self.follow_line()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def stop_waiting(self, data: st.DataObject) -> None:
        caller = self.line.pop(data.draw(st.integers(0, len(self.line) - 1), "place"))
        self.pool._line.give_up(self.pool, caller)
        self.follow_line()

    def at(self, delay: int) -> int:
        return max(LOWEST, min(HIGHEST, self.now + delay))

    def some_held(self, data: st.DataObject, owner: int | None = None) -> list[int]:
        held = sorted(c for c, o in self.model.holder.items() if owner is None or o == owner)
        size = data.draw(st.integers(0, len(held)), "how many")
        step = data.draw(st.sampled_from([1, 1, 3, 7]), "step")
        picked = (held * step)[::step][:size] if len(held) % step else held[:size]
        return data.draw(st.permutations(picked), "ids") if data.draw(st.booleans()) else picked

    def teardown(self) -> None:
        # Hypothesis keeps machines for a while, and a large pool takes 8 TiB of address space.
        if hasattr(self, "pool"):
            del self.pool

    @rule(passed=st.one_of(st.sampled_from([1, 5, 60, 3600]), st.integers(0, 300)))
    def time_passes(self, passed: int) -> None:
        self.now = self.at(passed)

    def one(self, owner: int, now: int) -> int | None:
        self.seen(now)
        if self.model.available(owner):
            cid = self.pool.acquire(owner, now)
            self.model.issue(owner, cid)
            return cid
        with pytest.raises(errors.Exhausted):
            self.pool.acquire(owner, now)
        return None

    @rule(owner=owners, back=st.sampled_from([0, 0, 0, 7]))
    def acquire(self, owner: int, back: int) -> None:
        self.one(owner, self.at(-back))

    @rule(owner=owners, n=st.one_of(st.integers(0, 10), st.integers(0, 140)), out=st.booleans())
    def acquire_many(self, owner: int, n: int, out: bool) -> None:
        now = self.seen(self.now)
        array = np.zeros(n, np.uint64) if out else None
        if n <= self.model.available(owner):
            ids = self.pool.acquire_many(n, owner, now, array)
            assert array is None or ids is array
            assert ids.dtype == np.uint64 and ids.shape == (n,)
            self.model.issue_many(owner, ids.tolist())
        else:
            with pytest.raises(errors.Exhausted):
                self.pool.acquire_many(n, owner, now, array)

    @precondition(lambda self: self.model.capacity <= 130)
    @rule(owner=owners)
    def acquire_the_rest(self, owner: int) -> None:
        self.seen(self.now)
        n = self.model.available(owner)
        with pytest.raises(errors.Exhausted):
            self.pool.acquire_many(n + 1, owner, self.now)
        self.model.issue_many(owner, self.pool.acquire_many(n, owner, self.now).tolist())

    @precondition(lambda self: self.model.holder)
    @rule(data=st.data(), delay=delays)
    def release(self, data: st.DataObject, delay: int) -> None:
        cid = data.draw(st.sampled_from(sorted(self.model.holder)), "cid")
        self.pool.release(cid, self.model.holder[cid], self.at(delay))
        self.model.release(cid, self.at(delay))
        self.follow_line()

    @rule(data=st.data(), owner=owners, delay=delays, array=st.booleans())
    def release_many(self, data: st.DataObject, owner: int, delay: int, array: bool) -> None:
        ids = self.some_held(data, owner)
        self.pool.release_many(np.array(ids, np.uint64) if array else ids, owner, self.at(delay))
        for cid in ids:
            self.model.release(cid, self.at(delay))
        self.follow_line()

    @rule(owner=owners, delay=delays)
    def release_owner(self, owner: int, delay: int) -> None:
        released = self.pool.release_owner(owner, self.at(delay))
        assert released == self.model.release_owner(owner, self.at(delay))
        self.follow_line()

    @rule(delay=delays)
    def clear(self, delay: int) -> None:
        assert self.pool.clear(self.at(delay)) == self.model.clear(self.at(delay))
        self.follow_line()

    @rule(data=st.data(), owner=owners)
    def reserve(self, data: st.DataObject, owner: int) -> None:
        low, high = self.model.first - 1, self.model.first + min(self.model.capacity, 200)
        ids = data.draw(st.lists(st.integers(low, min(high, HIGHEST)), max_size=20), "ids")
        if data.draw(st.booleans(), "only good ones"):
            ids = [c for i, c in enumerate(ids) if not self.model.refused([c], owner)]
            ids = list(dict.fromkeys(ids))
        if refused := self.model.refused(ids, owner):
            with pytest.raises(refused[1], match=f"position {refused[0]}\\b") as caught:
                self.pool.reserve(ids, owner)
            assert type(caught.value) is refused[1]
        else:
            self.pool.reserve(ids, owner)
            if ids:
                self.model.reserve(ids, owner)

    @precondition(lambda self: self.model.first + self.model.capacity < HIGHEST - 300)
    @rule(more=st.one_of(st.integers(0, 5), st.integers(0, 100)))
    def resize(self, more: int) -> None:
        capacity = min(self.model.capacity + more, 2**38)
        self.pool.resize(capacity)
        self.model.resize(capacity)
        self.follow_line()

    @precondition(lambda self: not self.line)
    @rule()
    def snapshot_and_restore(self) -> None:
        self.pool = Allocator.restore(self.pool.snapshot())
        self.model.restore()

    @rule(owner=owners, delay=delays)
    def take_and_give_back(self, owner: int, delay: int) -> None:
        for _ in range(3):
            if cid := self.one(owner, self.now):
                self.pool.release(cid, owner, self.at(delay))
                self.model.release(cid, self.at(delay))
                self.follow_line()

    def wrong(self, data: st.DataObject, owner: int, ids: list[int]) -> tuple[int, type]:
        model = self.model
        last = model.first + model.capacity - 1
        choices: list[tuple[int, type]] = [
            (cid, errors.OutOfRange) for cid in (0, model.first - 1, last + 1) if cid < 2**63
        ]
        choices += [(c, errors.NotOwner) for c, o in model.holder.items() if o != owner][:5]
        choices += [
            (c, errors.NotHeld)
            for c in (model.first, last, *sorted(model.issued)[:50])
            if c not in model.holder
        ]
        choices += [(c, errors.Duplicate) for c in ids]
        return data.draw(st.sampled_from(choices), "wrong")

    @rule(data=st.data(), owner=owners, delay=delays)
    def release_wrong(self, data: st.DataObject, owner: int, delay: int) -> None:
        cid, error = self.wrong(data, owner, [])
        with pytest.raises(error) as caught:
            self.pool.release(cid, owner, self.at(delay))
        assert type(caught.value) is error

    @rule(data=st.data(), owner=owners, delay=delays)
    def release_many_with_a_wrong_one(self, data: st.DataObject, owner: int, delay: int) -> None:
        ids = self.some_held(data, owner)
        cid, error = self.wrong(data, owner, ids)
        place = data.draw(st.integers(0, len(ids)), "place")
        ids.insert(place, cid)
        if error is errors.Duplicate:
            place = max(i for i, c in enumerate(ids) if c == cid)
        late = self.at(10_000 + delay)  # would show up in the queue if it left a trace
        with pytest.raises(error, match=f"position {place}\\b") as caught:
            self.pool.release_many(ids, owner, late)
        assert type(caught.value) is error

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool, model = self.pool, self.model
        pool._check()
        assert len(pool) == pool.active == len(model.holder)
        assert pool.inactive == len(model.issued) - len(model.holder)
        assert pool.high_water == model.capacity - model.fresh
        assert pool.peak == model.peak
        assert pool.cooling == model.cooling()
        assert pool.pinned == model.pinned()
        assert pool.free == model.available(99)
        assert list(pool) == pool.held().tolist() == sorted(model.holder)
        assert pool.next_due == (model.queue[0][0] if model.queue else None)
        for owner in range(6):
            held = sorted(c for c, o in model.holder.items() if o == owner)
            assert sorted(pool.held_by(owner).tolist()) == held
            assert pool.held_by(owner, ordered=True).tolist() == held
            assert pool.held_count(owner) == len(held)
        for cid in list(model.issued)[:10]:
            assert (cid in pool) == (cid in model.holder)


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=400,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
