"""The model's folder and its configuration: written at export, checked at every load."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from string import Template
from typing import Any

from ..errors import InvalidArgument
from ..settings import Settings
from ..wire import MODEL

__all__ = ["default_state_folder", "export", "settings_from"]

_HERE = Path(__file__).parent


def default_state_folder() -> Path:
    """Return where a service of this user keeps what it must remember."""
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
) -> Path:
    """Write the manager model into a model repository and return its folder.

    Args:
        repository: a model repository of Triton; it is made if it is not there.
        settings: what the model's configuration shall say; a person may edit it later.
        name: the model's name.
        version: the model's version, a positive integer.
        overwrite: replace the files of an earlier export.

    Raises:
        InvalidArgument: the model is there already, or the name or version is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise InvalidArgument(
            f"{name!r} cannot be a model's name: letters, digits, '_', '-' and '.' can"
        )
    if type(version) is not int or version < 1:
        raise InvalidArgument(f"{version!r} cannot be a model's version: it is 1 or more")
    folder = Path(repository) / name
    if folder.exists() and not overwrite:
        raise InvalidArgument(f"{folder} exists; to replace the model there, ask for overwriting")
    values = settings or Settings()
    template = Template((_HERE / "config.pbtxt").read_text())
    config = template.substitute(
        model=name, **{each.name: _as_text(getattr(values, each.name)) for each in fields(values)}
    )
    (folder / str(version)).mkdir(parents=True, exist_ok=True)
    # The configuration comes last: a server that polls does not see half a model.
    _write(folder / str(version) / "model.py", (_HERE / "model.py").read_text())
    _write(folder / "config.pbtxt", config)
    return folder


def settings_from(config: Mapping[str, Any]) -> Settings:
    """Return the settings that a loaded model's configuration, as Triton hands it over, says.

    Raises:
        InvalidArgument: a parameter is unknown or out of bounds, or the configuration would
            make more than one manager; the message names what to change in config.pbtxt.
    """
    instances = sum(
        int(group.get("count", 1)) * max(1, len(group.get("gpus", ())))
        for group in config.get("instance_group", [{}])
    )
    if instances != 1:
        raise InvalidArgument(
            f"instance_group has {instances} instances: each would hand out the same IDs; set one"
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
            "version_policy lets several versions run: each would hand out the same IDs; leave it"
            " out"
        )
    if int(config.get("max_batch_size", 0)) < 1:
        raise InvalidArgument(
            "max_batch_size must be 1 or more: the tensors have a batch dimension"
        )
    values: dict[str, int | bool | str] = {}
    kinds = {each.name: type(each.default) for each in fields(Settings)}
    for name, value in config.get("parameters", {}).items():
        if name.isupper():
            continue  # Triton's own
        if name not in kinds:
            raise InvalidArgument(f"unknown parameter {name}; there are {', '.join(kinds)}")
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
            raise InvalidArgument(f"parameter {name}={text!r} is neither true nor false")
        return text == "true"
    try:
        return int(text)
    except ValueError:
        raise InvalidArgument(f"parameter {name}={text!r} is not an integer") from None


def _write(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or none."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
