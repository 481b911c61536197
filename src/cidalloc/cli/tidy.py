"""The command ``tidy``: send END for the sequences of clients that died."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import click

from ..client import Client
from ..errors import InvalidArgument
from .ask import Manager, with_manager
from .screen import progress_line

__all__ = ["tidy"]

_LOOK_S = 0.5


@click.command(
    epilog="Example: echo '{\"CHUNK\": [0.0]}' >end.json; cidalloc tidy localhost:8001 --target asr"
    " end.json"
)
@with_manager
@click.option(
    "--target",
    "targets",
    type=(str, click.Path(exists=True, dir_okay=False)),
    metavar="MODEL INPUTS",
    multiple=True,
    required=True,
    help="A model, and a JSON file with the inputs of END: an object with a list for each input."
    " May be repeated.",
)
def tidy(manager: Manager, targets: tuple[tuple[str, str], ...]) -> None:
    """Send END for sequences of clients that died, until it is stopped.

    A client that dies sends no END, and Triton tells a model nothing when it drops an idle
    sequence. So a model that keeps state by itself keeps it for ever. This command asks the
    manager for the IDs of such clients, as soon as Triton has certainly forgotten their sequences,
    and sends a request with START and END for each of them to MODEL, with the inputs in the file
    INPUTS. Run it beside the server. Several such processes share the work.

    URL is host:port, or starts with grpc:// or grpcs://. If it is left out, the environment
    variable CIDALLOC_URL is used.
    """
    inputs = {model: _inputs(file) for model, file in targets}
    if len(inputs) < len(targets):
        raise click.UsageError("--target has a model twice.")
    client = Client(
        manager.url,
        model=manager.model,
        timeout=manager.timeout,
        headers=manager.headers,
        label=f"tidy:{os.uname().nodename[:48]}:{os.getpid()}",
        tidy=inputs,
        **manager.options,
    )
    with client:
        tidier = client._runner.tidier
        assert tidier is not None
        client._runner.run(tidier.check())
        client._runner.run(client._session.establish(client._deadline()))
        client._runner.start()
        click.echo(f"Tidying {', '.join(inputs)} at {manager.url}.")
        show, total = progress_line() if sys.stderr.isatty() else click.echo, 0
        try:
            while True:
                ended = tidier.ended.total()
                if ended > total:
                    counts = ", ".join(f"{n:,} on {name}" for name, n in tidier.ended.items())
                    show(f"END was sent for {counts}")
                    total = ended
                time.sleep(_LOOK_S)
        except KeyboardInterrupt:
            pass
        finally:
            progress_line()("")
            failed = tidier.failed.total()
            click.echo(f"END was sent for {tidier.ended.total():,} IDs; {failed:,} failed.")


def _inputs(file: str) -> dict[str, Any]:
    """Return the inputs in a file."""
    with open(file, encoding="utf-8") as stream:
        try:
            found = json.load(stream)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidArgument(f"{file} is not a JSON object with a list for each input")
    return found
