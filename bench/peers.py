"""The peers: other ways to hand out unique IDs, each as good as its own idea allows.

All have `acquire`, `release`, `acquire_many` and `release_many`. Bulk calls apply whole or not at
all where the peer checks anything. `checks` says which mistakes a peer refuses:

- `double`: an ID that nobody holds, or that was never issued;
- `twice`: the same ID twice in one bulk call;
- `owner`: an ID that somebody else holds.

What a peer does not check is work that it saves: it makes the peer faster, never slower. Peers
open new IDs by counting and keep a list only of those that came back, so an empty one is small.
"""

from __future__ import annotations

import heapq
import random
import uuid
from collections import deque
from collections.abc import Collection, Iterable
from itertools import islice, repeat
from typing import Any, ClassVar

import numpy as np
from bitarray import bitarray
from pyroaring import BitMap


class Refused(Exception):
    """The caller may not release this ID."""


class Full(Exception):
    """No ID is left."""


class Peer:
    """What every peer has: a range of IDs, of which those from `next` on were never issued."""

    name: ClassVar[str]
    checks: ClassVar[frozenset[str]] = frozenset({"double", "twice"})
    bounded: ClassVar[bool] = True

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


class Unchecked(Peer):
    """A list as a stack. Checks nothing: a second release issues the ID twice."""

    name = "list, unchecked"
    checks: ClassVar[frozenset[str]] = frozenset()

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


class RandomSet(Peer):
    """63 random bits and a set of what is held. No order, no pool, no owners, no cooling."""

    name = "getrandbits + set"
    bounded = False

    def __init__(self, capacity: int, first: int = 1) -> None:
        super().__init__(capacity, first)
        self.held: set[int] = set()
        self.draw = random.getrandbits

    def acquire(self) -> int:
        """Draw until nobody holds it."""
        cid = self.draw(63)
        while cid in self.held:
            cid = self.draw(63)
        self.held.add(cid)
        return cid

    def release(self, cid: int) -> None:
        """Take back an ID that is held."""
        if cid not in self.held:
            raise Refused(cid)
        self.held.remove(cid)

    def release_many(self, ids: Collection[int]) -> None:
        """Take back IDs that are all held and all different."""
        self.held -= different(ids, self.held)


class UuidSet(RandomSet):
    """`uuid.uuid4` as a number, and a set of what is held. As above, with 122 random bits."""

    name = "uuid4 + set"

    def acquire(self) -> int:
        """Draw until nobody holds it."""
        cid = uuid.uuid4().int
        while cid in self.held:
            cid = uuid.uuid4().int
        self.held.add(cid)
        return cid


class Bits(Peer):
    """A bitarray of what is held: the lowest ID goes first, found with a hint where to begin."""

    name = "bitarray"

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


ZERO = bitarray("0")


class Roaring(Peer):
    """A compressed bitmap of what is held, and one of what came back: the lowest goes first."""

    name = "pyroaring"

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


class NumpyStack(Peer):
    """An array as a stack and one with the owner of each ID.

    Misses an ID that stands twice in one call, and knows no cooling: both would cost it more.
    """

    name = "NumPy stack + owner"
    checks: ClassVar[frozenset[str]] = frozenset({"double", "owner"})

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


class FullPython(Peer):
    """Everything that the allocator does, in plain Python, with the fast idioms.

    A dict tells the owner of each ID, a set per owner what it holds, and a queue keeps what was
    released until its time comes. One thing is left out, to the good of this peer: `reuse_at` must
    not go back from one release to the next, or a heap would be needed in place of the queue.
    """

    name = "full Python"
    checks: ClassVar[frozenset[str]] = frozenset({"double", "twice", "owner", "cooling"})

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


PEERS: tuple[type[Peer], ...] = (
    Unchecked,
    ListSet,
    DequeSet,
    HeapSet,
    RandomSet,
    UuidSet,
    Bits,
    Roaring,
    NumpyStack,
    FullPython,
)
