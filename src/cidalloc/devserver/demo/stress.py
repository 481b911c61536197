"""Runs many client processes, each with the demo's two sequences, and looks for shared IDs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.synchronize import Barrier

from ...client import Client, Sequence
from .processes import run_at_once
from .sequences import run_two_sequences

__all__ = ["Hold", "Outcome", "overlapping", "stress"]

_START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Hold:
    """An ID and the time, in nanoseconds since boot, during which a client certainly held it."""

    cid: int
    since: int
    until: int


@dataclass(slots=True)
class Outcome:
    """The result of a run."""

    holds: list[Hold] = field(default_factory=list)
    wrong_sums: int = 0
    failures: list[str] = field(default_factory=list)
    still_held: int = 0

    @property
    def shared(self) -> set[int]:
        """The IDs that two sequences held at the same time."""
        return overlapping(self.holds)

    @property
    def good(self) -> bool:
        """Whether the run has no failure, wrong sum, shared ID or held ID."""
        return not (self.wrong_sums or self.failures or self.still_held or self.shared)


def overlapping(holds: list[Hold]) -> set[int]:
    """Return the IDs with two holds that overlap in time."""
    by_cid = defaultdict(list)
    for hold in holds:
        by_cid[hold.cid].append((hold.since, hold.until))
    found = set()
    for cid, times in by_cid.items():
        times.sort()
        if any(later[0] < earlier[1] for earlier, later in pairwise(times)):
            found.add(cid)
    return found


def stress(url: str, clients: int, progress: Callable[[int], None] = lambda done: None) -> Outcome:
    """Run ``clients`` processes in parallel against the gRPC ``url`` and return the result.

    ``progress`` is called after each client with the number of finished clients.
    """
    outcome = Outcome()
    with Client(url) as client:
        held_before = client.active()
        for report in run_at_once(_client, [(url,)] * clients, progress=progress):
            if report.failure is not None:
                outcome.failures.append(report.failure)
                continue
            holds, wrong = report.value
            outcome.holds += holds
            outcome.wrong_sums += wrong
        outcome.still_held = client.active() - held_before
    return outcome


def _client(barrier: Barrier, url: str) -> tuple[list[Hold], int]:
    holds: list[Hold] = []

    @contextmanager
    def watch(sequence: Sequence) -> Iterator[None]:
        since = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        try:
            yield
        finally:
            until = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            holds.append(Hold(sequence.cid, since, until))

    with Client(url) as client:
        client.active()  # connect now
        barrier.wait(_START_TIMEOUT_S)
        wrong = run_two_sequences(client, watch=watch)
    return holds, wrong
