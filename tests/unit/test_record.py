"""The track record: its table in the documentation is that of its rows, and a row can fail."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import record
from pages import ROOT, TESTING, fill

ROWS = record.load()


def test_the_table_is_that_of_the_rows(tmp_path: Path) -> None:
    """`make record ARGS=--table` writes it."""
    copy = tmp_path / "page.md"
    copy.write_text(TESTING.read_text())
    fill(copy, "record", record.table(ROWS.values()))
    assert copy.read_text() == TESTING.read_text()


def test_the_promises_are_those_of_the_design() -> None:
    promises = re.findall(r"^- \*\*(.+)\.\*\*", (ROOT / "docs" / "design.md").read_text(), re.M)
    others = {row.broke for row in ROWS.values()} - set(promises)
    assert all(re.fullmatch(r"\[.+\]\(.+\)", each) for each in others), others


FAILS, PASSES = (1, "E   it is 3\n1 failed in 1s"), (0, "1 passed in 1s")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (FAILS, PASSES, ""),
        ((1, "E   it is 3\n1 failed, 1 error in 1s"), PASSES, ""),
        (PASSES, PASSES, "without the mend the test does not fail:"),
        ((1, "E   it is 3\n1 failed, 1 passed in 1s"), PASSES, "the test does not fail:"),
        ((2, "E   ImportError: it is 3\n1 error in 1s"), PASSES, "the test does not fail:"),
        ((1, "E   ImportError\n1 failed in 1s"), PASSES, "the test does not fail with 'it is 3':"),
        (FAILS, FAILS, "with the mend the test does not pass:"),
        (FAILS, (0, "1 skipped in 1s"), "with the mend the test does not pass:"),
    ],
)
def test_what_counts_as_shown(before: tuple[int, str], after: tuple[int, str], words: str) -> None:
    row = replace(next(iter(ROWS.values())), fails="it is 3")
    found = record.wrong(row, before, after)
    assert words in found and bool(words) == bool(found)


@pytest.mark.parametrize("is_clone", [False, True])
def test_without_the_history(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_clone: bool,
) -> None:
    if is_clone:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["record.py", *list(ROWS)[:1]])
    assert record.main() == 1
    assert "`git fetch --unshallow`" in capsys.readouterr().err
