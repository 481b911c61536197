"""What every peer has, and what one may do for its caller.

Bulk calls apply whole or not at all where the peer checks anything. What a peer does not do is work
that it saves: it makes the peer faster, never slower.
"""

from __future__ import annotations

from typing import Any, ClassVar

DUTIES = {
    "unique": "unique",
    "reuse": "reuse",
    "double": "checks",
    "twice": "checks bulk",
    "whole": "whole bulk",
    "owner": "owners",
    "cooling": "cooldown",
    "bounded": "bounded",
    "every": "all usable",
    "lowest": "lowest first",
    "fork": "fork",
    "threads": "threads",
    "apart": "processes",
}
"""What a peer may do, and its name in the tables; duties.py tells what each means, and tries it."""

POOL = frozenset({"unique", "reuse", "double", "twice", "whole", "bounded", "every"})
"""What most pools do."""


class Refused(Exception):
    """The caller may not release this ID."""


class Full(Exception):
    """No ID is left."""


class Peer:
    """A range of IDs, of which those from `next` on were never issued.

    Peers open new IDs by counting and keep a list only of those that came back, so an empty one is
    small.
    """

    name: ClassVar[str]
    does: ClassVar[frozenset[str]] = POOL
    by_chance: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, capacity: int, first: int = 1) -> None:
        self.first = self.next = first
        self.end = first + capacity

    def acquire(self) -> int:
        """Issue one ID."""
        raise NotImplementedError

    def release(self, cid: int) -> None:
        """Take one ID back."""
        raise NotImplementedError

    def acquire_many(self, n: int) -> Any:
        """Issue `n` IDs; here with the scalar call, for want of something better."""
        acquire = self.acquire
        return [acquire() for _ in range(n)]

    def release_many(self, ids: Any) -> None:
        """Take IDs back; here with the scalar call, for want of something better."""
        release = self.release
        for cid in ids:
            release(cid)

    def new(self, n: int) -> range:
        """Open `n` IDs that were never issued."""
        start = self.next
        if start + n > self.end:
            raise Full
        self.next = start + n
        return range(start, start + n)

    def new_one(self) -> int:
        """Open one ID that was never issued."""
        cid = self.next
        if cid == self.end:
            raise Full
        self.next = cid + 1
        return cid
