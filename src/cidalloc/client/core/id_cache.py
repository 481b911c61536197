"""The ID cache: the IDs of a session within its client, so that most need no round trip.

Each ID of the session is in one place: *used* by the application; *fresh*, never used by us;
*cooling*, ended and soon usable again; *to_release*; *releasing*, in a release request without an
answer yet; or *awaiting_model*, to be released when its cooldown is known. Times are seconds, and
come from the caller.

A signal handler may raise an exception anywhere in here. Then an ID may be in two places, used and
where it goes to, but never in none while it is used, and never twice among those to be used again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from itertools import islice

from ...errors import Duplicate, NotHeld

__all__ = ["ENDED", "MAX_AHEAD", "IdCache", "need_ms"]

ENDED = -1
"""In place of a cooldown: the sequences were ended, so the manager's least cooldown will do."""

MAX_AHEAD = 1024
"""The most IDs in stock that nobody uses, if nothing else is said."""

_QUICK_S = 1.0  # a stock that is empty again so soon was too small
_STALE_S = 30.0  # what was not needed for so long may go back


def need_ms(idle: float, timeout: float) -> int:
    """Return for how many milliseconds an ID cools after a sequence without END.

    Args:
        idle: seconds after which its model forgets it.
        timeout: seconds that a request may have taken to get there.
    """
    return math.ceil((idle + timeout) * 1000)  # never shorter than model_was_read for


class IdCache:
    """The IDs of one session.

    Args:
        cooldown: the least time in seconds between two uses.
        ahead: the most IDs to keep that nobody uses.
    """

    __slots__ = (
        "ahead",
        "awaiting_model",
        "cooldown",
        "cooling",
        "fresh",
        "needs_refill",
        "refill_below",
        "refilled_at",
        "releasing",
        "releasing_cooldown",
        "taken_at",
        "target_size",
        "to_release",
        "used",
    )

    def __init__(self, cooldown: float = 0.0, ahead: int = MAX_AHEAD) -> None:
        self.cooldown = cooldown
        self.ahead = ahead
        self.used: set[int] = set()
        self.fresh: deque[int] = deque()
        self.cooling: deque[tuple[float, int]] = deque()
        self.to_release: dict[int, dict[int, None]] = {}  # by cooldown
        self.awaiting_model: dict[str, dict[int, tuple[float, float]]] = {}  # by model
        self.releasing: list[int] = []
        self.releasing_cooldown = ENDED
        self._set_target_size(1)
        self.needs_refill = False
        self.refilled_at = self.taken_at = float("-inf")

    # ---- The two that are called all the time

    def take(self, now: float) -> int:
        """Return an ID that is from now on used, or 0 if none is ready."""
        self.taken_at, cid = now, 0
        cooling = self.cooling
        try:
            if cooling and cooling[0][0] <= now:
                cid = cooling.popleft()[1]
            elif self.fresh:
                cid = self.fresh.popleft()
                if len(self.fresh) < self.refill_below:
                    self.needs_refill = True
            else:
                return 0
            self.used.add(cid)
            return cid
        except BaseException:
            self.used.discard(cid)
            raise

    def take_back(self, cids: Iterable[int]) -> None:
        """Take IDs back that nobody got to see; they are ready as they were before."""
        for cid in cids:
            if cid in self.used:
                self.used.remove(cid)
                self.fresh.appendleft(cid)

    def recycle(self, cid: int, now: float) -> bool:
        """Let a used ID cool, whose sequence was ended; False if it is none."""
        try:
            self.used.remove(cid)
            if len(self.cooling) + len(self.fresh) < self.ahead:
                self.cooling.append((now + self.cooldown, cid))
            else:
                self._put_to_release(cid, ENDED)
        except KeyError:
            return False
        except BaseException:
            if cid not in self.known():
                self._put_to_release(cid, ENDED)
            raise
        return True

    # ---- In and out

    @property
    def outgoing(self) -> bool:
        """Whether IDs have to be released, or are in a release request without an answer."""
        return bool(self.to_release or self.releasing or self.awaiting_model)

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
            self._put_to_release(cid, cooldown_ms)

    def _put_to_release(self, cid: int, cooldown_ms: int) -> None:
        self.to_release.setdefault(cooldown_ms, {})[cid] = None
        self.used.discard(cid)

    def await_model(self, cid: int, model: str, idle: float, timeout: float) -> None:
        """Let a used ID wait until it is known for how long ``model`` keeps idle sequences now.

        Args:
            cid: the ID.
            model: the model that its sequence was on.
            idle: seconds, the idle time that was known.
            timeout: seconds that a request of it may have taken.
        """
        self.awaiting_model.setdefault(model, {})[cid] = idle, timeout
        self.used.discard(cid)

    def model_was_read(self, model: str, idle: float) -> None:
        """Let those leave that waited for the idle time of ``model``, in seconds."""
        for cid, (known, timeout) in self.awaiting_model[model].items():
            self._put_to_release(cid, need_ms(max(known, idle), timeout))
        del self.awaiting_model[model]

    def refill(self, cids: Iterable[int]) -> None:
        """Add IDs that were issued to the session and that it never used."""
        self.fresh.extend(cids)
        self.needs_refill = False

    def plan(self, now: float, taken: int) -> int:
        """Return how many IDs to fetch ahead, on the occasion of a refill: what demand asks for.

        Args:
            now: the time.
            taken: how many of those in stock are about to be taken.
        """
        if now - self.refilled_at < _QUICK_S:
            self._set_target_size(2 * self.target_size)
        self.refilled_at = now
        left = len(self.cooling) + len(self.fresh) - taken
        return max(0, min(self.target_size, self.ahead - left))

    def trim(self, now: float) -> float:
        """Let those leave that nobody has needed for long; return when to look again."""
        while self.target_size > 1 and now - self.refilled_at >= 2 * _STALE_S:
            self._set_target_size(self.target_size // 2)
            self.refilled_at += _STALE_S
        gone: list[int] = []
        cooling = self.cooling
        spare = len(self.fresh) + len(cooling) - self.target_size
        while spare > len(gone) and cooling and cooling[0][0] <= now - _STALE_S:
            gone.append(cooling.popleft()[1])
        while now - self.refilled_at >= _STALE_S and len(self.fresh) > self.target_size:
            gone.append(self.fresh.popleft())
        if now - self.taken_at >= 2 * _STALE_S:  # nobody needs any
            gone.extend(self.fresh)
            self.fresh.clear()
            while cooling and cooling[0][0] <= now:
                gone.append(cooling.popleft()[1])
        for cid in gone:
            self._put_to_release(cid, ENDED)
        return now + _STALE_S

    def _set_target_size(self, target_size: int) -> None:
        self.target_size = min(target_size, self.ahead)
        self.refill_below = (self.target_size + 1) // 2

    # ---- Giving back

    def send(self, most: int) -> list[int]:
        """Choose at most so many IDs with one cooldown that leave with the next request."""
        self.requeue()
        for cooldown_ms, cids in self.to_release.items():
            self.releasing_cooldown = cooldown_ms
            self.releasing = list(islice(cids, most))
            self._drop_to_release(cooldown_ms, set(self.releasing))
            break
        return self.releasing

    def requeue(self) -> None:
        """The request did nothing: these IDs have still to leave."""
        for cid in self.releasing:
            self._put_to_release(cid, self.releasing_cooldown)
        self.releasing = []

    def keep(self, cid: int, cooldown_ms: int) -> None:
        """Let an ID that was to leave count as used: the manager does not take it."""
        self.used.add(cid)
        self._drop_to_release(cooldown_ms, {cid})

    def _drop_to_release(self, cooldown_ms: int, gone: set[int]) -> None:
        rest = {cid: None for cid in self.to_release[cooldown_ms] if cid not in gone}
        if rest:
            self.to_release[cooldown_ms] = rest
        else:
            del self.to_release[cooldown_ms]

    def reconcile(self, held: set[int]) -> list[int]:
        """Compare with what the manager says that the session holds, and believe it.

        IDs that nobody here knows were issued in an answer that was lost, so they are fresh.

        Returns:
            The used IDs that the session does not hold: they are lost.
        """
        self.requeue()
        for waiting in self.awaiting_model.values():
            for cid in waiting.keys() - held:
                del waiting[cid]
        for cooldown_ms, cids in list(self.to_release.items()):
            self._drop_to_release(cooldown_ms, cids.keys() - held)
        self.fresh = deque(cid for cid in self.fresh if cid in held)
        self.cooling = deque(each for each in self.cooling if each[1] in held)
        lost = self.used - held
        self.used -= lost
        self.fresh.extend(sorted(held - self.known()))
        return sorted(lost)

    def known(self) -> set[int]:
        """Return all IDs, wherever they are."""
        found = self.used.union(
            self.fresh, self.releasing, *self.to_release.values(), *self.awaiting_model.values()
        )
        found.update(cid for _, cid in self.cooling)
        return found
