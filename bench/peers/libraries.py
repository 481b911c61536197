"""Pools on the bit sets, sorted lists and arrays of other packages."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Any

import numpy as np
from bitarray import bitarray
from intbitset import intbitset
from pyroaring import BitMap
from sortedcontainers import SortedList

from .base import POOL, Full, Peer, Refused
from .plain import different

ZERO = bitarray("0")


class Bits(Peer):
    """A bitarray of what is held: the lowest ID goes first, found with a hint where to begin."""

    name = "bitarray"
    does = POOL | {"lowest"}

    def __init__(self, capacity: int, first: int = 1) -> None:
        super().__init__(capacity, first)
        self.held = bitarray(capacity)
        self.held.setall(0)
        self.lowest = 0

    def acquire(self) -> int:
        """Issue the lowest ID."""
        at = self.held.find(0, self.lowest)
        if at < 0:
            raise Full
        self.held[at] = 1
        self.lowest = at + 1
        return self.first + at

    def release(self, cid: int) -> None:
        """Take back an ID that is held."""
        at = cid - self.first
        if not (0 <= at < len(self.held) and self.held[at]):
            raise Refused(cid)
        self.held[at] = 0
        self.lowest = min(self.lowest, at)

    def acquire_many(self, n: int) -> list[int]:
        """Take the lowest ones."""
        places = list(islice(self.held.search(ZERO, self.lowest), n))
        if len(places) < n:
            raise Full
        self.held[places] = 1
        if places:
            self.lowest = places[-1] + 1
        return [self.first + at for at in places]

    def release_many(self, ids: Collection[int]) -> None:
        """Take back IDs that are all held and all different."""
        places = [cid - self.first for cid in ids]
        if not places:
            return
        lowest = min(places)
        if lowest < 0 or max(places) >= len(self.held) or not self.held[places].all():
            raise Refused
        if len(set(places)) != len(places):
            raise Refused
        self.held[places] = 0
        self.lowest = min(self.lowest, lowest)


class Roaring(Peer):
    """A compressed bitmap of what is held, and one of what came back: the lowest goes first."""

    name = "pyroaring"
    does = POOL | {"lowest"}

    def __init__(self, capacity: int, first: int = 1) -> None:
        super().__init__(capacity, first)
        self.held = BitMap()
        self.free = BitMap()

    def acquire(self) -> int:
        """Issue the lowest ID that came back."""
        cid = int(self.free.pop()) if self.free else self.new_one()
        self.held.add(cid)
        return cid

    def release(self, cid: int) -> None:
        """Take back an ID that is held."""
        try:
            self.held.remove(cid)
        except (KeyError, OverflowError):
            raise Refused(cid) from None
        self.free.add(cid)

    def acquire_many(self, n: int) -> Any:
        """Take the lowest ones."""
        some = min(n, len(self.free))
        new = self.new(n - some)
        ids = self.free[:some]
        self.free -= ids
        if new:
            ids.add_range(new.start, new.stop)
        self.held |= ids
        return ids.to_array()

    def release_many(self, ids: Collection[int]) -> None:
        """Take back IDs that are all held and all different."""
        some = BitMap(ids)
        if len(some) != len(ids) or not some <= self.held:
            raise Refused
        self.held -= some
        self.free |= some


class IntBits(Peer):
    """A bit set of what is held, and one of what came back: the lowest goes first.

    Its bits are not compressed, and the lowest is searched from the first word on.
    """

    name = "intbitset"
    does = POOL | {"lowest"}

    def __init__(self, capacity: int, first: int = 1) -> None:
        super().__init__(capacity, first)
        self.held = intbitset()
        self.free = intbitset()

    def acquire(self) -> int:
        """Issue the lowest ID that came back."""
        if self.free:
            cid: int = self.free[0]
            self.free.remove(cid)
        else:
            cid = self.new_one()
        self.held.add(cid)
        return cid

    def release(self, cid: int) -> None:
        """Take back an ID that is held."""
        try:
            self.held.remove(cid)
        except KeyError:
            raise Refused(cid) from None
        self.free.add(cid)

    def acquire_many(self, n: int) -> list[int]:
        """Take the lowest ones."""
        some = min(n, len(self.free))
        new = self.new(n - some)
        ids = list(islice(self.free, some))
        self.free.difference_update(ids)
        ids.extend(new)
        self.held.update(ids)
        return ids

    def release_many(self, ids: Collection[int]) -> None:
        """Take back IDs that are all held and all different."""
        some = intbitset(ids)
        if len(some) != len(ids) or not some.issubset(self.held):
            raise Refused
        self.held -= some
        self.free |= some


class Sorted(Peer):
    """A sorted list of what came back and a set of what is held: the lowest ID goes first."""

    name = "sortedcontainers + set"
    does = POOL | {"lowest"}

    def __init__(self, capacity: int, first: int = 1) -> None:
        super().__init__(capacity, first)
        self.free = SortedList()
        self.held: set[int] = set()

    def acquire(self) -> int:
        """Issue the lowest ID."""
        cid: int = self.free.pop(0) if self.free else self.new_one()
        self.held.add(cid)
        return cid

    def release(self, cid: int) -> None:
        """Take back an ID that is held."""
        if cid not in self.held:
            raise Refused(cid)
        self.held.remove(cid)
        self.free.add(cid)

    def acquire_many(self, n: int) -> list[int]:
        """Take the lowest ones."""
        some = min(n, len(self.free))
        new = self.new(n - some)
        ids = list(islice(self.free, some))
        del self.free[:some]
        ids.extend(new)
        self.held.update(ids)
        return ids

    def release_many(self, ids: Collection[int]) -> None:
        """Take back IDs that are all held and all different."""
        self.held -= different(ids, self.held)
        self.free.update(ids)


class NumpyStack(Peer):
    """An array as a stack and one with the owner of each ID.

    Misses an ID that stands twice in one call, and knows no cooling: both would cost it more.
    """

    name = "NumPy stack + owner"
    does = POOL - {"twice"} | {"owner"}

    def __init__(self, capacity: int, first: int = 1) -> None:
        super().__init__(capacity, first)
        self.free = np.empty(capacity, np.uint64)
        self.top = 0
        self.holder = np.zeros(capacity, np.uint32)  # the owner + 1, or 0 if free

    def acquire(self, owner: int = 0) -> int:
        """Issue the ID that came back last."""
        if self.top:
            self.top -= 1
            cid = int(self.free[self.top])
        else:
            cid = self.new_one()
        self.holder[cid - self.first] = owner + 1
        return cid

    def release(self, cid: int, owner: int = 0) -> None:
        """Take back an ID of this owner."""
        at = cid - self.first
        if not (0 <= at < len(self.holder) and self.holder[at] == owner + 1):
            raise Refused(cid)
        self.holder[at] = 0
        self.free[self.top] = cid
        self.top += 1

    def acquire_many(self, n: int, owner: int = 0) -> np.ndarray[Any, Any]:
        """Cut the end off the stack."""
        some = min(n, self.top)
        new = self.new(n - some)
        ids = self.free[self.top - some : self.top].copy()
        self.top -= some
        if new:
            ids = np.concatenate([ids, np.arange(new.start, new.stop, dtype=np.uint64)])
        self.holder[ids - np.uint64(self.first)] = owner + 1
        return ids

    def release_many(self, ids: np.ndarray[Any, Any], owner: int = 0) -> None:
        """Take back IDs that are all of this owner."""
        places = ids - np.uint64(self.first)
        try:
            mine = bool((self.holder[places] == owner + 1).all())
        except IndexError:
            mine = False
        if not mine:
            raise Refused
        self.holder[places] = 0
        self.free[self.top : self.top + len(ids)] = ids
        self.top += len(ids)
