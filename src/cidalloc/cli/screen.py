"""What a person sees of a manager's status: the same for one look and for the live view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["Rates", "duration", "rates_between", "status_view"]

Rates = Mapping[str, float]
"""Per second: acquired, released, requests, errors."""


def duration(seconds: float) -> str:
    """Return a time as people say it: ``4.2 s``, ``3 min 05 s``, ``2 h 10 min``, ``5 d 3 h``."""
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
    """Return what happened between two looks; None if the manager began anew between them."""
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


def status_view(
    status: Mapping[str, Any], rates: Rates | None = None, most: int | None = None
) -> RenderableType:
    """Return the whole status.

    Args:
        status: as STATUS says it.
        rates: per second, if they are known.
        most: how many sessions to show, those that expire first; all of them if it is left out.
    """
    parts: list[RenderableType] = [_facts(status, rates)]
    sessions = sorted(status["sessions"], key=lambda each: each["expires_in_s"])
    if sessions and most != 0:
        parts += [Text(), _sessions(sessions[:most])]
        hidden = status["sessions_total"] - len(sessions[:most])
        if hidden > 0:
            parts.append(Text(f"… and {hidden:,} more", style="dim"))
    return Group(*parts)


def _facts(status: Mapping[str, Any], rates: Rates | None) -> Table:
    pool = status["pool"]
    capacity, held, cooling = pool["capacity"], status["held"], status["cooling"]
    last = pool["first"] + capacity - 1
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()

    def row(name: str, text: str) -> None:
        table.add_row(name, Text(text))

    row("pool", f"{pool['first']} to {last}, {capacity:,} IDs")
    anonymous = status["anonymous"]
    more = f"; {anonymous:,} of them without a session" if anonymous else ""
    row("held", f"{held:,}, what clients keep in stock included{more}")
    row("cooling", f"{cooling:,}")
    row("free", f"{status['free']:,} ({status['free'] / capacity:.1%})")
    row("peak", f"{status['peak']:,} held at once")
    row("sessions", f"{status['sessions_total']:,} open, {status['sessions_expired']:,} expired")
    if rates is not None:
        row("a second", ", ".join(f"{rate:,.0f} {name}" for name, rate in rates.items()))
    errors = ", ".join(f"{count:,} {name}" for name, count in sorted(status["errors"].items()))
    row("errors", errors or "none")
    row("up for", f"{duration(status['uptime_s'])}, version {status['version']}")
    row("file", status["file"] or "none: a restart forgets everything")
    return table


def _sessions(sessions: list[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("session", overflow="ellipsis", no_wrap=True)
    for name in ("held", "age", "expires in"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in sessions:
        late = each["expires_in_s"] < 10
        table.add_row(
            # A label is a stranger's text: no markup in it is obeyed.
            Text(each["label"] or "–"),
            f"{each['held']:,}",
            duration(each["age_s"]),
            Text(duration(each["expires_in_s"]), style="yellow" if late else ""),
        )
    return table
