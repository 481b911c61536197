"""The operations in which `failing_child.py` lets calls fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import stepped_child
from crash_model import BOOT, ENDED, NEXT_BOOT, UNENDED, settings
from stepped_child import NOW, SCENARIOS, SEQS, SIX, Scenario

from cidalloc.manager.registry import Registry
from cidalloc.manager.storage.file_format import Shape

TIMES = [NOW, *(NOW + after + by for after in (ENDED, UNENDED, 300) for by in (-1, 0)), NOW + 1_000]


@dataclass
class Operation:
    """Something that is done while a call fails."""

    prepare: Callable[[Path], Any]  # returns what `act` and the others take
    act: Callable[[Any], object]
    check: Callable[[Any], object] = lambda subject: None
    end: Callable[[Any], object] = lambda subject: None
    shape: Shape = SIX
    boot: bytes = BOOT


class World(stepped_child.World):
    """As that one, but a refused release is an error."""

    def release(self, name: str, *ids: int, ended: bool = False) -> None:
        number, each = self.of(name), np.array(ids, np.uint64)
        self.registry.release(each, self.time, token=number, seq=next(SEQS), ended=ended)


def _of(scenario: Scenario) -> Operation:
    """Return an operation of an open registry."""

    def prepare(path: Path) -> World:
        world = World(path, scenario.shape)
        scenario.prepare(world)
        world.time = NOW
        return world

    return Operation(prepare, scenario.act, check, end, scenario.shape)


def check(world: World) -> None:
    """Audit a registry in use."""
    registry = world.registry
    registry._check()
    for each in registry.sessions:
        assert each.number
        assert (each.expires, each.generation) in [
            lease[:2] for lease in registry.sessions._leases
        ] or each.expires > NOW


def end(world: World) -> None:
    """Close a registry; before that, let all sessions expire in a copy."""
    world.registry.close()
    del world.registry


REFUSED = ("release a foreign one", "release one twice")
OPERATIONS: dict[str, Operation] = {
    name: _of(scenario) for name, scenario in SCENARIOS.items() if name not in REFUSED
}
