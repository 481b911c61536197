"""The study of `make bench`: allocator, floor and peers side by side, in many fresh processes.

Runs every case of measure.py in processes of its own, in random order, and writes what they found
as results.json, a table and pictures; report.py then fills docs/performance.md and
choosing.md in.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gate
import measure
import report

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "performance"
QUICK = ROOT / "build" / "bench" / "quick"
FEW = ("memory", "filling", "expire-scattered")
"""Cases that are counted, or take long and leave no doubt: three processes are enough."""
PACKAGES = ("cidalloc", "numpy", "cython", "bitarray", "fastuuid", "intbitset", "pyroaring")
PACKAGES += ("sortedcontainers", "uuid_utils")


def run(cases: list[str], processes: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Run the cases, each in so many processes, in random order."""
    jobs = [
        (case, process)
        for case in cases
        for process in range(min(processes, 3) if case.startswith(FEW) else processes)
    ]
    random.Random(seed).shuffle(jobs)  # noqa: S311
    found = []
    for done, (case, process) in enumerate(jobs):
        print(f"\r{done}/{len(jobs)} {case:<40}", end="", file=sys.stderr, flush=True)
        command = [sys.executable, measure.__file__, case]
        command += ["--rounds", str(rounds), "--seed", str(seed + process)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout  # noqa: S603
        found += json.loads(output)
    print(f"\r{len(jobs)} processes{'':<40}", file=sys.stderr)
    return found


def merge(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Collect what the processes found: per case, contestant and figure a list of values."""
    cases: dict[str, Any] = {}
    for result in found:
        case = cases.setdefault(result["case"], {"contestants": {}})
        case.update({key: result[key] for key in ("unit", "reference") if key in result})
        for name, figures in result["contestants"].items():
            values = case["contestants"].setdefault(name, {})
            for key, value in figures.items():
                values.setdefault(key, []).append(float(f"{value:.4g}"))
    return cases


def machine(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Describe what the figures depend on."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "load before": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "huge pages": huge.read_text().strip() if huge.exists() else "unknown",
        "python": f"{platform.python_version()} ({platform.python_compiler()})",
        "packages": {name: version(name) for name in packages},
    }


def instructions() -> float | None:
    """Count the instructions of the scalar pair above the floor, if valgrind is there."""
    return gate.measured(["pair"])["pair"][0] if shutil.which("valgrind") else None


def add(before: dict[str, Any], results: dict[str, Any], only: str) -> dict[str, Any]:
    """Put the results of some cases in place of those of an earlier study, and note when and where.

    The note stands until the next whole study.
    """
    said = f"the cases that begin with `{only}`: {report.conditions(results)}"
    later = before.get("later", {}) | {only: said}
    return before | {"cases": before["cases"] | results["cases"], "later": later}


def main() -> None:
    """Run the study and write everything."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="few rounds, into build/bench/quick")
    options.add_argument("--processes", type=int, help="per case; 8, or 1 with --quick")
    options.add_argument("--rounds", type=int, help="per process; 25, or 5 with --quick")
    options.add_argument("--seed", type=int, default=int(time.time()))
    options.add_argument("--only", default="", help="cases that begin with this; others stay")
    options.add_argument("--output", type=Path, help="where to write")
    given = options.parse_args()
    folder = given.output or (QUICK if given.quick else DOCS)
    processes = given.processes or (1 if given.quick else 8)
    rounds = given.rounds or (5 if given.quick else 25)
    cases = [case for case in measure.CASES if case.startswith(given.only)]
    began = time.time()
    results = {
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "seed": given.seed,
        "processes": processes,
        "rounds": rounds,
        "machine": machine(),
        "cases": merge(run(cases, processes, rounds, given.seed)),
        "instructions": instructions() if not given.only else None,
        "minutes": round((time.time() - began) / 60, 1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    if given.only and path.exists():
        results = add(json.loads(path.read_text()), results, given.only)
    path.write_text(report.compact(results))
    report.write(folder)


if __name__ == "__main__":
    main()
