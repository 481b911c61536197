"""The commands ``demo`` and ``stress``: run sequences with and without managed IDs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from ..client import Client, Sequence
from ..devserver.demo import demo_server
from ..devserver.demo.collide import Lane, collide
from ..devserver.demo.sequences import FIRST, expected_sums, run_two_sequences
from ..devserver.demo.stress import stress as run_stress
from ..errors import InvalidArgument
from .serve import progress_console, started

__all__ = ["demo", "show_lanes", "stress"]

_MOST_CLIENTS = 64  # two sequences each, and the model has 128 slots

console = Console(highlight=False)


@contextmanager
def _server_or(url: str | None) -> Iterator[str]:
    """Yield ``url``, or start a server and yield its gRPC URL."""
    if url is not None:
        yield url
    else:
        with started(demo_server()) as server:
            yield server.grpc_url


@click.command()
@click.option(
    "--async", "asynchronous", is_flag=True, help="Send all requests before reading answers."
)
@click.option("--reverse", is_flag=True, help="Stream the second sequence instead of the first.")
@click.option(
    "--collide",
    "colliding",
    is_flag=True,
    help="Show what happens if two clients pick the same ID.",
)
@click.option("--url", help="Triton to use, as HOST:PORT of gRPC. [default: start a server]")
def demo(asynchronous: bool, reverse: bool, colliding: bool, url: str | None) -> None:
    """Run two sequences with managed IDs side by side and check every sum.

    The first sequence uses a gRPC stream, the second one does not. With --collide, two processes
    run the same sequences, first with IDs that each process picks, then with managed IDs; --url is
    then http://HOST:PORT.
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
        with started(demo_server()) as server:
            _demo_collide(server.http_url)
        return
    if not url.startswith("http://"):
        raise InvalidArgument(
            f"--url {url} is not an HTTP URL: with --collide, use http://HOST:PORT"
        )
    wrong = {}
    for managed in (False, True):
        lanes = collide(url, managed=managed)
        show_lanes(console, lanes, managed)
        wrong[managed] = sum(lane.wrong for lane in lanes)
    if wrong[True] or not wrong[False]:
        click.echo("error: INTERNAL: the number of wrong sums is not as expected", err=True)
        sys.exit(1)


def show_lanes(console: Console, lanes: tuple[Lane, Lane], managed: bool) -> None:
    """Print the two sequences side by side."""
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
        f"\n[{colour}]{wrong} of {total} sums are wrong.[/] Triton answered {accepted} of these"
        f" {total} requests with 200."
    )
    for name, lane in zip("AB", lanes, strict=True):
        if lane.end_words:
            words = f"Only the END of {name} was refused: {lane.end_status}, {lane.end_words}"
            console.print(f"[dim]{words}[/dim]")


@click.command()
@click.option("-p", "--parents", default=10, show_default=True, help="Number of process groups.")
@click.option("-e", "--each", default=5, show_default=True, help="Client processes per group.")
@click.option("--url", help="Triton to use, as HOST:PORT of gRPC. [default: start a server]")
def stress(parents: int, each: int, url: str | None) -> None:
    """Run client processes in parallel, each with the two sequences of the demo.

    The report counts sequences, wrong sums, IDs that two sequences held at the same time, and IDs
    that are still held afterwards. Apart from the number of sequences, each count must be 0.
    """
    clients = parents * each
    if parents < 1 or each < 1 or clients > _MOST_CLIENTS:
        raise InvalidArgument(
            f"-p {parents} -e {each} is {clients} clients: choose 1 to {_MOST_CLIENTS} clients"
        )
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
        ("IDs shared by two sequences", len(outcome.shared)),
        ("IDs still held afterwards", outcome.still_held),
    ):
        click.echo(f"{name:30}{value:>6}")
    sys.exit(0 if outcome.good and len(outcome.holds) == 2 * clients else 1)
