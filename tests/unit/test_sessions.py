"""Tests the table of sessions: hashing, the wheel of leases, and what it makes of used rows."""

from __future__ import annotations

import gc
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cidalloc import Allocator
from cidalloc.errors import Forked, RegistryCorrupt
from cidalloc.manager._sessions import Sessions

TICK = 128
LAP = 2**14 * TICK
FREE, OPEN, ENDING = 0, 1, 2
FOREVER = 2**39


class Table:
    """A table of sessions in memory, with shorter calls."""

    def __init__(self, rows: int = 20, ready: int | None = None, now: int = 0) -> None:
        self.pool = Allocator(1000, 1, 1)
        self.memory = bytearray(Sessions.size(rows))
        self.ready = rows + 1 if ready is None else ready
        self.sessions = Sessions(self.pool, self.memory, self.ready)
        self.sessions.recover(bytes(self.ready), now, 0)

    def open(self, name: int, expires: int = FOREVER, **values: Any) -> int:
        given = {"generation": name, "ttl": 10, "cooldown": 5, "now": 0, "label": b"", **values}
        return self.sessions.open(digest(name), expires=expires, **given)


def digest(name: int) -> bytes:
    return struct.pack("=QQ", name * 0x9E3779B97F4A7C15 & 2**64 - 1, name)


def row(
    state: int = OPEN,
    generation: int = 1,
    name: int = 1,
    seq: int = 0,
    ttl: int = 10,
    cooldown: int = 5,
    opened_at: int = 0,
    anonymous: int = 0,
    label: bytes = b"",
) -> bytes:
    life = generation << 2 | state
    return struct.pack(
        "=QQ16sqqqQ64s", life, seq, digest(name), ttl, cooldown, opened_at, anonymous, label
    )


def taken_over(*rows: bytes, generation: int = 9, now: int = 0, grace: int = 0) -> Any:
    """A table in used rows; which held IDs; and what was ending."""
    memory = bytearray(128) + b"".join(rows) + bytes(5 * 128)
    ready = len(memory) // 128
    holders = Sessions.holders(memory, ready, generation)
    sessions = Sessions(Allocator(1000, 1, 1), memory, ready)
    return sessions, holders, sessions.recover(holders, now, grace)


# ---- Rows


def test_a_session_has_what_it_was_opened_with() -> None:
    table = Table()
    at = table.open(7, 1234, ttl=11, cooldown=12, now=13, label="Ünï".encode())
    sessions = table.sessions
    assert (at, len(sessions), sessions.count, sessions.opened) == (1, 1, 1, 1)
    assert sessions.find(digest(7)) == at and not sessions.find(digest(8))
    assert sessions.generation(at) == 7
    assert sessions.expires(at) == 1234
    assert (sessions.ttl(at), sessions.cooldown(at), sessions.opened_at(at)) == (11, 12, 13)
    assert (sessions.label(at), sessions.anonymous(at), sessions.seq(at)) == ("Ünï", False, 0)
    sessions.set_seq(at, 2**63 - 1)
    assert sessions.seq(at) == 2**63 - 1
    sessions.raise_cooldown(at, 11)
    assert sessions.cooldown(at) == 12
    sessions.raise_cooldown(at, 99)
    assert sessions.cooldown(at) == 99


def test_a_row_holds_nothing_of_the_session_before() -> None:
    table = Table()
    at = table.open(1, label=b"x" * 64)
    table.sessions.set_seq(at, 5)
    table.sessions.end(at, 0)
    assert table.open(2) == at
    assert table.sessions.seq(at) == 0 and table.sessions.label(at) == ""
    assert not table.sessions.find(digest(1))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (b"", ""),
        (b"a" * 64, "a" * 64),
        (b"a" * 65, "a" * 64),
        ("ü".encode() * 33, "ü" * 32),
        (b"a" + "ü".encode() * 32, "a" + "ü" * 31 + "\ufffd"),
        (b"\xff", "\ufffd"),
    ],
)
def test_labels_are_cut(given: bytes, kept: str) -> None:
    table = Table()
    assert table.sessions.label(table.open(1, label=given)) == kept


def test_an_anonymous_one_is_found_by_nobody() -> None:
    table = Table()
    at = table.sessions.open(b"", 1, 100, 10, 5, 0, b"")
    assert table.sessions.anonymous(at)
    assert not table.sessions.find(bytes(16))
    other = table.sessions.open(bytes(16), 2, 100, 10, 5, 0, b"")
    assert table.sessions.find(bytes(16)) == other
    table.sessions.end(at, 0)
    assert table.sessions.find(bytes(16)) == other


def test_the_lowest_row_is_taken_first_and_a_free_one_again() -> None:
    table = Table(5)
    assert [table.open(n) for n in range(1, 6)] == [1, 2, 3, 4, 5]
    assert table.open(6) == 0, "no more rows"
    for at in (2, 4):
        table.sessions.end(at, 0)
    assert sorted((table.open(7), table.open(8))) == [2, 4]
    assert table.open(9) == 0
    assert table.sessions.numbers() == [1, 2, 3, 4, 5]
    assert table.sessions.numbers(2) == [1, 2]
    assert table.sessions.numbers(2, after=3) == [4, 5]


def test_rows_become_ready() -> None:
    table = Table(5, ready=2)
    assert (table.open(1), table.open(2)) == (1, 0)
    table.sessions.set_ready(4)
    assert [table.open(n) for n in (2, 3, 4)] == [2, 3, 0]
    table.sessions.set_ready(1)
    assert table.sessions.ready == 4, "it is only raised"


@pytest.mark.parametrize("at", [0, 2, 3, 2**32 - 1])
def test_a_number_that_is_no_session_is_a_bug(at: int) -> None:
    table = Table()
    table.open(1)
    table.sessions.end(table.open(2), 0)
    for call in (table.sessions.seq, table.sessions.expires, lambda at: table.sessions.end(at, 0)):
        with pytest.raises(AssertionError, match="no session"):
            call(at)


def test_the_end_of_a_session_gives_its_ids_back() -> None:
    table = Table()
    one, two = table.open(1), table.open(2)
    table.pool.acquire_many(10, one)
    table.pool.acquire_many(5, two)
    assert table.sessions.end(one, 500) == 10
    assert table.pool.active == 5 and table.pool.next_due == 500
    table.pool._check()


# ---- Hashing


def test_ten_thousand_sessions_are_found() -> None:
    table = Table(10_000)
    numbers = {name: table.open(name) for name in range(1, 10_001)}
    assert all(table.sessions.find(digest(name)) == at for name, at in numbers.items())
    for name in range(1, 10_001, 3):
        table.sessions.end(numbers.pop(name), 0)
    for name in range(1, 10_001):
        assert table.sessions.find(digest(name)) == numbers.get(name, 0)
    assert len(table.sessions) == len(numbers)


@pytest.mark.parametrize("order", [1, -1, 7])
def test_digests_whose_low_bits_are_equal(order: int) -> None:
    table = Table(2_000)
    same = [struct.pack("=QQ", 5 | name << 40, name & 1) for name in range(1_500)]
    for name, each in enumerate(same):
        assert table.sessions.open(each, name, FOREVER, 1, 1, 0, b"") == name + 1
    gone = set(range(0, 1_500, 2))
    for name in sorted(gone, key=lambda n: n * order % 1_501):
        table.sessions.end(name + 1, 0)
    for name, each in enumerate(same):
        assert table.sessions.find(each) == (0 if name in gone else name + 1)


def test_both_words_of_a_digest_count() -> None:
    table = Table()
    table.sessions.open(struct.pack("=QQ", 1, 2), 1, FOREVER, 1, 1, 0, b"")
    assert not table.sessions.find(struct.pack("=QQ", 1, 3))
    assert not table.sessions.find(struct.pack("=QQ", 2, 2))


# ---- The wheel


@pytest.mark.parametrize("start", [0, 1, 127, 128, 10**9, 2**40])
@pytest.mark.parametrize("after", [0, 1, 127, 128, 129, LAP - 1, LAP, LAP + 1, 5 * LAP + 300])
def test_an_expiry_is_seen_within_a_tick(start: int, after: int) -> None:
    table = Table(now=start)
    at = table.open(1, start + after)
    seen = ((start + after) // TICK + 1) * TICK
    for now in (start, start + after // 2, start + after, seen - 1):
        assert table.sessions.due(now) == 0
    assert table.sessions.due(seen) == at, "at once, whatever it looked at before"
    assert table.sessions.due(seen) == at, "until it is ended"
    table.sessions.end(at, 0)
    assert table.sessions.due(seen) == table.sessions.due(seen + 9 * LAP) == 0


@pytest.mark.parametrize("step", [1, 50, 128, 1000, LAP - TICK, LAP, LAP + TICK, 3 * LAP])
def test_time_in_steps_sees_the_same(step: int) -> None:
    table = Table(100)
    wanted = {table.open(n, n * n * 40): n * n * 40 for n in range(1, 100)}
    now = 0
    while wanted:
        now += max(step, 20_000 if step < 1000 else step)
        while at := table.sessions.due(now):
            assert wanted.pop(at) < now
            table.sessions.end(at, 0)
        assert all(expires + TICK > now for expires in wanted.values())
    assert len(table.sessions) == 0


def test_a_huge_jump_of_time() -> None:
    table = Table(now=10)
    numbers = {table.open(n, 10 ** (n % 12)) for n in range(1, 15)}
    gone = set()
    while at := table.sessions.due(2**50):
        gone.add(at)
        table.sessions.end(at, 0)
    assert gone == numbers
    at = table.open(99, 2**50 + 1)
    assert table.sessions.due(2**50) == 0
    assert table.sessions.due(2**50 + 2 * TICK) == at


def test_renewal_moves_the_expiry_and_only_later() -> None:
    table = Table()
    at = table.open(1, 1_000)
    table.sessions.renew(at, 999)
    assert table.sessions.expires(at) == 1_000
    table.sessions.renew(at, 5_000)
    assert table.sessions.due(5_000) == 0
    table.sessions.renew(at, 3 * LAP)
    assert table.sessions.due(3 * LAP) == 0
    assert table.sessions.due(3 * LAP + TICK) == at
    table.sessions.renew(at, 4 * LAP)
    assert table.sessions.due(3 * LAP + TICK) == 0, "one that was not ended yet"
    assert table.sessions.due(4 * LAP + TICK) == at


def test_a_lease_that_is_over_from_the_start() -> None:
    table = Table(now=10 * TICK)
    assert table.sessions.due(10 * TICK) == 0
    at = table.open(1, 5)
    assert table.sessions.due(11 * TICK) == at


@pytest.mark.parametrize("ended", [[1], [2], [3], [1, 2], [2, 3], [1, 3], [3, 2, 1]])
def test_the_end_of_any_on_the_same_spoke(ended: list[int]) -> None:
    table = Table()
    for name in (1, 2, 3):
        table.open(name, 500 + (name == 2) * LAP)
    for at in ended:
        table.sessions.end(at, 0)
    left = []
    while at := table.sessions.due(2 * LAP):
        left.append(at)
        table.sessions.end(at, 0)
    assert sorted(left) == sorted({1, 2, 3} - set(ended))


# ---- Rows that were used


def test_used_rows_are_taken_over() -> None:
    sessions, holders, ending = taken_over(
        row(OPEN, 3, name=1, seq=4, ttl=100, label=b"one"),
        row(FREE, 5, name=2),
        row(ENDING, 4, name=3),
        row(OPEN, 9, anonymous=1),
        now=1_000,
        grace=50,
    )
    assert list(holders) == [0, 1, 0, 1, 1, 0, 0, 0, 0, 0]
    assert ending == [3]
    assert sessions.opened == 4 and len(sessions) == 3
    assert sessions.find(digest(1)) == 1 and not sessions.find(digest(2))
    assert (sessions.seq(1), sessions.generation(1), sessions.label(1)) == (4, 3, "one")
    assert sessions.expires(1) == 1_150, "the whole time again"
    sessions.end(3, 0)
    assert sessions.numbers() == [1, 4]


def test_free_rows_below_used_ones_are_taken_first() -> None:
    blank = bytes(128)
    sessions, _, _ = taken_over(row(FREE), blank, row(name=1), row(FREE), row(name=2), blank)
    assert sessions.opened == 5
    opened = [sessions.open(digest(n), 9, FOREVER, 1, 1, 0, b"") for n in range(10, 15)]
    assert opened == [1, 2, 4, 6, 7]


def test_only_anonymous_ones_are_believed_after_a_power_cut() -> None:
    memory = bytearray(128) + row(name=1) + row(name=2, anonymous=1) + row(ENDING, name=3)
    holders = Sessions.holders(memory, 4, 9, anonymous_only=True)
    assert list(holders) == [0, 0, 1, 0]
    sessions = Sessions(Allocator(10), memory, 4)
    assert sessions.recover(holders, 0, 0) == []
    assert sessions.numbers() == [2]
    assert not sessions.find(digest(1))
    assert list(Sessions.holders(memory, 4, 9)) == [0, 0, 1, 0], "and so it stays"


@pytest.mark.parametrize(
    "bad",
    [
        row(3),
        row(generation=10),
        row(generation=2**62 - 1),
        row(anonymous=2),
        row(anonymous=2**64 - 1),
        row(ttl=-1),
        row(ttl=2**40),
        row(cooldown=-1),
        row(cooldown=2**40),
        b"\xff" * 128,
        b"y" * 128,
    ],
)
def test_a_row_that_no_session_leaves_is_damage(bad: bytes) -> None:
    memory = bytearray(128) + row() + bad
    before = bytes(memory)
    with pytest.raises(RegistryCorrupt, match="session 2 is damaged"):
        Sessions.holders(memory, 3, 9)
    assert memory == before


def test_what_a_free_row_holds_does_not_matter() -> None:
    _, holders, ending = taken_over(row(FREE, 2**62 - 1, ttl=-5, anonymous=77), row())
    assert list(holders)[:3] == [0, 0, 1] and ending == []


# ---- Beside a dict


class Histories(RuleBasedStateMachine):
    """Random calls beside a dict of when each session expires."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000
        self.table = Table(12, now=self.now)
        self.open: dict[int, int] = {}  # by name, the number
        self.expires: dict[int, int] = {}
        self.generation = 0

    @rule(name=st.integers(1, 20), ttl=st.one_of(st.integers(0, 1_000), st.integers(0, 3 * LAP)))
    def opens(self, name: int, ttl: int) -> None:
        if name in self.open:
            return
        self.generation += 1
        at = self.table.open(name, self.now + ttl, generation=self.generation)
        if len(self.open) == 12:
            assert at == 0
        else:
            assert at and at not in self.open.values()
            self.open[name], self.expires[name] = at, self.now + ttl

    @precondition(lambda self: self.open)
    @rule(data=st.data(), ttl=st.integers(0, 3 * LAP))
    def renews(self, data: st.DataObject, ttl: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        self.table.sessions.renew(self.open[name], self.now + ttl)
        self.expires[name] = max(self.expires[name], self.now + ttl)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        self.table.sessions.end(self.open.pop(name), 0)
        del self.expires[name]

    @rule(passed=st.one_of(st.integers(0, 300), st.integers(0, 3 * LAP), st.just(2**45)))
    def time_passes(self, passed: int) -> None:
        self.now += passed
        over = {n for n, expires in self.expires.items() if expires // TICK < self.now // TICK}
        seen = set()
        while at := self.table.sessions.due(self.now):
            (name,) = [name for name, number in self.open.items() if number == at]
            seen.add(name)
            self.table.sessions.end(self.open.pop(name), 0)
            del self.expires[name]
        assert seen == over

    @rule()
    def the_process_dies(self) -> None:
        table = self.table
        holders = Sessions.holders(table.memory, table.ready, self.generation)
        table.pool = Allocator(1000, 1, 1)
        table.sessions = Sessions(table.pool, table.memory, table.ready)
        assert table.sessions.recover(holders, self.now, 77) == []
        self.expires = dict.fromkeys(self.open, self.now + 10 + 77)

    @invariant()
    def agree(self) -> None:
        sessions = self.table.sessions
        assert len(sessions) == len(self.open)
        assert sessions.numbers() == sorted(self.open.values())
        for name in range(1, 21):
            assert sessions.find(digest(name)) == self.open.get(name, 0)
        for name, at in self.open.items():
            assert sessions.expires(at) == self.expires[name]


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# ---- The process

FORKED_CALLS: dict[str, Callable[[Sessions], object]] = {
    "recover": lambda s: s.recover(bytes(21), 0, 0),
    "set_ready": lambda s: s.set_ready(5),
    "open": lambda s: s.open(digest(5), 1, 1, 1, 1, 1, b""),
    "find": lambda s: s.find(digest(1)),
    "renew": lambda s: s.renew(1, 5),
    "due": lambda s: s.due(10**9),
    "end": lambda s: s.end(1, 0),
    "raise_cooldown": lambda s: s.raise_cooldown(1, 1),
    "set_seq": lambda s: s.set_seq(1, 1),
    "seq": lambda s: s.seq(1),
    "generation": lambda s: s.generation(1),
    "ttl": lambda s: s.ttl(1),
    "cooldown": lambda s: s.cooldown(1),
    "opened_at": lambda s: s.opened_at(1),
    "expires": lambda s: s.expires(1),
    "label": lambda s: s.label(1),
    "anonymous": lambda s: s.anonymous(1),
    "numbers": lambda s: s.numbers(),
}
PLAIN = {"size", "holders", "ready", "opened", "count", "len"}  # no memory of the parent's


def test_a_copy_in_a_forked_child_refuses_everything() -> None:
    named = {name.strip("_") for name in vars(Sessions)} - PLAIN
    assert set(FORKED_CALLS) == named - {
        "doc",
        "new",
        "reduce",
        "setstate",
        "reduce_cython",
        "setstate_cython",
        "pyx_vtable",
    }
    table = Table()
    table.open(1)
    child = os.fork()
    if child == 0:
        status = 0
        try:
            for call in FORKED_CALLS.values():
                try:
                    call(table.sessions)
                    status += 1
                except Forked:
                    pass
        except BaseException:
            status = 99
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert table.sessions.find(digest(1)) == 1, "the parent goes on"


def test_memory_goes_back() -> None:
    def address_space() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0])

    Table()
    before = address_space()
    for _ in range(20):
        table = Table()
        table.open(1)
        memory = table.memory
        with pytest.raises(BufferError):
            memory.append(1)
        del table
        gc.collect()
        memory.append(1)
    assert address_space() - before < 50_000, "in pages; one table has more than 90,000"
