"""The ``cidalloc`` command: what a person types, and what they read."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from . import __version__
from .cli_registry import registry
from .client import Client, Sequence
from .codes import Code
from .demo import demo_server
from .demo.collide import Lane, collide
from .demo.sequences import FIRST, expected_sums, run_two_sequences
from .demo.stress import stress as run_stress
from .errors import CidError, InvalidArgument, Unavailable
from .server import TritonServer
from .settings import Settings
from .triton_model import default_state_folder, export

__all__ = ["main", "run"]

console = Console(highlight=False)
progress_console = Console(stderr=True, highlight=False)

_MOST_CLIENTS = 64  # two sequences each, and the model has 128 slots


_PORT = click.IntRange(0, 65535)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="cidalloc %(version)s")
def main() -> None:
    """Correlation IDs that no two live sequences share, for stateful models on Triton."""


main.add_command(registry)


def run() -> None:
    """Run the command; an error is one line on stderr and exit status 1."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except CidError as error:
        failure = f"{error.code.name}: {error}"
    except OSError as error:
        failure = f"{Code.INVALID_ARGUMENT.name}: {error}"
    else:
        return
    click.echo(f"error: {failure}", err=True)
    sys.exit(1)


@contextmanager
def _started(server: AbstractContextManager[TritonServer]) -> Iterator[TritonServer]:
    """Enter ``server`` and say how long that took."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        with progress_console.status("Starting Triton …"):
            running = stack.enter_context(server)
        taken = time.monotonic() - began
        progress_console.print(f"[dim]Triton is ready after {taken:.1f} s[/dim]")
        yield running


@contextmanager
def _server_or(url: str | None) -> Iterator[str]:
    """Yield ``url``, or the gRPC URL of a server that runs as long as it is needed."""
    if url is not None:
        yield url
    else:
        with _started(demo_server()) as server:
            yield server.grpc_url


@main.command()
@click.option("--async", "asynchronous", is_flag=True, help="Send everything before reading.")
@click.option("--reverse", is_flag=True, help="Let the second sequence stream, not the first.")
@click.option("--collide", "colliding", is_flag=True, help="Show two clients that pick one ID.")
@click.option(
    "--url", help="A Triton that runs already, as HOST:PORT of gRPC. [default: start one]"
)
def demo(asynchronous: bool, reverse: bool, colliding: bool, url: str | None) -> None:
    """Run two sequences with managed IDs side by side and check every sum.

    One streams over gRPC, one does not. With --collide, two processes run the same sequences
    with an ID that each picked by itself, as is common, and then with managed ones (here --url
    takes http://HOST:PORT).
    """
    if colliding:
        _demo_collide(url)
        return
    with _server_or(url) as server, Client(server) as client:
        wrong = run_two_sequences(
            client, asynchronous=asynchronous, reverse=reverse, say=click.echo, watch=_announce
        )
    if wrong:
        click.echo(f"error: INTERNAL: {wrong} sums are wrong", err=True)
        sys.exit(1)


@contextmanager
def _announce(sequence: Sequence) -> Iterator[None]:
    click.echo(f"Have Correlation Id: {sequence.cid}")
    yield
    click.echo(f"Removing managed Correlation ID: {sequence.cid}")


def _demo_collide(url: str | None) -> None:
    if url is None:
        with _started(demo_server()) as server:
            _demo_collide(server.http_url)
        return
    if not url.startswith("http://"):
        raise InvalidArgument(f"--url {url}: with --collide it is http://HOST:PORT")
    wrong = {}
    for managed in (False, True):
        lanes = collide(url, managed=managed)
        show_lanes(console, lanes, managed)
        wrong[managed] = sum(lane.wrong for lane in lanes)
    if wrong[True] or not wrong[False]:
        click.echo("error: INTERNAL: the sums are not what they must be", err=True)
        sys.exit(1)


def show_lanes(console: Console, lanes: tuple[Lane, Lane], managed: bool) -> None:
    how = "The manager picks the IDs" if managed else "Each client picks its ID, 10086 + task index"
    ids = ", ".join(f"{name} has {lane.cid}" for name, lane in zip("AB", lanes, strict=True))
    console.print(f"\n[bold]{how}:[/bold] {ids}\n")
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("")
    for name in "AB":
        table.add_column(f"   {name} sends", justify="right")
        table.add_column("Triton", justify="right")
        table.add_column("sum", justify="right")
        table.add_column("")
    for step in range(len(FIRST)):
        cells: list[str | Text] = [Text(f"[{step}]", "dim")]
        for lane in lanes:
            total, expected = lane.sums[step], expected_sums(lane.values)[step]
            sent = f"START {lane.values[step]}" if step == 0 else f"{lane.values[step]:+d}"
            right = total == expected
            cells += [sent, str(lane.statuses[step])]
            cells += [Text(str(total), "green" if right else "bold red")]
            cells += ["" if right else Text(f"not {expected}", "red")]
        table.add_row(*cells)
    ends = [cell for lane in lanes for cell in ("END", str(lane.end_status), "", "")]
    table.add_row("", *ends)
    console.print(table)
    wrong, total = sum(lane.wrong for lane in lanes), sum(len(lane.sums) for lane in lanes)
    accepted = sum(lane.statuses.count(200) for lane in lanes)
    colour = "bold red" if wrong else "bold green"
    console.print(
        f"\n[{colour}]{wrong} of {total} sums are wrong.[/] Triton answered {accepted} of the"
        f" {total} requests with 200."
    )
    for name, lane in zip("AB", lanes, strict=True):
        if lane.end_words:
            console.print(f"[dim]At the END of {name}: {lane.end_status}, {lane.end_words}[/dim]")


@main.command()
@click.option("-p", "--parents", default=10, show_default=True, help="Groups of clients.")
@click.option("-e", "--each", default=5, show_default=True, help="Client processes in a group.")
@click.option(
    "--url", help="A Triton that runs already, as HOST:PORT of gRPC. [default: start one]"
)
def stress(parents: int, each: int, url: str | None) -> None:
    """Run P x E client processes at once, each with the demo's two sequences.

    Reports the sequences run, the wrong sums, the IDs that two sequences held at the same time,
    and the IDs still held afterwards; all but the first must be 0.
    """
    clients = parents * each
    if parents < 1 or each < 1 or clients > _MOST_CLIENTS:
        raise InvalidArgument(f"-p {parents} -e {each}: 1 to {_MOST_CLIENTS} clients in all")
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=progress_console,
    )
    with _server_or(url) as server, progress:
        task = progress.add_task("client processes", total=clients)
        outcome = run_stress(server, clients, lambda done: progress.update(task, completed=done))
    for failure in sorted(set(outcome.failures)):
        click.echo(f"failed in {outcome.failures.count(failure)} clients: {failure}", err=True)
    for name, value in (
        ("client processes", clients),
        ("failed", len(outcome.failures)),
        ("sequences run", len(outcome.holds)),
        ("wrong sums", outcome.wrong_sums),
        ("IDs with two holders at once", len(outcome.shared)),
        ("IDs still held afterwards", outcome.still_held),
    ):
        click.echo(f"{name:30}{value:>6}")
    sys.exit(0 if outcome.good and len(outcome.holds) == 2 * clients else 1)


@main.command()
@click.argument("repository", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("-o", "--overwrite", is_flag=True, help="Replace an earlier export.")
@click.option("-n", "--name", default="cidmgr", show_default=True, help="The model's name.")
@click.option("-m", "--modver", default=1, show_default=True, help="The model's version.")
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"The folder for the file in which the manager remembers what is held."
    f" [default: {default_state_folder()}]",
)
@click.option("--no-state", is_flag=True, help="Remember nothing across a restart.")
def model(
    repository: Path,
    overwrite: bool,
    name: str,
    modver: int,
    state: Path | None,
    no_state: bool,
) -> None:
    """Write the manager model into the Triton model repository DIR."""
    if state and no_state:
        raise InvalidArgument("--state and --no-state exclude each other")
    if state is None and not no_state:
        state = default_state_folder()
        state.mkdir(parents=True, exist_ok=True)
    if state and repository.resolve() in (state.resolve(), *state.resolve().parents):
        raise InvalidArgument(
            f"--state {state} is within the model repository: there, a file that changes makes"
            " Triton load the model anew"
        )
    settings = Settings(state=str(state.absolute()) if state else "")
    folder = export(repository, settings, name=name, version=modver, overwrite=overwrite)
    click.echo(f"Wrote {folder / 'config.pbtxt'} and {folder / str(modver) / 'model.py'}.")
    if state:
        click.echo(f"It will remember what is held in {state.absolute() / name}.cidalloc.")
        if not state.is_dir():
            click.echo(f"Make the folder {state} first, where the server runs.")
    click.echo("Next: install cidalloc where Triton's Python finds it, then load the model.")


@main.command()
@click.option("--http-port", default=8000, type=_PORT, show_default=True, help="0: a free one.")
@click.option("--grpc-port", default=8001, type=_PORT, show_default=True, help="0: a free one.")
@click.option("--metrics-port", default=8002, type=_PORT, show_default=True, help="0: a free one.")
def serve(http_port: int, grpc_port: int, metrics_port: int) -> None:
    """Serve the manager and the model simple_sequence on loopback until Ctrl-C."""
    ports = (http_port, grpc_port, metrics_port)
    with _started(demo_server(Settings(), ports)) as server:
        click.echo(f"HTTP     {server.http_url}")
        click.echo(f"gRPC     {server.grpc_url}")
        click.echo(f"metrics  {server.metrics_url}")
        click.echo("Ctrl-C stops it.")
        with contextlib.suppress(KeyboardInterrupt):
            while server.poll() is None:
                time.sleep(0.2)
            raise Unavailable(f"Triton ended with status {server.poll()}")
