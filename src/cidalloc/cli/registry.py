"""The commands ``cidalloc registry``: show, check or enlarge a manager's file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ..errors import RegistryCorrupt
from ..manager.inspection import look, status_of
from ..manager.registry import Registry
from ..manager.service import boottime_ms
from ..manager.storage.file import enlarge
from ..manager.storage.file_lock import process_id, writer_of
from ..manager.takeover import boot_id
from .screen import progress_line

__all__ = ["registry"]

_FILE = click.argument("file", type=click.Path(path_type=Path))


@click.group()
def registry() -> None:
    """Show, check or enlarge the file in which a manager stores held IDs."""


@registry.command()
@_FILE
@click.option("--json", "as_json", is_flag=True, help="Print the content as JSON.")
def show(file: Path, as_json: bool) -> None:
    """Print the content of FILE. The file is only read; the manager may be running."""
    found, status = _look(file)
    pid, running = _writer(file)
    status["writer"] = pid if running else None
    status["draining"] = status["draining"] and running
    if as_json:
        click.echo(json.dumps(status))
        return
    console = Console(highlight=False)
    pool = status["pool"]
    last = pool["first"] + pool["capacity"] - 1
    rows = (
        ("registry", status["registry"]),
        ("file", f"{file}, {file.stat().st_blocks / 2**11:,.1f} MiB on the disk"),
        ("writer", f"process {pid}" if running else "none"),
        ("pool", f"{pool['first']} to {last}, {pool['capacity']:,} IDs"),
        ("held", f"{status['held']:,}, {status['anonymous']:,} of them without a session"),
        ("in use", f"{status['used']:,}, as clients said with their last heartbeat"),
        ("cooling", f"{status['cooling']:,}"),
        ("ever opened", f"{status['high_water']:,}"),
        ("sessions", f"{status['sessions_total']:,}"),
        *([("draining", "the manager issues no more IDs")] if status["draining"] else []),
    )
    for name, value in rows:
        console.print(f"{name:<12} {value}", soft_wrap=True)
    told = ""
    if status["restored"]:
        told = "This is or was a copy: it is another registry than the original"
    elif found.store.found_boot != boot_id():
        told = "The machine has restarted since the last write"
    if told:
        console.print(f"[dim]{told}, see docs/operations.md[/dim]")
    sessions = status["sessions"]
    if sessions:
        table = Table("session", box=None, pad_edge=False)
        for name in ("in use", "held", "age"):
            table.add_column(name, justify="right")
        for each in sessions:
            used = "-" if each["used"] is None else f"{each['used']:,}"
            row = (used, f"{each['held']:,}", f"{each['age_s']:,.0f} s")
            table.add_row(each["label"] or "–", *row)
        console.print()
        console.print(table)
        if status["sessions_total"] > len(sessions):
            console.print(f"… and {status['sessions_total'] - len(sessions):,} more")


@registry.command()
@_FILE
def check(file: Path) -> None:
    """Check whether FILE is damaged. The file is only read; the manager may be running."""
    began, show = time.monotonic(), progress_line()
    show(f"Reading {file}")
    try:
        found, status = _look(file)
        show(f"Checking {status['high_water']:,} IDs and {status['sessions_total']:,} sessions")
        found._check()
    except AssertionError as error:
        raise RegistryCorrupt(f"{file} is damaged: {error}") from None
    finally:
        show("")
    click.echo(
        f"{file} is sound: {status['held']:,} held, {status['cooling']:,} cooling,"
        f" {status['sessions_total']:,} sessions ({time.monotonic() - began:.2f} s)"
    )


@registry.command(name="upgrade")
@_FILE
@click.option("--capacity", type=int, required=True, help="New number of IDs in the pool.")
def grow(file: Path, capacity: int) -> None:
    """Enlarge the pool in FILE. Stop the manager first.

    Held IDs stay held. The file is changed in place, in one step. Do not enlarge a slice: its
    manager would refuse the file.
    """
    shape = enlarge(file, capacity)
    click.echo(f"{file} now has a pool of {shape.capacity:,} IDs from {shape.first} on.")
    click.echo(
        f"Next: set capacity to {shape.capacity} in the model's config.pbtxt, then load the model."
    )


def _look(file: Path) -> tuple[Registry, dict[str, Any]]:
    now = boottime_ms()
    found = look(file, now, boot_id())
    return found, status_of(found, now)


def _writer(file: Path) -> tuple[int, bool]:
    """Return the process that last wrote a file, and whether it is running."""
    pid, _ = writer_of(file)
    return pid, pid != 0 and process_id(pid) != 0
