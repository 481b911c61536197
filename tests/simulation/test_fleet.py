"""A simulated fleet breaks no promise, and one with a broken promise is noticed.

CIDALLOC_FLEET says how many fleets; `make simulate` runs thousands.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fleet import FAULTS, simulate
from mutants import MUTANTS, Mutant, run

pytestmark = pytest.mark.slow

FLEETS = int(os.environ.get("CIDALLOC_FLEET", "40"))


@pytest.mark.timeout(60 + FLEETS)
def test_no_promise_is_broken() -> None:
    total = {}
    for seed in range(FLEETS):
        wrong, counts = simulate(seed)
        assert not wrong, f"seed {seed}: {wrong[:5]}"
        total = {name: total.get(name, 0) + counts[name] for name in (*total, *counts)}
    # Everything happened.
    for name in (*FAULTS, "power", "thefts", "late or twice", "held", "end", "ended", "waited"):
        assert total[name] > FLEETS / 10, name
    assert total["drain"] and total["refused"] > FLEETS
    assert total["sequences"] > 25 * FLEETS
    assert total["dead ended"] > max(total["dead stayed"], FLEETS / 2)


def test_a_seed_is_one_history(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert simulate(3, one) == simulate(3, other)
    assert one.read_text() == other.read_text()
    assert len([json.loads(line) for line in one.read_text().splitlines()]) > 1000


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.name)
def test_a_broken_promise_is_noticed(mutant: Mutant) -> None:
    found = run(mutant, 500, mutant.seed)
    rules = {line.strip()[0] for line in found.splitlines()[1:] if line.strip()}
    assert rules & set(mutant.rules), found or "nothing was noticed"
