"""A simulated fleet breaks no promise, and one with a broken promise is noticed.

CIDALLOC_FLEET says how many fleets; `make simulate` runs thousands.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from fleet import simulate
from mutants import MUTANTS, Mutant, run
from nemesis import FAULTS
from sometimes import STATES, missing, write_table

pytestmark = pytest.mark.slow

FLEETS = int(os.environ.get("CIDALLOC_FLEET", "40"))


@pytest.mark.timeout(120 + 5 * FLEETS)
def test_no_promise_is_broken() -> None:
    total = {}
    found: Counter[str] = Counter()
    for seed in range(FLEETS):
        wrong, counts, rare = simulate(seed)
        assert not wrong, f"seed {seed}: {wrong[:5]}"
        found += rare
        total = {name: total.get(name, 0) + counts[name] for name in (*total, *counts)}
    # Everything happened.
    for name in (*FAULTS, "takeover", "thefts", "late or twice", "held", "end", "ended", "waited"):
        assert total[name] > FLEETS / 10, name
    assert total["drain"] and total["power"] and total["refused"] > FLEETS
    assert total["sequences"] > 25 * FLEETS
    assert total["dead ended"] > max(total.get("dead stayed", 0), FLEETS / 2)
    # Also what is rare; test_many_servers.py looks for what needs several servers.
    if FLEETS >= 40:
        assert not missing(found, STATES.keys() - {"moved before START"})


def test_a_seed_is_one_history(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert simulate(3, one) == simulate(3, other)
    assert one.read_text() == other.read_text()
    assert len([json.loads(line) for line in one.read_text().splitlines()]) > 1000


def test_what_was_never_reached_is_told() -> None:
    assert len(missing(Counter())) == len(STATES)
    assert missing(Counter({*STATES} - {"the dead in the calm"})) == [
        "S: never reached: the dead in the calm"
    ]


def test_the_table_of_rare_states(tmp_path: Path) -> None:
    """The page has each state; a run writes between the marks and nowhere else."""
    page = Path(__file__).parents[2] / "docs" / "testing.md"
    assert all(f"| **{name}**: " in page.read_text() for name in STATES)
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    write_table(copy, Counter(dict.fromkeys(STATES, 3)), 12, {"moved before START": 4})
    table = [line for line in copy.read_text().splitlines() if line.startswith("| **")]
    assert [line.split("|")[2:4] for line in table[-2:]] == [
        [" 3 of 12 ", " 250 "],
        [" 3 of 4 ", " 750 "],
    ]
    before, after = page.read_text().splitlines(), copy.read_text().splitlines()
    kept = [line for line in before if not line.startswith("| **")]
    assert kept == [line for line in after if not line.startswith("| **")]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.name)
def test_a_broken_promise_is_noticed(mutant: Mutant) -> None:
    found = run(mutant, 500, mutant.seed)
    rules = {line.strip()[0] for line in found.splitlines()[1:] if line.strip()}
    assert rules & set(mutant.rules), found or "nothing was noticed"
