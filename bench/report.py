"""Turns the results of the study into tables and pictures of docs/performance.md and choosing.md.

Run it alone to draw anew: python bench/report.py [folder with results.json]
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "performance"
PAGE = ROOT / "docs" / "performance.md"
CHOICE = ROOT / "docs" / "choosing.md"
MAIN = "cidalloc 64"
Results = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A measured value: the median over processes, and their spread."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Figure:
        """Condense the values of several processes."""
        return cls(statistics.median(values), min(values), max(values))

    def inverted(self) -> Figure:
        """Return the reciprocal."""
        return Figure(1 / self.middle, 1 / self.high, 1 / self.low)

    def __str__(self) -> str:
        middle, low, high = map(number, (self.middle, self.low, self.high))
        return middle if low == high else f"{middle} ({low} … {high})"


def number(value: float) -> str:
    """Write a number with three significant digits, and no more than needed."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def figure(
    results: Results, case: str, contestant: str, key: str, *, inverted: bool = False
) -> Figure | None:
    """Look a figure up; None if it was not measured."""
    values = results["cases"].get(case, {}).get("contestants", {}).get(contestant, {}).get(key)
    if not values:
        return None
    found = Figure.of(values)
    return found.inverted() if inverted else found


@dataclass(frozen=True)
class Goal:
    """A goal: at most or at least a limit, and where the figure is found."""

    what: str
    at_most: bool
    limit: float
    case: str
    contestant: str
    key: str = "ratio"
    inverted: bool = False
    unit: str = ""
    why: str = ""

    def row(self, results: Results) -> tuple[str, str, str, str, str]:
        """Return what, goal, measured, verdict, and what limits it if it is missed."""
        goal = f"{'≤' if self.at_most else '≥'} {self.limit:g}{self.unit}"
        found = self.find(results)
        if isinstance(found, str):
            return self.what, goal, "–", found, ""
        verdict = self.verdict(found)
        missed = f"{self.why} ([more]({LIMITS}))" if "missed" in verdict else ""
        return self.what, goal, str(found), verdict, missed

    def find(self, results: Results) -> Figure | str:
        """Return the figure, or why there is none."""
        if self.case == "instructions":
            count = results["instructions"]
            return "not measured: no valgrind" if count is None else Figure.of([count])
        found = figure(results, self.case, self.contestant, self.key, inverted=self.inverted)
        if self.case.startswith("threads") and not self._had_cores(results):
            return "not measured: no two free cores"
        return found or "not measured"

    def _had_cores(self, results: Results) -> bool:
        # Processes that never had two cores report no speed-up; at least half must have.
        found = results["cases"].get(self.case, {}).get("contestants", {}).get(self.contestant, {})
        return 2 * len(found.get(self.key, [])) >= max(2, results["processes"])

    def verdict(self, found: Figure) -> str:
        """Say whether the goal is met, by the median, and whether every process agrees."""

        def meets(value: float) -> bool:
            return value <= self.limit if self.at_most else value >= self.limit

        if not meets(found.middle):
            return f"**missed by {abs(found.middle / self.limit - 1):.0%}**"
        return "met" if meets(found.low) and meets(found.high) else "met, not by every process"


def versus(peer: str, case: str, words: str, limit: float, why: str) -> Goal:
    """Return the goal to be so many times faster than a peer."""
    return Goal(f"{words}, times faster than {peer}", False, limit, case, peer, why=why)


LIMITS = "#what-limits-each-goal"
"""The section with more about what limits each goal."""
CALL = "Python's call of a method with optional arguments"
ARGUMENTS = "three arguments more are turned into C integers and checked"
WRITING = "writing the numbers to memory"
MISSES = "cache misses of random records; the peers release all with one set operation"
CALLER = "cache misses of the caller's own memory, in both sides of the ratio"
BLOCKS = "32 bytes for each block that was ever in use"
VISITS = "it visits the blocks of the owner"
LOCK = "the part of a call that needs the GIL, and memory bandwidth that the threads share"

SCALAR, BULK = "churn 1000000", "bulk churn 1000000"
INTS = "churn, list of ints, 1000000"
INTS_WORDS = "the same, the caller keeps a list of ints"
GOALS = [
    Goal("scalar acquire + release / two empty methods", True, 1.15, "pair", MAIN, why=CALL),
    Goal(
        *("the same, owner and times given", True, 1.35, "pair, owner and times given", MAIN),
        why=ARGUMENTS,
    ),
    Goal(
        *("IDs one by one, acquired and released 1000 at once / `range`", True, 1.1, "loops"),
        "acquire_many, loop, release_many",
        why="reading each ID from the array, and making the int",
    ),
    Goal("instructions of the pair above the floor", True, 90, "instructions", MAIN, why=CALL),
    *(
        Goal(
            *(f"bulk acquire of {words}, speed / `np.arange`", False, limit, case, MAIN),
            inverted=True,
            why=WRITING,
        )
        for words, limit, case in (("10 k", 1, "acquire 10000"), ("1 M", 0.9, "acquire 1000000"))
    ),
    *(
        versus(peer, BULK, "bulk churn, 1 M live", limit, MISSES)
        for peer, limit in (
            ("list + set", 100),
            ("heapq + set", 150),
            ("full Python", 250),
            ("NumPy stack + owner", 3),
        )
    ),
    *(
        versus(peer, case, words, limit, CALLER)
        for case, words in ((SCALAR, "scalar churn, 1 M live"), (INTS, INTS_WORDS))
        for peer, limit in (("list + set", 3), ("full Python", 8))
    ),
    Goal("bytes per live ID, dense", True, 1, "memory 1000000", MAIN, "dense", why=BLOCKS),
    Goal("bytes per live ID, churned", True, 4, "memory 1000000", MAIN, "churned", why=BLOCKS),
    versus("full Python", "expire 1000000", "expire 1 M IDs", 500, VISITS),
    versus("full Python", "expire, scattered, 1000000", "expire 1 M scattered IDs", 500, VISITS),
    *(
        Goal(
            *(f"two threads, bulk of {words} each", False, 1.5, case, MAIN, "speedup"),
            unit="×",
            why=LOCK,
        )
        for words, case in (("10 k", "threads 10000"), ("100 k", "threads 100000"))
    ),
]
ELSEWHERE = [
    ("renew one of a million sessions", "≤ 1 % of a request, round trip included", "The registry"),
    ("recover 1 M / 100 M IDs from a file, ext4, warm", "≤ 1 / ≤ 100 ms", "The registry"),
    ("DELETE and NEW in a file / in memory", "≤ 1.1", "The registry"),
    (
        "the manager's requests/s / an empty model, 1 to 64 clients",
        "≥ 0.8",
        "The manager under load",
    ),
    ("a request or a sequence / plain tritonclient's", "≤ 1.03, CPU ≤ 1.10", "The client"),
    ("CPU of a sequence of 2 beyond plain tritonclient's", "≤ 25 µs", "The client"),
    ("CPU of acquire + release at the client / `secrets.randbits(63)`", "≤ 1", "The client"),
]
"""Goals of other parts of the project, and the section that has the figures."""


def markdown(head: list[str], rows: list[list[str]], rule: str = "---:") -> str:
    """Lay out a Markdown table; ``rule`` aligns all columns but the first."""
    lines = [head, ["---", *[rule] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goals(results: Results) -> str:
    """Return the table of goals."""
    rows = [list(goal.row(results)) for goal in GOALS]
    rows += [
        [what, goal, f"[{section}](#{section.lower().replace(' ', '-')})", "see there", ""]
        for what, goal, section in ELSEWHERE
    ]
    return markdown(["what", "goal", "measured", "verdict", "what limits it"], rows)


def machine(results: Results) -> str:
    """Say when and where the figures came about."""
    of = results["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in of["packages"].items())
    return (
        f"{results['date']}: {of['cpu']}, {of['cpus']} CPUs, load before {of['load before']}; "
        f"Linux {of['kernel']}, {of['libc']}; Python {of['python']}; {packages}."
    )


def conditions(results: Results) -> str:
    """Say where and how the figures of the study came about."""
    said = (
        f"{machine(results)} {results['processes']} processes per case, at most 3 of what repeats"
        f" well; {results['rounds']} rounds or more in each; seed {results['seed']}; "
        f"{results['minutes']} minutes."
    )
    return "\n\n".join([said, *(f"Later, {part}" for part in results.get("later", {}).values())])


def memory(results: Results) -> str:
    """Return the table of bytes per live ID."""
    rows = []
    for name in results["cases"].get("memory 1000000", {}).get("contestants", {}):
        found = [figure(results, "memory 1000000", name, key) for key in ("dense", "churned")]
        rows.append((found[1].middle if found[1] else 0, [name, *map(str, found)]))
    rows.sort()
    return markdown(["bytes per live ID, 1 M live", "dense", "churned"], [row for _, row in rows])


def filling(results: Results) -> str:
    """Return how full a pool gets for each width."""
    found = results["cases"].get("filling 16384", {}).get("contestants", {})
    names = sorted(found, key=lambda name: -int(name.split()[1]))
    row = [f"{Figure.of(found[name]['percent'])} %" for name in names]
    return markdown(["width", *(name.split()[1] for name in names)], [["held at most", *row]])


def everything(results: Results) -> str:
    """Return a table for each case."""
    parts = ["# All results of `make bench`", conditions(results)]
    parts.append("Median over the processes (lowest … highest). Made by bench/report.py.")
    for name, case in sorted(results["cases"].items(), key=lambda item: _natural(item[0])):
        keys = sorted({key for values in case["contestants"].values() for key in values})
        words = {"ns": case["unit"], "ratio": f"ratio to {case.get('reference')}"}
        rows = [
            [contestant, *(str(figure(results, name, contestant, key) or "–") for key in keys)]
            for contestant in sorted(case["contestants"])
        ]
        parts += [
            f"## {name}",
            markdown(["contestant", *(words.get(key, key) for key in keys)], rows),
        ]
    return "\n\n".join(parts) + "\n"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdigit() else (0, word) for word in name.split()]


def refresh(page: Path, parts: dict[str, str]) -> None:
    """Replace what stands between the markers of a page."""
    text = page.read_text()
    for name, part in parts.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"error: {page} has no {begin} … {end}")
        block = f"{begin}\n\n{part}\n\n{end}"
        text = pattern.sub(lambda _, block=block: block, text)
    page.write_text(text)


def compact(results: Results) -> str:
    """Write JSON with one line for each contestant of a case."""
    text = json.dumps(results, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def write(folder: Path) -> None:
    """Make tables and pictures from results.json; fill the pages in if these are its results."""
    import choose
    import pictures
    import summary

    results = json.loads((folder / "results.json").read_text())
    pages = {
        PAGE: (goals, conditions, choose.allocator),
        CHOICE: (memory, filling, *choose.PARTS),
    }
    (folder / "table.md").write_text(everything(results))
    pictures.draw(results, folder)
    pictures.draw_peers(choose.costs(results), folder / "peers.svg")
    for page, every in pages.items():
        parts = {part.__name__: part(results) for part in every}
        if folder.resolve() == DOCS.resolve():
            refresh(page, parts)
        print("\n\n".join(parts.values()))
    if folder.resolve() == DOCS.resolve():
        summary.write()


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
