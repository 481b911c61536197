"""The gate of `make bench-gate`: instructions per operation, which repeat, against stored limits.

Each loop runs under callgrind with two lengths. The difference, divided by the operations between,
is free of whatever happens once. The same loop with the floor is subtracted, so what remains is
the allocator's own. Cache misses are not seen: that is what `make bench` is for.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads import BulkChurn, Calls, Pair, PairInFull, Rig, make

LIMITS = Path(__file__).with_name("limits.json")
TOLERANCE = 0.05
REASON = (
    "5 % above what was measured, and at least 1 instruction per call or 0.05 per ID: the counts "
    "themselves repeat to 0.3 %, but another compiler, Python or NumPy changes them by a few per "
    "cent, though the floor, measured in the same run, takes away most of that"
)


def _settled(pool: Any) -> Rig:
    rig = BulkChurn(pool, 100_000, seed=1)
    rig.settle(5)
    return rig


@dataclass(frozen=True)
class Case:
    """A loop, the contestant in it, two lengths, and how many operations one turn counts for."""

    rig: Callable[[Any], Rig]
    contestant: str
    lengths: tuple[int, int]
    per_turn: int
    unit: str


CASES = {
    "pair": Case(Pair, "cidalloc 64", (2_000, 102_000), 1, "call pair"),
    "pair, block 1": Case(Pair, "cidalloc 1", (2_000, 102_000), 1, "call pair"),
    "pair, owner and times given": Case(
        PairInFull, "cidalloc 64", (2_000, 102_000), 1, "call pair"
    ),
    "bulk 1000": Case(lambda pool: Calls(pool, 1_000), "cidalloc 64", (20, 1_020), 1_000, "ID"),
    "bulk 100000": Case(lambda pool: Calls(pool, 100_000), "cidalloc 64", (3, 13), 100_000, "ID"),
    "bulk churn 100000": Case(_settled, "cidalloc 64", (50, 250), 1_000, "ID"),
}


def loop(name: str, contestant: str, turns: int) -> None:
    """Run one loop: this is what callgrind watches."""
    CASES[name].rig(make(contestant, 2**20)).run(turns)


def instructions(name: str, contestant: str, turns: int) -> int:
    """Count the instructions of a process that runs one loop."""
    command = [
        *("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"),
        *(sys.executable, __file__, "--loop", name, contestant, str(turns)),
    ]
    kept = {
        key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ
    }
    env = {**kept, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
    env["PYTHONDONTWRITEBYTECODE"] = "1"  # or the first run would do it for the others
    done = subprocess.run(command, env=env, capture_output=True, text=True)  # noqa: S603
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(found[1])


def measured(names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Count instructions per operation: above the floor, and the floor's own."""
    jobs = {
        (loop_name, contestant, turns)
        for name in names
        for loop_name, contestant in ((name, CASES[name].contestant), (floor_of(name), "floor"))
        for turns in CASES[name].lengths
    }
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        counts = dict(zip(jobs, workers.map(lambda job: instructions(*job), jobs), strict=True))

    def each(name: str, contestant: str) -> float:
        case, (short, long) = CASES[name], CASES[name].lengths
        extra = counts[name, contestant, long] - counts[name, contestant, short]
        return extra / ((long - short) * case.per_turn)

    return {
        name: (
            each(name, CASES[name].contestant) - each(floor_of(name), "floor"),
            each(floor_of(name), "floor"),
        )
        for name in names
    }


def floor_of(name: str) -> str:
    """Return the first case with the same loop, whose floor is this one's too."""
    return next(other for other in CASES if CASES[other].rig is CASES[name].rig)


def limit_for(name: str, count: float) -> float:
    """Return the limit that a measured count becomes."""
    case = CASES[name]
    least, digits = (1.0, 0) if case.per_turn == 1 else (0.05, 2)
    most = count + max(count * TOLERANCE, least)
    return float(math.ceil(most * 10**digits) / 10**digits)


def update(found: dict[str, tuple[float, float]]) -> None:
    """Write the limits anew."""
    libc = " ".join(platform.libc_ver())
    text = {
        "what": "instructions per operation above the floor",
        "tolerance": REASON,
        "measured with": f"Python {platform.python_version()}, {platform.machine()}, {libc}",
        "limits": {name: limit_for(name, count) for name, (count, _) in found.items()},
    }
    LIMITS.write_text(json.dumps(text, indent=2) + "\n")


def judge(found: dict[str, tuple[float, float]]) -> bool:
    """Print the table, and tell whether every count is within its limit."""
    limits = json.loads(LIMITS.read_text())["limits"]
    print(f"{'instructions per':<40}{'floor':>9}{'above it':>10}{'limit':>9}")
    passed = True
    for name, (count, floor) in found.items():
        limit = limits.get(name)
        verdict = "no limit: run with --update" if limit is None else ""
        if limit is not None and count > limit:
            verdict = f"EXCEEDED by {count / limit - 1:.1%}"
        passed = passed and not verdict
        label = f"{CASES[name].unit}: {name}"
        print(f"{label:<40}{floor:>9.2f}{count:>10.2f}{limit or 0:>9.2f}  {verdict}")
    return passed


def main() -> int:
    """Measure, and judge or write the limits."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--update", action="store_true", help="write bench/limits.json anew")
    options.add_argument("--loop", nargs=3, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.loop:
        name, contestant, turns = given.loop
        loop(name, contestant, int(turns))
        return 0
    if not shutil.which("valgrind"):
        print("error: callgrind is missing; apt-get install valgrind", file=sys.stderr)
        return 1
    found = measured(CASES)
    if given.update:
        update(found)
    if judge(found):
        return 0
    print("If that is meant, run bench/gate.py --update and commit limits.json", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
