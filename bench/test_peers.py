"""The peers do what they say: otherwise the allocator would be compared with something broken."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from compiled import module
from duties import CLAIMS, does, many
from measure import IDIOMS, LOOPS
from peers import DUTIES, NUMBERS, PEERS, Full
from workloads import FIRST, MAKERS, OURS, Statements, make

from cidalloc import Allocator
from cidalloc.errors import Exhausted

POOLS = [*OURS, *(peer.name for peer in PEERS)]


@pytest.mark.parametrize("duty", DUTIES)
@pytest.mark.parametrize("name", CLAIMS)
def test_contestants_do_what_they_say_and_no_more(name: str, duty: str) -> None:
    """Each tick and each dash of the table of peers is tried."""
    assert does(name, duty) == (duty in CLAIMS[name])


@pytest.mark.parametrize("name", POOLS)
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
                pool.release_many(many(pool, some))
            else:
                pool.release(some[0])


@pytest.mark.parametrize(
    "name", ["cidalloc 1", *(peer.name for peer in PEERS if "reuse" in peer.does)]
)
def test_every_id_is_issued_before_the_pool_is_full(name: str) -> None:
    """The whole pool and nothing else, and again after everything came back."""
    pool = make(name, 50)
    for _ in range(3):
        ids = [int(cid) for cid in pool.acquire_many(20)] + [pool.acquire() for _ in range(30)]
        assert sorted(ids) == list(range(FIRST, FIRST + 50))
        with pytest.raises((Full, Exhausted)):
            pool.acquire()
        with pytest.raises((Full, Exhausted)):
            pool.acquire_many(1)
        for cid in ids[:10]:
            pool.release(cid)
        pool.release_many(many(pool, ids[10:]))


@pytest.mark.parametrize("peer", [*PEERS, *NUMBERS], ids=lambda peer: peer.name)
def test_peers_say_what_they_are(peer: Any) -> None:
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


def test_loops_in_c_release_what_they_acquire() -> None:
    """And count what is refused, so none of them can be fast by failing."""
    loops, pool = module("from_c"), Allocator(10, block=1)
    assert loops.from_pool(pool, 1000, 10) == 0
    assert len(pool) == 0
    assert loops.from_pool(pool, 20, 20) == 10 + 10
    assert loops.from_bump(1000, 10) == loops.from_malloc(1000, 10) == 0


@pytest.mark.parametrize("source", [*IDIOMS.values(), *LOOPS.values()])
def test_what_users_write_gives_everything_back(source: str) -> None:
    """The statements run, so many times, and leave the pool as it was."""
    pool, full, turns = Allocator(2000), Allocator(2000), []
    full.acquire_many(1000)
    names = {"pool": pool, "full": full, "turns": turns}
    Statements(f"{source}\nturns.append(1)", names).run(3)
    assert (len(turns), len(pool), len(full)) == (3, 0, 1000)
