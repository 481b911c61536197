"""The command ``top``: show the status of managers, live."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import click
from rich.console import Console

from ..ask import Manager, with_managers
from .watch import Watch, ask

__all__ = ["top"]

_WEB = "127.0.0.1:8080"


@click.command(
    epilog="Examples: cidalloc top localhost:8001; cidalloc top a:8001 b:8001 --web"
    f" (opens {_WEB})",
)
@with_managers
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    help="Seconds between two updates.",
)
@click.option("--once", is_flag=True, help="Print the status once, and exit.")
@click.option(
    "--web",
    is_flag=False,
    flag_value=_WEB,
    metavar="[HOST:PORT]",
    help=f"Serve the screen to browsers.  [default: {_WEB}]",
)
def top(managers: Sequence[Manager], interval: float, once: bool, web: str | None) -> None:
    """Watch the managers at one or more URLs: IDs held, clients, and rates.

    The keys are at the bottom of the screen; q quits. While a manager does not answer, its last
    status stays on the screen, with the reason. If input or output is not a terminal, or TERM is
    dumb, the status is printed once. The exit status is then 1 if a manager did not answer.

    The web page shows what the screen shows: labels, numbers, the host name, the path of the
    registry's file, but no tokens. It has no login: everybody who reaches HOST and PORT can read
    it.

    A URL is host:port, or starts with grpc://, grpcs://, http:// or https://. If it is left out,
    the environment variable CIDALLOC_URL is used; it may contain several, separated by spaces. With
    dns: before it, such as dns:triton:8001, the servers at all addresses of the name are watched.
    """
    # A process that serves one page of --web has no terminal, but Textual's driver for the web.
    served = "TEXTUAL_DRIVER" in os.environ
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and not Console().is_dumb_terminal
    if once or not (served or web or terminal):
        _print(managers)
        return
    for module in ("textual", "textual_serve"):
        if find_spec(module) is None:
            raise click.ClickException(
                "the screen needs Textual: pip install 'cidalloc[top]' (--once works without it)"
            )
    if web and not served:
        from .web import serve

        serve(web, sys.argv[1:])
        return
    from .app import TopApp

    app = TopApp(managers, interval)
    app.run()
    sys.exit(app.return_code)


def _print(managers: Sequence[Manager]) -> None:
    """Print what each manager answers now. Raises the error of the last one that did not."""
    console = Console(highlight=False)
    failed = None
    for manager in managers:
        watch = Watch(manager)
        watch.take(ask(manager))
        if watch.error is None or len(managers) > 1:
            console.print(watch.page(), *[""] * (manager is not managers[-1]), sep="\n")
        failed = watch.error or failed
    if failed is not None:
        raise failed
