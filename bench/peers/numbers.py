"""Numbers that are made, not allocated: random ones and a counter; with a set they become pools."""

from __future__ import annotations

import random
import secrets
import uuid
from collections.abc import Collection
from itertools import count
from typing import Any, ClassVar

import fastuuid
import uuid_utils

from .base import Peer, Refused
from .plain import different


class RandomSet(Peer):
    """63 random bits and a set of what is held. No order, no pool, no owners, no cooling."""

    name = "getrandbits + set"
    does = frozenset({"unique", "double", "twice", "whole", "fork", "apart"})
    by_chance = frozenset({"fork", "apart"})

    def __init__(self, capacity: int, first: int = 1) -> None:
        super().__init__(capacity, first)
        self.held: set[int] = set()
        self.draw: Any = random.getrandbits

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

    def __init__(self, capacity: int, first: int = 1) -> None:
        super().__init__(capacity, first)
        self.draw = uuid.uuid4

    def acquire(self) -> int:
        """Draw until nobody holds it."""
        cid = self.draw().int
        while cid in self.held:
            cid = self.draw().int
        self.held.add(cid)
        return cid


class Numbers:
    """Makes numbers and keeps none, so it can neither take one back nor refuse one.

    Random numbers repeat by chance only, but nothing prevents it.
    """

    name: ClassVar[str]
    call: ClassVar[str] = "draw()"
    does: ClassVar[frozenset[str]] = frozenset({"bounded", "fork", "threads", "apart"})
    by_chance: ClassVar[frozenset[str]] = frozenset({"unique", "fork", "apart"})
    source: ClassVar[Any]

    def __init__(self, _capacity: int, _first: int = 1) -> None:
        self.draw = type(self).source  # which binds no function

    def acquire(self) -> Any:
        """Make a number, as `call` does, which is what is timed."""
        return self.draw()


class RandomBits(Numbers):
    """Of the Mersenne Twister: whoever sees 624 words of it knows all that follow."""

    name = "random.getrandbits(63)"
    call = "draw(63)"
    source = random.getrandbits

    def acquire(self) -> int:
        """Make a number."""
        number: int = self.draw(63)
        return number


class SecretBits(RandomBits):
    """Of the kernel: nobody can guess them."""

    name = "secrets.randbits(63)"
    source = secrets.randbits


class Uuid(Numbers):
    """An object of 122 random bits, as the following two."""

    name = "uuid.uuid4()"
    source = uuid.uuid4


class UuidUtils(Numbers):
    """In Rust."""

    name = "uuid_utils.uuid4()"
    source = uuid_utils.uuid4


class FastUuid(Numbers):
    """In Rust."""

    name = "fastuuid.uuid4()"
    source = fastuuid.uuid4


class Counter(Numbers):
    """Counts up: no number comes twice in this process, as long as it lives."""

    name = "itertools.count"
    call = "next(counter)"
    does = frozenset({"unique", "bounded", "threads"})
    by_chance = frozenset()

    def __init__(self, _capacity: int, first: int = 1) -> None:
        self.counter = count(first)

    def acquire(self) -> int:
        """Make a number."""
        return next(self.counter)
