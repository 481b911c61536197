"""The table of sessions. Each session is an owner of IDs in the pool, with a lease to renew.

A session has a row, which may be in a file: which sessions may hold IDs survives the process. Its
lease does not: a new process gives each session its whole time again.

The first word of a row has the generation of its session and one of three states. Opening a
session stores this word last. The end of a session stores ENDING first; then its IDs are released;
then FREE is stored. If the process dies in between, no ID goes to the next session of the row, and
no session that has lost some of its IDs is open.

Python may run out of memory at almost any line. So each change first makes all objects that it
needs, and then the stores, which need no memory: the file and the objects never contradict each
other.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .._alloc import Allocator
from ..errors import RegistryCorrupt
from ..protocol import SEQ_BITS
from .storage.file import Storage
from .storage.file_format import (
    GRANULE,
    ROW,
    VALUE_BITS,
    Part,
    Word,
    checked,
    new_content,
    read_checked,
)

__all__ = ["Session", "Sessions"]

FREE, OPEN, ENDING = range(3)
# A row: life, seq, digest, ttl, cooldown, opened_at, kind, label. Its life is the generation times
# 4 and a state; 0: it was never used. The kind is 1 for anonymous IDs. Otherwise it is twice as
# many as IDs are in use, and 2; or 0 if that is not known.
_ROW = struct.Struct("=QQ16sQQQQ64s")
# The words that are checked; that of opened_at covers generation, digest, ttl and label, too.
_LIFE, _SEQ, _COOLDOWN, _OPENED_AT, _KIND = 0, 1, 5, 6, 7
_COVERED = struct.Struct("=Q16sQ64s")
_WORDS = ROW // 8  # of a row
_FIRST = Part.ROWS.word(0)  # the word of the file at which the rows begin
_ANONYMOUS = 1  # a kind


class _Row(NamedTuple):
    """A row of the table, of a session that is or was open."""

    number: int
    life: int
    seq: int
    digest: bytes
    ttl: int
    cooldown: int
    opened_at: int
    kind: int
    label: bytes


class _Rows(NamedTuple):
    """What an earlier process left: a byte for each row, whether it may hold IDs; used rows."""

    holders: bytes
    used: list[_Row]


class Session:
    """An open session. Times are milliseconds.

    Attributes:
        number: of its row, and of its owner in the pool; 0 after its end.
        generation: a number that no other session of the registry has.
        expires: when its lease ends.
        seq: of the last change, also if that was refused. Of anonymous IDs, which have none: until
            when they cool at least; see `floor`.
        digest: stands for its token; empty for a session that holds anonymous IDs.
        ttl: for how long a renewal lasts.
        cooldown: for how long its IDs cool if it expires.
        opened_at: when it was opened.
        label: its name in the status.
        used: how many of its IDs are in use, as its client last said; None: it has not said it.
        models: the models on which they are used, as its client last said; it is not in the row.
    """

    __slots__ = (
        "cooldown",
        "digest",
        "expires",
        "generation",
        "label",
        "models",
        "number",
        "opened_at",
        "seq",
        "ttl",
        "used",
    )

    def __init__(
        self,
        number: int,
        generation: int,
        expires: int,
        *,
        digest: bytes,
        ttl: int,
        cooldown: int,
        opened_at: int,
        label: str,
        seq: int = 0,
        used: int | None = None,
    ) -> None:
        self.number = number
        self.generation = generation
        self.expires = expires
        self.digest = digest
        self.ttl = ttl
        self.cooldown = cooldown
        self.opened_at = opened_at
        self.label = label
        self.seq = seq
        self.used = used
        self.models: tuple[str, ...] = ()

    @property
    def floor(self) -> int:
        """Until when, at least, its IDs cool: a power cut may have lost who used them since."""
        return 0 if self.digest else self.seq

    @property
    def anonymous(self) -> bool:
        """Whether it holds the IDs that were acquired without a session."""
        return not self.digest


def _word(place: int, value: int, bits: int = VALUE_BITS) -> int:
    """Return the word at a place of the rows; see `checked`."""
    return checked(_FIRST + place, value, bits=bits)


def _opened_word(
    place: int, opened_at: int, generation: int, digest: bytes, ttl: int, label: bytes
) -> int:
    """Return the word with opened_at in the row at a place."""
    covered = _COVERED.pack(generation, digest, ttl, label)
    return checked(_FIRST + place + _OPENED_AT, opened_at, covered)


def _used(memory: memoryview, granules: int) -> Iterator[int]:
    """Iterate over the rows that do not look as if they had never been used."""
    lives = np.frombuffer(memory, np.uint64)[::_WORDS]
    each = GRANULE // ROW
    for first in range(granules):
        new = np.frombuffer(new_content(Part.ROWS, first, 1), np.uint64)[::_WORDS]
        found = lives[first * each : (first + 1) * each]
        yield from (np.flatnonzero(found != new) + first * each).tolist()


def _read(memory: memoryview, number: int) -> _Row:
    """Return a row; of one that is free only the life counts.

    Raises:
        RegistryCorrupt: it is damaged.
    """
    words = memory[number * ROW : (number + 1) * ROW].cast("Q")
    place = _FIRST + number * _WORDS
    _, _, digest, ttl, _, _, _, label = _ROW.unpack(words)
    life = read_checked(words, _LIFE, place)
    if life & 3 == FREE:
        return _Row(number, life, 0, b"", 0, 0, 0, 0, b"")
    seq = read_checked(words, _SEQ, place + _SEQ, bits=SEQ_BITS)
    covered = _COVERED.pack(life >> 2, digest, ttl, label)
    cooldown, opened_at, kind = (
        read_checked(words, at, place + at, rest)
        for at, rest in ((_COOLDOWN, b""), (_OPENED_AT, covered), (_KIND, b""))
    )
    return _Row(number, life, seq, digest, ttl, cooldown, opened_at, kind, label)


def _lease(session: Session) -> tuple[int, int, int, Session]:
    """Return the entry of a session in the heap: of equal leases, the older session comes first."""
    return session.expires, session.generation, id(session), session


class Sessions:
    """The sessions that own IDs of a pool.

    Args:
        store: where the rows are.
        pool: the pool; its ticks are milliseconds.

    Attributes:
        used: how many IDs are in use, as clients last said.
        silent: the number of sessions whose client has not said it.
    """

    def __init__(self, store: Storage, pool: Allocator) -> None:
        self.named: dict[bytes, Session] = {}  # by digest
        self.anonymous: dict[int, Session] = {}  # by number, the oldest first
        self.used = self.silent = 0
        self._chosen: list[Session] = []
        self._choose_at = 0
        self._store = store
        self._pool = pool
        self._rows = memoryview(store.rows).cast("B")
        self._words = self._rows.cast("Q")
        self._rows_used = 1  # rows that were ever used, including row 0
        self._free: list[int] = []  # of these, the free ones
        # A renewal does not change the heap: a session that comes up too early is put back.
        self._leases: list[tuple[int, int, int, Session]] = []

    @staticmethod
    def read(store: Storage, generation: int, after_power_loss: bool) -> _Rows:
        """Return what an earlier process left. Only reads.

        Args:
            store: where the rows are.
            generation: no session has a later one.
            after_power_loss: only sessions that hold anonymous IDs may hold any.

        Raises:
            RegistryCorrupt: a row that no registry writes.
        """
        rows, digests = [], set()
        holders = bytearray(store.ready_rows)
        memory = memoryview(store.rows).cast("B")
        for number in _used(memory, store.granules(Part.ROWS)):
            try:
                row = _read(memory, number)
            except RegistryCorrupt:
                row = None
            if row is None or row.life & 3 > ENDING or row.life >> 2 > generation:
                raise RegistryCorrupt(f"the record of session {number} is damaged")
            rows.append(row)
            # After power loss, also of one session that ended, and began again by a late OPEN.
            if row.life & 3 != FREE and (row.kind == _ANONYMOUS or not after_power_loss):
                if row.kind != _ANONYMOUS and row.digest in digests:
                    raise RegistryCorrupt("the records of two sessions have the same token")
                digests.add(row.digest)
                holders[number] = True
        return _Rows(bytes(holders), rows)

    def recover(self, rows: _Rows, now: int, grace: int, floor: int = 0) -> list[Session]:
        """Take over the rows of an earlier process; free those of no owner.

        Each open session gets its whole time again. Anonymous IDs cool until ``floor`` at least.

        Returns:
            The sessions that the earlier process was about to end: call `end` for each.
        """
        ending = []
        self._rows_used = max((row.number for row in rows.used), default=0) + 1
        for number, life, seq, digest, ttl, cooldown, opened_at, kind, label in rows.used:
            place = number * _WORDS
            if not rows.holders[number]:
                self._words[place] = _word(place, life & ~3)
                continue
            if opened_at > now:  # by the clock of another boot
                opened_at = now
                self._words[place + _OPENED_AT] = _opened_word(
                    place, now, life >> 2, digest, ttl, label
                )
            if floor and kind == _ANONYMOUS:
                seq = floor
                self._words[place + _SEQ] = _word(place + _SEQ, seq, SEQ_BITS)
            session = Session(
                number,
                life >> 2,
                now + ttl + grace,
                digest=b"" if kind == _ANONYMOUS else digest,
                ttl=ttl,
                cooldown=cooldown,
                opened_at=opened_at,
                label=label.rstrip(b"\0").decode("utf-8", "replace"),
                seq=seq,
                used=kind // 2 - 1 if kind > _ANONYMOUS else None,
            )
            self._add(session)
            if life & 3 == ENDING:
                ending.append(session)
        taken = {session.number for session in self}
        self._free = [each for each in range(self._rows_used - 1, 0, -1) if each not in taken]
        return ending

    def open(
        self, digest: bytes, now: int, expires: int, *, ttl: int, cooldown: int, label: str
    ) -> Session:
        """Open a session. `Session` explains the arguments.

        The digest has 16 bytes, or none for anonymous IDs; the label at most 64 in UTF-8.

        Raises:
            Unavailable: there is no row for it, since the disk is full.
        """
        generation = self._store.read(Word.GENERATION) + 1
        self._store.write(Word.GENERATION, generation)
        if self._free:
            number = self._free.pop()
        else:
            if self._rows_used == self._store.ready_rows:
                self._store.grow(Part.ROWS, 1)
            number, self._rows_used = self._rows_used, self._rows_used + 1
        session = None
        try:
            session = Session(
                number,
                generation,
                expires,
                digest=digest,
                ttl=ttl,
                cooldown=cooldown,
                opened_at=now,
                label=label,
            )
            place, name = number * _WORDS, label.encode().ljust(64, b"\0")
            life = _word(place, generation << 2 | OPEN)
            digest = digest.ljust(16, b"\0")
            row = _ROW.pack(
                self._words[place],
                _word(place + _SEQ, 0, SEQ_BITS),
                digest,
                ttl,
                _word(place + _COOLDOWN, cooldown),
                _opened_word(place, now, generation, digest, ttl, name),
                _word(place + _KIND, _ANONYMOUS if session.anonymous else 0),
                name,
            )
            self._rows[number * ROW : (number + 1) * ROW] = row
            self._add(session)
        except BaseException:
            if session is not None:
                session.number = 0
            self._free.append(number)
            raise
        self._words[place] = life
        return session

    def _add(self, session: Session) -> None:
        """Add a session, or nothing; without memory a lease may be left, which counts as ended."""
        used, silent = self._counts(session, 1)
        if len(self._leases) > 2 * len(self) + 1000:  # most are of sessions that have ended
            self._leases = [_lease(each) for each in self]
            heapq.heapify(self._leases)
        heapq.heappush(self._leases, _lease(session))
        if session.digest:
            self.named[session.digest] = session
        else:
            self.anonymous[session.number] = session
        self.used, self.silent = used, silent

    def due(self, now: int) -> Session | None:
        """Return a session whose lease has ended, or None. It is returned again until `end`."""
        leases = self._leases
        while leases and leases[0][0] < now:
            session = leases[0][-1]
            if not session.number:
                heapq.heappop(leases)
            elif session.expires < now:
                return session
            else:
                heapq.heapreplace(leases, _lease(session))
        return None

    def end(self, session: Session, reuse_at: int) -> int:
        """End a session: all its IDs cool until `reuse_at`. Return how many IDs these are."""
        number, life = session.number, session.generation << 2
        place = number * _WORDS
        states = [_word(place, life | state) for state in (FREE, OPEN, ENDING)]
        used, silent = self._counts(session, -1)
        self._free.append(number)
        self._words[place] = states[ENDING]
        try:
            released = self._pool.release_owner(number, reuse_at)
        except MemoryError:  # nothing was released
            self._words[place] = states[OPEN]
            self._free.pop()
            raise
        self._words[place] = states[FREE]
        if session.digest:
            del self.named[session.digest]
        else:
            del self.anonymous[number]
        self.used, self.silent, session.number = used, silent, 0
        return released

    def raise_cooldown(self, session: Session, cooldown: int) -> None:
        """Let the IDs cool for at least so long if the session expires."""
        cooldown, place = max(cooldown, session.cooldown), session.number * _WORDS + _COOLDOWN
        self._words[place] = _word(place, cooldown)
        session.cooldown = cooldown

    def set_seq(self, session: Session, seq: int) -> None:
        """Note the number of a change before it is made: it is never made twice."""
        place = session.number * _WORDS + _SEQ
        self._words[place] = _word(place, seq, SEQ_BITS)
        session.seq = seq

    def set_used(self, session: Session, used: int | None) -> None:
        """Note how many IDs of a session are in use; None: its client does not say it."""
        before = session.used
        if used is None or used == before:
            return
        try:
            held = self._pool.held_count(session.number)
            used = held if used > held else used
            total, silent = self.used + used - (before or 0), self.silent - (before is None)
            place = session.number * _WORDS + _KIND
            self._words[place] = _word(place, 2 * used + 2)
        except MemoryError:  # this is only for the status, and a change may be done already
            return
        self.used, self.silent, session.used = total, silent, used

    def largest(self, most: int, now: int) -> list[Session]:
        """Return the sessions with the most IDs in use, and among equals the most held.

        Choosing them takes about 0.1 ms for a thousand sessions. So with n sessions the choice is
        kept for n / 100 ms: whoever asks all the time takes up about 1 % of the time.
        """
        if now >= self._choose_at:
            held = self._pool.held_count
            self._chosen = heapq.nlargest(
                most,
                self.named.values(),
                lambda each: (-1 if each.used is None else each.used, held(each.number)),
            )
            self._choose_at = now + len(self.named) // 100
        return [each for each in self._chosen if each.number]

    def _counts(self, session: Session, by: int) -> tuple[int, int]:
        """Return `used` and `silent` with one session more or less."""
        if not session.digest:
            return self.used, self.silent
        if session.used is None:
            return self.used, self.silent + by
        return self.used + by * session.used, self.silent

    def __iter__(self) -> Iterator[Session]:
        """Iterate over all sessions; those with a token come first."""
        yield from self.named.values()
        yield from self.anonymous.values()

    def __len__(self) -> int:
        """Return how many sessions are open, including those of anonymous IDs."""
        return len(self.named) + len(self.anonymous)
