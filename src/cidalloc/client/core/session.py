"""The session: a lease and the cache of IDs under it, as flows."""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import Callable, Iterable
from typing import Any

from ...codes import Operation
from ...errors import (
    CidError,
    Exhausted,
    InvalidArgument,
    LimitExceeded,
    NotHeld,
    NotOwner,
    OutOfRange,
    ProtocolError,
    RegistryMismatch,
    Repeated,
    SequenceLost,
    SessionExpired,
    SessionUnknown,
    Unavailable,
)
from .effects import Flow, Idle, Reply
from .id_cache import ENDED, MAX_AHEAD, IdCache, need_ms
from .lease import NEVER, Lease, runs
from .model_info import ModelCache

__all__ = ["Acquired", "Session"]

_log = logging.getLogger("cidalloc.client")

_PREFETCH_BACK_OFF_S = 10.0  # take nothing ahead for so long when the manager had no more
_MOST_AT_ONCE = 1000  # IDs in one DELETE
_ASK_S = 60.0  # for how long a model is asked that is not there


class Acquired(list[int]):
    """IDs on their way to the application, and of which of the client's sessions they are."""

    epoch = -1


class Session(Lease):
    """One client's session, and the cache of IDs that it holds; `Lease` says what the rest is."""

    def __init__(
        self,
        *,
        ttl: float,
        label: str,
        timeout: float,
        rng: random.Random,
        clock: Callable[[], float],
        ahead: int = MAX_AHEAD,
    ) -> None:
        super().__init__(ttl=ttl, label=label, timeout=timeout, rng=rng, clock=clock)
        self.ahead = ahead
        self.cache = IdCache(ahead=ahead)
        self.models = ModelCache()
        self.announced_ms = 0  # for how long its IDs cool if the session expires
        self._announcing_ms = 0  # the same, in a NEW whose answer is not there yet
        self.default_ms = 0  # what the manager takes if nothing is said
        self.needs_maintenance = False  # the heartbeat has something to do
        self._seq = 0
        self._doubtful = False  # the outcome of a change is not known
        self._lost: set[int] = set()  # IDs in use when their session was lost
        self._prefetch_after = NEVER
        self._trim_at = NEVER
        self._chunk = _MOST_AT_ONCE
        self._pool: range | None = None
        self._ending: Flow[None] | None = None  # the flow that closes it
        self._gone = False  # the manager was told, or cannot be
        self._all_ended = False
        self._ask_until = NEVER  # from then on a model that does not tell is not asked any more

    def _begin(self, cooldown_ms: int, default_ms: int) -> None:
        self.default_ms = default_ms
        self.cache = IdCache(cooldown_ms / 1000, self.ahead)
        self._trim_at = self.now()

    def _drop(self) -> None:
        self._lost |= self.cache.used
        self.cache = IdCache(ahead=self.ahead)
        self._seq = self.announced_ms = 0
        self._doubtful = False
        self._pool = None

    # ---- What needs no answer

    def take(self, need_ms: int | None = None) -> int:
        """Return an ID out of the cache, or 0 if that takes a flow.

        Args:
            need_ms: for how long it must cool if we die; as long as the manager says without it.
        """
        now = self.now()
        if now >= self.lease_deadline or self.closed:
            return 0
        if (self.default_ms if need_ms is None else need_ms) > self.announced_ms:
            return 0
        return self._take(now)

    def _take(self, now: float) -> int:
        cache, cid = self.cache, 0
        needs_refill = cache.needs_refill
        try:
            cid = cache.take(now)
            if cache.needs_refill and not needs_refill:
                self.needs_maintenance = True
            return cid
        except BaseException:
            cache.take_back((cid,))
            raise

    def take_back(self, taken: Acquired, error: BaseException) -> None:
        """Take back what an exception kept from reaching the application."""
        if taken.epoch == self.epoch:
            self.cache.take_back(taken)
        taken.clear()
        if not isinstance(error, CidError):
            self._doubtful = True  # it came from anywhere: an ID may be in no place at all

    def give(self, cids: list[int], cooldown_ms: int | None) -> None:
        """Take IDs back from the application, all or none.

        Args:
            cids: the IDs.
            cooldown_ms: for how long they cool; `ENDED` if their sequences were ended; if it is
                None, as long as the manager says.

        Raises:
            NotHeld, OutOfRange, Duplicate: an ID that cannot be given back.
            SessionExpired: an ID that was lost with its session.
        """
        for cid in cids:
            if not 0 < cid < 2**63:
                raise OutOfRange(f"{cid} is no correlation ID")
        lost = self._lost.intersection(cids)
        if lost:
            self._lost -= lost
            others = "; no other was given back" if len(lost) < len(cids) else ""
            raise SessionExpired(f"{_some(lost)} had been lost: {self.lost_why}{others}")
        self.cache.check_used(cids)
        if cooldown_ms == ENDED:
            for cid in cids:
                self.recycle(cid)
            return
        self.cache.give_back(cids, self.default_ms if cooldown_ms is None else cooldown_ms)
        self.needs_maintenance = True

    def recycle(self, cid: int) -> bool:
        """Take back an ID whose sequence was ended; False if it is none that is used."""
        found = self.cache.recycle(cid, self.now())
        if self.cache.to_release:
            self.needs_maintenance = True
        return found

    def release_from(self, epoch: int, cid: int, cooldown_ms: int) -> None:
        """Take back the ID of a sequence. If it was lost meanwhile, nothing is left to do."""
        if self._has(epoch, cid):
            self.give([cid], cooldown_ms)

    def release_unended(
        self, epoch: int, cid: int, model: str, idle: float, timeout: float
    ) -> None:
        """Take back the ID of a sequence without END, on a model that may have been loaded anew.

        Args:
            epoch: of which of our sessions the ID is.
            cid: the ID.
            model: the model.
            idle: seconds after which it forgot sequences when this one began.
            timeout: seconds that a request may have taken.
        """
        if self._has(epoch, cid):
            self.cache.await_model(cid, model, idle, timeout)
            self._ask_until = self.now() + _ASK_S
            self.needs_maintenance = True

    def _has(self, epoch: int, cid: int) -> bool:
        if epoch == self.epoch and not self.closed and cid in self.cache.used:
            return True
        self._lost.discard(cid)
        return False

    def check(self, epoch: int, cid: int) -> None:
        """See that a sequence may still use its ID.

        Raises:
            InvalidArgument: the client is closed.
            SequenceLost: the ID belonged to a session that is no more.
            SessionExpired: no heartbeat was answered in time; that may still change.
        """
        if self.closed:
            raise InvalidArgument("the client of this sequence is closed")
        if epoch != self.epoch or cid not in self.cache.used:
            raise SequenceLost(f"ID {cid} was lost: {self.lost_why}")
        if self.now() >= self.lease_deadline:
            raise SessionExpired(self._expired())

    # ---- Flows

    def acquire(
        self, count: int, need_ms: int | None, deadline: float, taken: Acquired
    ) -> Flow[None]:
        """Put so many IDs into ``taken``, which are from now on used.

        `take` says what ``need_ms`` is. Whoever called puts back what it cannot hand on.

        Raises what `cidalloc.client.Client.acquire_many` does.
        """
        tries = 0
        while True:
            self.check_open()
            try:
                if not self.opened or self.now() >= self.lease_deadline:
                    yield from self._in_turn(self._establish(deadline), deadline)
                need = self.default_ms if need_ms is None else need_ms
                now = self.now()
                enough = self.cache.ready(now, count) >= count
                if enough and need <= self.announced_ms and now < self.lease_deadline:
                    taken.epoch = self.epoch
                    for _ in range(count):
                        taken.append(self._take(now))
                    assert all(taken)
                    return
                yield from self._in_turn(self._fetch(count, need, deadline), deadline)
            except CidError as error:
                tries += 1
                yield from self._recover(error, tries, deadline)

    def heartbeat(self) -> Flow[None]:
        """Look after the session until it is closed: renew, refill, give back; never raises."""
        tries = 0
        while not (self.closed or self.abandoned):
            self.needs_maintenance = False
            if self._due() > self.now():
                yield Idle(self._due())
                continue
            # Short enough for some tries before the lease is over.
            deadline = self.now() + min(self.timeout, self.ttl / 8)
            try:
                if self.now() >= self._renew_at:
                    yield from self._renew(deadline)
                    yield from self._check_models(deadline)
                else:
                    yield from self._in_turn(self._maintain(deadline), deadline)
                tries = 0
            except CidError as error:
                tries += 1
                level = logging.INFO if tries == 1 else logging.DEBUG
                _log.log(level, "%r: a heartbeat or refill failed: %s", self, error)
                self._retry_at = self.now() + self._pause(tries)
                if isinstance(error, RegistryMismatch):
                    with contextlib.suppress(RegistryMismatch):
                        yield from self._probe(error, deadline)

    def flush(self, deadline: float) -> Flow[None]:
        """Give back what is leaving, so that others may see it gone."""
        tries = 0
        if self.opened and self.now() < self.lease_deadline and self.cache.awaiting_model:
            with contextlib.suppress(CidError):  # a model may be away, which is no matter here
                yield from self._in_turn(self._give_back(deadline), deadline)
        while (
            self.opened
            and self.now() < self.lease_deadline
            and (self.cache.to_release or self.cache.releasing)
        ):
            try:
                yield from self._in_turn(self._give_back(deadline), deadline)
            except CidError as error:
                tries += 1
                yield from self._recover(error, tries, deadline)

    def read(self, operation: Operation, deadline: float) -> Flow[Reply]:
        """Ask the manager something that changes nothing."""
        yield from self.flush(deadline)
        tries = 0
        while True:
            self.check_open()
            try:
                return (yield from self._once(operation, deadline, session=False))
            except CidError as error:
                tries += 1
                yield from self._recover(error, tries, deadline)

    def status(self, deadline: float) -> Flow[dict[str, Any]]:
        """Return the manager's status."""
        event = yield from self.read(Operation.STATUS, deadline)
        try:
            found = json.loads(event.detail)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ProtocolError("the manager's status is no JSON object")
        return found

    def pool(self, deadline: float) -> Flow[range]:
        """Return the manager's pool, which is asked for once in a session."""
        if self._pool is None:
            status = yield from self.status(deadline)
            try:
                first, capacity = (status["pool"][name] for name in ("first", "capacity"))
                self._pool = range(first, first + capacity)
            except (LookupError, TypeError):
                raise ProtocolError("the manager's status does not say what its pool is") from None
        return self._pool

    def close(self, deadline: float) -> Flow[None]:
        """Give everything back. A manager that is away finds out when the lease is over."""
        while runs(self._ending) and self.now() < deadline:  # another closes it
            yield Idle(deadline)
        if self._gone:
            return
        ending = self._close(deadline)
        try:
            self._ending = ending
            yield from ending
            self._gone = True
        finally:
            ending.close()
            self._shut()

    def _shut(self) -> None:
        if not self.closed:
            cache = self.cache
            left = cache.used or cache.outgoing
            self._all_ended = not (left or self._doubtful)
            self.cache = IdCache()
            self.closed = True
            self.version += 1

    def _close(self, deadline: float) -> Flow[None]:
        cache, tries = self.cache, 0
        try:
            if self.now() < self.lease_deadline and cache.outgoing:
                yield from self._in_turn(self._give_back(deadline), deadline)
        except CidError as error:
            _log.info("%r: could not give back IDs before closing: %s", self, error)
        self._shut()
        while self.opened:
            try:
                yield from self._once(Operation.CLOSE, deadline, ended=self._all_ended)
            except SessionUnknown:
                return
            except CidError as error:
                tries += 1
                wait = self._pause(tries)
                if (
                    error.answered
                    and isinstance(error, Unavailable)
                    and self.now() + wait < deadline
                ):
                    yield from self._sleep(wait)
                    continue
                _log.info("%r: it ends when its lease is over, since: %s", self, error)
            return

    # ---- Inside, in turn

    def _change(
        self, operation: Operation, deadline: float, cids: Iterable[int] = (), **more: Any
    ) -> Flow[Reply]:
        """Send one change of the session; it is our turn, and no doubt is left of one before.

        Whoever called notes what the answer has changed, and that no doubt is left then.
        """
        self._seq += 1
        self._doubtful = True  # until an answer says what was done; also if we are broken off
        epoch = self.epoch
        try:
            event = yield from self._once(operation, deadline, cids, seq=self._seq, **more)
        except CidError as error:
            # Triton refuses some requests by itself; those never reached the manager.
            certain = error.answered or isinstance(error, InvalidArgument)
            if epoch == self.epoch and certain and not isinstance(error, Repeated):
                self._doubtful = False
                self.cache.requeue()
            raise
        return event

    def _fetch(self, count: int, need_ms: int, deadline: float) -> Flow[None]:
        """Get what lacks of ``count`` IDs and some ahead, and have ``need_ms`` announced."""
        yield from self._reconcile(deadline)
        ready = self.cache.ready(self.now(), count) if count else 0
        lacking = max(0, count - ready)
        if lacking <= 0 and count > 0:
            yield from self._announce(need_ms, deadline)
            return  # if it is not for that, somebody else was faster
        ahead = self.cache.plan(self.now(), ready) if self.now() >= self._prefetch_after else 0
        while lacking + ahead > 0:
            wanted, need = lacking + ahead, max(need_ms, self.announced_ms)
            self._announcing_ms = need
            try:
                event = yield from self._change(
                    Operation.NEW, deadline, count=wanted, cooldown_ms=need
                )
            except (Exhausted, LimitExceeded):
                self._prefetch_after = self.now() + _PREFETCH_BACK_OFF_S
                if not (ahead and lacking):
                    raise
                ahead = 0
                continue
            cids = event.output.tolist()
            if len(cids) != wanted or not all(cids):
                self._doubtful = True
                raise ProtocolError(f"asked for {wanted} IDs, got {len(cids)}")
            self._lost.difference_update(cids)
            self.announced_ms = need
            self.cache.refill(cids)
            self._doubtful = False
            self.version += 1
            return

    def _announce(self, need_ms: int, deadline: float) -> Flow[None]:
        """Tell the manager for how long our IDs have to cool if we die, if it must be longer."""
        if need_ms > self.announced_ms:
            yield from self._renew(deadline, cooldown_ms=need_ms)
            self.announced_ms = max(self.announced_ms, need_ms)
            self.version += 1

    def _check_models(self, deadline: float) -> Flow[None]:
        """See whether models with new sequences were loaded anew, and now keep them for longer."""
        for model, timeout in list(self.models.to_check.items()):
            try:
                target = yield from self.models.look(model, self.now(), self._limit(deadline))
            except Unavailable:
                continue
            except CidError:
                target = None  # it may not be read any more, or keeps no sequences
            self.models.to_check.pop(model, None)
            if target is not None:
                yield from self._announce(need_ms(target.idle_s, timeout), deadline)

    def _ask_models(self, deadline: float) -> Flow[None]:
        """Find out for how long IDs have to cool that came back without END, and let them leave."""
        for model in list(self.cache.awaiting_model):
            try:
                target = yield from self.models.look(model, self.now(), self._limit(deadline))
                idle = target.idle_s
            except Unavailable:
                if self.now() < self._ask_until:
                    raise
                idle = 0.0  # it is not served any more: what was known will do
            except CidError:
                idle = 0.0  # it may not be read any more, or keeps no sequences
            self.cache.model_was_read(model, idle)

    def _maintain(self, deadline: float) -> Flow[None]:
        """What the heartbeat does but for renewing."""
        if self.now() >= self._trim_at:
            self._trim_at = self.cache.trim(self.now())
        yield from self._give_back(deadline)
        if self.cache.needs_refill:
            self.cache.needs_refill = False
            if self.now() >= self._prefetch_after:
                yield from self._fetch(0, self.announced_ms, deadline)

    def _due(self) -> float:
        """Return when the heartbeat has to do something next."""
        if not self.opened:
            return float("inf")
        cache = self.cache
        needs_refill = cache.needs_refill and self.now() >= self._prefetch_after
        work = self._doubtful or cache.to_release or cache.awaiting_model or needs_refill
        if work and self.now() < self.lease_deadline:
            return self._retry_at
        return max(min(self._renew_at, self._trim_at), self._retry_at)

    def _reconcile(self, deadline: float) -> Flow[None]:
        """After an answer was lost, ask what the session holds. Nothing else is in flight."""
        if not self._doubtful:
            return
        self._seq += 1
        event = yield from self._once(Operation.HELD, deadline, seq=self._seq)
        held = set(event.output.tolist())
        if held - self.cache.known():  # so it was a NEW, and what it announced holds
            self.announced_ms = max(self.announced_ms, self._announcing_ms)
        lost = self.cache.reconcile(held)
        self._lost -= held  # if they were ours once, they are so again
        if lost:
            self.lost_why = "the manager does not count it among the session's"
            _log.error("%r: %s are not the session's any more", self, _some(lost))
            self._lost.update(lost)
        self._doubtful = False
        self.version += 1

    def _give_back(self, deadline: float) -> Flow[None]:
        while True:
            yield from self._reconcile(deadline)
            cids = self.cache.send(self._chunk)
            if not cids:
                if not self.cache.awaiting_model:
                    return
                yield from self._ask_models(deadline)
                continue
            cooldown_ms = self.cache.releasing_cooldown
            how: dict[str, Any] = {"ended": True}
            if cooldown_ms != ENDED:
                how = {"cooldown_ms": cooldown_ms}
            try:
                yield from self._change(Operation.DELETE, deadline, cids, **how)
            except LimitExceeded as error:
                self._chunk = max(1, len(cids) // 8)
                if len(cids) == 1:  # so it is the cooldown that is too long
                    _log.error("%r: %s stays ours until we close: %s", self, cids[0], error)
                    self.cache.keep(cids[0], cooldown_ms)
                    self._chunk = _MOST_AT_ONCE
                continue
            except (NotHeld, NotOwner, OutOfRange):
                self._doubtful = True  # we are wrong about what we hold
                continue
            self.cache.releasing = []
            self._doubtful = False
            self.version += 1


def _some(cids: Iterable[int]) -> str:
    """Return the first few IDs, for a person."""
    found = sorted(cids)
    return ", ".join(f"ID {cid}" for cid in found[:3]) + (" and others" if len(found) > 3 else "")
