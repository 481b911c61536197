"""A Triton server for tests whose model shows in each answer that it was this server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from proxies import free_ports

from cidalloc.devserver.demo import MODEL, write_repository
from cidalloc.manager.settings import Settings

BASE = 1_000_000
"""What a server's sums begin with is a multiple of this number."""

_KEEPER = Path(__file__).with_name("keep_server.py")


class BasedServer:
    """A server with a file, at ports that stay. It runs from now on.

    Args:
        folder: for its files.
        base: the sums of its model begin with this number; 0: it has only the manager.
        manager: whether it has a manager.
        settings: of its manager.

    Attributes:
        pid: its process, which leads a process group.
    """

    def __init__(self, folder: Path, base: int, manager: bool = True, **settings: Any) -> None:
        self.base = base
        self.state, self._models = folder / "state", folder / "models"
        values = {"state": str(self.state), "cooldown_ms": 200, "grace_ms": 500, "fresh": True}
        write_repository(self._models, Settings(**{**values, **settings}))
        if not manager:
            (self._models / "cidmgr").rename(folder / "unused")
        if base:
            file = self._models / MODEL / "1" / "model.py"
            text, old = file.read_text(), '(0 if read("START")'
            assert old in text
            file.write_text(text.replace(old, f'({base} if read("START")'))
        else:
            (self._models / MODEL).rename(folder / "unused")
        self.ports = free_ports(3)
        self.start()

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        command = [sys.executable, str(_KEEPER), str(self._models), *map(str, self.ports)]
        self._keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._keeper.stdout is not None
        self.pid = int(self._keeper.stdout.readline())  # empty if it did not start

    def stop(self) -> None:
        """Kill it. May be repeated."""
        if self._keeper.poll() is None:
            self._keeper.communicate()

    def url(self, kind: str) -> str:
        """Return its URL for ``http`` or ``grpc``."""
        return f"{kind}://127.0.0.1:{self.ports[kind == 'grpc']}"


def send(sequence: Any, value: int, **options: Any) -> int:
    """Send a number, and return the sum."""
    return int(sequence.infer({"INPUT": [[value]]}, **options)["OUTPUT"][0, 0])
