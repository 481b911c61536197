"""Draws the simulated fleets of docs/many-servers.md, and fills their table in.

Run it alone to draw anew: python bench/many_servers.py
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from pictures import draw_zones
from report import ROOT, Results, markdown, number, refresh

DOCS = ROOT / "docs"
PAGE = DOCS / "many-servers.md"


def size(run: Results) -> str:
    """Name a fleet."""
    subset = f"subset={run['subset']}" if run["subset"] else "no subset"
    return f"{run['servers']:,} servers, {run['clients']:,} clients, {subset}"


def part(run: Results, name: str) -> list[dict[str, Any]]:
    """Return the samples of a part of the story; none if it was not reached."""
    names = list(run["began"])
    if name not in names:
        return []
    last = names.index(name) + 1
    end = run["began"][names[last]] if last < len(names) else run["virtual_s"]
    return [each for each in run["samples"] if run["began"][name] < each["at"] <= end]


def mean(samples: list[dict[str, Any]], what: str) -> str:
    """Write the mean of a value, or a dash."""
    return number(statistics.mean(each[what] for each in samples)) if samples else "–"


def most(samples: list[dict[str, Any]], what: str) -> str:
    """Write the largest value, or a dash."""
    return number(max(each[what] for each in samples)) if samples else "–"


def spread(run: Results, within: str) -> str:
    """Write how long it took until the load was spread again, or a dash."""
    took = run.get("spread_s", {}).get(within)
    return f"{took:.0f} s" if took else "–"


def table(results: Results) -> str:
    """Return what was measured, with a column for each fleet."""
    runs = results["runs"]
    waits = [run["waits_s"] for run in runs]
    rows = [
        ("virtual time", [f"{run['virtual_s']:,} s" for run in runs]),
        ("CPU time", [f"{run['cpu_s']:,.0f} s" for run in runs]),
        ("sequences that ended", [f"{run['counts'].get('sequences', 0):,}" for run in runs]),
        ("requests that met the state of another", [str(len(run["wrong"])) for run in runs]),
        (
            "sequences lost with their servers",
            [
                f"{sum(n for name, n in run['counts'].items() if name.startswith('lost')):,}"
                for run in runs
            ],
        ),
        (
            "wait for a sequence: 95 %, 99.9 %, longest",
            [
                f"{a:.2f} s, {b:.1f} s, {run['longest_wait_s']} s"
                for (a, b), run in zip(waits, runs, strict=True)
            ],
        ),
        (
            "sessions of a server, in the end",
            [mean(run["samples"][-3:], "sessions") for run in runs],
        ),
        (
            "heartbeats of a server each second, in the end",
            [mean(run["samples"][-6:], "renewals") for run in runs],
        ),
        (
            "the same, most of all servers in 5 s, with OPEN and NEW",
            [most(run["samples"], "most") for run in runs],
        ),
        ("a zone's load is within 20 % again after", [spread(run, "0.2") for run in runs]),
        ("within 10 %", [spread(run, "0.1") for run in runs]),
    ]
    return markdown(["", *map(size, runs)], [[name, *values] for name, values in rows])


if __name__ == "__main__":
    found = json.loads((DOCS / "many-servers.json").read_text())
    drawn = max(
        (run for run in found["runs"] if "20 % come" in run["began"]),
        key=lambda run: run["servers"],
    )
    draw_zones(drawn, DOCS / "many-servers.svg")
    sizes = (
        f"{number(found['manager_kb'])} KB at its manager and {number(found['client_kb'])} KB in"
    )
    refresh(
        PAGE, {"fleets": table(found), "fleet memory": f"An idle session takes {sizes} its client."}
    )
