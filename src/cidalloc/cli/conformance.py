"""The command ``conformance``: judge a client of the manager, in any language."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import click

from ..conformance.ledger import ASKED, Finding
from ..conformance.run import Result, run_seeds
from .screen import progress_line

__all__ = ["conformance"]

_SEEDS = 100
_JOBS = 12 * (os.cpu_count() or 1)  # seeds mostly wait
_LATE_S = 0.3
_NAMED = 10  # other seeds with the same finding


@click.command(
    epilog="Example: cidalloc conformance -- python examples/conformance/python_client.py",
)
@click.option(
    "--seeds",
    metavar="N",
    type=click.IntRange(min=1),
    help=f"Number of seeds.  [default: {_SEEDS}; with --seed 1]",
)
@click.option(
    "--seed", metavar="K", type=click.IntRange(min=0), help="The first seed.  [default: 1]"
)
@click.option(
    "--jobs",
    metavar="N",
    default=_JOBS,
    type=click.IntRange(min=1),
    help="Number of seeds that run at the same time.  [default: 12 for each CPU]",
)
@click.option(
    "--junit",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the results as JUnit XML, one test case for each seed.",
)
@click.option(
    "--keep",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the time line and the history of each seed to this folder.",
)
@click.argument("client", nargs=-1, required=True)
def conformance(
    client: tuple[str, ...],
    seeds: int | None,
    seed: int | None,
    jobs: int,
    junit: Path | None,
    keep: Path | None,
) -> None:
    """Judge a client of the manager: run the program CLIENT against a manager behind faults.

    CLIENT and its arguments follow after --. It reads commands from standard input, and answers
    each with one line; docs/conformance.md describes them. For each seed the kit starts a manager,
    loses, delays, repeats and cuts messages, stops the program and restarts the manager, and then
    checks what the client did.
    """
    number = seeds or (_SEEDS if seed is None else 1)
    first = 1 if seed is None else seed
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    show = progress_line()

    def done(result: Result) -> None:
        results.append(result)
        failed = sum(bool(each.findings) for each in results)
        show(f"{len(results)} of {number} seeds, {failed} failed")

    began = time.monotonic()
    asyncio.run(run_seeds(client, range(first, first + number), jobs, done, keep))
    show("")
    results.sort()
    if junit is not None:
        _write_junit(junit, client, results)
    _report(client, results, time.monotonic() - began)
    sys.exit(any(each.findings for each in results))


def _report(client: Sequence[str], results: Sequence[Result], took: float) -> None:
    """Print each kind of finding once, with its time line, and the seeds that have it."""
    kinds: defaultdict[str, dict[int, Finding]] = defaultdict(dict)
    for result in results:
        for finding in result.findings:
            kinds[finding.kind].setdefault(result.seed, finding)
    for kind, seeds in kinds.items():
        seed, finding = next(iter(seeds.items()))
        click.echo(f"{kind.upper()}: {_told(finding)}")
        others = ", ".join(map(str, list(seeds)[1 : _NAMED + 1]))
        more = " ..." if len(seeds) > _NAMED + 1 else ""
        where = f" ({len(seeds) - 1} more: {others}{more})" if others else ""
        click.echo(f"  seed {seed}{where}")
        click.echo(f"  repeat: cidalloc conformance --seed {seed} -- {' '.join(client)}\n")
    if (late := max(each.late for each in results)) > _LATE_S:
        words = f"the machine was busy, and the kit late by up to {late:.1f} s: try fewer --jobs"
        click.echo(f"note: {words}")
    failed = sum(bool(each.findings) for each in results)
    messages = sum(each.messages for each in results)
    click.echo(
        f"{len(results)} seeds, {messages:,} messages, {took:.0f} s:"
        f" {f'{failed} failed' if failed else 'all passed'}"
    )


def _told(finding: Finding) -> str:
    lines = "\n".join(f"    {each}" for each in finding.lines)
    return f"{finding.words}\n  Asked for: {ASKED[finding.kind]}\n{lines}"


def _write_junit(file: Path, client: Sequence[str], results: Sequence[Result]) -> None:
    failures = sum(bool(each.findings) for each in results)
    counts = {"tests": str(len(results)), "failures": str(failures)}
    suite = ElementTree.Element("testsuite", {"name": " ".join(client), **counts})
    for result in results:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname="cidalloc.conformance",
            name=f"seed {result.seed}",
            time=f"{result.took:.3f}",
        )
        for finding in result.findings:
            words = {"type": finding.kind, "message": finding.words}
            ElementTree.SubElement(case, "failure", words).text = _told(finding)
    ElementTree.ElementTree(suite).write(file, "utf-8", xml_declaration=True)
