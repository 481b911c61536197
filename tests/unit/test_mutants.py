"""The table of mutants fits the source, and a few of them are run: `make mutants` runs all."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mutants import MUTANTS, PACKAGE, WRONG_CLIENTS, Mutant, table
from mutate import node_ids

ROOT = Path(__file__).parent.parent.parent
MUTATE = ROOT / "tests" / "support" / "mutate.py"


def test_the_text_of_each_is_in_the_source_once() -> None:
    for mutant in (*table(), *MUTANTS, *WRONG_CLIENTS):
        assert (PACKAGE / mutant.file).read_text().count(mutant.old) == 1, mutant
        assert mutant.old != mutant.new, mutant


def test_each_names_tests_that_exist() -> None:
    mutants = table()
    assert len({(each.file, each.old, each.new) for each in mutants}) == len(mutants)
    assert len({each.name for each in mutants}) == len(mutants)
    for mutant in mutants:
        assert mutant.tests, mutant
        for node in node_ids(mutant):
            file, *names = node.split("::")
            text = Path(file).read_text()
            for name in names:
                assert re.search(rf"\b(def|class) {name.partition('[')[0]}\b", text), node


def _rank(mutant: Mutant) -> bytes:
    return hashlib.blake2b(mutant.name.encode()).digest()


@pytest.mark.slow
def test_a_few_are_killed() -> None:
    chosen = sorted((each for each in table() if not each.is_core), key=_rank)[:4]
    done = subprocess.run(
        [sys.executable, str(MUTATE), *(f"={each.name}" for each in chosen)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "4 mutants, 0 of them not killed\n"


def test_the_page_counts_them() -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    rows = re.findall(r"^\| ([\w ]+) \| (\d+) \|$", page, re.MULTILINE)
    assert {name: int(count) for name, count in rows} == Counter(each.promise for each in table())
