"""Turns the results of `make bench-client` into tables and a picture in docs/performance.md.

Run it alone to draw anew: python bench/client_report.py [folder with client.json]
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from report import DOCS, PAGE, Figure, Results, machine, markdown, number, refresh

GOALS = {"time": 1.03, "cpu": 1.10}
"""The limits of this client's time and CPU time, divided by plain tritonclient's."""
FLEET = 1.03
"""The limit of the CPU time of a `Fleet` of one server, divided by that of a `Client` of it."""
SEQUENCE_US = 25
"""The limit of the CPU time of a sequence of two, less plain tritonclient's."""

REQUEST, SEQUENCE = "a request", "a sequence of 2"
"""What the clients are compared by."""

CACHED = "`Client.acquire` + `release`, from the client's cache"
RANDBITS = "`secrets.randbits(63)`"
UUID = "`uuid.uuid4()`"
UNUSED = "a sequence that is opened and closed, not used"
ROUND_TRIPS = "NEW + DELETE, two round trips to the manager"
EMPTY = "two round trips to a model that does nothing"

Row = dict[str, Any]


def spread(values: Iterable[float]) -> Figure:
    """Condense rounds into their median, and the 10th and the 90th percentile."""
    values = list(values)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Figure(statistics.median(values), tenths[0], tenths[-1])


def pairs(row: Row, kind: str) -> list[tuple[float, float]]:
    """Return this client's and plain tritonclient's microseconds, round by round."""
    return list(zip(row["ours"][kind], row["plain"][kind], strict=True))


def ratios(row: Row, kind: str) -> list[float]:
    """Return this client's microseconds divided by plain tritonclient's, round by round."""
    return [ours / plain for ours, plain in pairs(row, kind)]


def beyond(row: Row) -> list[float]:
    """Return the microseconds of CPU time of this client beyond plain tritonclient's."""
    return [ours - plain for ours, plain in pairs(row, "cpu")]


def verdict(values: list[float], limit: float) -> str:
    """Say whether the median meets a limit, or whether its 95 % interval contains the limit."""
    ordered, skipped = sorted(values), int(len(values) / 2 - 0.98 * math.sqrt(len(values)))
    low, high = ordered[max(skipped, 0)], ordered[min(-1 - skipped, -1)]
    if high <= limit:
        return "met"
    return "missed" if low > limit else "unclear"


def marked(values: list[float], limit: float) -> str:
    """Write a median, bold if it misses its limit, with ≈ if the noise hides that."""
    text = number(statistics.median(values))
    return {"met": text, "missed": f"**{text}**", "unclear": f"≈ {text}"}[verdict(values, limit)]


def name(row: Row) -> str:
    """Name the case of a row, without the number of its workers."""
    return f"{row['transport']}, {row['unit']}{', 5 s cooldown' if row['cooldown'] else ''}"


def groups(results: Results) -> dict[str, dict[int, Row]]:
    """Return the rows by name and number of workers."""
    found: dict[str, dict[int, Row]] = {}
    for row in results["rows"]:
        found.setdefault(name(row), {})[row["workers"]] = row
    return found


def client_ratios(results: Results) -> str:
    """Return the table of ratios to plain tritonclient."""
    head = ["this client / plain tritonclient"]
    head += [f"{kind}, {workers}" for kind in ("time", "CPU") for workers in (1, 8, 64)]
    rows = [
        [what, *(marked(ratios(row, kind), GOALS[kind]) for kind in GOALS for row in by.values())]
        for what, by in groups(results).items()
    ]
    return markdown(head, rows)


def counted(results: Results) -> dict[str, int]:
    """Count the ratios that meet, miss, or may meet their goals."""
    found = [
        verdict(ratios(row, kind), limit)
        for row in results["rows"]
        for kind, limit in GOALS.items()
    ]
    return {word: found.count(word) for word in ("met", "unclear", "missed")}


def client_verdict(results: Results) -> str:
    """Say how many ratios meet their goals."""
    count = counted(results)
    return (
        f"Of {sum(count.values())} ratios {count['met']} meet the goal, {count['missed']} miss it,"
        f" and for {count['unclear']} the noise is larger than the difference."
    )


def client_sequences(results: Results) -> str:
    """Return the table of the CPU time of a sequence beyond plain tritonclient's."""
    head = ["a sequence of 2 requests, one thread or task", "plain", "beyond it", "goal"]
    rows = []
    for row in results["rows"]:
        if row["workers"] == 1 and row["unit"] == SEQUENCE:
            plain = number(statistics.median(row["plain"]["cpu"]))
            more = beyond(row)
            verdict_ = verdict(more, SEQUENCE_US).replace("missed", "**missed**")
            rows.append([name(row), f"{plain} µs", f"{spread(more)} µs", verdict_])
    return markdown(head, rows)


def of_randbits(results: Results, way: str) -> list[float]:
    """Return the CPU time of an ID, divided by that of a random number, round by round."""
    base = results["ids"][RANDBITS]["cpu"]
    return [a / b for a, b in zip(results["ids"][way]["cpu"], base, strict=True)]


def client_ids(results: Results) -> str:
    """Return the table of ways to get an ID."""
    rows = []
    for way, found in results["ids"].items():
        times = [f"{number(statistics.median(found[kind]))} µs" for kind in ("cpu", "time")]
        ratio = spread(of_randbits(results, way))
        missed = way == CACHED and verdict(of_randbits(results, way), 1) == "missed"
        rows.append([way, *times, f"**{ratio}**" if missed else str(ratio)])
    return markdown(["an ID by", "CPU", "clock", f"CPU / {RANDBITS}"], rows)


def client_fleet(results: Results) -> str:
    """Say what a fleet costs."""
    costs = {name: found["cpu"] for name, found in results["fleet"].items()}
    both = list(zip(costs["Fleet"], costs["Client"], strict=True))
    found = [ours / client for ours, client in both]
    more = number(statistics.median(ours - client for ours, client in both))
    return (
        f"A sequence of 2 requests with a `Fleet` of one server takes {spread(found)} × the CPU of"
        f" one with a `Client` of it, {more} µs more. The goal of {FLEET} is"
        f" {verdict(found, FLEET)}."
    )


def client_conditions(results: Results) -> str:
    """Say where and how the figures came about."""
    rounds = [len(row["ours"]["cpu"]) for row in results["rows"]]
    crashes = results["crashes"]
    return (
        f"{machine(results)} {min(rounds)} to {max(rounds)} rounds a row;"
        f" {results['minutes']} minutes{f'; Triton crashed {crashes} times' if crashes else ''}."
    )


def everything(results: Results) -> str:
    """Return the page with all values."""
    head = ["", "at once", "time", "CPU", "CPU µs", "plain's", "time goal", "CPU goal"]
    rows = []
    for row in results["rows"]:
        found = {kind: ratios(row, kind) for kind in GOALS}
        costs = [number(statistics.median(row[side]["cpu"])) for side in ("ours", "plain")]
        verdicts = [verdict(found[kind], limit) for kind, limit in GOALS.items()]
        both = [str(spread(found[kind])) for kind in GOALS]
        rows.append([name(row), str(row["workers"]), *both, *costs, *verdicts])
    return "\n\n".join(
        [
            "# All results of `make bench-client`",
            client_conditions(results),
            "Time and CPU: this client divided by plain tritonclient, median over the rounds"
            " (10th … 90th percentile). CPU µs: of the client's process, for a unit. Made by"
            " bench/client_report.py.",
            markdown(head, rows) + "\n",
        ]
    )


def compact(results: Results) -> str:
    """Write JSON with one line for each row and each way."""
    text = json.dumps(results, separators=(",", ":"))
    return text.replace('{"transport"', '\n{"transport"').replace(']},"', ']},\n"') + "\n"


PARTS = (
    client_verdict,
    client_ratios,
    client_sequences,
    client_fleet,
    client_ids,
    client_conditions,
)


def write(folder: Path) -> None:
    """Make tables and picture from client.json; fill the page in if these are its results."""
    import pictures
    import summary

    results = json.loads((folder / "client.json").read_text())
    (folder / "client.md").write_text(everything(results))
    found = {
        what: {
            kind: {workers: spread(ratios(row, kind)) for workers, row in by.items()}
            for kind in GOALS
        }
        for what, by in groups(results).items()
    }
    pictures.draw_ratios(found, GOALS, folder / "client.svg")
    parts = {part.__name__.replace("_", " "): part(results) for part in PARTS}
    if folder.resolve() == DOCS.resolve():
        refresh(PAGE, parts)
        summary.write()
    print("\n\n".join(parts.values()))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
