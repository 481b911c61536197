"""Pools in plain Python."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterable
from itertools import islice, repeat

from .base import POOL, Peer, Refused


class Unchecked(Peer):
    """A list as a stack. Checks nothing: a second release issues the ID twice."""

    name = "list, unchecked"
    does = POOL - {"double", "twice", "whole"}

    def __init__(self, capacity: int, first: int = 1) -> None:
        super().__init__(capacity, first)
        self.free: list[int] = []
        self.release = self.free.append  # type: ignore[assignment]

    def acquire(self) -> int:
        """Issue the ID that came back last."""
        return self.free.pop() if self.free else self.new_one()

    def acquire_many(self, n: int) -> list[int]:
        """Cut the end off the stack."""
        return cut(self, self.free, n)

    def release_many(self, ids: Iterable[int]) -> None:
        """Put the IDs on the stack."""
        self.free.extend(ids)


class ListSet(Peer):
    """A list as a stack and a set of what is held. Knows no owners and no cooling."""

    name = "list + set"

    def __init__(self, capacity: int, first: int = 1) -> None:
        super().__init__(capacity, first)
        self.free: list[int] = []
        self.held: set[int] = set()

    def acquire(self) -> int:
        """Issue the ID that came back last."""
        cid = self.free.pop() if self.free else self.new_one()
        self.held.add(cid)
        return cid

    def release(self, cid: int) -> None:
        """Take back an ID that is held."""
        if cid not in self.held:
            raise Refused(cid)
        self.held.remove(cid)
        self.free.append(cid)

    def acquire_many(self, n: int) -> list[int]:
        """Cut the end off the stack."""
        ids = cut(self, self.free, n)
        self.held.update(ids)
        return ids

    def release_many(self, ids: Collection[int]) -> None:
        """Take back IDs that are all held and all different."""
        self.held -= different(ids, self.held)
        self.free.extend(ids)


class DequeSet(Peer):
    """A queue and a set of what is held: the ID that waited longest goes first."""

    name = "deque + set"

    def __init__(self, capacity: int, first: int = 1) -> None:
        super().__init__(capacity, first)
        self.free: deque[int] = deque()
        self.held: set[int] = set()

    def acquire(self) -> int:
        """Issue the ID that came back first."""
        cid = self.free.popleft() if self.free else self.new_one()
        self.held.add(cid)
        return cid

    def release(self, cid: int) -> None:
        """Take back an ID that is held."""
        if cid not in self.held:
            raise Refused(cid)
        self.held.remove(cid)
        self.free.append(cid)

    def acquire_many(self, n: int) -> list[int]:
        """Take from the front of the queue."""
        some = min(n, len(self.free))
        new = self.new(n - some)
        popleft = self.free.popleft
        ids = [popleft() for _ in range(some)]
        ids.extend(new)
        self.held.update(ids)
        return ids

    def release_many(self, ids: Collection[int]) -> None:
        """Take back IDs that are all held and all different."""
        self.held -= different(ids, self.held)
        self.free.extend(ids)


class HeapSet(Peer):
    """A heap and a set of what is held: the lowest ID goes first."""

    name = "heapq + set"
    does = POOL | {"lowest"}

    def __init__(self, capacity: int, first: int = 1) -> None:
        super().__init__(capacity, first)
        self.free: list[int] = []
        self.held: set[int] = set()

    def acquire(self) -> int:
        """Issue the lowest ID."""
        cid = heapq.heappop(self.free) if self.free else self.new_one()
        self.held.add(cid)
        return cid

    def release(self, cid: int) -> None:
        """Take back an ID that is held."""
        if cid not in self.held:
            raise Refused(cid)
        self.held.remove(cid)
        heapq.heappush(self.free, cid)

    def acquire_many(self, n: int) -> list[int]:
        """Take the lowest ones."""
        free, pop = self.free, heapq.heappop
        some = min(n, len(free))
        new = self.new(n - some)
        ids = [pop(free) for _ in range(some)]
        ids.extend(new)
        self.held.update(ids)
        return ids

    def release_many(self, ids: Collection[int]) -> None:
        """Take back IDs that are all held and all different."""
        self.held -= different(ids, self.held)
        free, push = self.free, heapq.heappush
        for cid in ids:
            push(free, cid)


class FullPython(Peer):
    """The checks of the allocator, in plain Python, with the fast idioms.

    A dict tells the owner of each ID, a set per owner what it holds, and a queue keeps what was
    released until its time comes. One thing is left out, to the good of this peer: `reuse_at` must
    not go back from one release to the next, or a heap would be needed in place of the queue. It
    takes no lock, and does not notice a fork.
    """

    name = "full Python"
    does = POOL | {"owner", "cooling"}

    def __init__(self, capacity: int, first: int = 1) -> None:
        super().__init__(capacity, first)
        self.holder: dict[int, int] = {}
        self.holdings: dict[int, set[int]] = {}
        self.cooling: deque[tuple[int, int]] = deque()

    def acquire(self, owner: int = 0, now: int = 0) -> int:
        """Issue an ID that has cooled, or else a new one."""
        cooling = self.cooling
        cid = cooling.popleft()[1] if cooling and cooling[0][0] <= now else self.new_one()
        self.holder[cid] = owner
        try:
            self.holdings[owner].add(cid)
        except KeyError:
            self.holdings[owner] = {cid}
        return cid

    def release(self, cid: int, owner: int = 0, reuse_at: int = 0) -> None:
        """Take back an ID of this owner."""
        if self.holder.get(cid) != owner:
            raise Refused(cid)
        del self.holder[cid]
        self.holdings[owner].remove(cid)
        self.cooling.append((reuse_at, cid))

    def acquire_many(self, n: int, owner: int = 0, now: int = 0) -> list[int]:
        """Issue IDs that have cooled, and new ones for the rest."""
        cooling = self.cooling
        ready = 0
        for due, _ in islice(cooling, n):
            if due > now:
                break
            ready += 1
        new = self.new(n - ready)
        popleft = cooling.popleft
        ids = [popleft()[1] for _ in range(ready)]
        ids.extend(new)
        self.holder.update(zip(ids, repeat(owner)))
        self.holdings.setdefault(owner, set()).update(ids)
        return ids

    def release_many(self, ids: Collection[int], owner: int = 0, reuse_at: int = 0) -> None:
        """Take back IDs that are all of this owner and all different."""
        mine = self.holdings.setdefault(owner, set())
        mine -= different(ids, mine)
        self._forget(ids, reuse_at)

    def release_owner(self, owner: int, reuse_at: int = 0) -> int:
        """Take back all that this owner holds."""
        ids = self.holdings.pop(owner, set())
        self._forget(ids, reuse_at)
        return len(ids)

    def _forget(self, ids: Iterable[int], reuse_at: int) -> None:
        holder = self.holder
        for cid in ids:
            del holder[cid]
        self.cooling.extend(zip(repeat(reuse_at), ids))


def cut(peer: Peer, free: list[int], n: int) -> list[int]:
    """Return `n` IDs from the end of a stack, and new ones for the rest."""
    some = min(n, len(free))
    new = peer.new(n - some)
    ids = free[len(free) - some :]
    del free[len(free) - some :]
    ids.extend(new)
    return ids


def different(ids: Collection[int], held: set[int]) -> set[int]:
    """Return the IDs as a set; refuse if one is not held or stands there twice."""
    some = set(ids)
    if len(some) != len(ids) or not some <= held:
        raise Refused
    return some
