"""A disk whose power can be cut: what was written to a file since its last sync may be lost."""

from __future__ import annotations

import os
import random
from pathlib import Path

VERSIONS = 6  # of the file since the last sync, among which a page on the disk may be


class Disk:
    """A file that is whole and synced now, and what of it is on the disk for certain.

    Whoever makes one puts `sync` in the place of ``os.fsync``.
    """

    def __init__(self, path: Path, chance: random.Random) -> None:
        self.path, self.chance = path, chance
        self.versions = [path.read_bytes()]
        self._fsync = os.fsync

    def sync(self, fd: int) -> None:
        """Sync a file; if it is ours, all of it is on the disk."""
        self._fsync(fd)
        if os.path.samestat(os.fstat(fd), self.path.stat()):
            self.versions = [self.path.read_bytes()]

    def note(self) -> None:
        """Some page may reach the disk as it is now."""
        if len(self.versions) < VERSIONS:
            self.versions.append(self.path.read_bytes())
        elif self.chance.random() < 0.2:
            self.versions[self.chance.randrange(1, VERSIONS)] = self.path.read_bytes()

    def cut(self) -> None:
        """Put each page or sector back to what it was at some time since the last sync."""
        versions = [*self.versions, self.path.read_bytes()]
        data = bytearray(self.chance.choice([versions[0], versions[-1]]))
        size = self.chance.choice([512, 4096])
        old = self.chance.random()
        for place in range(0, len(data), size):
            some = versions[0] if self.chance.random() < old else self.chance.choice(versions)
            data[place : place + size] = some[place : place + size].ljust(size, b"\0")
        self.path.write_bytes(data)
        self.versions = [bytes(data)]
