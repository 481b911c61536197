"""The page says what the raw results say, and changes with them."""

from __future__ import annotations

import copy
import json
from typing import Any

import choose
import client_report
import measure
import pytest
import report
import study as make_bench
import summary


def raw(name: str) -> dict[str, Any]:
    """Return the raw results in the documentation."""
    results: dict[str, Any] = json.loads((report.DOCS / f"{name}.json").read_text())
    return results


def test_the_page_is_as_fresh_as_the_results() -> None:
    """Every generated block stands in its page as the results in the same folder make it."""
    client, study = raw("client"), raw("results")
    parts = [part(client) for part in client_report.PARTS]
    parts += [part(study) for part in (report.goals, report.conditions, choose.allocator)]
    parts += [part(study) for part in (report.memory, report.filling, *choose.PARTS)]
    page = report.PAGE.read_text() + report.CHOICE.read_text()
    for part in (summary.summary(client, study), *parts):
        assert f"\n\n{part}\n\n<!-- end: " in page
    assert (report.DOCS / "client.md").read_text() == client_report.everything(client)


def test_a_slower_client_shows_in_the_summary_and_the_verdicts() -> None:
    """The figures are computed, not written by hand."""
    client, study = raw("client"), raw("results")
    slow = copy.deepcopy(client)
    for row in slow["rows"]:
        for kind in ("time", "cpu"):
            row["ours"][kind] = [9 * value for value in row["plain"][kind]]
    lines = summary.summary(slow, study).splitlines()
    assert "9.00 × the time, 9.00 × the CPU" in lines[2]
    assert f"Goals met: 0 of {2 * len(client['rows'])} of " in lines[-1]
    assert client_report.client_ratios(slow).count("**9.00**") == 2 * len(client["rows"])


def test_each_missed_goal_says_what_limits_it() -> None:
    """Also one that is met today, and the link leads to a section of the page."""
    study = raw("results")
    for case in study["cases"].values():
        for goal in report.GOALS:
            for key, values in case["contestants"].get(goal.contestant, {}).items():
                if key == goal.key:
                    bad = 1e-9 if goal.at_most == goal.inverted else 1e9
                    case["contestants"][goal.contestant][key] = [bad] * len(values)
    study["instructions"] = 1e9
    rows = [goal.row(study) for goal in report.GOALS]
    assert sum("missed" in row[3] for row in rows) > len(rows) / 2
    assert all(goal.why for goal in report.GOALS)
    assert all(row[4].endswith("(#what-limits-each-goal))") for row in rows if "missed" in row[3])
    assert "\n### What limits each goal\n" in report.PAGE.read_text()


def test_cases_that_are_measured_again_replace_only_themselves() -> None:
    """And the page says when and where that was."""
    before, again = raw("results"), raw("results")
    again |= {"cases": {"pair": {"contestants": {}}}, "date": "2000-01-01"}
    both = make_bench.add(before, again, "pair")
    assert both["cases"] == before["cases"] | again["cases"]
    assert both["date"] == before["date"]
    assert "`pair`: 2000-01-01" in report.conditions(both)


def test_all_that_users_write_has_words() -> None:
    """The table has a row for everything that is measured, and no other."""
    assert set(choose.IDIOMS) == {*measure.IDIOMS, *measure.LOOPS}


@pytest.mark.parametrize(
    ("values", "word"),
    [([1.0] * 20, "met"), ([1.2] * 20, "missed"), ([1.0, 1.2] * 10, "unclear")],
)
def test_a_verdict_needs_more_than_the_noise(values: list[float], word: str) -> None:
    """If the limit is within the confidence interval of the median, nothing is claimed."""
    assert client_report.verdict(values, 1.1) == word


def test_json_is_compact_and_whole() -> None:
    """The layout of the file changes no value."""
    client = raw("client")
    text = client_report.compact(client)
    assert json.loads(text) == client
    assert len(text.splitlines()) > len(client["rows"])
