"""Rare states that the simulation has to reach: where one is reached, a hook calls `sometimes`.

A run that never reached one of `STATES` shows less than it says, so it fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from pages import fill, markdown

STATES = {
    "takeover under load": "another process of the manager takes the file over while IDs are in"
    " use and requests are on their way",
    "two processes wait for the file": "the manager's model is reloaded again during a takeover",
    "power cut with a full ID cache": "some client's cache has no room when the manager's machine"
    " loses power",
    "HELD after a lost answer": "HELD tells a client what an unanswered NEW or DELETE did",
    "expiry in the middle of a release": "a session expires while its DELETE is on its way",
    "two changes at once": "a change of a session arrives while another one of it is on its way",
    "drain with a session in doubt": "a drain begins while the result of a change is not known to"
    " its client",
    "no room for the dead": "the list of dead IDs is full, so some are never named to a client",
    "the disk refuses to grow": "the manager needs room on its disk, which is full",
    "a client without answers": "no answer reaches a client, for ever",
    "half is refused": "the manager refuses half of the requests, for ever",
    "a crowd for few IDs": "a client gets one of few IDs while other clients wait for one",
    "the dead in the calm": "a client is killed after the faults, and leaves state in the model",
    "moved before START": "a sequence goes to another one of several servers, since the first did"
    " not begin it",
}
"""The states, and what each one is. The last is one of several servers."""

reached: Counter[str] = Counter()
"""How many times each was reached since it was cleared."""


def sometimes(name: str, when: object = True) -> None:
    """Count a state, if it is reached."""
    assert name in STATES, name
    if when:
        reached[name] += 1


def missing(found: Counter[str], states: Iterable[str] = STATES) -> list[str]:
    """Return what was never reached."""
    return [f"S: never reached: {name}" for name in states if not found[name]]


def write_table(file: Path, found: Counter[str], runs: int, others: Mapping[str, int]) -> None:
    """Write between the marks of a page in how many runs each state was reached.

    Args:
        file: the page.
        found: in how many runs each state was reached.
        runs: how many runs there were.
        others: how many there were for some of the states.
    """
    rows = [["state", "reached in", "per 1,000 seeds"]]
    for name, what in STATES.items():
        of = others.get(name, runs)
        share = f"{1000 * found[name] / of:.0f}"
        rows.append([f"**{name}**: {what}", f"{found[name]} of {of}", share])
    fill(file, "rare states", markdown(rows))
