"""The ID cache: the IDs of a session within its client, so that most need no round trip.

Each ID of the session is in one place: *used* by the application; *fresh*, not used by this client
yet; *cooling*, ended and soon usable again; *to_release*; *releasing*, in a release request without
an answer yet; or *awaiting_model*, to be released when its cooldown is known. Times are seconds,
and come from the caller.

A signal handler may raise an exception at any line. Then an ID may be in two places: in *used* and
in the place it goes to. An ID in use is always in one place at least, and an ID that may be used
again is never there twice.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from itertools import islice

from ...errors import Duplicate, NotHeld
from .effects import NEVER

__all__ = ["ENDED", "MAX_AHEAD", "IdCache", "need_ms"]

ENDED = -1
"""In place of a cooldown: the sequences were ended, so the manager's minimum cooldown is enough."""

MAX_AHEAD = 1024
"""Maximum number of unused IDs in the cache, and the default."""

_QUICK_S = 1.0  # a cache that is empty again so soon was too small
_STALE_S = 30.0  # IDs that were not needed for so long may go back
_WANTED_S = 5.0  # unused IDs go back after so long without demand if other clients wait for some
_SHARED_S = 10.0  # released IDs are not cached for so long after calls of this client had to wait
_REFILL_BACK_OFF_S = 10.0  # no IDs are fetched ahead for so long after the manager had no more
_BATCH_S = 50e-6  # times `ahead`: between two release requests, so that many IDs leave together
_AWAIT_MODEL_S = 60.0  # a model that does not answer is asked for so long


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
        cooldown: the minimum time in seconds between two uses of an ID.
        ahead: the maximum number of unused IDs.

    Attributes:
        needs_refill: few fresh IDs are left.
        needs_maintenance: the heartbeat has something new to do.
        trim_at: when to call `trim` next.
        draining: the manager issues no more IDs: none is taken, and unused ones are released.
    """

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
        self.target_size = min(1, ahead)  # IDs to fetch ahead
        self.needs_refill = self.needs_maintenance = self.draining = False
        self.refilled_at = self.refill_after = self.taken_at = self.released_at = NEVER
        self.trim_at = self.shared_until = NEVER
        self.await_until: dict[str, float] = {}  # by model

    # ---- For each ID

    def take(self, now: float) -> int:
        """Move an ID to the used ones and return it; return 0 if no ID is ready."""
        self.taken_at, cid = now, 0
        if self.draining:
            return 0
        cooling = self.cooling
        try:
            if cooling and cooling[0][0] <= now:
                cid = cooling.popleft()[1]
            elif self.fresh:
                cid = self.fresh.popleft()
                if 2 * len(self.fresh) < self.target_size and not self.needs_refill:
                    self.needs_refill = self.needs_maintenance = True
            else:
                return 0
            self.used.add(cid)
            return cid
        except BaseException:
            self.used.discard(cid)
            raise

    def take_back(self, cids: Iterable[int]) -> None:
        """Take back IDs that the application never saw; they are ready again."""
        for cid in cids:
            if cid in self.used:
                self.used.remove(cid)
                self.fresh.appendleft(cid)

    def recycle(self, cid: int, now: float) -> bool:
        """Let a used ID cool after its sequence was ended; return False if it is not used."""
        try:
            self.used.remove(cid)
            # What cools leaves room for the fresh IDs that a busy client needs.
            room = self.ahead - max(len(self.fresh), self.target_size if self.ahead > 1 else 0)
            if len(self.cooling) < room and now >= self.shared_until and not self.draining:
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

    def due(self, now: float) -> float:
        """Return when the heartbeat has to release IDs or to fetch some; infinite if never."""
        unwanted = self.draining and (self.fresh or self.cooling)
        if self.awaiting_model or unwanted or (self.needs_refill and now >= self.refill_after):
            return NEVER
        return self.released_at + self.ahead * _BATCH_S if self.to_release else float("inf")

    def ready(self, now: float, enough: int) -> int:
        """Return how many IDs can be taken now; it may stop counting at ``enough``."""
        if self.draining:
            return 0
        count = len(self.fresh)
        for due, _ in self.cooling:
            if due > now or count >= enough:
                break
            count += 1
        return count

    def ready_at(self, count: int) -> float:
        """Return the time from which on so many IDs can be taken; infinite if there are fewer."""
        lacking = count - len(self.fresh)
        if lacking <= 0:
            return NEVER
        return self.cooling[lacking - 1][0] if lacking <= len(self.cooling) else float("inf")

    def check_used(self, cids: Iterable[int]) -> None:
        """Check that all of these are used, and that no ID is given twice.

        Raises:
            Duplicate, NotHeld: one of them is not.
        """
        seen = set()
        for cid in cids:
            if cid in seen:
                raise Duplicate(f"ID {cid} is given twice in this call")
            seen.add(cid)
            if cid not in self.used:
                raise NotHeld(
                    f"this client does not hold ID {cid}: it was released, or was never acquired"
                )

    def give_back(self, cids: Iterable[int], cooldown_ms: int) -> None:
        """Move used IDs to those that have to be released, with this cooldown."""
        for cid in cids:
            self._put_to_release(cid, cooldown_ms)

    def _put_to_release(self, cid: int, cooldown_ms: int) -> None:
        if not self.to_release:  # else the heartbeat knows
            self.needs_maintenance = True
        self.to_release.setdefault(cooldown_ms, {})[cid] = None
        self.used.discard(cid)

    def await_model(self, cid: int, model: str, idle: float, timeout: float, now: float) -> None:
        """Let a used ID wait until the present idle time of ``model`` is known.

        Args:
            cid: the ID.
            model: the model of its sequence.
            idle: the idle time in seconds that was known.
            timeout: seconds that a request of the sequence may have taken.
            now: the time.
        """
        if model not in self.awaiting_model:
            self.await_until[model] = now + _AWAIT_MODEL_S
        self.awaiting_model.setdefault(model, {})[cid] = idle, timeout
        self.used.discard(cid)
        self.needs_maintenance = True

    def model_was_read(self, model: str, idle: float) -> None:
        """Let IDs leave that waited for the idle time of ``model``, in seconds."""
        for cid, (known, timeout) in self.awaiting_model[model].items():
            self._put_to_release(cid, need_ms(max(known, idle), timeout))
        del self.awaiting_model[model]

    def refill(self, fresh: Iterable[int], used: Iterable[int], now: float) -> None:
        """Add new IDs of the session, some of which are used from now on."""
        self.used.update(used)
        self.fresh.extend(fresh)
        self.needs_refill = False
        self.taken_at = now

    def plan(self, now: float, taken: int) -> int:
        """Return how many IDs to fetch ahead with the next refill, by the recent demand.

        Args:
            now: the time.
            taken: how many IDs of the cache are about to be taken.
        """
        if now < self.refill_after:
            return 0
        if now - self.refilled_at < _QUICK_S:
            # IDs that cool have the other half of the cache.
            self.target_size = min(2 * self.target_size, max(self.ahead // 2, 1))
        self.refilled_at = now
        left = len(self.cooling) + len(self.fresh) - taken
        return max(0, min(self.target_size, self.ahead - left))

    def refill_failed(self, now: float) -> None:
        """Note that the manager has no more IDs: fetch none ahead for a while."""
        self.refill_after = now + _REFILL_BACK_OFF_S

    def share(self, now: float) -> None:
        """Note that calls wait for IDs: released IDs go to the manager, for the first in line."""
        self.shared_until = now + _SHARED_S

    def drain(self, on: bool | None) -> None:
        """Note whether the manager issues no more IDs, if that is known.

        The next `trim` releases all unused ones.
        """
        if on is not None:
            self.draining, self.needs_refill = on, self.needs_refill and not on

    def trim(self, now: float, others_wait: bool = False) -> None:
        """Release IDs that were not needed for long; set `trim_at`.

        If others wait for IDs, a few seconds without demand are long. In a drain none is needed.
        """
        while self.target_size > 1 and now - self.refilled_at >= 2 * _STALE_S:
            self.target_size //= 2
            self.refilled_at += _STALE_S
        gone: list[int] = []
        cooling = self.cooling
        spare = len(self.fresh) + len(cooling) - self.target_size
        while spare > len(gone) and cooling and cooling[0][0] <= now - _STALE_S:
            gone.append(cooling.popleft()[1])
        while now - self.refilled_at >= _STALE_S and len(self.fresh) > self.target_size:
            gone.append(self.fresh.popleft())
        if now - self.taken_at >= (_WANTED_S if others_wait else 2 * _STALE_S):  # no demand
            gone.extend(self.fresh)
            self.fresh.clear()
            while cooling and cooling[0][0] <= now:
                gone.append(cooling.popleft()[1])
        if self.draining:
            gone += [*self.fresh, *(cid for _, cid in cooling)]
            self.fresh.clear()
            cooling.clear()
        for cid in gone:
            self._put_to_release(cid, ENDED)
        self.trim_at = now + _STALE_S

    # ---- Releasing

    def send(self, most: int, now: float) -> list[int]:
        """Choose at most so many IDs, all with one cooldown, for the next release request."""
        self.requeue()
        self.released_at = now
        for cooldown_ms, cids in self.to_release.items():
            self.releasing_cooldown = cooldown_ms
            self.releasing = list(islice(cids, most))
            self._drop_to_release(cooldown_ms, set(self.releasing))
            break
        return self.releasing

    def requeue(self) -> None:
        """Note that the release request did nothing: its IDs have to be released again."""
        for cid in self.releasing:
            self._put_to_release(cid, self.releasing_cooldown)
        self.releasing = []

    def keep(self, cid: int, cooldown_ms: int) -> None:
        """Move an ID back to the used ones, since the manager refuses to release it."""
        self.used.add(cid)
        self._drop_to_release(cooldown_ms, {cid})

    def _drop_to_release(self, cooldown_ms: int, gone: set[int]) -> None:
        rest = {cid: None for cid in self.to_release[cooldown_ms] if cid not in gone}
        if rest:
            self.to_release[cooldown_ms] = rest
        else:
            del self.to_release[cooldown_ms]

    def reconcile(self, held: set[int]) -> list[int]:
        """Adopt the manager's list of the IDs that the session holds.

        IDs that this client does not know were issued in an answer that was lost; they are fresh.

        Returns:
            The used IDs that the session does not hold; they are lost.
        """
        self.requeue()
        # An exception that was raised in the middle may have left an ID in two places.
        self.used.difference_update(*self.to_release.values(), *self.awaiting_model.values())
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
        """Return all IDs of the session that this client knows."""
        found = self.used.union(
            self.fresh, self.releasing, *self.to_release.values(), *self.awaiting_model.values()
        )
        found.update(cid for _, cid in self.cooling)
        return found
