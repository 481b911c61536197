"""The command ``drain``: let no new sequence begin on a server, and wait for those that run."""

from __future__ import annotations

import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from ..errors import CidError, InvalidArgument, Unavailable
from ..manager.inspection import look, status_of
from ..manager.service import boottime_ms
from ..manager.storage.drain import DrainSwitch
from ..manager.takeover import boot_id
from .screen import progress_line

__all__ = ["drain"]

_ANSWER_S = 5.0  # a manager answers within a tenth of a second, and a reload takes no longer
_LOOK_S = 0.2  # between two looks into the file
_SHARE = 5  # after a look it rests so many times as long as that took
_NAMED = 5  # sessions that are named
_TIMED_OUT = 3  # the exit status
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(context: click.Context, param: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh]?)", text)
    if not found:
        raise click.BadParameter(f"{text!r} is not a time such as 90, 150s, 10m or 1h.")
    return float(found[1]) * _UNITS[found[2]]


@click.command(epilog="Example: cidalloc drain /var/lib/cidalloc --wait 10m && kill PID_OF_TRITON")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--wait",
    metavar="TIME",
    callback=_seconds,
    help="Wait until no ID is held. If that takes longer than TIME, such as 150s or 10m, the exit"
    " status is 3, and the drain goes on.",
)
@click.option("--undo", is_flag=True, help="End the drain: new sequences may begin again.")
def drain(file: Path, wait: float | None, undo: bool) -> None:
    """Let no new sequence begin on the server whose manager has FILE.

    FILE is the manager's registry, or the folder in which it is the only one. Running sequences
    continue, with their heartbeats, until they end. Clients give back the IDs that they do not use
    with their next heartbeat. A drain holds when models are reloaded, and ends with the server.
    """
    if undo and wait is not None:
        raise click.UsageError("--undo and --wait cannot be combined.")
    path = _registry_in(file)
    switch = DrainSwitch(path)
    try:
        if undo:
            _undo(switch)
            return
        _begin(switch, path)
        click.echo("The server is draining: its manager issues no more IDs.")
        if wait is not None:
            _wait(switch, path, time.monotonic() + wait)
            click.echo("No ID is held: all sequences have ended.")
    finally:
        switch.close()


def _registry_in(file: Path) -> Path:
    """Return the file of a registry.

    Raises:
        InvalidArgument: a folder has none, or several.
    """
    if not file.is_dir():
        if not file.exists():
            raise InvalidArgument(f"there is no registry at {file}: {_WHICH}")
        return file
    found = sorted(file.glob("*.cidalloc"))
    if not found:
        raise InvalidArgument(f"there is no registry in {file}: {_WHICH}")
    if len(found) > 1:
        raise InvalidArgument(
            f"{file} has several registries, drain each: {', '.join(map(str, found))}"
        )
    return found[0]


_WHICH = (
    "'cidalloc status URL' tells the manager's file. A registry in memory cannot be drained: give"
    " it a file with 'cidalloc model -o --state FOLDER DIR'"
)


def _begin(switch: DrainSwitch, path: Path) -> None:
    """Drain, and wait for the manager's answer.

    Raises:
        Unavailable: no manager answers. Then the drain is undone.
    """
    until, ours = time.monotonic() + _ANSWER_S, False
    try:
        while not (switch.on and switch.answered):
            if time.monotonic() >= until:
                raise Unavailable(
                    f"no manager answers that has {path}, within {_ANSWER_S:g} s: it does not run,"
                    " or is of an earlier version"
                )
            # Again and again, since it may be another server from now on.
            if not switch.on:
                ours = True
                switch.set(True)
            time.sleep(_LOOK_S / 4)
    except BaseException:
        if ours:
            with suppress(CidError):  # the first error counts
                switch.set(False)
        raise


def _undo(switch: DrainSwitch) -> None:
    was, until = switch.on, time.monotonic() + _ANSWER_S
    switch.set(False)
    while switch.runs and not switch.answered:
        if time.monotonic() >= until:
            raise Unavailable(f"the manager does not answer within {_ANSWER_S:g} s")
        time.sleep(_LOOK_S / 4)
    click.echo("New sequences may begin again." if was else "There was no drain.")


def _wait(switch: DrainSwitch, path: Path, until: float) -> None:
    """Wait until no ID is held; show on a terminal how many are left.

    Ends the program with the status 3 if it takes too long.

    Raises:
        Unavailable: the drain was undone, or another server has the file.
    """
    show = progress_line()
    while True:
        began = time.monotonic()
        now = boottime_ms()
        status = status_of(look(path, now, boot_id()), now)
        if not switch.on:
            show("")
            raise Unavailable(
                f"the drain of {path} was undone, or another server has the file by now"
            )
        if not status["held"]:
            show("")
            return
        left = _left(status) + ("" if switch.runs else "; no manager has the file")
        if time.monotonic() >= until:
            show("")
            click.echo(f"error: time is over: {left}. The drain goes on.", err=True)
            sys.exit(_TIMED_OUT)
        show(left)
        ended = time.monotonic()
        time.sleep(max(min(max(_LOOK_S, _SHARE * (ended - began)), until - ended), 0.0))


def _left(status: dict[str, Any]) -> str:
    """Return how many IDs are held, and by whom."""
    sessions = [each for each in status["sessions"] if each["held"]]
    sessions.sort(key=lambda each: -each["held"])
    whose = [f"{each['label'] or 'no label'} {each['held']:,}" for each in sessions[:_NAMED]]
    if status["anonymous"]:
        whose.insert(0, f"without a session {status['anonymous']:,}")
    if len(sessions) > _NAMED or status["sessions_total"] > len(status["sessions"]):
        whose.append("and others")
    ids = "1 ID is" if status["held"] == 1 else f"{status['held']:,} IDs are"
    return f"{ids} held: {', '.join(whose)}"
