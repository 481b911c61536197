"""The ``cidalloc`` command line."""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys

import click

from .. import __version__
from ..codes import Code
from ..errors import CidError
from . import ask, demo, doctor, model, registry, serve, top

__all__ = ["main", "run"]


_GROUPS: dict[str, list[click.Command]] = {
    "Try it": [demo.demo, demo.stress, serve.serve],
    "Deploy the manager": [model.model],
    "Watch a manager": [ask.status, top.top, ask.probe, doctor.doctor],
    "Use IDs in scripts": [ask.acquire, ask.release],
    "Repair": [registry.registry],
}


class _Grouped(click.Group):
    """A group that lists its commands by purpose."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(str(c.name), c.get_short_help_str(60)) for c in commands])


@click.group(
    cls=_Grouped,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 on success; 1 after an error (one line on stderr: code and message) or a"
    " failed check; 2 if the arguments are wrong.",
)
@click.version_option(__version__, message="cidalloc %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Manage correlation IDs of stateful models on Triton: no two live sequences share one."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        context.color = False  # as rich does; otherwise click checks whether this is a terminal


for commands in _GROUPS.values():
    for command in commands:
        main.add_command(command)


_PLAIN = {"→": "->", "…": "...", "–": "-", "×": "x", "µ": "u"}


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that the terminal's encoding does not have."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(each, "?") for each in text), error.end


codecs.register_error("cidalloc", _plainly)


def run() -> None:
    """Run the command; an error is one line on stderr and exit status 1."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="cidalloc")
    try:
        main()
    except CidError as error:
        failure = f"{error.code.name}: {error}"
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        failure = f"{(Code.UNAVAILABLE if full else Code.INVALID_ARGUMENT).name}: {error}"
    else:
        return
    click.echo(f"error: {failure}", err=True)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 drop output that could not be written
    sys.exit(1)
