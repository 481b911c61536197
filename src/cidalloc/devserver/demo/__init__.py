"""The demo: two sequences side by side, on a real Triton server that it starts."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...manager.settings import Settings
from ...triton_model import export
from ..triton_server import TritonServer

__all__ = ["FRESH", "MODEL", "demo_server", "write_repository"]

MODEL = "simple_sequence"
"""The accumulator model that the sequences run on."""

FRESH = Settings(first=1, capacity=2**30 - 1, fresh=True)
"""A new registry, whose IDs begin at 1."""


def write_repository(folder: Path, settings: Settings) -> None:
    """Write a model repository with the manager and the accumulator model."""
    export(folder, settings)
    # Copied, since Triton's Python writes compiled files next to a model.
    shutil.copytree(
        Path(__file__).parent / "models" / MODEL,
        folder / MODEL,
        ignore=shutil.ignore_patterns("__pycache__"),
    )


@contextlib.contextmanager
def demo_server(
    settings: Settings = FRESH,
    ports: tuple[int, int, int] = (0, 0, 0),
    repositories: Iterable[Path] = (),
    arguments: Iterable[str] = (),
) -> Iterator[TritonServer]:
    """Run a `TritonServer` with both models, and with the given repositories and arguments."""
    with tempfile.TemporaryDirectory(prefix="cidalloc-models-") as name:
        write_repository(Path(name), settings)
        served = (Path(name), *repositories)
        with TritonServer(*served, ports=ports, arguments=arguments) as server:
            yield server
