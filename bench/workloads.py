"""The workloads: what is timed, for all contestants alike. Everything else here shares them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, MutableSequence
from itertools import repeat
from textwrap import indent
from time import perf_counter_ns
from types import FunctionType, MethodType
from typing import Any, Protocol

import numpy as np
from compiled import module
from peers import NUMBERS, PEERS, FullPython, NumpyStack

from cidalloc import Allocator

CAPACITY = 2**26
FIRST = 1000  # above the small ints that Python keeps ready
WIDTHS = (64, 8, 1)
OURS = tuple(f"cidalloc {width}" for width in WIDTHS)
MAIN = OURS[0]
CHUNK = 1000  # IDs per call in bulk churn
OWNER, NOW = 7, 1_000_000


def _ours(width: int) -> Callable[[int], Allocator]:
    return lambda capacity: Allocator(capacity, first=FIRST, block=width)


def _peer(kind: Callable[[int, int], Any]) -> Callable[[int], Any]:
    return lambda capacity: kind(capacity, FIRST)


floor = module("floor")
MAKERS: dict[str, Callable[[int], Any]] = {
    **{name: _ours(width) for name, width in zip(OURS, WIDTHS, strict=True)},
    **{peer.name: _peer(peer) for peer in (*PEERS, *NUMBERS)},
    "floor": lambda capacity: floor.Floor(FIRST),
    "floor, no optional arguments": lambda capacity: floor.NoArguments(FIRST),
    "floor, existing int": lambda capacity: floor.Existing(FIRST),
}
"""How to make each contestant, from a capacity."""


def make(name: str, capacity: int = CAPACITY) -> Any:
    """Make a contestant by its name."""
    return MAKERS[name](capacity)


class Rig(Protocol):
    """A contestant at work: `run` does so many operations and tells the ns of one, by phase."""

    def run(self, count: int) -> dict[str, float]:
        """Run, and return what one operation took in each phase."""
        ...


def own_code(method: Any) -> Any:
    """Return the method with bytecode of its own.

    The interpreter specialises bytecode for the types that it meets. Contestants that share it
    would spoil that for each other, which happens in no program that uses just one of them.
    """
    function = method.__func__
    copy = FunctionType(function.__code__.replace(), function.__globals__)
    return MethodType(copy, method.__self__)


def timer_cost() -> float:
    """Measure what reading the clock twice adds to what lies between, in ns."""
    costs = []
    for _ in range(2001):
        start = perf_counter_ns()
        costs.append(perf_counter_ns() - start)
    return float(np.median(costs))


TIMER = timer_cost()


class EmptyLoop:
    """The loop of `Pair` with nothing in it, to be subtracted."""

    def run(self, count: int) -> dict[str, float]:
        """Loop."""
        start = perf_counter_ns()
        for _ in repeat(None, count):
            pass
        return {"pair": (perf_counter_ns() - start) / count}


class Pair:
    """Acquire one ID and release it."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.run = own_code(self.run)  # type: ignore[method-assign]

    def run(self, count: int) -> dict[str, float]:
        """Do pairs."""
        pool = self.pool
        start = perf_counter_ns()
        for _ in repeat(None, count):
            pool.release(pool.acquire())
        return {"pair": (perf_counter_ns() - start) / count}


class PairInFull(Pair):
    """The same, with the owner and the times given."""

    def run(self, count: int) -> dict[str, float]:
        """Do pairs."""
        pool, owner, now = self.pool, OWNER, NOW
        start = perf_counter_ns()
        for _ in repeat(None, count):
            pool.release(pool.acquire(owner, now), owner, now)
        return {"pair": (perf_counter_ns() - start) / count}


class BulkChurn:
    """Release random ones of `n` held IDs, a chunk per call, and acquire as many anew."""

    def __init__(self, pool: Any, n: int, seed: int, chunk: int = CHUNK) -> None:
        self.pool, self.n, self.chunk = pool, n, min(chunk, n)
        self.random = np.random.default_rng(seed)
        self.live = _fill(pool, n)
        self.as_array = isinstance(self.live, np.ndarray)

    def run(self, count: int) -> dict[str, float]:
        """Do chunks; choosing them and storing the new ones is not timed."""
        pool, chunk, total = self.pool, self.chunk, -count * TIMER
        for _ in range(count):
            where = self.random.choice(self.n, chunk, replace=False, shuffle=False)
            ids = self._at(where)
            start = perf_counter_ns()
            pool.release_many(ids)
            ids = pool.acquire_many(chunk)
            total += perf_counter_ns() - start
            self._store(where, ids)
        return {"pair": total / (count * chunk)}

    def _at(self, where: Any) -> Any:
        if self.as_array:
            return self.live[where]
        live = self.live
        return [live[at] for at in where.tolist()]

    def _store(self, where: Any, ids: Any) -> None:
        if self.as_array:
            self.live[where] = ids
            return
        live = self.live
        for at, cid in zip(where.tolist(), ids, strict=True):
            live[at] = cid

    def settle(self, factor: float | None = None) -> None:
        """Churn until the pool looks as after a long time: each ID replaced `factor` times."""
        if factor is None:
            factor = 8 if self.as_array else 1  # plain Python keeps no traces, but is slow
        self.run(max(1, int(self.n * factor) // self.chunk))


class Churn:
    """Release a random one of `n` held IDs and acquire another.

    The caller keeps its IDs in an array, or, which costs it more, in a list of ints.
    """

    def __init__(
        self, pool: Any, n: int, seed: int, *, settle: float | None = None, ints: bool = False
    ) -> None:
        before = BulkChurn(pool, n, seed)
        before.settle(settle)
        self.pool = pool
        ids = before.live.tolist() if before.as_array else before.live
        self.live: MutableSequence[int] = list(ids) if ints else array("Q", ids)
        self.random = random.Random(seed)  # noqa: S311
        self.run = own_code(self.run)  # type: ignore[method-assign]

    def run(self, count: int) -> dict[str, float]:
        """Release and acquire; choosing the victims is not timed."""
        pool, live = self.pool, self.live
        victims = self.random.choices(range(len(live)), k=count)
        start = perf_counter_ns()
        for at in victims:
            pool.release(live[at])
            live[at] = pool.acquire()
        return {"pair": (perf_counter_ns() - start) / count}


class Bulk:
    """Acquire `n` IDs at once and release them, in order or shuffled."""

    def __init__(
        self, pool: Any, n: int, *, out: bool = False, shuffled: bool = False, seed: int = 0
    ) -> None:
        self.pool, self.n = pool, n
        self.options = {"out": np.empty(n, np.uint64)} if out else {}
        self.order = np.random.default_rng(seed).permutation(n) if shuffled else None

    def run(self, count: int) -> dict[str, float]:
        """Acquire and release, timed apart, per ID; shuffling is not timed."""
        pool, n, options = self.pool, self.n, self.options
        acquire = release = -count * TIMER
        for _ in range(count):
            ids = None
            start = perf_counter_ns()
            ids = pool.acquire_many(n, **options)
            acquire += perf_counter_ns() - start
            ids = self._shuffle(ids)
            start = perf_counter_ns()
            pool.release_many(ids)
            release += perf_counter_ns() - start
        return {"acquire": acquire / (count * n), "release": release / (count * n)}

    def _shuffle(self, ids: Any) -> Any:
        if self.order is None:
            return ids
        return ids[self.order] if isinstance(ids, np.ndarray) else [ids[at] for at in self.order]


class Arange:
    """The least that giving out `n` numbers in an array can cost: `np.arange`."""

    def __init__(self, n: int) -> None:
        self.n = n

    def run(self, count: int) -> dict[str, float]:
        """Make arrays."""
        n, total = self.n, -count * TIMER
        for _ in range(count):
            ids = None
            start = perf_counter_ns()
            ids = np.arange(FIRST, FIRST + n, dtype=np.uint64)
            total += perf_counter_ns() - start
        del ids
        return {"acquire": total / (count * n)}


class Expire:
    """Take back all of the `n` IDs of one owner: consecutive, or one in five of such."""

    def __init__(self, pool: Any, n: int, *, scattered: bool = False, seed: int = 0) -> None:
        self.pool, self.n = pool, n
        some = np.random.default_rng(seed).permutation(5 * n)[n:] if scattered else None
        self.gone = some

    def run(self, count: int) -> dict[str, float]:
        """Acquire, which is not timed, and take back; per ID."""
        pool, n, total = self.pool, self.n, -count * TIMER
        for _ in range(count):
            self._acquire()
            start = perf_counter_ns()
            pool.release_owner(OWNER)
            total += perf_counter_ns() - start
        return {"expire": total / (count * n)}

    def _acquire(self) -> None:
        if self.gone is None:
            self.pool.acquire_many(self.n, OWNER)
            return
        ids = self.pool.acquire_many(5 * self.n, OWNER)
        as_array = isinstance(ids, np.ndarray)
        self.pool.release_many(
            ids[self.gone] if as_array else [ids[at] for at in self.gone.tolist()], OWNER
        )


class Calls:
    """`acquire_many` and `release_many` in turn, untimed: for threads and instruction counts."""

    def __init__(self, pool: Any, n: int, *, out: bool = False) -> None:
        self.pool, self.n = pool, n
        self.options = {"out": np.empty(n, np.uint64)} if out else {}

    def run(self, count: int) -> dict[str, float]:
        """Acquire and release."""
        pool, n, options = self.pool, self.n, self.options
        for _ in repeat(None, count):
            pool.release_many(pool.acquire_many(n, **options))
        return {}


class Statements:
    """Statements as a user writes them, in a loop that is compiled for them alone.

    Args:
        source: the statements.
        names: the local variables that they use.
        per_turn: how many operations they do.
    """

    def __init__(self, source: str, names: dict[str, Any], per_turn: int = 1) -> None:
        text = f"def loop(count, repeat, {', '.join(names)}):\n  for _ in repeat(None, count):\n"
        space: dict[str, Any] = {}
        exec(text + indent(source, "    "), space)  # noqa: S102
        self.loop, self.names, self.per_turn = space["loop"], names, per_turn

    def run(self, count: int) -> dict[str, float]:
        """Execute them so many times."""
        start = perf_counter_ns()
        self.loop(count, repeat, **self.names)
        return {"pair": (perf_counter_ns() - start) / (count * self.per_turn)}


class FromC:
    """A loop of from_c.pyx: a function and its arguments, with so many at once."""

    def __init__(self, at_once: int, function: Callable[..., int], *arguments: Any) -> None:
        self.at_once, self.function, self.arguments = at_once, function, arguments

    def run(self, count: int) -> dict[str, float]:
        """Do at least so many pairs, in whole turns."""
        pairs = -(-count // self.at_once) * self.at_once
        start = perf_counter_ns()
        wrong = self.function(*self.arguments, pairs, self.at_once)
        took = perf_counter_ns() - start
        assert not wrong
        return {"pair": took / pairs}


def _fill(pool: Any, n: int) -> Any:
    # Acquire n IDs in chunks, as one array or list, in random order.
    chunks = [pool.acquire_many(min(CHUNK, n - at)) for at in range(0, n, CHUNK)]
    if isinstance(chunks[0], np.ndarray):
        return np.concatenate(chunks)
    return [cid for chunk in chunks for cid in chunk]


PYTHON_BULK = (
    *("list + set", "deque + set", "heapq + set", "sortedcontainers + set", "intbitset"),
    FullPython.name,
)
"""The peers of the bulk and churn cases that issue lists of ints."""

ARRAY_BULK = (NumpyStack.name, "pyroaring")
"""The peers that issue arrays."""
