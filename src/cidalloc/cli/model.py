"""The command ``model``: write the manager into a model repository."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
from click.core import ParameterSource

from ..errors import CidError, InvalidArgument, RegistryMismatch
from ..manager.recovery import shape_for, waiting_for
from ..manager.settings import Settings
from ..manager.slices import RANDOM
from ..manager.storage.file import Storage
from ..manager.storage.file_format import NEW_FILE
from ..triton_model import default_state_folder, export, settings_from
from ..triton_model.vendor import pythons_of
from .rules import EXACT, INEXACT

__all__ = ["model"]

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"ms": 1, "s": 1000, "": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def duration(text: str) -> int:
    """Parse a time such as ``90s`` or ``2m``; a number without a unit is seconds.

    Returns:
        Milliseconds.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)", text)
    if not match:
        raise click.BadParameter(f"{text!r} is not a time: write it like 500ms, 90s, 2m, 1h or 1d")
    return round(float(match[1]) * _UNITS[match[2]])


def written(milliseconds: int) -> str:
    """Format a time for `duration`, in the largest unit that divides it."""
    for unit in ("d", "h", "m", "s"):
        if milliseconds and milliseconds % _UNITS[unit] == 0:
            return f"{milliseconds // _UNITS[unit]}{unit}"
    return f"{milliseconds}ms"


# Option, setting, help text.
_OPTIONS = (
    ("--first", "first", "Lowest ID of the pool."),
    ("--capacity", "capacity", "Number of IDs in the pool."),
    (
        "--slice",
        "slice",
        "Part of the pool for this server, if there are several: 3/64 (the fourth of 64 parts),"
        " auto/64 (by the ordinal of a StatefulSet), or random (a pool of its own, for models with"
        " a 64-bit CORRID).",
    ),
    ("--min-ttl", "min_ttl_ms", "Minimum session TTL that a client may request."),
    ("--max-ttl", "max_ttl_ms", "Maximum session TTL that a client may request."),
    ("--grace", "grace_ms", "Time after the TTL before a silent session expires."),
    ("--cooldown", "cooldown_ms", "Minimum time before a released ID is issued again."),
    (
        "--unended-cooldown",
        "unended_cooldown_ms",
        "Cooldown of an ID that is released without END and without a cooldown of its own.",
    ),
    ("--max-cooldown", "max_cooldown_ms", "Maximum cooldown that a client may request."),
    ("--max-count", "max_count", "Maximum number of IDs in one request."),
    ("--max-sessions", "max_sessions", "Maximum number of open sessions."),
    ("--max-held", "max_held", "Maximum number of IDs held by one session."),
    ("--max-anonymous", "max_anonymous", "Maximum number of IDs held without a session."),
    (
        "--anonymous-age",
        "anonymous_age_ms",
        "Time after which the manager takes back an ID held without a session.",
    ),
)


def _settings_options(command: Command) -> Command:
    defaults = Settings()
    for option, name, words in reversed(_OPTIONS):
        default = getattr(defaults, name)
        timed = name.endswith("_ms")
        command = click.option(
            option,
            name,
            type=duration if timed else type(default),
            default=written(default) if timed else default,
            show_default="all of the pool" if name == "slice" else True,
            help=words,
        )(command)
    return command


@click.command(
    epilog="Example: cidalloc model /models --state /var/lib/cidalloc --max-ttl 5m --vendor",
)
@click.argument("repository", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "-o",
    "--overwrite",
    is_flag=True,
    help="Replace an existing manager model. Options that are not given keep their values.",
)
@click.option(
    "--reset",
    is_flag=True,
    help="Replace an existing manager model. Options that are not given get their defaults.",
)
@click.option("-n", "--name", default="cidmgr", show_default=True, help="Name of the model.")
@click.option("-m", "--modver", default=1, show_default=True, help="Version of the model.")
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Folder for the file in which the manager stores held IDs."
    f" [default: {default_state_folder()}]",
)
@click.option("--no-state", is_flag=True, help="Keep no file. A restart forgets all held IDs.")
@click.option(
    "--vendor/--no-vendor",
    default=False,
    help="Copy this package into the model's folder, for a Triton whose Python does not have it.",
)
@click.option(
    "--python",
    "pythons",
    metavar="X.Y",
    multiple=True,
    help="Python version of the server, for --vendor; may be given several times. Other versions"
    " than that of the Python that runs this command come from wheels."
    " [default: the Python that runs this command]",
)
@click.option(
    "--wheels",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with wheels of cidalloc, for --python. Without it, pip downloads them.",
)
@_settings_options
@click.option(
    "--fresh/--no-fresh",
    default=False,
    help="Start at --first. Use it only if no ID of this pool was ever issued.",
)
@click.option(
    "--batch-size",
    default=256,
    show_default=True,
    help="Maximum number of requests that the manager answers in one batch.",
)
@click.pass_context
def model(
    context: click.Context,
    /,
    repository: Path,
    overwrite: bool,
    reset: bool,
    name: str,
    modver: int,
    state: Path | None,
    no_state: bool,
    vendor: bool,
    pythons: tuple[str, ...],
    wheels: Path | None,
    batch_size: int,
    **settings: Any,
) -> None:
    """Write the manager model into the Triton model repository DIR.

    Write times like 500ms, 90s, 2m, 1h or 1d. The options are stored in the model's config.pbtxt.
    You may edit this file later; the manager checks it when it loads.
    """

    def said(option: str) -> bool:
        return context.get_parameter_source(option) is not ParameterSource.DEFAULT

    if state and no_state:
        raise InvalidArgument("--state and --no-state cannot be combined: give one of them")
    there = (repository / name).exists()
    before = _read(repository / name) if there and overwrite and not reset else None
    chosen = {key: value for key, value in settings.items() if said(key) or before is None}
    if state or no_state:
        chosen["state"] = str(state.absolute()) if state else ""
    elif before is None:
        chosen["state"] = str(default_state_folder())
    values = replace(before.settings if before else Settings(), **chosen)
    if before:
        batch_size = batch_size if said("batch_size") else before.batch_size
        modver = modver if said("modver") else before.version
        if not said("vendor"):
            vendor, pythons = bool(before.pythons), pythons or before.pythons
    if (pythons or wheels) and not vendor:
        raise InvalidArgument(
            "--python and --wheels need --vendor: they choose the copy that --vendor makes"
        )
    _check_folder(values.state, repository)
    replaced = before
    if there and reset:
        with contextlib.suppress(InvalidArgument):  # --reset also replaces a damaged one
            replaced = _read(repository / name)
    _warn_of_file(values, name, replaced)
    place = export(
        repository,
        values,
        name=name,
        version=modver,
        overwrite=overwrite or reset,
        batch_size=batch_size,
        vendor=vendor and (pythons or True),
        wheels=wheels,
        more=before.more if before else {},
    )
    click.echo(f"Wrote {place / 'config.pbtxt'} and {place / str(modver) / 'model.py'}.")
    if before:
        click.echo(f"{_kept(values, chosen)} Use --reset to restore the defaults.")
    _tell_next(values, name, pythons_of(place / str(modver) / "cidalloc"))


def _check_folder(state: str, repository: Path) -> None:
    folder = Path(state).resolve()
    if state and repository.resolve() in (folder, *folder.parents):
        raise InvalidArgument(
            f"--state {state} is inside the model repository, where Triton reloads a model when a"
            " file changes: choose a folder outside"
        )


def _warn_of_file(values: Settings, name: str, before: _Before | None) -> None:
    """Say what will happen to a file that has another pool."""
    if not values.state:
        return
    file = Path(values.state) / f"{name}.cidalloc"
    try:
        Storage.expect(file, shape_for(values.on_host(socket.gethostname())))
    except RegistryMismatch as error:
        click.echo(f"warning: the manager will refuse its file, and not load. {error}.", err=True)
    except (CidError, OSError):  # the file is on another machine, or is to be read by another user
        if before and _pool(before.settings) != _pool(values):
            click.echo(
                f"warning: the pool changes. If the server has the file {file}, the manager will"
                f" refuse it, and not load: {NEW_FILE.format(file)}.",
                err=True,
            )


def _pool(values: Settings) -> tuple[int, int, str]:
    return values.first, values.capacity, values.slice


def _tell_next(values: Settings, name: str, pythons: tuple[str, ...]) -> None:
    """Print what the operator has to know and to do next."""
    if values.slice == RANDOM:
        click.echo(f"warning: a random slice is above 2^62: {INEXACT}.", err=True)
    elif (last := values.first + values.capacity - 1) > EXACT:
        click.echo(f"warning: the pool ends at {last}: {INEXACT}.", err=True)
    if waiting_ms := waiting_for(values):
        click.echo(
            f"A manager without a file issues no ID for {written(waiting_ms)} (--max-ttl and"
            " --grace), since clients may use IDs from before it."
        )
    if values.state:
        click.echo(f"The manager will store held IDs in {Path(values.state) / name}.cidalloc.")
        if not Path(values.state).is_dir():
            click.echo("The manager creates this folder on the server, for the server's user only.")
    if pythons:
        built = ", ".join(pythons)
        click.echo(
            f"Next: load the model. Its folder contains a copy of cidalloc for Python {built}."
        )
    else:
        click.echo("Next: install cidalloc for Triton's Python, then load the model.")


class _Before(NamedTuple):
    settings: Settings
    batch_size: int
    version: int
    pythons: tuple[str, ...]
    more: dict[str, str]


def _read(folder: Path) -> _Before:
    """Return the settings of an existing model."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    try:
        text = (folder / "config.pbtxt").read_text()
        message = text_format.Parse(text, model_config_pb2.ModelConfig())
        config = json_format.MessageToDict(message, preserving_proto_field_name=True)
        settings = settings_from(config)
    except (OSError, ValueError, text_format.ParseError) as error:
        raise InvalidArgument(
            f"cannot read the existing settings in {folder / 'config.pbtxt'}: {error}. Correct the"
            " file, or replace it with --reset"
        ) from None
    versions = [int(each.name) for each in folder.iterdir() if re.fullmatch(r"[1-9]\d*", each.name)]
    version = max(versions, default=1)
    pythons = pythons_of(folder / str(version) / "cidalloc")
    more = {
        key: value["string_value"]
        for key, value in config.get("parameters", {}).items()
        if key.isupper()
    }
    return _Before(settings, int(config["max_batch_size"]), version, pythons, more)


def _kept(values: Settings, chosen: dict[str, Any]) -> str:
    """Describe the settings that keep their values."""
    kept = [
        f"{each.name}={getattr(values, each.name)}"
        for each in fields(values)
        if each.name not in chosen and getattr(values, each.name) != each.default
    ]
    return f"Kept settings: {', '.join(kept) or 'all defaults'}."
