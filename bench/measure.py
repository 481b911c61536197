"""One case of the study in a process of its own: prints what it measured, as JSON.

The contestants take turns in slices of a few ms, in a random order each round, so that whatever
disturbs the machine disturbs them alike. Before a slice the same operations run untimed for four
times as long, since the others have just filled the caches with what is theirs. Ratios are taken
within a round, and their median counts.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from compiled import module
from peers import NUMBERS, PEERS, FullPython, NumpyStack, UuidSet
from workloads import (
    ARRAY_BULK,
    MAIN,
    OURS,
    PYTHON_BULK,
    Arange,
    Bulk,
    BulkChurn,
    Calls,
    Churn,
    EmptyLoop,
    Expire,
    FromC,
    Pair,
    PairInFull,
    Rig,
    Statements,
    make,
)

from cidalloc import Allocator
from cidalloc.errors import CidError

SLICE = 0.003  # seconds; the longest is below 5 ms unless one operation takes longer
WARM = 4  # times a slice runs untimed before: enough to touch the records of a million live IDs
SIZES = (1_000, 10_000, 100_000, 1_000_000)
LOOP = "empty loop"
TWO_CORES = 1.85  # CPU time per time that two threads reach if both have a core
FLOORS = ("floor", "floor, no optional arguments", "floor, existing int")
POOLS = tuple(peer.name for peer in PEERS)
AT_ONCE = (1, 1000)
"""How many a loop in C holds at once."""
IDIOMS = {
    "acquire + release": "pool.release(pool.acquire())",
    "acquire_wait + release": "pool.release(pool.acquire_wait())",
    "acquire, try, finally": "cid = pool.acquire()\ntry:\n  pass\nfinally:\n  pool.release(cid)",
    "lease": "with pool.lease():\n  pass",
}
LOOPS = {
    "range": "for i in range(1000):\n  pass",
    "acquire and release in a loop": "for i in range(1000):\n  pool.release(pool.acquire())",
    "acquire_many, loop, release_many": "ids = pool.acquire_many(1000)\n"
    "for cid in memoryview(ids):\n  pass\n"
    "pool.release_many(ids)",
    "iterate over the held IDs": "for cid in full:\n  pass",
    "held, loop": "for cid in full.held().tolist():\n  pass",
}
"""What a user writes, with one ID and with a thousand of them."""
Measured = dict[str, dict[str, list[float]]]


def rounds_of(rigs: dict[str, Rig], rounds: int, chance: random.Random) -> Measured:
    """Let the rigs take turns; returns what each took in each round, by phase."""
    counts = {name: _calibrate(rig) for name, rig in rigs.items()}
    taken: Measured = {}
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        order = list(rigs)
        chance.shuffle(order)
        for name in order:
            if counts[name] > 1:
                rigs[name].run(counts[name] * WARM)
            for phase, ns in rigs[name].run(counts[name]).items():
                taken.setdefault(phase, {}).setdefault(name, []).append(ns)
    gc.enable()
    return taken


def _calibrate(rig: Rig) -> int:
    count = 1
    while True:
        start = time.perf_counter()
        rig.run(count)
        took = time.perf_counter() - start
        if took > SLICE / 4:
            return max(1, int(count * SLICE / took))
        count *= 4


def summary(label: str, taken: dict[str, list[float]], reference: str, unit: str) -> dict[str, Any]:
    """Condense the rounds of one process into a median and a median ratio per contestant."""
    contestants = {
        name: {
            "ns": statistics.median(values),
            "ratio": statistics.median(
                a / b for a, b in zip(values, taken[reference], strict=True)
            ),
        }
        for name, values in taken.items()
    }
    return {"case": label, "reference": reference, "unit": unit, "contestants": contestants}


def pairs(full: bool, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Scalar pairs, or numbers that are only made, less the empty loop around them."""
    names = ("floor", *OURS, FullPython.name) if full else (*FLOORS, *OURS, *POOLS)
    kind = PairInFull if full else Pair
    rigs: dict[str, Rig] = {name: kind(make(name, 2**16)) for name in names}
    if not full:
        rigs |= {each.name: Statements(each.call, vars(make(each.name))) for each in NUMBERS}
    rigs[LOOP] = EmptyLoop()
    taken = rounds_of(rigs, rounds * 4, random.Random(seed))["pair"]  # noqa: S311
    loop = taken.pop(LOOP)
    less = {
        name: [a - b for a, b in zip(values, loop, strict=True)] for name, values in taken.items()
    }
    label = "pair, owner and times given" if full else "pair"
    return [summary(label, less, "floor", "ns per pair")]


def from_c(at_once: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Pairs in C, so many at once."""
    loops = module("from_c")
    rigs: dict[str, Rig] = {name: FromC(at_once, loops.from_pool, make(name)) for name in OURS}
    rigs["bump pointer"] = FromC(at_once, loops.from_bump)
    rigs["malloc + free"] = FromC(at_once, loops.from_malloc)
    taken = rounds_of(rigs, rounds * 4, random.Random(seed))["pair"]  # noqa: S311
    return [summary(f"from C, {at_once} at once", taken, MAIN, "ns per pair")]


def idioms(rounds: int, seed: int) -> list[dict[str, Any]]:
    """Pairs as users write them."""
    pool, full = make(MAIN), make(MAIN)
    full.acquire_many(1000)
    found = []
    for label, sources, count in (("idioms", IDIOMS, 1), ("loops", LOOPS, 1000)):
        names = {"pool": pool, "full": full}
        rigs: dict[str, Rig] = {
            name: Statements(source, names, count) for name, source in sources.items()
        }
        taken = rounds_of(rigs, rounds * 2, random.Random(seed))["pair"]  # noqa: S311
        found.append(summary(label, taken, next(iter(sources)), "ns per ID"))
    return found


def churn(n: int, ints: bool, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Scalar churn with `n` live."""
    names = ("floor", *OURS, *PYTHON_BULK, "pyroaring")
    rigs: dict[str, Rig] = {name: Churn(make(name), n, seed, ints=ints) for name in names}
    taken = rounds_of(rigs, rounds, random.Random(seed))["pair"]  # noqa: S311
    label = f"churn, list of ints, {n}" if ints else f"churn {n}"
    return [summary(label, taken, MAIN, "ns per pair")]


def bulk_churn(n: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Churn by arrays with `n` live."""
    rigs: dict[str, Rig] = {}
    for name in (*OURS, *ARRAY_BULK, *PYTHON_BULK):
        rigs[name] = rig = BulkChurn(make(name), n, seed)
        rig.settle()
    taken = rounds_of(rigs, rounds, random.Random(seed))["pair"]  # noqa: S311
    return [summary(f"bulk churn {n}", taken, MAIN, "ns per pair")]


def bulk(n: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Bulk acquire and release of `n` IDs."""
    rigs: dict[str, Rig] = {"np.arange": Arange(n)}
    for name in (*OURS, *ARRAY_BULK):
        rigs[name] = Bulk(make(name), n)
        rigs[f"{name}, shuffled"] = Bulk(make(name), n, shuffled=True, seed=seed)
    rigs[f"{MAIN}, out="] = Bulk(make(MAIN), n, out=True)
    if n <= 10_000:  # beyond that, one call takes longer than a slice
        rigs.update({name: Bulk(make(name), n) for name in PYTHON_BULK})
    taken = rounds_of(rigs, rounds * 2, random.Random(seed))  # noqa: S311
    return [
        summary(f"acquire {n}", taken["acquire"], "np.arange", "ns per ID"),
        summary(f"release {n}", taken["release"], MAIN, "ns per ID"),
    ]


def expire(n: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Expiry of an owner of `n` IDs."""
    rigs: dict[str, Rig] = {name: Expire(make(name), n) for name in (*OURS, FullPython.name)}
    taken = rounds_of(rigs, rounds if n <= 10_000 else 5, random.Random(seed))["expire"]  # noqa: S311
    return [summary(f"expire {n}", taken, MAIN, "ns per ID")]


def expire_scattered(n: int, _rounds: int, seed: int) -> list[dict[str, Any]]:
    """The same, when the IDs lie as far apart as after long churn."""
    rigs: dict[str, Rig] = {
        name: Expire(make(name), n, scattered=True, seed=seed) for name in (MAIN, FullPython.name)
    }
    taken = rounds_of(rigs, 2, random.Random(seed))["expire"]  # noqa: S311
    return [summary(f"expire, scattered, {n}", taken, MAIN, "ns per ID")]


def occupancy(capacity: int, percent: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Scalar churn in a pool of which so much is held."""
    rigs: dict[str, Rig] = {}
    for name in (*OURS, "list + set", "heapq + set", "bitarray", FullPython.name):
        try:
            rigs[name] = Churn(make(name, capacity), capacity * percent // 100, seed)
        except CidError:  # exhausted: wide blocks do not fill a pool
            continue
    taken = rounds_of(rigs, rounds, random.Random(seed))["pair"]  # noqa: S311
    return [summary(f"occupancy {capacity} {percent}", taken, "cidalloc 1", "ns per pair")]


def filling(capacity: int, _rounds: int, seed: int) -> list[dict[str, Any]]:
    """Find how full a pool gets under uniform churn by one owner, in per cent, for each width."""
    contestants = {}
    for width in (64, 32, 16, 8, 4, 2, 1):
        percent = 0
        for percent in range(2, 101, 2):
            rig = BulkChurn(Allocator(capacity, block=width), capacity * percent // 100, seed, 1)
            try:
                rig.settle(10)
            except CidError:
                percent -= 2
                break
        contestants[f"cidalloc {width}"] = {"percent": float(percent)}
    return [{"case": f"filling {capacity}", "unit": "per cent", "contestants": contestants}]


def private_dirty() -> int:
    """Return the bytes of memory that this process alone has written to."""
    total = 0
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if line.startswith("Private_Dirty:"):
                total += int(line.split()[1]) * 1024
    return total


def memory(name: str, n: int, _rounds: int, seed: int) -> list[dict[str, Any]]:
    """Bytes per live ID, freshly acquired and after churn; the caller's own array not counted."""
    live = np.ones(n, object if name == UuidSet.name else np.uint64)  # its IDs have 128 bits
    _hold(name, 2000, seed, lambda: None, live)  # the code paths, once
    figures: list[float] = []
    before = 0

    def look() -> None:
        gc.collect()
        figures.append((private_dirty() - before) / n)

    before = private_dirty()
    _hold(name, n, seed, look, live)
    found = {"dense": figures[0], "churned": figures[1]}
    return [
        {"case": f"memory {n}", "unit": "bytes per live ID", "contestants": {name: found}},
    ]


def _hold(name: str, n: int, seed: int, look: Callable[[], None], live: Any) -> None:
    # The live IDs stand in the caller's array, even those of plain Python, which pays for its ints.
    pool = make(name)
    for at in range(0, n, 1000):
        live[at : at + 1000] = pool.acquire_many(1000)
    look()
    chance = np.random.default_rng(seed)
    array = isinstance(pool.acquire_many(0), np.ndarray)
    for _ in range((10 if array else 3) * n // 1000):
        where = chance.choice(n, min(1000, n), replace=False, shuffle=False)
        ids = live[where]
        pool.release_many(ids if array else ids.tolist())
        live[where] = pool.acquire_many(len(where))
    look()


class Hashing:
    """Work that certainly runs on two cores at once: hashing leaves the interpreter's lock."""

    block = bytes(10_000)

    def run(self, count: int) -> dict[str, float]:
        """Hash."""
        for _ in range(count):
            hashlib.sha256(self.block)
        return {}


def threads(n: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """How much faster two threads are than one, each with a pool of its own."""
    makers: dict[str, Callable[[], Rig]] = {"hashing": Hashing}
    for name in (MAIN, NumpyStack.name):
        makers[name] = partial(_calls, name, n)
    chance = random.Random(seed)  # noqa: S311
    speedups: dict[str, list[float]] = {name: [] for name in makers}
    cores: list[float] = []
    for _ in range(rounds):
        turn = {
            name: _one_and_two([makers[name](), makers[name]()])
            for name in chance.sample(list(makers), len(makers))
        }
        cores.append(turn["hashing"][1])
        if cores[-1] >= TWO_CORES:  # or there were none to be had in this round
            for name, (speedup, _) in turn.items():
                speedups[name].append(speedup)
    found = {
        name: {"speedup": statistics.median(values)} for name, values in speedups.items() if values
    }
    found.setdefault("hashing", {})["cores"] = statistics.median(cores)
    return [{"case": f"threads {n}", "unit": "times one thread", "contestants": found}]


def _calls(name: str, n: int) -> Rig:
    return Calls(make(name), n, out=name == MAIN)


def _one_and_two(rigs: list[Rig]) -> tuple[float, float]:
    count = _calibrate(rigs[0]) * 10
    rigs[1].run(1)
    start = time.perf_counter()
    rigs[0].run(count)
    rigs[1].run(count)
    one = time.perf_counter() - start
    barrier = threading.Barrier(3)

    def work(rig: Rig) -> None:
        barrier.wait()
        rig.run(count)
        barrier.wait()

    workers = [threading.Thread(target=work, args=(rig,)) for rig in rigs]
    for worker in workers:
        worker.start()
    barrier.wait()
    start, cpu = time.perf_counter(), time.process_time()
    barrier.wait()
    two, cpu = time.perf_counter() - start, time.process_time() - cpu
    for worker in workers:
        worker.join()
    return one / two, cpu / two


CASES: dict[str, tuple[Any, ...]] = {
    "pair": (pairs, False),
    "pair-full": (pairs, True),
    **{f"from-c-{n}": (from_c, n) for n in AT_ONCE},
    "idioms": (idioms,),
    **{f"churn-{n}": (churn, n, False) for n in SIZES},
    "churn-ints": (churn, SIZES[-1], True),
    **{f"bulk-churn-{n}": (bulk_churn, n) for n in SIZES},
    **{f"bulk-{n}": (bulk, n) for n in SIZES},
    **{f"expire-{n}": (expire, n) for n in SIZES},
    "expire-scattered": (expire_scattered, SIZES[-1]),
    **{
        f"occupancy-{capacity}-{percent}": (occupancy, capacity, percent)
        for capacity in (10_000, 1_000_000)
        for percent in (10, 50, 90, 99)
    },
    "filling": (filling, 2**14),
    **{f"memory-{name.replace(' ', '-')}": (memory, name, SIZES[-1]) for name in (*OURS, *POOLS)},
    **{f"threads-{n}": (threads, n) for n in SIZES[1:]},
}
"""Every case: a function and its arguments, after which come the number of rounds and a seed."""


def main() -> None:
    """Measure one case."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("case", choices=CASES)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    case, *arguments = CASES[given.case]
    json.dump(case(*arguments, given.rounds, given.seed), sys.stdout)


if __name__ == "__main__":
    main()
