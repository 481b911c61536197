"""Runs simulated fleets by the thousand: `make simulate`, or `python simulate.py SEED`.

A run is wrong if a promise was broken, or if the rare states were not reached.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import many_servers
from fleet import simulate
from sometimes import missing, reached, write_table

T = TypeVar("T")
ENOUGH = 100  # runs, after which each rare state must have been reached


def several_servers(seed: int) -> tuple[list[str], Counter[str]]:
    """Run clients of six servers; return what is wrong, and which rare states were reached."""
    reached.clear()
    world = many_servers.World(seed, 6, 30, 3)
    world.run()
    world.close()
    return world.wrong, Counter({*reached})


def in_processes(function: Callable[[int], T], seeds: range) -> Iterator[tuple[int, T]]:
    """Yield each seed with what the function returns for it, in order; each CPU runs one."""
    with multiprocessing.Pool(min(len(os.sched_getaffinity(0)), len(seeds)) or 1) as pool:
        yield from zip(seeds, pool.imap(function, seeds), strict=True)


def main() -> None:
    """Run many; end with 1 at the first that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no more then")
    parser.add_argument("--keep", type=Path, help="write the history of one run to this file")
    parser.add_argument("--table", type=Path, help="write how often rare states were reached here")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    total: Counter[str] = Counter()
    found: Counter[str] = Counter()
    seeds = range(options.seed, options.seed + options.runs)
    runs, until = 0, time.monotonic() + 3600 * options.hours
    for seed, (wrong, counts, rare) in in_processes(partial(simulate, keep=options.keep), seeds):
        runs += 1
        total += counts
        found += rare
        if wrong:
            first = {each[0]: each for each in reversed(wrong)}  # by rule
            print(f"seed {seed}: {len(wrong)} wrong", *first.values(), sep="\n  ")
            sys.exit(1)
        if time.monotonic() > until:
            break
    more = range(runs // ENOUGH)
    for seed, (wrong, rare) in in_processes(several_servers, more):
        found += rare
        if wrong:
            print(f"several servers, seed {seed}: wrong", *wrong[:3], sep="\n  ")
            sys.exit(1)
    lacking = missing(found) if more else []
    if runs > 10 and total["dead ended"] <= total["dead stayed"]:
        lacking.append("S: most of what the dead left has stayed")
    if lacking:
        print(f"{runs} runs, but wrong:", *lacking, total, sep="\n  ")
        sys.exit(1)
    print(f"{runs} runs, nothing wrong:", dict(total.most_common()))
    print("rare states, in how many runs:", dict(found.most_common()))
    if options.table:
        write_table(options.table, found, runs, {"moved before START": len(more)})


if __name__ == "__main__":
    main()
