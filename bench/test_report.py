"""The page says what the raw results say, and changes with them."""

from __future__ import annotations

import copy
import json
from typing import Any

import client_report
import pytest
import report
import summary


def raw(name: str) -> dict[str, Any]:
    """Return the raw results in the documentation."""
    results: dict[str, Any] = json.loads((report.DOCS / f"{name}.json").read_text())
    return results


def test_the_page_is_as_fresh_as_the_results() -> None:
    """Every generated block stands in the page as the results in the same folder make it."""
    client, study = raw("client"), raw("results")
    parts = [part(client) for part in client_report.PARTS]
    parts += [part(study) for part in (report.goals, report.memory, report.filling)]
    page = report.PAGE.read_text()
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
