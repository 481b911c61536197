"""The ``cidalloc`` command line."""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
from importlib import import_module

import click

from .. import __version__
from ..codes import Code
from ..errors import CidError

__all__ = ["main", "run"]


_GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Try it": {
        "demo": ("demo", "Run two sequences with managed IDs and check every sum."),
        "stress": ("demo", "Run many client processes and check every sum."),
        "serve": ("serve", "Run a Triton server for development, on loopback."),
    },
    "Deploy the manager": {
        "model": ("model", "Write the manager model into a model repository."),
    },
    "Operate a manager": {
        "tidy": ("tidy", "Send END for the sequences of clients that died."),
        "drain": ("drain", "Let no new sequence begin on a server, and wait for the others."),
    },
    "Watch a manager": {
        "status": ("ask", "Print how many IDs are held, and by which clients."),
        "top": ("top", "Watch the status of a manager, live."),
        "probe": ("ask", "Check that a manager answers."),
        "doctor": ("doctor", "Check a deployment and recommend actions."),
    },
    "Use IDs in scripts": {
        "acquire": ("ask", "Acquire IDs and print them."),
        "release": ("ask", "Release IDs that 'acquire' printed."),
    },
    "Write a client": {
        "conformance": ("conformance", "Judge a client of the manager, in any language."),
    },
    "Repair": {
        "registry": ("registry", "Show, check or enlarge a manager's file."),
    },
}
"""The commands by purpose: the module of each, which is imported when it runs, and its help."""


class _Lazy(click.Group):
    """A group that lists its commands by purpose, and imports the one that runs."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [name for commands in _GROUPS.values() for name in commands]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        for commands in _GROUPS.values():
            if name in commands:
                module = import_module(f".{commands[name][0]}", __package__)
                found: click.Command = getattr(module, name)
                return found
        return None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, words) for name, (_, words) in commands.items()])


@click.group(
    cls=_Lazy,
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


_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
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
        code = Code.UNAVAILABLE if error.errno in _PASSING else Code.INVALID_ARGUMENT
        failure = f"{code.name}: {error}"
    except MemoryError:
        failure = f"{Code.UNAVAILABLE.name}: there is not enough memory"
    else:
        return
    click.echo(f"error: {failure}", err=True)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 drop output that could not be written
    sys.exit(1)
