"""Tests the table of sessions: rows, leases, and the recovery of an earlier process's rows."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cidalloc import Allocator
from cidalloc.errors import RegistryCorrupt
from cidalloc.manager.sessions import ENDING, FREE, OPEN, Session, Sessions
from cidalloc.manager.storage.file import Storage
from cidalloc.manager.storage.file_format import (
    GRANULE,
    MAX_CAPACITY,
    MAX_ROWS,
    Part,
    Shape,
    Word,
    new_content,
)

FOREVER = 2**39


class Table:
    """A table of sessions in memory, with shorter calls."""

    def __init__(self) -> None:
        self.store = Storage.memory(Shape(1, 1000))
        self.pool = Allocator(1000, 1, 1)
        self.sessions = Sessions(self.store, self.pool)

    def open(self, name: int, expires: int = FOREVER, **values: Any) -> Session:
        given = {"now": 0, "ttl": 10, "cooldown": 5, "label": "", **values}
        return self.sessions.open(digest(name) if name else b"", expires=expires, **given)

    def find(self, name: int) -> Session | None:
        return self.sessions.named.get(digest(name))


def digest(name: int) -> bytes:
    return struct.pack("=QQ", name * 0x9E3779B97F4A7C15 & 2**64 - 1, name)


def word(number: int, at: int, value: int, bits: int = 48, covered: bytes = b"") -> int:
    """A word of a row, with its checksum."""
    place = (Part.ROWS.place + number * 128) // 8 + at
    found = zlib.crc32(struct.pack("=QQ", place, value) + covered)
    return value | found << bits & 2**64 - 1


Row = Callable[[int], bytes]


def row(
    state: int = OPEN,
    generation: int = 1,
    name: int = 1,
    seq: int = 0,
    ttl: int = 10,
    cooldown: int = 5,
    opened_at: int = 0,
    kind: int = 0,
    label: bytes = b"",
) -> Row:
    """The bytes of a row, by its number."""

    def packed(number: int) -> bytes:
        covered = struct.pack("=Q16sQ64s", generation, digest(name), ttl, label)
        return struct.pack(
            "=QQ16sQQQQ64s",
            word(number, 0, generation << 2 | state),
            word(number, 1, seq, 53),
            digest(name),
            ttl,
            word(number, 5, cooldown),
            word(number, 6, opened_at, covered=covered),
            word(number, 7, kind),
            label,
        )

    return packed


def stored(*rows: Row) -> Storage:
    """Memory with these rows from number 1 on."""
    store = Storage.memory(Shape(1, 1000))
    memory = memoryview(store.rows).cast("B")
    for number, packed in enumerate(rows, 1):
        memory[128 * number : 128 * (number + 1)] = packed(number)
    return store


def taken_over(*rows: Row, generation: int = 9, now: int = 0, grace: int = 0) -> Any:
    """A table over these rows; the numbers of the first that may hold IDs; what was ending."""
    store = stored(*rows)
    found = Sessions.read(store, generation, False)
    sessions = Sessions(store, Allocator(1000, 1, 1))
    return sessions, list(found.holders[:10]), sessions.recover(found, now, grace)


def words(store: Storage, number: int) -> list[int]:
    return memoryview(store.rows).cast("B").cast("Q")[16 * number :][:16].tolist()


# ---- Rows


def test_a_session_has_what_it_was_opened_with() -> None:
    table = Table()
    session = table.open(7, 1234, ttl=11, cooldown=12, now=13, label="Ünï")
    assert (session.number, len(table.sessions)) == (1, 1)
    assert table.find(7) is session
    assert table.find(8) is None
    assert session.generation == table.store.read(Word.GENERATION) == 1
    assert session.expires == 1234
    assert (session.ttl, session.cooldown, session.opened_at) == (11, 12, 13)
    assert (session.label, session.anonymous, session.seq) == ("Ünï", False, 0)
    table.sessions.set_seq(session, 2**53 - 1)
    table.sessions.raise_cooldown(session, 11)
    assert (session.seq, session.cooldown) == (2**53 - 1, 12)
    table.sessions.raise_cooldown(session, 99)
    assert session.cooldown == 99
    assert words(table.store, 1)[:2] == [word(1, 0, 1 << 2 | OPEN), word(1, 1, 2**53 - 1, 53)]
    covered = struct.pack("=Q16sQ64s", 1, digest(7), 11, "Ünï".encode())
    assert words(table.store, 1)[4:8] == [
        11,
        word(1, 5, 99),
        word(1, 6, 13, covered=covered),
        word(1, 7, 0),
    ]


def test_a_row_holds_nothing_of_the_session_before() -> None:
    table = Table()
    session = table.open(1, label="x" * 64)
    table.sessions.set_seq(session, 5)
    table.sessions.end(session, 0)
    assert session.number == 0
    assert table.find(1) is None
    other = table.open(2)
    assert (other.number, other.seq, other.label) == (1, 0, "")
    assert words(table.store, 1)[1] == word(1, 1, 0, 53)
    assert words(table.store, 1)[8:] == [0] * 8


@pytest.mark.parametrize("label", ["", "a" * 64, "ü" * 32, "Ünï"])
def test_a_label_survives_the_process(label: str) -> None:
    table = Table()
    table.open(1, label=label)
    rows = Sessions.read(table.store, 9, False)
    again = Sessions(table.store, Allocator(1000, 1, 1))
    again.recover(rows, 0, 0)
    assert again.named[digest(1)].label == label


def test_a_session_of_anonymous_ids_has_no_token() -> None:
    table = Table()
    session = table.open(0)
    assert session.anonymous
    assert table.sessions.anonymous == {1: session}
    assert table.sessions.named == {}
    other = table.open(5)
    assert [*table.sessions] == [other, session]
    table.sessions.end(session, 0)
    assert [*table.sessions] == [other]


def test_the_lowest_row_is_taken_first_and_a_free_one_again() -> None:
    table = Table()
    opened = [table.open(n) for n in range(1, 6)]
    assert [each.number for each in opened] == [1, 2, 3, 4, 5]
    for each in (opened[1], opened[3]):
        table.sessions.end(each, 0)
    assert sorted(table.open(n).number for n in (7, 8)) == [2, 4]
    assert table.open(9).number == 6


def test_rows_are_added_when_none_is_free() -> None:
    table = Table()
    rows = GRANULE // 128
    numbers = [table.open(n).number for n in range(1, 2 * rows)]
    assert numbers == [*range(1, 2 * rows)]
    assert table.store.ready_rows >= 2 * rows


def test_there_is_room_for_all_sessions_of_the_settings() -> None:
    store = stored()
    assert len(store.rows) == MAX_ROWS * 128
    assert MAX_ROWS > 1_000_000 + 1000


def test_the_end_of_a_session_gives_its_ids_back() -> None:
    table = Table()
    one, two = table.open(1), table.open(2)
    table.pool.acquire_many(10, one.number)
    table.pool.acquire_many(5, two.number)
    assert table.sessions.end(one, 500) == 10
    assert table.pool.active == 5
    assert table.pool.next_due == 500
    table.pool._check()


class Full(dict[bytes, Any]):
    """A dict that has no memory for one more."""

    def __setitem__(self, key: bytes, value: Any) -> None:
        raise MemoryError


def test_without_memory_a_session_is_not_opened_at_all() -> None:
    """Also if its lease is in the heap already: it does not end another one."""
    table = Table()
    table.open(1, 10**6)
    named, table.sessions.named = table.sessions.named, Full(table.sessions.named)
    with pytest.raises(MemoryError):
        table.open(2, 1_000)
    table.sessions.named = named
    assert words(table.store, 2)[0] == word(2, 0, 0), "its row is a new one"
    assert table.sessions.due(2_000) is None
    assert table.open(2, 1_000).number == 2


def test_without_memory_for_its_end_a_session_is_open() -> None:
    table = Table()
    session = table.open(1, 1_000)
    before = words(table.store, 1)

    class Pool:
        def release_owner(self, number: int, reuse_at: int) -> int:
            raise MemoryError

    pool, table.sessions._pool = table.sessions._pool, Pool()  # type: ignore[assignment]
    with pytest.raises(MemoryError):
        table.sessions.end(session, 0)
    table.sessions._pool = pool
    assert words(table.store, 1) == before
    assert table.find(1) is session and session.number == 1
    assert table.open(2, 1_000).number == 2
    assert table.sessions.end(session, 0) == 0
    assert table.find(1) is None


def test_ten_thousand_sessions_are_found() -> None:
    table = Table()
    opened = {name: table.open(name) for name in range(1, 10_001)}
    for name in range(1, 10_001, 3):
        table.sessions.end(opened.pop(name), 0)
    assert all(table.find(name) is opened.get(name) for name in range(1, 10_001))
    assert len(table.sessions) == len(opened)


# ---- Leases


@pytest.mark.parametrize("start", [0, 1, 127, 10**9, 2**40])
@pytest.mark.parametrize("after", [0, 1, 127, 10**7])
def test_an_expiry_is_seen_when_its_time_is_over(start: int, after: int) -> None:
    table = Table()
    session = table.open(1, start + after)
    for now in (start, start + after // 2, start + after):
        assert table.sessions.due(now) is None
    assert table.sessions.due(start + after + 1) is session
    assert table.sessions.due(start + after + 1) is session, "until it is ended"
    table.sessions.end(session, 0)
    assert table.sessions.due(2**50) is None


@pytest.mark.parametrize("step", [1, 50, 1000, 10**6])
def test_time_in_steps_sees_the_same(step: int) -> None:
    table = Table()
    wanted = {table.open(n, n * n * 40): n * n * 40 for n in range(1, 100)}
    now = 0
    while wanted:
        now += max(step, 20_000)
        while session := table.sessions.due(now):
            assert wanted.pop(session) < now
            table.sessions.end(session, 0)
        assert all(expires >= now for expires in wanted.values())
    assert len(table.sessions) == 0


def test_a_renewal_moves_the_expiry() -> None:
    table = Table()
    session = table.open(1, 1_000)
    session.expires = 5_000
    assert table.sessions.due(5_000) is None
    assert table.sessions.due(5_001) is session
    session.expires = 9_000
    assert table.sessions.due(5_001) is None, "one that was not ended yet"
    assert table.sessions.due(9_001) is session


def test_two_sessions_that_expire_at_one_time() -> None:
    table = Table()
    opened = [table.open(name, 500) for name in (1, 2, 3)]
    table.sessions.end(opened[1], 0)
    opened[1] = table.open(4, 500)  # in the same row
    seen = set()
    while session := table.sessions.due(501):
        seen.add(session)
        table.sessions.end(session, 0)
    assert seen == set(opened)


def test_leases_of_sessions_that_have_ended_take_no_memory_for_long() -> None:
    table = Table()
    kept = [table.open(name) for name in range(1, 11)]
    for name in range(100, 10_000):
        table.sessions.end(table.open(name), 0)
    assert len(table.sessions._leases) < 1_100
    assert {session for *_, session in table.sessions._leases} >= set(kept)


# ---- The rows of an earlier process


def test_used_rows_are_taken_over() -> None:
    sessions, owners, ending = taken_over(
        row(OPEN, 3, name=1, seq=4, ttl=100, label=b"one"),
        row(FREE, 5, name=2),
        row(ENDING, 4, name=3),
        row(OPEN, 9, kind=1),
        now=1_000,
        grace=50,
    )
    assert owners == [0, 1, 0, 1, 1, 0, 0, 0, 0, 0]
    one = sessions.named[digest(1)]
    assert (one.number, one.seq, one.generation, one.label) == (1, 4, 3, "one")
    assert one.expires == 1_150, "the whole time again"
    assert digest(2) not in sessions.named
    assert [each.number for each in ending] == [3]
    assert len(sessions) == 3
    sessions.end(ending[0], 0)
    assert [each.number for each in sessions] == [1, 4]


def test_free_rows_below_used_ones_are_taken_first() -> None:
    def blank(number: int) -> bytes:
        return new_content(Part.ROWS, 0, 1)[128 * number : 128 * (number + 1)]

    sessions, _, _ = taken_over(row(FREE), blank, row(name=1), row(FREE), row(name=2), blank)
    opened = [
        sessions.open(digest(n), 0, FOREVER, ttl=1, cooldown=1, label="") for n in range(10, 15)
    ]
    assert [each.number for each in opened] == [1, 2, 4, 6, 7]


def test_only_anonymous_ones_are_believed_after_a_power_cut() -> None:
    store = stored(row(name=1), row(name=2, kind=1), row(ENDING, name=3))
    rows = Sessions.read(store, 9, after_power_loss=True)
    assert list(rows.holders[:4]) == [0, 0, 1, 0]
    sessions = Sessions(store, Allocator(10))
    assert sessions.recover(rows, 0, 0) == []
    assert [*sessions.anonymous] == [2]
    assert not sessions.named
    assert list(Sessions.read(store, 9, False).holders[:4]) == [0, 0, 1, 0], "and so it stays"


def test_how_many_are_in_use_outlives_the_process() -> None:
    table = Table()
    for name in (1, 2, 3):
        session = table.open(name)
        table.pool.acquire_many(5, session.number, 0)
        table.sessions.set_used(session, {1: None, 2: 0, 3: 4}[name])
    table.open(0)
    rows = Sessions.read(table.store, 9, False)
    later = Sessions(table.store, table.pool)
    later.recover(rows, 0, 0)
    assert [each.used for each in later.named.values()] == [None, 0, 4]
    for sessions in (table.sessions, later):
        assert (sessions.used, sessions.silent) == (4, 1)
    highest = taken_over(row(kind=2 * MAX_CAPACITY + 2))[0]
    assert highest.used == MAX_CAPACITY


def test_no_more_are_in_use_than_are_held() -> None:
    table = Table()
    session = table.open(1)
    table.pool.acquire_many(3, session.number, 0)
    table.sessions.set_used(session, 2**70)
    assert session.used == table.sessions.used == 3
    table.sessions.end(session, 0)
    assert table.sessions.used == table.sessions.silent == 0


def test_a_time_of_another_boot_is_not_in_the_future() -> None:
    sessions, _, _ = taken_over(row(opened_at=10**9), now=5)
    assert sessions.named[digest(1)].opened_at == 5


@pytest.mark.parametrize(
    "bad",
    [
        row(3),
        row(generation=10),
        row(generation=2**46 - 1),
        lambda number: row()(number + 1),
        lambda _: bytes(128),
        lambda _: b"\xff" * 128,
        lambda _: b"y" * 128,
    ],
)
def test_a_row_that_no_session_leaves_is_damage(bad: Row) -> None:
    store = stored(row(), bad)
    before = bytes(memoryview(store.rows).cast("B")[:GRANULE])
    with pytest.raises(RegistryCorrupt, match="session 2 is damaged"):
        Sessions.read(store, 9, False)
    assert memoryview(store.rows).cast("B")[:GRANULE] == before


def test_two_rows_of_one_session_are_damage() -> None:
    with pytest.raises(RegistryCorrupt, match="two sessions have the same token"):
        taken_over(row(name=1), row(name=2), row(name=1, generation=2))


def test_two_rows_of_one_session_after_a_power_cut_are_none() -> None:
    """It ended, which is lost, and then began again, by an OPEN that was late."""
    store = stored(row(name=1), row(name=1, generation=2))
    assert not any(Sessions.read(store, 9, True).holders)


def test_the_rest_of_a_free_row_does_not_matter() -> None:
    def free(number: int) -> bytes:
        return row(FREE, 9)(number)[:8] + b"\xff" * 120

    _, owners, ending = taken_over(free, row())
    assert owners[:3] == [0, 0, 1]
    assert ending == []


# ---- Beside a dict


class Histories(RuleBasedStateMachine):
    """Random calls beside a dict of when each session expires."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000
        self.table = Table()
        self.open: dict[int, Session] = {}  # by name
        self.expires: dict[int, int] = {}

    @rule(name=st.integers(1, 20), ttl=st.one_of(st.integers(0, 1_000), st.integers(0, 10**7)))
    def opens(self, name: int, ttl: int) -> None:
        if name in self.open:
            return
        session = self.table.open(name, self.now + ttl)
        assert session.number not in {each.number for each in self.open.values()}
        assert session.number <= 20
        self.open[name], self.expires[name] = session, self.now + ttl

    @precondition(lambda self: self.open)
    @rule(data=st.data(), ttl=st.integers(0, 10**7))
    def renews(self, data: st.DataObject, ttl: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        self.expires[name] = max(self.expires[name], self.now + ttl)
        self.open[name].expires = self.expires[name]

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        self.table.sessions.end(self.open.pop(name), 0)
        del self.expires[name]

    @rule(passed=st.one_of(st.integers(0, 300), st.integers(0, 10**7), st.just(2**45)))
    def time_passes(self, passed: int) -> None:
        self.now += passed
        over = {name for name, expires in self.expires.items() if expires < self.now}
        seen = set()
        while session := self.table.sessions.due(self.now):
            (name,) = [name for name, each in self.open.items() if each is session]
            seen.add(name)
            self.table.sessions.end(self.open.pop(name), 0)
            del self.expires[name]
        assert seen == over

    @rule()
    def the_process_dies(self) -> None:
        table = self.table
        rows = Sessions.read(table.store, table.store.read(Word.GENERATION), False)
        table.pool = Allocator(1000, 1, 1)
        table.sessions = Sessions(table.store, table.pool)
        assert table.sessions.recover(rows, self.now, 77) == []
        for name, before in self.open.items():
            self.open[name] = found = table.sessions.named[digest(name)]
            for what in ("number", "generation", "ttl", "cooldown", "seq", "label"):
                assert getattr(found, what) == getattr(before, what)
        self.expires = dict.fromkeys(self.open, self.now + 10 + 77)

    @invariant()
    def agree(self) -> None:
        assert len(self.table.sessions) == len(self.open)
        for name in range(1, 21):
            assert self.table.find(name) is self.open.get(name)
        for name, session in self.open.items():
            assert session.expires == self.expires[name]


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
