"""The first lines of docs/performance.md: the costs that matter to a user, from the raw results."""

from __future__ import annotations

import json
from statistics import median

from client_report import (
    CACHED,
    EMPTY,
    RANDBITS,
    REQUEST,
    ROUND_TRIPS,
    SEQUENCE,
    beyond,
    counted,
    groups,
    of_randbits,
    ratios,
)
from report import DOCS, GOALS, MAIN, PAGE, Results, figure, markdown, number, refresh


def summary(client: Results, study: Results) -> str:
    """Return the table of costs.

    Args:
        client: the results of `make bench-client`.
        study: those of `make bench`.
    """
    cases, ids = groups(client), client["ids"]
    pair = _middle(study, "pair", MAIN, "ns")
    peers = [
        _middle(study, "pair", peer, "ratio") / _middle(study, "pair", MAIN, "ratio")
        for peer in ("list + set", "full Python")
    ]
    dense, churned = (_middle(study, "memory 1000000", MAIN, key) for key in ("dense", "churned"))
    trips = zip(ids[ROUND_TRIPS]["time"], ids[EMPTY]["time"], strict=True)
    rows = [
        [f"**{what}**, next to plain tritonclient", _costs(cases[case][1])]
        for what, case in (
            ("A request of a running sequence", f"gRPC, {REQUEST}"),
            ("A whole sequence of 2 requests, with its ID", f"gRPC, {SEQUENCE}"),
        )
    ]
    rows += [
        [
            "**An ID** from the client's cache, without a round trip",
            f"{number(median(ids[CACHED]['cpu']))} µs of CPU,"
            f" {number(median(of_randbits(client, CACHED)))} × {RANDBITS}",
        ],
        [
            "**A request to the manager**, which most IDs do not need",
            f"{number(median(a / b for a, b in trips))} × the time of one to a model that does"
            " nothing",
        ],
        [
            "**The allocator alone**, acquire + release",
            f"{pair:.0f} ns: {peers[0]:.1f} × as fast as a list and a set,"
            f" {peers[1]:.1f} × as fast as plain Python with the same checks;"
            f" {dense:.1f} to {churned:.1f} bytes per held ID",
        ],
    ]
    count = counted(client)
    met = sum(goal.row(study)[3].startswith("met") for goal in GOALS)
    return (
        f"{markdown(['what', 'cost'], rows, '---')}\n\n"
        "The first two rows are gRPC with one thread. CPU is the CPU time of the client's process."
        f" Goals met: {count['met']} of {sum(count.values())} of [the client](#the-client), with"
        f" {count['unclear']} too close to tell, and {met} of {len(GOALS)} of"
        " [the allocator](#goals)."
    )


def _costs(row: Results) -> str:
    time, cpu = (median(ratios(row, kind)) for kind in ("time", "cpu"))
    return f"{number(time)} × the time, {number(cpu)} × the CPU ({median(beyond(row)):+.0f} µs)"


def _middle(study: Results, case: str, contestant: str, key: str) -> float:
    found = figure(study, case, contestant, key)
    assert found is not None, f"{case} of {contestant} was not measured"
    return found.middle


def write() -> None:
    """Refresh the page from the results beside it."""
    client, study = (
        json.loads((DOCS / f"{name}.json").read_text()) for name in ("client", "results")
    )
    refresh(PAGE, {"summary": summary(client, study)})


if __name__ == "__main__":
    write()
