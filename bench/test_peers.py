"""The peers do what they say: otherwise the allocator would be compared with something broken."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from peers import PEERS, Full, FullPython, NumpyStack, Peer, Refused
from workloads import FIRST, MAKERS, OURS, make

from cidalloc.errors import CidError

CHECKED = [peer for peer in PEERS if peer.checks]
FULL = (Full, CidError)
REFUSED = (Refused, CidError)
ALL = [*OURS, *(peer.name for peer in PEERS)]


def checks(name: str) -> frozenset[str]:
    """Return what a contestant refuses; the allocator refuses everything."""
    return next((peer.checks for peer in PEERS if peer.name == name), FullPython.checks)


@pytest.mark.parametrize("name", ALL)
def test_no_id_is_held_twice(name: str) -> None:
    """A long random mixture of all calls, against a plain set."""
    pool = make(name, 4000)
    chance = random.Random(1)  # noqa: S311
    held: list[int] = []
    for _ in range(1500):
        if len(held) < 300 and chance.random() < 0.6:
            new = pool.acquire_many(7) if chance.random() < 0.3 else [pool.acquire()]
            held += [int(cid) for cid in new]
            assert len(set(held)) == len(held)
        elif held:
            chance.shuffle(held)
            some = held[-5:] if chance.random() < 0.3 else held[-1:]
            del held[-len(some) :]
            if len(some) > 1:
                pool.release_many(np.array(some, np.uint64) if array_like(name) else some)
            else:
                pool.release(some[0])


def array_like(name: str) -> bool:
    """Tell whether a contestant takes arrays."""
    return name in OURS or name == NumpyStack.name


@pytest.mark.parametrize("name", ["cidalloc 1", *(peer.name for peer in PEERS if peer.bounded)])
def test_every_id_is_issued_before_the_pool_is_full(name: str) -> None:
    """The whole pool and nothing else, and again after everything came back."""
    pool = make(name, 50)
    for _ in range(3):
        ids = [int(cid) for cid in pool.acquire_many(20)] + [pool.acquire() for _ in range(30)]
        assert sorted(ids) == list(range(FIRST, FIRST + 50))
        with pytest.raises(FULL):
            pool.acquire()
        with pytest.raises(FULL):
            pool.acquire_many(1)
        for cid in ids[:10]:
            pool.release(cid)
        rest = ids[10:]
        pool.release_many(np.array(rest, np.uint64) if array_like(name) else rest)


@pytest.mark.parametrize("name", [name for name in ALL if "double" in checks(name)])
def test_what_nobody_holds_is_refused(name: str) -> None:
    """Released before, never issued, outside the pool; and a refused bulk call changes nothing."""
    pool = make(name, 64)
    cid, other = pool.acquire(), pool.acquire()
    pool.release(cid)
    for wrong in (cid, FIRST + 40, FIRST + 64, FIRST - 1):
        with pytest.raises(REFUSED):
            pool.release(wrong)
        if "twice" in checks(name) and wrong != FIRST - 1:
            with pytest.raises(REFUSED):
                pool.release_many([other, wrong])
    pool.release(other)


@pytest.mark.parametrize("name", [name for name in ALL if "twice" in checks(name)])
def test_one_id_twice_in_a_call_is_refused(name: str) -> None:
    """And neither is released."""
    pool = make(name, 64)
    cid = pool.acquire()
    with pytest.raises(REFUSED):
        pool.release_many([cid, cid])
    pool.release(cid)


@pytest.mark.parametrize("name", [name for name in ALL if "owner" in checks(name)])
def test_another_owner_is_refused(name: str) -> None:
    """By the scalar and by the bulk call."""
    pool = make(name, 1000)
    cid, ids = pool.acquire(3), pool.acquire_many(5, 3)
    with pytest.raises(REFUSED):
        pool.release(cid, 4)
    with pytest.raises(REFUSED):
        pool.release_many(ids, 4)
    pool.release(cid, 3)
    pool.release_many(ids, 3)


@pytest.mark.parametrize("name", [name for name in ALL if "cooling" in checks(name)])
def test_released_ids_cool(name: str) -> None:
    """An ID comes back at its time and not before, and expiry gives all of an owner's."""
    pool = make(name, 64)
    ids = pool.acquire_many(64, 5, 0)
    assert pool.release_owner(5, 10) == 64
    with pytest.raises(FULL):
        pool.acquire(6, 9)
    again = pool.acquire_many(64, 6, 10)
    assert sorted(map(int, again)) == sorted(map(int, ids))
    with pytest.raises(REFUSED):
        pool.release(int(ids[0]), 5)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peers_say_what_they_are(peer: type[Peer]) -> None:
    """Each has a name of its own, an explanation, and stands among the contestants."""
    assert peer.__doc__
    assert peer.name in MAKERS


def test_the_floor_counts_and_does_nothing() -> None:
    """The floor has the allocator's signatures."""
    floor: Any = make("floor")
    assert floor.acquire(1, now=2) == floor.acquire() - 1
    assert floor.release(5, 1, reuse_at=3) is None
    out = np.empty(3, np.uint64)
    assert floor.acquire_many(3, out=out) is out
    assert floor.acquire_many(3).shape == (3,)
