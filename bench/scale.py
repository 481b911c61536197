"""What one operation of the registry costs when many IDs are held, and many sessions are open.

It must stay flat. IDs and sessions are picked at random, so the caches miss more the more there
are. What one such miss costs stands beside it: a loop that changes one record's worth of memory.
The ratios are to the first row of the same run. `make scale` runs this; ARGS="--ids 1e6" stops
early. 100 million held IDs take 3.5 GB.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cidalloc import Allocator
from cidalloc.manager.registry import Registry
from cidalloc.manager.settings import Settings

CALLS, ROUNDS = 2_000, 9
DICE = random.Random(1)  # noqa: S311 no secret
LIMITS = {
    "first": 1,
    "capacity": 2**38,
    "fresh": True,
    "cooldown_ms": 0,
    "max_held": 2**38,
    "max_count": 10**6,
    "max_sessions": 1_000_000,
    "max_ttl_ms": 30 * 86_400_000,
}


def token(n: int) -> bytes:
    """Return the n-th token."""
    return n.to_bytes(16, "little")


def resident() -> int:
    """Return the memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def each_ns(work: Callable[[int], object], choices: Callable[[], int]) -> float:
    """Return the median over rounds of what one call costs, in nanoseconds."""
    times = []
    for _ in range(ROUNDS):
        chosen = [choices() for _ in range(CALLS)]
        began = time.perf_counter()
        for each in chosen:
            work(each)
        times.append((time.perf_counter() - began) / CALLS * 1e9)
    return statistics.median(times)


def held(count: int) -> list[float]:
    """Return the cost of a miss, of a swap in core and registry, and the bytes an ID takes."""
    return [touch(count), core(count), *in_registry(count)]


def touch(count: int) -> float:
    """Change 8 of the 32 bytes that one of so many IDs has."""
    memory = memoryview(np.ones(4 * count, np.uint64))

    def change(at: int) -> None:
        memory[4 * at] = 2

    return each_ns(change, lambda: DICE.randrange(count))


def core(count: int) -> float:
    """Give one of so many held IDs back and take another."""
    pool = Allocator(2**38, 1, 1)
    ids = pool.acquire_many(count)

    def swap(at: int) -> None:
        pool.release(ids[at])
        ids[at] = pool.acquire()

    return each_ns(swap, lambda: DICE.randrange(count))


def in_registry(count: int) -> list[float]:
    """Do the same in a registry; return the bytes that an ID takes, too."""
    registry = Registry(Settings(**LIMITS), 0)  # type: ignore[arg-type]
    registry.open(token(1), 0, ttl_ms=10**9)
    ids = np.ones(count, np.uint64)
    before = resident()
    for seq, start in enumerate(range(0, count, 10**6), 1):
        part = registry.acquire(min(10**6, count - start), 0, token=token(1), seq=seq)
        ids[start : start + len(part)] = part
    memory = (resident() - before) / count
    seq = 2**32

    def exchange(at: int) -> None:
        nonlocal seq
        seq += 2
        registry.release(ids[at : at + 1], 0, token=token(1), seq=seq, ended=True)
        ids[at] = registry.acquire(1, 0, token=token(1), seq=seq + 1)[0]

    return [each_ns(exchange, lambda: DICE.randrange(count)), memory]


def sessions(count: int) -> list[float]:
    """Return the cost of a renewal, of an ID taken and given back, and the bytes of a session."""
    registry = Registry(Settings(**LIMITS), 0)  # type: ignore[arg-type]
    before = resident()
    for n in range(count):
        registry.open(token(n), 0, ttl_ms=10**9)
    memory = (resident() - before) / count
    seq = 0

    def exchange(n: int) -> None:
        nonlocal seq
        seq += 2
        one = registry.acquire(1, 0, token=token(n), seq=seq)
        registry.release(one, 0, token=token(n), seq=seq + 1, ended=True)

    def pick() -> int:
        return DICE.randrange(count)

    renewed = each_ns(lambda n: registry.renew(token(n), 0), pick)
    return [renewed, each_ns(exchange, pick), memory]


def table(
    title: str, names: list[str], sizes: list[int], row: Callable[[int], list[float]]
) -> None:
    """Print one, line by line."""
    print(f"\n| {title} | " + " | ".join(names) + " |\n|---:" + "|---:" * len(names) + "|")
    first: list[float] = []
    for size in sizes:
        *times, memory = row(size)
        first = first or times
        cells = [
            f"{time:,.0f} ({time / base:.2f})" for time, base in zip(times, first, strict=True)
        ]
        print(f"| {size:,} | " + " | ".join([*cells, f"{memory:,.0f}"]) + " |", flush=True)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ids", type=float, default=1e8, help="at most so many")
    parser.add_argument("--sessions", type=float, default=1e6, help="at most so many")
    options = parser.parse_args()
    print("Nanoseconds, and the ratio to the first row.")
    names = [
        "one record touched",
        "core: release + acquire",
        "registry: DELETE + NEW",
        "bytes an ID",
    ]
    table("held IDs", names, [10**n for n in range(3, 9) if 10**n <= options.ids], held)
    names = ["renew", "NEW + DELETE", "bytes a session"]
    table("sessions", names, [10**n for n in range(7) if 10**n <= options.sessions], sessions)


if __name__ == "__main__":
    main()
