"""Runs simulated fleets by the thousand: `make simulate`, or `python simulate.py SEED`.

A run is wrong if a promise was broken, or if the rare states were not reached.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import many_servers
from fleet import simulate
from sometimes import missing, reached, write_table

ENOUGH = 100  # runs, after which each rare state must have been reached


def several_servers(seed: int) -> tuple[list[str], Counter[str]]:
    """Run clients of six servers; return what is wrong, and which rare states were reached."""
    reached.clear()
    world = many_servers.World(seed, 6, 30, 3)
    world.run()
    world.close()
    return world.wrong, Counter({*reached})


def main() -> None:
    """Run many; end with 1 at the first that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="write the history of one run to this file")
    parser.add_argument("--table", type=Path, help="write how often rare states were reached here")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    total: Counter[str] = Counter()
    found: Counter[str] = Counter()
    seeds = range(options.seed, options.seed + options.runs)
    with multiprocessing.Pool(min(len(os.sched_getaffinity(0)), len(seeds))) as pool:
        results = pool.imap(partial(simulate, keep=options.keep), seeds, 10)
        for seed, (wrong, counts, rare) in zip(seeds, results, strict=True):
            total += counts
            found += rare
            if wrong:
                first = {each[0]: each for each in reversed(wrong)}  # by rule
                print(f"seed {seed}: {len(wrong)} wrong", *first.values(), sep="\n  ")
                sys.exit(1)
        more = range(options.runs // ENOUGH)
        for seed, (wrong, rare) in zip(more, pool.imap(several_servers, more), strict=True):
            found += rare
            if wrong:
                print(f"several servers, seed {seed}: wrong", *wrong[:3], sep="\n  ")
                sys.exit(1)
    lacking = missing(found) if more else []
    if options.runs > 10 and total["dead ended"] <= total["dead stayed"]:
        lacking.append("S: most of what the dead left has stayed")
    if lacking:
        print(f"{options.runs} runs, but wrong:", *lacking, total, sep="\n  ")
        sys.exit(1)
    print(f"{options.runs} runs, nothing wrong:", dict(total.most_common()))
    print("rare states, in how many runs:", dict(found.most_common()))
    if options.table:
        write_table(options.table, found, options.runs, {"moved before START": len(more)})


if __name__ == "__main__":
    main()
