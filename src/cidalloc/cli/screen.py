"""What commands show: a manager's status, and one line of progress."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["Rates", "duration", "progress_line", "rates_between", "status_view"]

Rates = Mapping[str, float]
"""Per second: acquired, released, requests, errors."""


def duration(seconds: float) -> str:
    """Format a time: ``4.2 s``, ``3 min 05 s``, ``2 h 10 min``, ``5 d 3 h``."""
    if seconds < 60:
        return f"{max(seconds, 0.0):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def rates_between(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> Rates | None:
    """Return the rates between two statuses; None if the manager restarted in between."""
    if before is None or before.get("registry") != now.get("registry"):
        return None
    took = now["uptime_s"] - before["uptime_s"]
    if took <= 0:
        return None
    return {name: (count - _counts(before)[name]) / took for name, count in _counts(now).items()}


def _counts(status: Mapping[str, Any]) -> dict[str, int]:
    return {
        "acquired": status["acquired"],
        "released": sum(status["released"].values()),
        "requests": sum(status["operations"].values()),
        "errors": sum(status["errors"].values()),
    }


def status_view(status: Mapping[str, Any], most: int | None = None) -> RenderableType:
    """Return a view of the whole status.

    Args:
        status: the answer to STATUS.
        most: number of sessions to show, open and expired ones together; None shows all. Sessions
            with the most IDs in use come first, and then the last ones that expired.
    """
    parts: list[RenderableType] = [_facts(status)]
    expired = [each for each in status.get("expired", ()) if each["used"]]
    if most is not None:
        expired = expired[: most // 3]
        most = max(most - len(expired) - 2 * bool(expired), 0)
    sessions = status["sessions"][:most]
    if sessions:
        parts += [Text(), _sessions(sessions)]
        hidden = status["sessions_total"] - len(sessions)
        if hidden > 0:
            parts.append(Text(f"… and {hidden:,} more", style="dim"))
    if expired:
        parts += [Text(), _expired(expired)]
    return Group(*parts)


def _facts(status: Mapping[str, Any]) -> Table:
    pool = status["pool"]
    capacity, held, cooling = pool["capacity"], status["held"], status["cooling"]
    last = pool["first"] + capacity - 1
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()

    def row(name: str, text: str) -> None:
        table.add_row(name, Text(text))

    part = f", the slice {status['slice']}" if status.get("slice") else ""
    row("pool", f"{pool['first']} to {last}, {capacity:,} IDs{part}")
    anonymous = status["anonymous"]
    more = f"; {anonymous:,} of them without a session" if anonymous else ""
    if status.get("draining"):  # earlier managers cannot
        row("draining", "the manager issues no more IDs; 'cidalloc drain --undo FILE' ends this")
    if waits_s := status.get("issues_in_s"):
        row("new", f"the manager issues its first ID in {duration(waits_s)}")
    row("held", f"{held:,}, including the ID caches of clients{more}")
    if "used" in status:  # earlier managers do not count them
        silent = status["sessions_silent"]
        more = f"; sessions that have not said it: {silent:,}" if silent else ""
        row("in use", f"{status['used']:,}, as clients said with their last heartbeat{more}")
    row("cooling", f"{cooling:,}")
    row("free", f"{status['free']:,} ({status['free'] / capacity:.1%})")
    row("peak", f"{status['peak']:,} held at the same time")
    waiting = status.get("waiting", 0)  # earlier managers do not count them
    more = f"; {waiting:,} wait for IDs" if waiting else ""
    expired, in_use = status["sessions_expired"], status.get("sessions_expired_in_use", 0)
    more = (f", {in_use:,} of them with IDs in use" if in_use else "") + more
    if dead := status.get("dead", 0):
        more += f"; 'cidalloc tidy' gets {dead:,} of their IDs"
    row("sessions", f"{status['sessions_total']:,} open, {expired:,} expired{more}")
    errors = ", ".join(f"{count:,} {name}" for name, count in sorted(status["errors"].items()))
    row("errors", errors or "none")
    row("up for", f"{duration(status['uptime_s'])}, version {status['version']}")
    if "host" in status:
        row("host", status["host"])
    row("file", status["file"] or "none: a restart forgets all IDs")
    return table


def _sessions(sessions: list[Mapping[str, Any]]) -> Table:
    table = _table("session", "in use", "held", "age", "expires in")
    for each in sessions:
        late = each["expires_in_s"] < 10
        table.add_row(
            # A label comes from a client: do not interpret markup in it.
            Text(each["label"] or "–"),
            _number(each.get("used")),
            f"{each['held']:,}",
            duration(each["age_s"]),
            Text(duration(each["expires_in_s"]), style="yellow" if late else ""),
        )
    return table


def _expired(sessions: list[Mapping[str, Any]]) -> Table:
    table = _table("expired with IDs in use", "in use", "held", "ago")
    for each in sessions:
        row = (_number(each["used"]), f"{each['held']:,}", duration(each["ago_s"]))
        table.add_row(Text(each["label"] or "–"), *row)
    return table


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="ellipsis", no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(count: int | None) -> str:
    """Return an unknown number as a dash."""
    return "-" if count is None else f"{count:,}"


def progress_line() -> Callable[[str], None]:
    """Return a function that shows a line on a terminal in place of the one before."""
    if not sys.stderr.isatty():
        return lambda line: None

    def show(line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        click.echo(f"\r{line[:width]:<{width}}\r", nl=False, err=True)

    return show
