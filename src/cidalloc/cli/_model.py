"""The command ``model``: write the manager into a model repository."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..errors import InvalidArgument
from ..settings import Settings
from ..triton_model import default_state_folder, export

__all__ = ["model"]

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"ms": 1, "s": 1000, "": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def duration(text: str) -> int:
    """Return in milliseconds what is written ``90s`` or ``2m``; a number alone is seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)", text)
    if not match:
        raise click.BadParameter(f"{text!r} is no time: 500ms, 90s, 2m, 1h and 1d are some")
    return round(float(match[1]) * _UNITS[match[2]])


def written(milliseconds: int) -> str:
    """Return a time as `duration` reads it, in the largest unit that fits."""
    for unit in ("d", "h", "m", "s"):
        if milliseconds and milliseconds % _UNITS[unit] == 0:
            return f"{milliseconds // _UNITS[unit]}{unit}"
    return f"{milliseconds}ms"


# Option, setting, words.
_OPTIONS = (
    ("--first", "first", "The lowest ID of the pool."),
    ("--capacity", "capacity", "How many IDs the pool has."),
    ("--min-ttl", "min_ttl_ms", "The least time to live that a session may ask for."),
    ("--max-ttl", "max_ttl_ms", "The most."),
    ("--grace", "grace_ms", "How much longer a silent session is kept."),
    ("--cooldown", "cooldown_ms", "The least time for which an ID cools, after END, too."),
    (
        "--unended-cooldown",
        "unended_cooldown_ms",
        "How long an ID cools that comes back without a word on END.",
    ),
    ("--max-cooldown", "max_cooldown_ms", "The longest that a client may ask for."),
    ("--max-count", "max_count", "The most IDs in one request."),
    ("--max-sessions", "max_sessions", "The most sessions that are open at once."),
    ("--max-held", "max_held", "The most IDs that one session may hold."),
    ("--max-anonymous", "max_anonymous", "The most IDs that may be held without a session."),
    ("--anonymous-age", "anonymous_age_ms", "When such an ID is taken back."),
)


def _settings_options(command: Command) -> Command:
    defaults = Settings()
    for option, name, words in reversed(_OPTIONS):
        default = getattr(defaults, name)
        timed = name.endswith("_ms")
        command = click.option(
            option,
            name,
            type=duration if timed else int,
            default=written(default) if timed else default,
            show_default=True,
            help=words,
        )(command)
    return command


@click.command(
    short_help="Write the manager into a model repository.",
    epilog="Example: cidalloc model /models --state /var/lib/cidalloc --max-ttl 5m --vendor",
)
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
@click.option(
    "--vendor",
    is_flag=True,
    help="Put a copy of this package into the model's folder, so that Triton's Python need not have"
    " it. That Python must be of the version that runs this command.",
)
@click.option(
    "--python",
    "version",
    metavar="X.Y",
    help="With --vendor: the Python of the server, to be sure of that.",
)
@_settings_options
@click.option("--fresh", is_flag=True, help="No ID of the pool was ever issued: begin at --first.")
@click.option(
    "--batch-size", default=256, show_default=True, help="Requests that are answered together."
)
def model(
    repository: Path,
    overwrite: bool,
    name: str,
    modver: int,
    state: Path | None,
    no_state: bool,
    vendor: bool,
    version: str | None,
    batch_size: int,
    **settings: Any,
) -> None:
    """Write the manager model into the Triton model repository DIR.

    Times are written like 500ms, 90s, 2m, 1h or 1d. All that is chosen here stands in the model's
    config.pbtxt, which you may edit later; the manager checks it when it loads.
    """
    if state and no_state:
        raise InvalidArgument("--state and --no-state exclude each other")
    if version and not vendor:
        raise InvalidArgument("--python goes with --vendor")
    if state is None and not no_state:
        state = default_state_folder()
        state.mkdir(parents=True, exist_ok=True)
    if state and repository.resolve() in (state.resolve(), *state.resolve().parents):
        raise InvalidArgument(
            f"--state {state} is within the model repository: there, a file that changes makes"
            " Triton load the model anew"
        )
    folder = export(
        repository,
        Settings(state=str(state.absolute()) if state else "", **settings),
        name=name,
        version=modver,
        overwrite=overwrite,
        batch_size=batch_size,
        vendor=(version or True) if vendor else False,
    )
    click.echo(f"Wrote {folder / 'config.pbtxt'} and {folder / str(modver) / 'model.py'}.")
    if state:
        click.echo(f"It will remember what is held in {state.absolute() / name}.cidalloc.")
        if not state.is_dir():
            click.echo(f"Make the folder {state} first, where the server runs.")
    if vendor:
        click.echo("Next: load the model. A copy of cidalloc is in its folder.")
    else:
        click.echo("Next: install cidalloc where Triton's Python finds it, then load the model.")
