"""What is in a sparse file, without its holes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

PAGE = 4096
_BLANK = bytes(PAGE)


class Content(NamedTuple):
    """A file's length, and its pages that are not all zero, by their places."""

    size: int
    pages: dict[int, bytes]

    def put(self, path: Path) -> Path:
        """Let the file at `path` have this content, and no other."""
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(0)
            file.truncate(self.size)
            for place, page in self.pages.items():
                file.seek(place)
                file.write(page)
        return path

    def byte(self, place: int) -> int:
        """Return one byte."""
        return self.bytes(place, 1)[0]

    def bytes(self, place: int, length: int) -> bytes:
        """Return some bytes of one page."""
        return self.pages.get(place - place % PAGE, _BLANK)[place % PAGE :][:length]


def content(path: Path) -> Content:
    """Read a file."""
    pages: dict[int, bytes] = {}
    with path.open("rb") as file:
        fd, end = file.fileno(), 0
        size = os.fstat(fd).st_size
        while True:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError:  # there is no more data
                return Content(size, pages)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            for place in range(start - start % PAGE, end, PAGE):
                page = os.pread(fd, PAGE, place)
                if page != _BLANK[: len(page)]:
                    pages[place] = page
