"""The commands that send one request to a manager: status, acquire, release, probe."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click
from rich.console import Console

from ..client.sync.transport import connect
from ..codes import Operation
from ..errors import InvalidArgument, ProtocolError
from ..protocol import MODEL, IDs, Parameter, Request, as_ids
from .screen import status_view

__all__ = ["Manager", "acquire", "ask_options", "probe", "release", "status"]

Command = TypeVar("Command", bound=Callable[..., Any])


class Manager:
    """A connection to a manager. It opens no session and does not retry.

    Args:
        url: address of the server.
        model: name of the manager model.
        timeout: seconds to wait for each answer.
    """

    def __init__(self, url: str, model: str, timeout: float) -> None:
        self.transport = connect(url)
        self.model = model
        self.timeout = timeout

    def ask(
        self, operation: Operation, ids: Iterable[int] = (), **parameters: Parameter
    ) -> tuple[IDs, str]:
        """Return OUTPUT and DETAIL. Raises the manager's error, or `Unavailable`."""
        request = Request(operation, as_ids(ids), parameters)
        return self.transport.call(self.model, request, self.timeout)

    def status(self) -> dict[str, Any]:
        """Return the answer to STATUS."""
        text = self.ask(Operation.STATUS)[1]
        try:
            found: dict[str, Any] = json.loads(text)
            return {**found, "pool": {**found["pool"]}}
        except (ValueError, TypeError, KeyError):
            raise ProtocolError(
                f"model {self.model} is not a cidalloc manager: it answered without a status"
            ) from None

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *error: object) -> None:
        self.transport.close()


def ask_options(command: Command) -> Command:
    """Add URL, --model and --timeout to a command."""
    options: list[Any] = [
        click.option(
            "--timeout",
            type=click.FloatRange(0.0, min_open=True),
            default=10.0,
            show_default=True,
            help="Seconds to wait for the manager's answer.",
        ),
        click.option(
            "--model", default=MODEL, show_default=True, help="Name of the manager model."
        ),
        click.argument("url"),
    ]
    for option in options:
        command = option(command)
    return command


@click.command(
    short_help="Print how many IDs are held, and by which clients.",
    epilog="Example: cidalloc status localhost:8001",
)
@ask_options
@click.option("--json", "as_json", is_flag=True, help="Print the manager's status as JSON.")
def status(url: str, model: str, timeout: float, as_json: bool) -> None:
    """Print the status of the manager at URL: its pool, its sessions, and its error counts.

    URL is host:port, or starts with grpc://, grpcs://, http:// or https://.
    """
    with Manager(url, model, timeout) as manager:
        found = manager.status()
    if as_json:
        click.echo(json.dumps(found))
    else:
        Console(highlight=False).print(status_view(found))


@click.command(
    short_help="Acquire IDs and print them.",
    epilog="Example: cid=$(cidalloc acquire localhost:8001)",
)
@ask_options
@click.option(
    "--count",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Number of IDs to acquire. They are printed one per line.",
)
def acquire(url: str, model: str, timeout: float, count: int) -> None:
    """Acquire a correlation ID that no live sequence uses, and print it.

    The ID is held without a session, so the manager cannot see when the script dies. It takes the
    ID back after a day (setting anonymous_age_ms). Release the ID with 'cidalloc release'. In
    programs, use the client: its IDs are released soon after the program dies.

    URL is host:port, or starts with grpc://, grpcs://, http:// or https://.
    """
    with Manager(url, model, timeout) as manager:
        ids, _ = manager.ask(Operation.NEW, count=count)
    click.echo("\n".join(map(str, ids.tolist())))
    if sys.stderr.isatty():
        click.echo(
            "The IDs are held without a session until they are released, for a day at most.",
            err=True,
        )


@click.command(
    short_help="Release IDs that 'acquire' printed.",
    epilog="Example: cidalloc release localhost:8001 --ended 1073741824",
)
@ask_options
@click.argument("cid", nargs=-1, required=True, type=int)
@click.option(
    "--ended",
    is_flag=True,
    help="END was answered with success. The IDs cool for the minimum cooldown.",
)
@click.option(
    "--cooldown",
    type=click.FloatRange(0.0),
    help="Seconds until an ID may be issued again. Use at least the idle time of the model."
    "  [default: the manager's unended_cooldown_ms]",
)
def release(
    url: str, model: str, timeout: float, cid: tuple[int, ...], ended: bool, cooldown: float | None
) -> None:
    """Release IDs that 'cidalloc acquire' printed.

    If one of the IDs is not held, the command releases none of them.

    URL is host:port, or starts with grpc://, grpcs://, http:// or https://.
    """
    if ended and cooldown is not None:
        raise InvalidArgument("--ended and --cooldown cannot be combined: give one of them")
    parameters: dict[str, Parameter] = {"ended": ended}
    if cooldown is not None:
        parameters["cooldown_ms"] = round(cooldown * 1000)
    with Manager(url, model, timeout) as manager:
        manager.ask(Operation.DELETE, cid, **parameters)


@click.command(
    short_help="Check that a manager answers.",
    epilog="Example: cidalloc probe localhost:8001 --timeout 2",
)
@ask_options
def probe(url: str, model: str, timeout: float) -> None:
    """Exit with status 0 if the manager at URL answers, and with 1 if it does not.

    The probe is a real inference. Before version 26.01, Triton reports a Python model as ready even
    if its process is dead.

    URL is host:port, or starts with grpc://, grpcs://, http:// or https://.
    """
    began = time.monotonic()
    with Manager(url, model, timeout) as manager:
        held, _ = manager.ask(Operation.ACTIVE)
    if held.shape != (1,):
        raise ProtocolError(
            f"model {manager.model} is not a cidalloc manager: its answer has another shape"
        )
    took = (time.monotonic() - began) * 1e3
    click.echo(f"{manager.model} answers: {held[0]:,} held ({took:.0f} ms)")
