"""The command ``top``: show a manager's status, live."""

from __future__ import annotations

import contextlib
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ..errors import CidError, Unavailable
from .ask import Manager, with_manager
from .screen import rates_between, status_view

__all__ = ["View", "top"]

_AROUND = 15  # lines of the screen around the sessions


@click.command(epilog="Example: cidalloc top localhost:8001")
@with_manager
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    help="Seconds between two updates.",
)
def top(manager: Manager, interval: float) -> None:
    """Watch the manager at URL: IDs held, clients, and rates.

    Press q or Ctrl-C to quit. While the manager does not answer, the last status stays on the
    screen. If the output is not a terminal, or TERM is dumb, the status is printed once.

    URL is host:port, or starts with grpc://, grpcs://, http:// or https://. If it is left out, the
    environment variable CIDALLOC_URL is used.
    """
    console = Console(highlight=False)
    view = View(manager)
    shown = view.look(console.height)
    if view.error:
        raise view.error
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        console.print(shown)
        return
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as pressed,
        Live(shown, console=console, screen=True, auto_refresh=False) as live,
    ):
        while pressed(interval) not in ("q", "Q", "\x1b"):
            live.update(view.look(console.height), refresh=True)


class View:
    """The last status of a manager, and the one before to compute rates."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._status: dict[str, Any] | None = None
        self._body: RenderableType = Text()
        self.error: CidError | None = None

    def look(self, height: int) -> RenderableType:
        """Request the status once, and return a view of it for so many lines."""
        try:
            status = self._manager.status()
        except CidError as error:
            self.error = error
        else:
            self.error = None
            rates = rates_between(self._status, status)
            self._status = status
            self._body = status_view(status, rates, max(height - _AROUND, 1))
        head = Text(f"{self._manager.model} at {self._manager.url}", style="bold")
        head.append(time.strftime("  %H:%M:%S"), style="dim")
        head.append("  q quits", style="dim")
        if self.error is not None:
            kind = "no answer" if isinstance(self.error, Unavailable) else self.error.code.name
            head.append(f"  {kind}: this is the last status", style="bold red")
        return Group(head, Text(), self._body)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that waits so many seconds for a key, and returns it or an empty text."""
    if not sys.stdin.isatty():

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([fd], [], [], seconds)
        return sys.stdin.read(1) if ready else ""

    try:
        tty.setcbreak(fd)
        yield pressed
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
