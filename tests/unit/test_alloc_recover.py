"""Tests a pool that takes over the blocks of an earlier one, after a crash or a power cut."""

from __future__ import annotations

import itertools
import random
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cidalloc import Allocator, errors

CAPACITY = 150
OWNERS = 4
ALL = b"\1" * OWNERS
WIDTHS = [1, 8, 64]
RECORD = 32  # bytes of a block; its fields stand at these places
USED, REUSE_AT, BUMP, END, SEEN = 0, 8, 29, 30, 31


def worn(width: int, seed: int = 0, blocks: int | None = None) -> tuple[bytearray, Allocator]:
    """Return the memory of a pool with a history, and the pool; its times are 1 to 100."""
    chance = random.Random(seed)
    memory = bytearray(Allocator.buffer_size(CAPACITY, width))
    pool = Allocator(CAPACITY, 1, width, buffer=memory, ready=blocks)
    for _ in range(200):
        owner = chance.randrange(OWNERS)
        if chance.random() < 0.6:
            try:
                pool.acquire_many(chance.randrange(8), owner, now=chance.randrange(50))
            except errors.Exhausted:
                continue
        else:
            mine = sorted(pool.held_by(owner).tolist())
            gone = chance.sample(mine, len(mine) // 2)
            pool.release_many(gone, owner, reuse_at=chance.randrange(1, 101))
    return memory, pool


def held(pool: Allocator) -> list[list[int]]:
    return [sorted(pool.held_by(owner).tolist()) for owner in range(OWNERS)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", WIDTHS)
def test_a_pool_goes_on_where_the_earlier_one_was(width: int, seed: int) -> None:
    memory, before = worn(width, seed)
    pool = Allocator(CAPACITY, 1, width, buffer=bytearray(memory), holders=ALL, latest=100)
    pool._check()
    assert held(pool) == held(before)
    assert (pool.opened, pool.peak) == (before.opened, len(before))
    assert pool.inactive >= before.inactive
    free = CAPACITY - len(pool) - pool.pinned
    known = {cid for ids in held(before) for cid in ids}
    assert known.isdisjoint(pool.acquire_many(free, 0, now=100).tolist())
    pool._check()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_free_id_still_cools(width: int) -> None:
    memory = bytearray(Allocator.buffer_size(CAPACITY, width))
    pool = Allocator(CAPACITY, 1, width, buffer=memory)
    pool.release_many(pool.acquire_many(CAPACITY), reuse_at=50)
    again = Allocator(CAPACITY, 1, width, buffer=bytearray(memory), holders=ALL)
    assert (again.cooling, again.next_due) == (CAPACITY, 50)
    with pytest.raises(errors.Exhausted):
        again.acquire(now=49)
    assert again.acquire(now=50) == 1


def test_the_highest_bit_corrects_bump() -> None:
    memory = bytearray(Allocator.buffer_size(64, 64))
    Allocator(64, 1, 64, buffer=memory).acquire_many(3)
    memory[RECORD + BUMP] = memory[RECORD + SEEN] = 2  # the process died between two stores
    pool = Allocator(64, 1, 64, buffer=memory, holders=ALL)
    assert pool.acquire() == 4
    pool._check()


def test_only_one_block_of_an_owner_has_room() -> None:
    memory = bytearray(Allocator.buffer_size(CAPACITY, 8))
    before = Allocator(CAPACITY, 1, 8, buffer=memory)
    before.acquire_many(10)
    before.release(8)
    memory[RECORD + BUMP] = 7
    pool = Allocator(CAPACITY, 1, 8, buffer=memory[:], holders=ALL)
    assert [pool.acquire(), pool.acquire()] == [8, 17]
    pool._check()


@pytest.mark.parametrize("width", WIDTHS)
def test_after_a_power_cut_every_free_id_cools(width: int) -> None:
    memory, before = worn(width, blocks=CAPACITY // width // 2 + 1)
    expected = [[], held(before)[1], held(before)[2], []]
    ready = before.ready
    pool = Allocator(
        CAPACITY, 1, width, buffer=memory, ready=ready, holders=b"\0\1\1\0", reuse_at=500
    )
    pool._check()
    assert held(pool) == expected
    assert pool.opened == ready
    with pytest.raises(errors.Exhausted):
        pool.acquire(now=499)
    assert pool.acquire(now=500)


def test_in_a_copy_ids_of_unknown_owners_are_free() -> None:
    memory, before = worn(1)
    with pytest.raises(errors.RegistryCorrupt):
        Allocator(CAPACITY, 1, 1, buffer=memory[:], holders=ALL[:2])
    pool = Allocator(CAPACITY, 1, 1, buffer=memory[:], holders=ALL[:2], live_snapshot=True)
    pool._check()
    assert held(pool) == [*held(before)[:2], [], []]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 1, "records of IDs"),  # of the block that is none
        (RECORD + BUMP, 9, "record of ID 1 "),
        (RECORD + SEEN, 9, "record of ID 1 "),
        (RECORD + END, 7, "record of ID 1 "),
        (RECORD + USED, 1, "record of ID 1 "),  # the bits of this block are in the next byte
        (RECORD + REUSE_AT + 7, 1, "record of ID 1 "),  # after `latest`
        (2 * RECORD + END, 0, "record of ID 9 "),  # a block that was never opened, before others
        (4 * RECORD + USED, 1, "record of ID 25 "),  # held, in a block that was never opened
        (5 * RECORD + END, 8, "record of ID 33 "),  # opened, but not the one before it
    ],
)
def test_damage_is_refused_and_nothing_is_written(place: int, value: int, message: str) -> None:
    memory = bytearray(Allocator.buffer_size(CAPACITY, 8))
    Allocator(CAPACITY, 1, 8, buffer=memory).acquire_many(3 * 8)
    memory[place] = value
    before = bytes(memory)
    with pytest.raises(errors.RegistryCorrupt, match=message):
        Allocator(CAPACITY, 1, 8, buffer=memory, holders=ALL, latest=100)
    assert memory == before


def test_holders_need_a_buffer() -> None:
    with pytest.raises(errors.InvalidArgument, match="holders needs a buffer"):
        Allocator(CAPACITY, holders=ALL)


# ---- Sealed blocks


def sealed(memory: bytearray, **how: object) -> Allocator:
    return Allocator(CAPACITY, 1, 1, buffer=memory, holders=ALL, sealed=True, **how)


def new_memory() -> bytearray:
    return bytearray(Allocator.sealed_blocks(0, CAPACITY + 1))


ACTS = st.tuples(
    st.sampled_from(["one", "many", "release", "release many", "owner", "wrong", "die"]),
    st.integers(0, OWNERS - 1),
    st.integers(1, 40),
    st.integers(0, 20),
)


@given(st.lists(ACTS, max_size=40))
def test_a_sealed_pool_does_what_another_one_does(acts: list[tuple[str, int, int, int]]) -> None:
    plain, memory = Allocator(CAPACITY, 1, 1), new_memory()
    pool, now = sealed(memory), 0
    for what, owner, n, cool in acts:
        now += cool
        mine = plain.held_by(owner)[::-2][:n].tolist()
        for each in (plain, pool):
            with suppress(errors.Exhausted, errors.NotHeld, errors.NotOwner, errors.Duplicate):
                if what == "one":
                    each.acquire(owner, now)
                elif what == "many":
                    each.acquire_many(n, owner, now)
                elif what == "owner":
                    each.release_owner(owner, now + cool)
                elif what == "release" and mine:
                    each.release(mine[0], owner, now + cool)
                elif what == "release many":
                    each.release_many(mine, owner, now + cool)
                elif what == "wrong":
                    each.release_many([*mine, 1, 1], owner, now + cool)
            each._check()
        assert held(pool) == held(plain)
        assert (pool.opened, pool.free, pool.next_due) == (plain.opened, plain.free, plain.next_due)
        if what == "die":
            again = sealed(bytearray(memory))
            again._check()
            assert held(again) == held(plain) and again.high_water == plain.high_water


def test_a_block_in_the_place_of_another_one() -> None:
    """Free, held and new ones."""
    memory = new_memory()
    pool = sealed(memory)
    pool.release_many(pool.acquire_many(6, 1)[:3], 1, 50)
    for one, other in itertools.permutations(range(1, 9), 2):
        left = bytearray(memory)
        left[other * RECORD : (other + 1) * RECORD] = memory[one * RECORD : (one + 1) * RECORD]
        with pytest.raises(errors.RegistryCorrupt):
            sealed(left)


def test_what_a_sealed_pool_has_not() -> None:
    pool = sealed(new_memory())
    for call in (lambda: pool.reserve([1]), pool.snapshot):
        with pytest.raises(errors.InvalidArgument, match="sealed blocks has no"):
            call()
    for how in ({}, {"holders": ALL, "block": 8}):
        memory = bytearray(Allocator.buffer_size(CAPACITY, how.get("block", 1)))
        with pytest.raises(errors.InvalidArgument, match="sealed needs holders, and blocks of one"):
            Allocator(CAPACITY, buffer=memory, sealed=True, **{"block": 1, **how})
