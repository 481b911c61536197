"""The stock: the IDs of a session within its client, so that most need no round trip.

An ID of the session is in one place: *used* by the application; *fresh*, never used by us;
*cooling*, ended and soon to be used again; *leaving*, to be given back; or *sent*, in a request to
give it back whose answer is not there yet. Times are seconds, and come from the caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..errors import Duplicate, NotHeld

__all__ = ["ENDED", "Stock"]

ENDED = -1
"""In place of a cooldown: the sequences were ended, so the manager's least cooldown will do."""

_GOAL_MOST = 1024
_QUICK_S = 1.0  # a stock that is empty again so soon was too small
_STALE_S = 30.0  # what was not needed for so long may go back


class Stock:
    """The IDs of one session. ``cooldown`` is the least time in seconds between two uses."""

    __slots__ = (
        "cooldown",
        "cooling",
        "fresh",
        "goal",
        "hungry",
        "leaving",
        "low",
        "refilled_at",
        "sent",
        "sent_cooldown",
        "used",
    )

    def __init__(self, cooldown: float = 0.0) -> None:
        self.cooldown = cooldown
        self.used: set[int] = set()
        self.fresh: deque[int] = deque()
        self.cooling: deque[tuple[float, int]] = deque()
        self.leaving: dict[int, list[int]] = {}
        self.sent: list[int] = []
        self.sent_cooldown = ENDED
        self.goal = self.low = 1
        self.hungry = False
        self.refilled_at = float("-inf")

    # ---- The two that are called all the time

    def take(self, now: float) -> int:
        """Return an ID that is from now on used, or 0 if none is ready."""
        cooling = self.cooling
        if cooling and cooling[0][0] <= now:
            cid = cooling.popleft()[1]
        elif self.fresh:
            cid = self.fresh.popleft()
            if len(self.fresh) < self.low:
                self.hungry = True
        else:
            return 0
        self.used.add(cid)
        return cid

    def recycle(self, cid: int, now: float) -> bool:
        """Let a used ID cool, whose sequence was ended; False if it is none."""
        try:
            self.used.remove(cid)
        except KeyError:
            return False
        self.cooling.append((now + self.cooldown, cid))
        return True

    # ---- In and out

    def ready(self, now: float, enough: int) -> int:
        """Return how many IDs can be taken now, or at least ``enough`` if there are so many."""
        count = len(self.fresh)
        for due, _ in self.cooling:
            if due > now or count >= enough:
                break
            count += 1
        return count

    def check_used(self, cids: Iterable[int]) -> None:
        """See that all of these are used, each of them standing there once.

        Raises:
            Duplicate, NotHeld: which one is not.
        """
        seen = set()
        for cid in cids:
            if cid in seen:
                raise Duplicate(f"ID {cid} stands twice in this call")
            seen.add(cid)
            if cid not in self.used:
                raise NotHeld(f"this client holds no ID {cid}: it was released or never acquired")

    def give_back(self, cids: Iterable[int], cooldown_ms: int) -> None:
        """Let used IDs leave, to cool at the manager for so long."""
        for cid in cids:
            self.used.remove(cid)
            self.leaving.setdefault(cooldown_ms, []).append(cid)

    def refill(self, cids: Iterable[int]) -> None:
        """Add IDs that were issued to the session and that it never used."""
        self.fresh.extend(cids)
        self.hungry = False

    def plan(self, now: float) -> int:
        """Return how many IDs to have ahead, on the occasion of a refill: what demand asks for."""
        if now - self.refilled_at < _QUICK_S:
            self._set_goal(min(2 * self.goal, _GOAL_MOST))
        self.refilled_at = now
        return self.goal

    def trim(self, now: float) -> float:
        """Let those leave that nobody has needed for long; return when to look again."""
        while self.goal > 1 and now - self.refilled_at >= 2 * _STALE_S:
            self._set_goal(self.goal // 2)
            self.refilled_at += _STALE_S
        gone: list[int] = []
        cooling = self.cooling
        spare = len(self.fresh) + len(cooling) - self.goal
        while spare > len(gone) and cooling and cooling[0][0] <= now - _STALE_S:
            gone.append(cooling.popleft()[1])
        while now - self.refilled_at >= _STALE_S and len(self.fresh) > self.goal:
            gone.append(self.fresh.popleft())
        if gone:
            self.leaving.setdefault(ENDED, []).extend(gone)
        return now + _STALE_S

    def _set_goal(self, goal: int) -> None:
        self.goal = goal
        self.low = (goal + 1) // 2

    # ---- Giving back

    def send(self, most: int) -> list[int]:
        """Choose at most so many IDs with one cooldown that leave with the next request."""
        assert not self.sent, "one change after the other"
        for cooldown_ms, cids in self.leaving.items():
            self.sent_cooldown = cooldown_ms
            self.sent, rest = cids[:most], cids[most:]
            self.leaving[cooldown_ms] = rest
            if not rest:
                del self.leaving[cooldown_ms]
            break
        return self.sent

    def unsend(self) -> None:
        """The request did nothing: these IDs have still to leave."""
        if self.sent:
            self.leaving.setdefault(self.sent_cooldown, []).extend(self.sent)
            self.sent = []

    def keep(self, cid: int, cooldown_ms: int) -> None:
        """Let an ID that was to leave count as used: the manager does not take it."""
        self.leaving[cooldown_ms].remove(cid)
        if not self.leaving[cooldown_ms]:
            del self.leaving[cooldown_ms]
        self.used.add(cid)

    def settle(self, held: set[int]) -> list[int]:
        """Compare with what the manager says that the session holds, and believe it.

        IDs that nobody here knows were issued in an answer that was lost, so they are fresh.

        Returns:
            The used IDs that the session does not hold: they are lost.
        """
        self.unsend()
        for cooldown_ms, cids in list(self.leaving.items()):
            self.leaving[cooldown_ms] = [cid for cid in cids if cid in held]
            if not self.leaving[cooldown_ms]:
                del self.leaving[cooldown_ms]
        self.fresh = deque(cid for cid in self.fresh if cid in held)
        self.cooling = deque(each for each in self.cooling if each[1] in held)
        lost = self.used - held
        self.used -= lost
        self.fresh.extend(sorted(held - self.known()))
        return sorted(lost)

    def known(self) -> set[int]:
        """Return all IDs, wherever they are."""
        found = self.used.union(self.fresh, self.sent, *self.leaving.values())
        found.update(cid for _, cid in self.cooling)
        return found
