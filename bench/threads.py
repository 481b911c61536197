"""How the allocator scales from one thread to two, on each of the given Pythons.

    python bench/threads.py PYTHON... [--rounds N]

Each round runs every case once with every Python, one after the other, in a process of its own. The
table has operations a second of all threads together, in the best of all short windows: on a busy
machine most windows show other processes. Each Python needs the package.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

CASES = [
    (call, threads, shared)
    for call in ("pair", "bulk")
    for threads, shared in ((1, False), (2, False), (2, True))
]
SECONDS, WINDOWS = 0.05, 8
BULK = 10_000


def turns(call: str, pool: Any) -> Callable[[], int]:
    """Return a function that does some work, and returns how many operations that was."""
    import numpy as np

    out = np.empty(BULK, np.uint64)

    def pair() -> int:
        for _ in range(1000):
            pool.release(pool.acquire())
        return 1000

    def bulk() -> int:
        pool.release_many(pool.acquire_many(BULK, out=out))
        return BULK

    return pair if call == "pair" else bulk


def measure(call: str, threads: int, shared: bool) -> float:
    """Return the operations a second of all threads in the best window."""
    from cidalloc import Allocator

    common = Allocator(2**20)
    begin = threading.Barrier(threads)
    done: list[list[tuple[int, float, float]]] = [[] for _ in range(threads)]

    def work(number: int) -> None:
        turn = turns(call, common if shared else Allocator(2**20))
        turn()
        for _ in range(WINDOWS):
            begin.wait()
            count, since = 0, time.perf_counter()
            while time.perf_counter() - since < SECONDS:
                count += turn()
            done[number].append((count, since, time.perf_counter()))

    workers = [threading.Thread(target=work, args=[number]) for number in range(threads)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    # From the first thread's begin to the last one's end: else they would not seem to wait.
    return max(
        sum(count for count, _, _ in window)
        / (max(end for _, _, end in window) - min(since for _, since, _ in window))
        for window in zip(*done, strict=True)
    )


def main() -> None:
    """Measure with each Python in turn, and print a table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("pythons", nargs="*")
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--case", type=int, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.case is not None:
        print(measure(*CASES[given.case]))
        return
    found = defaultdict(list)
    for _ in range(given.rounds):
        for case in range(len(CASES)):
            for python in given.pythons:
                command = [python, __file__, "--case", str(case)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
                found[python, case].append(float(done.stdout))
    for python in given.pythons:
        for case, (call, threads, shared) in enumerate(CASES):
            rate = max(found[python, case]) / 1e6
            single = max(found[python, 0 if call == "pair" else 3]) / 1e6
            pool = "one pool" if shared else "own pools"
            print(f"{python} {call} {threads} {pool}: {rate:.2f} M/s, {rate / single:.2f} x")


if __name__ == "__main__":
    sys.exit(main())
