"""A disk whose power can be cut: what was written to a file since its last sync may be lost."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

from sometimes import sometimes
from sparse import PAGE, Content, content

VERSIONS = 6  # of the file since the last sync, among which a page on the disk may be


class Disk:
    """A file that is whole and synced now, and what of it is on the disk for certain.

    Whoever makes one puts `sync` in the place of ``os.fsync``, and `allocate` in that of
    ``os.posix_fallocate``.

    Attributes:
        full: no file can grow.
    """

    def __init__(self, path: Path, chance: random.Random) -> None:
        self.path, self.chance = path, chance
        self.versions = [content(path)]
        self._fsync, self._allocate = os.fsync, os.posix_fallocate
        self.full = False

    def sync(self, fd: int) -> None:
        """Sync a file; if it is ours, all of it is on the disk."""
        self._fsync(fd)
        if os.path.samestat(os.fstat(fd), self.path.stat()):
            self.versions = [content(self.path)]

    def allocate(self, fd: int, place: int, length: int) -> None:
        """Let a file grow, unless the disk is full."""
        sometimes("the disk refuses to grow", self.full)
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._allocate(fd, place, length)

    def note(self) -> None:
        """Some page may reach the disk as it is now."""
        if len(self.versions) < VERSIONS:
            self.versions.append(content(self.path))
        elif self.chance.random() < 0.2:
            self.versions[self.chance.randrange(1, VERSIONS)] = content(self.path)

    def cut(self) -> None:
        """Put each page or sector back to what it was at some time since the last sync."""
        versions = [*self.versions, content(self.path)]
        base = self.chance.choice([versions[0], versions[-1]])
        unit = self.chance.choice([512, PAGE])
        old = self.chance.random()
        pages = {}
        for place in sorted({place for each in versions for place in each.pages}):
            page = b""
            for part in range(place, place + PAGE, unit):
                some = versions[0] if self.chance.random() < old else self.chance.choice(versions)
                page += some.bytes(part, unit)
            if place < base.size:
                pages[place] = page
        left = Content(base.size, pages)
        left.put(self.path)
        self.versions = [left]
