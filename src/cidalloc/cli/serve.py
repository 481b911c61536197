"""The command ``serve``: run a Triton server for development, on loopback."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import click
from rich.console import Console

from ..devserver.demo import demo_server
from ..devserver.triton_server import TritonServer
from ..errors import Unavailable
from ..manager.settings import Settings

__all__ = ["progress_console", "serve", "started"]

progress_console = Console(stderr=True, highlight=False)

_PORT = click.IntRange(0, 65535)


@contextmanager
def started(server: AbstractContextManager[TritonServer]) -> Iterator[TritonServer]:
    """Start ``server`` and print how long it took."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        with progress_console.status("Starting Triton …"):
            running = stack.enter_context(server)
        taken = time.monotonic() - began
        progress_console.print(f"[dim]Triton is ready after {taken:.1f} s[/dim]")
        yield running


@click.command(
    epilog="Example: cidalloc serve --repository ./models -- --log-verbose=1",
)
@click.option(
    "--http-port",
    default=8000,
    type=_PORT,
    show_default=True,
    help="HTTP port. 0 chooses a free port.",
)
@click.option(
    "--grpc-port",
    default=8001,
    type=_PORT,
    show_default=True,
    help="gRPC port. 0 chooses a free port.",
)
@click.option(
    "--metrics-port",
    default=8002,
    type=_PORT,
    show_default=True,
    help="Metrics port. 0 chooses a free port.",
)
@click.option(
    "--repository",
    "repositories",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Another model repository to serve. May be repeated.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder for the file in which the manager stores held IDs.  [default: no file]",
)
@click.argument("flags", nargs=-1)
def serve(
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    repositories: tuple[Path, ...],
    state: Path | None,
    flags: tuple[str, ...],
) -> None:
    """Serve the manager and the model simple_sequence on loopback. Ctrl-C stops the server.

    Arguments after -- are passed to tritonserver.
    """
    ports = (http_port, grpc_port, metrics_port)
    settings = Settings(state=str(state.absolute()) if state else "")
    with started(demo_server(settings, ports, repositories, flags)) as server:
        click.echo(f"HTTP     {server.http_url}")
        click.echo(f"gRPC     {server.grpc_url}")
        click.echo(f"metrics  {server.metrics_url}")
        click.echo("Ctrl-C stops it.")
        with contextlib.suppress(KeyboardInterrupt):
            while server.poll() is None:
                time.sleep(0.2)
            raise Unavailable(f"Triton ended with status {server.poll()}: {server.complaint()}")
