"""Tables in the documentation that a command writes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TESTING = ROOT / "docs" / "testing.md"
"""The page about testing."""


def markdown(rows: Iterable[Iterable[object]]) -> list[str]:
    """Return the lines of a table, whose first row is its head."""
    head, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [head, "|" + "---|" * (head.count(" | ") + 1), *body]


def fill(page: Path, name: str, lines: Iterable[str]) -> None:
    """Write lines between the marks of a page that have this name."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    text, found = "\n".join([begin, "", *lines, "", end]), page.read_text()
    new, count = re.subn(f"{begin}.*{end}", lambda _: text, found, flags=re.S)
    assert count == 1, f"{page} has no mark {begin}"
    page.write_text(new)
