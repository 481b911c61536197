"""The waiting list: the sessions that wait for IDs of an exhausted pool, in their order.

It is in memory only. A session keeps its place by asking again.
"""

from __future__ import annotations

from .._alloc import Allocator
from ..errors import Exhausted
from ..protocol import MAX_WAIT_MS
from .sessions import Session

__all__ = ["WaitingList", "exhausted"]


class WaitingList:
    """The sessions that wait for IDs of a pool, each with one place. Times are milliseconds.

    Attributes:
        places: for each session in their order, how many IDs it waits for, and until when. `check`
            removes places of which the time is over when it comes across them.
    """

    def __init__(self, pool: Allocator) -> None:
        self._pool = pool
        self.places: dict[Session, tuple[int, int]] = {}
        self._latest = 0  # no place is kept for longer

    def any(self, now: int) -> bool:
        """Whether a session may be waiting. Constant time; it may be wrong for `MAX_WAIT_MS`."""
        return bool(self.places) and now < self._latest

    def count(self, now: int) -> int:
        """Return how many sessions wait."""
        return sum(now < until for _, until in self.places.values())

    def check(self, session: Session | None, count: int, now: int, room: int) -> None:
        """Check that a request takes no ID that a place before it needs.

        The time that it takes grows with the number of free IDs, and not with that of the places.

        Args:
            session: the request uses the place of this session. A request without a place, or
                for more IDs than its place, comes after all others.
            count: the number of IDs that it asks for.
            now: the time.
            room: the number of IDs that the pool can have now; a full disk limits it.

        Raises:
            Exhausted: it has to wait for the others.
        """
        pool = self._pool
        pool.acquire_many(0, now=now)  # so that it knows the time
        free = room - pool.active - pool.cooling
        before, over = 0, []
        for each, (needed, until) in self.places.items():
            if until <= now:
                over.append(each)
            elif each is session:
                if count <= needed:
                    break
            else:
                before += needed
                if before + count > free:
                    break
        for each in over:
            del self.places[each]
        if before and before + count > free:
            raise exhausted(pool, count, now, "; others wait before this request")

    def keep(self, session: Session, count: int, now: int, wait_ms: int) -> None:
        """Give a session a place for so many IDs, or let it keep the one that it has.

        If it asks for more IDs than before, or its time was over, it comes last. A session has no
        place for more IDs than the pool has.
        """
        needed, until = self.places.get(session, (0, 0))
        if count > needed or until <= now:
            self.leave(session)
        if count <= self._pool.capacity:
            until = now + min(wait_ms, MAX_WAIT_MS)
            self.places[session] = count, until
            self._latest = max(self._latest, until)

    def leave(self, session: Session) -> None:
        """Remove a session that has got its IDs or has ended."""
        self.places.pop(session, None)


def exhausted(pool: Allocator, count: int, now: int, why: str) -> Exhausted:
    """Return the error that there are not so many IDs; its text says when the next one is due."""
    due, when = pool.next_due, "none is cooling"
    if due is not None:
        when = f"the next is due in {max(due - now, 0) / 1e3:g} s"
    return Exhausted(
        f"cannot issue {count} of {pool.capacity} IDs: {pool.active} are held,"
        f" {pool.cooling} are cooling; {when}{why}"
    )
