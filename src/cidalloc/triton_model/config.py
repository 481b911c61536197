"""The model's folder and configuration: `export` writes them, `settings_from` checks them."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from string import Template
from typing import Any

from ..errors import InvalidArgument
from ..manager.settings import Settings
from ..protocol import MODEL
from .vendor import HERE, Copy

__all__ = ["default_state_folder", "export", "settings_from"]

_HERE = Path(__file__).parent


def default_state_folder() -> Path:
    """Return the folder in which a service of this user stores its state."""
    if os.geteuid() == 0:
        return Path("/var/lib/cidalloc")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "cidalloc"


def export(
    repository: Path,
    settings: Settings | None = None,
    *,
    name: str = MODEL,
    version: int = 1,
    overwrite: bool = False,
    batch_size: int = 256,
    vendor: bool | str | Iterable[str] = False,
    wheels: Path | None = None,
    more: Mapping[str, str] | None = None,
) -> Path:
    """Write the manager model into a model repository and return its folder.

    Args:
        repository: a model repository of Triton; it is created if it does not exist.
        settings: written to the model's configuration, which may be edited later.
        name: the model's name.
        version: the model's version, a positive integer.
        overwrite: replace the files of an earlier export.
        batch_size: maximum number of requests in one batch.
        vendor: copy this package into the model's folder, for a server whose Python does not have
            it. True stands for this version of Python; other versions, such as ``"3.12"`` or
            ``["3.10", "3.12"]``, come from wheels.
        wheels: a folder with wheels of this version of cidalloc. Without it, pip downloads those
            that are needed.
        more: parameters of the Python backend itself, such as ``EXECUTION_ENV_PATH``.

    Raises:
        InvalidArgument: the model exists, a name or number is not valid, or there is no wheel for
            a version of Python.
    """
    _check_numbers(name, version, batch_size)
    pythons = (HERE,) if vendor is True else (vendor,) if isinstance(vendor, str) else vendor or ()
    copy = Copy(pythons, wheels)
    folder = Path(repository) / name
    if folder.exists() and not overwrite:
        raise InvalidArgument(
            f"{folder} exists: use --overwrite (in Python overwrite=True) to replace it"
        )
    values = settings or Settings()
    template = Template((_HERE / "config.pbtxt").read_text())
    config = template.substitute(
        model=name,
        batch_size=batch_size,
        **{each.name: _as_text(getattr(values, each.name)) for each in fields(values)},
    )
    for key, value in (more or {}).items():
        words = f'parameters {{ key: "{key}" value {{ string_value: "{_as_text(value)}" }} }}'
        config += f"{words}\n"
    if folder.exists():
        _fill(folder, version, config, copy)
        return folder
    # In one step: a server that polls does not see half a model.
    draft = folder.with_name(f".{name}.{os.getpid()}.new")
    try:
        _fill(draft, version, config, copy)
        draft.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise InvalidArgument(f"{folder} exists: another process has just made it") from None
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _check_numbers(name: str, version: int, batch_size: int) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise InvalidArgument(
            f"{name!r} is not a valid model name: use letters, digits, '_', '-' and '.'"
        )
    if type(version) is not int or version < 1:
        raise InvalidArgument(f"{version!r} is not a valid model version: use 1 or more")
    if type(batch_size) is not int or batch_size < 1:
        raise InvalidArgument(f"batch_size={batch_size!r} is not valid: use 1 or more")


def _fill(folder: Path, version: int, config: str, copy: Copy) -> None:
    """Write the model's files, each in one step, the configuration last."""
    home = folder / str(version)
    home.mkdir(parents=True, exist_ok=True)
    copy.place_in(home)
    _write(home / "model.py", (_HERE / "model.py").read_text())
    _write(folder / "config.pbtxt", config)


def settings_from(config: Mapping[str, Any]) -> Settings:
    """Return the settings in a model's configuration, as Triton passes it to the model.

    Raises:
        InvalidArgument: a parameter is unknown or out of bounds, or the configuration would
            start more than one manager. The message says what to change in config.pbtxt.
    """
    instances = sum(
        int(group.get("count", 1)) * max(1, len(group.get("gpus", ())))
        for group in config.get("instance_group", [{}])
    )
    if instances != 1:
        raise InvalidArgument(
            f"instance_group has {instances} instances: each would issue the same IDs. Set one"
            " group with count: 1"
        )
    policy = config.get("version_policy", {})
    versions = policy.get("specific", {}).get("versions", [1])
    if (
        "all" in policy
        or len(versions) > 1
        or int(policy.get("latest", {}).get("num_versions", 1)) > 1
    ):
        raise InvalidArgument(
            "version_policy allows several versions: each would issue the same IDs. Remove it from"
            " config.pbtxt"
        )
    if int(config.get("max_batch_size", 0)) < 1:
        raise InvalidArgument(
            "max_batch_size is 0: set it to 1 or more, since the tensors have a batch dimension"
        )
    values: dict[str, int | bool | str] = {}
    kinds = {each.name: type(each.default) for each in fields(Settings)}
    for name, value in config.get("parameters", {}).items():
        if name.isupper():
            continue  # Triton's own
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"did you mean {near[0]}? Known" if near else "known"
            raise InvalidArgument(f"unknown parameter {name}: {hint} are {', '.join(kinds)}")
        values[name] = _from_text(name, value.get("string_value", ""), kinds[name])
    return Settings(**values)  # type: ignore[arg-type]


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value.replace("\\", "\\\\").replace('"', '\\"')
    return str(value).lower()


def _from_text(name: str, text: str, kind: type) -> int | bool | str:
    if kind is str:
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise InvalidArgument(f"parameter {name}={text!r} is not 'true' or 'false'")
        return text == "true"
    # int() alone would also take "1_0" and " 5 ".
    if not re.fullmatch(r"-?[0-9]{1,20}", text):
        raise InvalidArgument(f"parameter {name}={text!r} is not an integer")
    return int(text)


def _write(path: Path, text: str) -> None:
    """Write a file in one step, so that a reader never sees a part of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
