"""Damages a registry's file: a flipped bit, zeros, and pages or sectors in each other's places.

The next process must refuse the file, or find in it what was there, or take it for a copy or for
what a power cut has left. `make errors` flips each bit (CIDALLOC_ERRORS=all), `make test` some.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from crash_model import BOOT, NEXT_BOOT, Facts, facts_of
from golden import SHAPE, use
from sparse import PAGE, Content, content
from stepped_child import NOW, TIMES

from cidalloc.errors import RegistryCorrupt, RegistryMismatch
from cidalloc.manager.storage.file_format import HEADER_BYTES, RECORD, ROW, Part

pytestmark = pytest.mark.slow

ALL = os.environ.get("CIDALLOC_ERRORS") == "all"
SOME = 400  # bits to flip, otherwise
ROWS, RECORDS = 9, 17  # that were used, and one that was not
UNITS = [RECORD, ROW, 512, PAGE]  # that are zeroed, or get in the place of another one
LIVE = [
    (0, HEADER_BYTES),
    (Part.ROWS.place, ROWS * ROW),
    (Part.RECORDS.place, RECORDS * RECORD),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    """A file with all that a file can have, which a killed process left; and its content."""
    path = tmp_path_factory.mktemp("damaged") / "it"
    return path, use(path)


class Judge:
    """Opens damaged files, and counts what comes of it."""

    def __init__(self, path: Path, left: Content) -> None:
        self.path, self.left = path, left
        self.found = Counter[str]()
        self.right = self.facts()
        self.late = self.facts(NEXT_BOOT)
        assert {session.anonymous for session in self.right.sessions.values()} == {False, True}

    def facts(self, boot: bytes = BOOT) -> Facts:
        return facts_of(self.left.put(self.path), SHAPE, NOW, TIMES, boot)

    def judge(self, damaged: Content, what: str) -> None:
        damaged.put(self.path)
        try:
            facts = facts_of(self.path, SHAPE, NOW, TIMES)
        except (RegistryCorrupt, RegistryMismatch):
            assert content(self.path) == damaged, f"{what}: it was refused, and written to"
            self.found["refused"] += 1
        else:
            cautious = (facts.holds, facts.first) == (self.late.holds, self.late.first)
            self.found["as before" if facts == self.right else "cautious"] += 1
            assert facts == self.right or cautious, f"{what}: nobody noticed"


@pytest.fixture(scope="module")
def judge(whole: tuple[Path, Content]) -> Judge:
    return Judge(*whole)


def changed(content: Content, *patches: tuple[int, bytes]) -> Content:
    """Return a content with other bytes at some places, each within a page."""
    pages = dict(content.pages)
    for place, data in patches:
        at = place % PAGE
        page = pages.get(place - at, bytes(PAGE))
        pages[place - at] = page[:at] + data + page[at + len(data) :]
    return Content(content.size, {place: page for place, page in pages.items() if any(page)})


@pytest.mark.timeout(3600)
def test_a_flipped_bit(judge: Judge) -> None:
    live = [place for start, n in LIVE for place in range(start, start + n)]
    places = [(place, bit) for place in live for bit in range(8)]
    for place, bit in places if ALL else random.Random(21).sample(places, SOME):
        flipped = bytes([judge.left.byte(place) ^ 1 << bit])
        judge.judge(changed(judge.left, (place, flipped)), f"byte {place}, bit {bit}")
    print(f"{len(places)} bits:", dict(judge.found))


@pytest.mark.parametrize("unit", UNITS)
def test_zeros(judge: Judge, unit: int) -> None:
    for start, n in LIVE:
        for place in range(start, start + max(n, 2 * unit), unit):
            judge.judge(changed(judge.left, (place, bytes(unit))), f"{unit} bytes at {place}")


@pytest.mark.parametrize("unit", UNITS)
def test_parts_in_wrong_places(judge: Judge, unit: int) -> None:
    places = [start + n * unit for start, _ in LIVE for n in range(1, 4)]
    for one, other in permutations(places, 2):
        copied = (other, judge.left.bytes(one, unit))
        judge.judge(changed(judge.left, copied), f"{unit} bytes of {one} at {other}")
        if one < other:
            swapped = (one, judge.left.bytes(other, unit))
            judge.judge(changed(judge.left, copied, swapped), f"{one} and {other} swapped")
