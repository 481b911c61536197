"""A lease: one session at the manager, from OPEN to its end, and the IDs that it holds.

A client has one lease at a time. A lease that was lost is never used again: a new object takes its
place, so an ID belongs to the lease that it was acquired with, and to no other. Flows that change
what the session holds (`fetch`, `refill`, `release`, `reconcile`) run one at a time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from uuid import UUID

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
    Repeated,
    SequenceLost,
    SessionExpired,
    SessionUnknown,
)
from ...protocol import MAX_MODELS, PROTOCOL, TOKEN_BYTES, Parameter, Request, as_ids, is_name
from .effects import NEVER, Flow, Reply, Send
from .id_cache import ENDED, IdCache
from .link import Link
from .model_info import HIGHEST_CID

__all__ = ["Acquired", "Lease"]

_log = logging.getLogger("cidalloc.client")

_MOST_AT_ONCE = 1000  # IDs in one DELETE
_TIMES_MS = (5_000, 120_000)  # cooldowns of a manager that does not tell them
_CHANGES = (Operation.NEW, Operation.DELETE)
_NOT_COUNTED = "the manager does not count it among the session's"


class Acquired(list[int]):
    """IDs on their way to the application, and the lease that they belong to."""

    lease: Lease | None = None


class Lease:
    """One session at the manager.

    Args:
        link: the way to the manager.
        label: the name of the session in the manager's status.
        ahead: the maximum number of unused IDs in the cache.
        lost: IDs in use when their session was lost, and why; the client's leases share it.

    Attributes:
        cache: the IDs that the session holds; empty when the lease has ended.
        deadline: the IDs must not be used from this time on.
        renew_at: when the heartbeat renews the lease.
        retry_at: the heartbeat sends nothing before this time.
        token: the secret that names the session.
        first_sent: when OPEN was sent first.
        generation: the manager's number of the session; 0 before OPEN is answered, and once lost.
        default_ms: the cooldown that the manager takes if a release does not say one.
        announced_ms: the cooldown of the IDs if the session expires.
        models: the models of its sequences, in the order in which they came up.
        doubtful: the result of a change is not known.
        lost_why: why the lease has ended; empty while it has not.
        pool: the manager's pool, once it is known.
        registry: the UUID of the manager's registry, once OPEN was answered.
        seen: the latest stamp of the registry; if its file is restored, it proves that.
        slice: the number of the manager's slice, which proxies find its server by; None while it is
            not known, once the lease was lost, and if the manager has no fixed slice.
        starved: why calls that wait for IDs have none. The cached IDs are reserved for them.
    """

    def __init__(self, link: Link, label: str, ahead: int, lost: dict[int, str]) -> None:
        self.cache = IdCache(ahead=ahead)
        self.deadline = self.renew_at = self.retry_at = NEVER
        self.token = f"{link.rng.getrandbits(8 * TOKEN_BYTES):0{2 * TOKEN_BYTES}x}"
        self.first_sent = float("inf")
        self.generation = 0
        self.default_ms = self.announced_ms = 0
        self.models: list[str] = []
        self._announced_models = 0
        self.doubtful = False
        self.lost_why = ""
        self.pool: range | None = None
        self.starved: Exhausted | None = None
        self.label, self._link, self._lost = label, link, lost
        self.registry = ""  # its UUID
        self.seen = ""
        self.slice: int | None = None
        self._sequences = self._seq = 0
        self._announcing_ms = 0  # announced by a NEW that is not answered yet
        self._most = _MOST_AT_ONCE

    def __repr__(self) -> str:  # never with the token
        return f"<Session {self.label!r}, {self.state}>"

    @property
    def opened(self) -> bool:
        """Whether the session was opened and not lost; its time may have run out."""
        return self.generation != 0

    @property
    def spent(self) -> bool:
        """Whether the lease cannot be opened any more."""
        return bool(self.lost_why) or self._link.now() >= self.first_sent + self._link.ttl

    @property
    def state(self) -> str:
        """The state in a word or two."""
        if not self.opened:
            return "not opened"
        return "open" if self._link.now() < self.deadline else "expired"

    # ---- IDs to and from the application: no round trip

    def take(self) -> int:
        """Take an ID out of the cache; return 0 if that needs a flow."""
        now = self._link.now()
        if now >= self.deadline or self.default_ms > self.announced_ms or self.starved:
            return 0
        return self.cache.take(now)

    def take_ready(self, count: int, need_ms: int | None, taken: Acquired) -> None:
        """Move ``count`` IDs from the cache to ``taken`` if so many are ready.

        Args:
            count: the number of IDs.
            need_ms: their cooldown if this client dies; None: the manager's default.
            taken: where they go.
        """
        now, cache = self._link.now(), self.cache
        need = self.default_ms if need_ms is None else need_ms
        if now < self.deadline and need <= self.announced_ms and cache.ready(now, count) >= count:
            taken.lease = self
            for _ in range(count):
                taken.append(cache.take(now))

    def take_back(self, taken: Acquired, error: BaseException) -> None:
        """Take back IDs that an exception kept from reaching the application."""
        self.cache.take_back(taken)
        taken.clear()
        if not isinstance(error, CidError):
            self.doubtful = True  # raised at any line: an ID may be in no place at all

    def give(self, cids: list[int], cooldown_ms: int | None) -> None:
        """Take IDs back from the application, all or none.

        Args:
            cids: the IDs.
            cooldown_ms: their cooldown; `ENDED` if their sequences were ended; None: the
                manager's default.

        Raises:
            NotHeld, OutOfRange, Duplicate: an ID cannot be given back.
            SessionExpired: an ID was lost with its session.
        """
        for cid in cids:
            if not 0 < cid <= HIGHEST_CID:
                raise OutOfRange(f"{cid} is not a correlation ID")
        lost = {cid: self._lost.pop(cid) for cid in cids if cid in self._lost}
        if lost:
            others = "; no other was given back" if len(lost) < len(cids) else ""
            raise SessionExpired(
                f"{_some(lost)} had been lost: {next(iter(lost.values()))}{others}"
            )
        self.cache.check_used(cids)
        try:
            if cooldown_ms == ENDED:
                for cid in cids:
                    self.cache.recycle(cid, self._link.now())
            else:
                self.cache.give_back(cids, self.default_ms if cooldown_ms is None else cooldown_ms)
        except BaseException:
            self.doubtful = True  # raised at any line: an ID may be in two places
            raise

    def release_from(self, cid: int, cooldown_ms: int) -> None:
        """Take back the ID of a sequence. A lost ID needs nothing more."""
        recycled = cooldown_ms == ENDED and self.cache.recycle(cid, self._link.now())
        if not recycled and self._has(cid):
            self.give([cid], cooldown_ms)

    def release_unended(self, cid: int, model: str, idle: float, timeout: float) -> None:
        """Take back the ID of a sequence without END; see `IdCache.await_model`."""
        if self._has(cid):
            self.cache.await_model(cid, model, idle, timeout, self._link.now())

    def drop_lost(self, cid: int) -> None:
        """Forget why an ID was lost, since its sequence is closed."""
        self._lost.pop(cid, None)

    def _has(self, cid: int) -> bool:
        self.drop_lost(cid)
        return cid in self.cache.used

    def check(self, cid: int, now: float) -> None:
        """Check that a sequence may still use its ID.

        Raises:
            SequenceLost: the ID was lost with its session.
            SessionExpired: no heartbeat was answered in time; a later answer may change that.
        """
        if cid not in self.cache.used:
            raise SequenceLost(f"ID {cid} was lost: {self.lost_why or _NOT_COUNTED}")
        if now >= self.deadline:
            raise SessionExpired(self.expired())

    def begin_sequence(self, cid: int, model: str) -> str:
        """Note a new sequence, and return a name that no other sequence ever has."""
        known = model in self.models or not is_name(model)  # else each RENEW would be refused
        if not known and len(self.models) < MAX_MODELS:
            self.models.append(model)
            self.cache.needs_maintenance = True
        # No other session of the registry ever has this generation.
        self._sequences += 1
        return f"{self.registry[-12:]}-{cid}-{self.generation}-{self._sequences}"

    def expired(self) -> str:
        """Return what an error says of a lease that has run out."""
        return (
            f"no heartbeat was answered for {self._link.ttl:g} s: until one is, another client may"
            " hold the IDs of this session"
        )

    # ---- Its life

    def open(self, deadline: float) -> Flow[None]:
        """Open the session at the manager."""
        self.first_sent = min(self.first_sent, self._link.now())
        what: dict[str, Parameter] = {"ttl_ms": int(self._link.ttl * 1000), "label": self.label}
        reply = yield from self._ask(Operation.OPEN, deadline, what)
        answer = reply.output.tolist()
        if len(answer) < 5 or answer[0] != PROTOCOL:
            raise ProtocolError(f"OPEN was answered with {answer}: a manager of another version?")
        _, generation, _, high, low, *more = answer
        self.registry = str(UUID(int=high << 64 | low))
        cooldown_ms, self.default_ms = more[:2] if len(more) >= 2 else _TIMES_MS
        own_slice, slices = more[2:4] if len(more) >= 4 else (0, 0)
        self.slice = own_slice if slices else None
        self.cache.cooldown = cooldown_ms / 1000
        # The first OPEN of this token that arrived began the session; later ones renew nothing.
        self._renewed(self.first_sent)
        self._plan_renewal(self.first_sent)
        self.generation = generation  # the last step, so that all is done or nothing
        _log.info("%r: opened, generation %d of %s", self, generation, self.registry)

    def renew(self, deadline: float, announced_ms: int | None = None) -> Flow[None]:
        """Renew the session; announce this cooldown."""
        what: dict[str, Parameter] = {} if announced_ms is None else {"cooldown_ms": announced_ms}
        sent, models = self._link.now(), len(self.models)
        if models:  # each time, since a manager that was reloaded does not know it
            what["models"] = json.dumps(self.models)
        reply = yield from self._ask(Operation.RENEW, deadline, what)
        self._announced_models = models
        self._plan_renewal(sent)
        answer = reply.output.tolist()
        if answer[:1] != [self.generation]:
            # A late OPEN made that session, and it holds no ID of this one.
            self.lose("the manager has another session under its name")
            raise SessionUnknown(self.lost_why)
        if any(answer[2:3]) and (not self.starved or self.starved.others_wait):
            self.cache.trim(self._link.now(), others_wait=True)

    def announce(self, need_ms: int, deadline: float) -> Flow[None]:
        """Tell the manager the cooldown of the IDs if this client dies, if it has to be longer."""
        if need_ms > self.announced_ms:
            yield from self.renew(deadline, need_ms)
            self.announced_ms = max(self.announced_ms, need_ms)

    def close(self, deadline: float, ended: bool) -> Flow[None]:
        """Close the session at the manager. If all ``ended``, its IDs cool for the minimum."""
        yield from self._ask(Operation.CLOSE, deadline, {"ended": ended})

    def end(self, why: str) -> None:
        """Stop using the lease. May be repeated."""
        self.lost_why = self.lost_why or why
        self.deadline = NEVER
        self.cache = IdCache()

    def lose(self, why: str) -> None:
        """End the lease: the session does not exist any more, and its IDs are lost."""
        if not self.lost_why:
            _log.warning("%r: lost, since %s", self, why)
        self._lost.update(dict.fromkeys(self.cache.used, why))
        self.end(why)
        self.generation, self.slice = 0, None

    @property
    def to_renew(self) -> bool:
        """Whether the heartbeat has to renew it now."""
        return self._link.now() >= self.renew_at or len(self.models) > self._announced_models

    def due(self) -> float:
        """Return when the heartbeat has to do something next."""
        if not self.opened:
            return float("inf")
        now, cache = self._link.now(), self.cache
        due = min(self.renew_at, cache.trim_at)
        if now < self.deadline:
            due = NEVER if self.doubtful or self.to_renew else min(due, cache.due(now))
        return max(due, self.retry_at)

    def put_off(self, tries: int) -> None:
        """Let the heartbeat pause after so many tries that failed."""
        self.retry_at = self._link.now() + self._link.pause(tries)

    def _renewed(self, sent: float) -> None:
        self.deadline = max(self.deadline, sent + self._link.ttl)
        self.retry_at = NEVER

    def _plan_renewal(self, sent: float) -> None:
        """Plan the next RENEW, also of a client whose other requests renew the lease.

        Only RENEW tells a manager that was reloaded the models, and the client that others wait.
        """
        self.renew_at = sent + self._link.ttl * self._link.rng.uniform(0.25, 0.35)

    def _ask(
        self,
        operation: Operation,
        deadline: float,
        parameters: dict[str, Parameter],
        cids: list[int] | None = None,
    ) -> Flow[Reply]:
        """Send one request of the session, and note what its answer says of the session.

        A change (NEW, DELETE) leaves the lease doubtful if its result is not known. After a success
        the caller notes the result, and that no doubt is left.
        """
        closing = operation is Operation.CLOSE
        if self.lost_why and not closing:
            raise SessionUnknown(self.lost_why)
        sent = self._link.now()
        parameters["session"], parameters["seen"] = self.token, self.seen
        if self.registry and operation is not Operation.OPEN:
            parameters["registry"] = self.registry
            parameters.setdefault("used", len(self.cache.used))
        if operation in _CHANGES or operation is Operation.HELD:
            self._seq += 1
            parameters["seq"] = self._seq
            self.doubtful = True  # until an answer tells the result, also if this is broken off
        request = Request(operation, as_ids(cids or ()), parameters)
        reply = yield Send(request, self._link.limit(deadline))
        error = self._link.note(reply)
        if self.lost_why and not closing:
            raise SessionUnknown(self.lost_why)
        self.cache.drain(reply.draining)
        self.seen = max(self.seen, reply.stamp)
        if error is None:
            if operation is not Operation.OPEN and not closing:
                self._renewed(sent)
            return reply
        if isinstance(error, SessionUnknown):
            self.lose(f"the manager does not know its session any more ({error})")
        # Triton refuses some requests by itself; those never reached the manager.
        undone = error.answered or isinstance(error, InvalidArgument)
        if undone and operation in _CHANGES and not isinstance(error, Repeated):
            self.doubtful = False
            self.cache.requeue()
        raise error

    def ask_dead(self, model: str, count: int) -> Request:
        """Return the request for IDs of dead clients on a model, which `Tidier` sends."""
        what = {"session": self.token, "registry": self.registry, "model": model, "count": count}
        return Request(Operation.DEAD, parameters=what)

    # ---- IDs to and from the manager: one flow at a time

    def fetch(
        self,
        count: int,
        need_ms: int | None,
        deadline: float,
        taken: Acquired | None,
        wait_ms: int | None = None,
    ) -> Flow[None]:
        """Ask for the IDs that the cache lacks, and for some ahead.

        Args:
            count: the number of IDs that the caller needs.
            need_ms: see `take_ready`.
            deadline: when to stop waiting.
            taken: where new IDs go, with those of the cache that complete them. It stays empty if
                another flow was faster or the lease has run out; then the IDs are in the cache.
            wait_ms: for how long the session keeps its place if the pool is exhausted; with 0 it
                gives up a place that it may have. None: this request is not for a call.
        """
        if self.doubtful:
            yield from self.reconcile(deadline)
        link, cache = self._link, self.cache
        need = max(self.announced_ms, self.default_ms if need_ms is None else need_ms)
        ready = min(count, cache.ready(link.now(), count))
        if ready == count > 0:
            yield from self.announce(need, deadline)
            return
        lacking, ahead = count - ready, cache.plan(link.now(), ready)
        while lacking + ahead > 0:
            self._announcing_ms = need
            what: dict[str, Parameter] = {"count": lacking + ahead, "cooldown_ms": need}
            what["used"] = len(cache.used) + count  # once this is answered
            if wait_ms is not None:
                what["wait_ms"] = wait_ms
            try:
                reply = yield from self._ask(Operation.NEW, deadline, what)
            except (Exhausted, LimitExceeded) as error:
                cache.refill_failed(link.now())
                if not (ahead and lacking and error.answered):  # else IDs may have been issued
                    raise
                ahead = 0
                continue
            cids = reply.output.tolist()
            if len(cids) != lacking + ahead or not all(cids):
                raise ProtocolError(f"asked for {lacking + ahead} IDs, got {len(cids)}")
            self.announced_ms = need
            self._hand_out(cids, lacking, ready, taken)
            return

    def _hand_out(self, cids: list[int], lacking: int, ready: int, taken: Acquired | None) -> None:
        """Move ``lacking`` new IDs and ``ready`` cached ones to ``taken``; cache all other new IDs.

        At whatever line an exception breaks it off, an ID is in ``taken``, in the cache, or found
        again by `reconcile`, since the lease is doubtful until the end.
        """
        now, cache = self._link.now(), self.cache
        for cid in self._lost.keys() & cids:
            del self._lost[cid]
        # Other calls may have taken IDs out of the cache meanwhile.
        complete = not ready or cache.ready(now, ready) >= ready
        if taken is not None and complete and now < self.deadline:
            taken.lease = self
            for _ in range(ready):
                taken.append(cache.take(now))
            taken.extend(cids[:lacking])
            cache.refill(cids[lacking:], taken, now)
        else:
            cache.refill(cids, (), cache.taken_at)
        self.doubtful = False

    def reconcile(self, deadline: float) -> Flow[None]:
        """Ask the manager what the session holds, after an answer was lost."""
        reply = yield from self._ask(Operation.HELD, deadline, {})
        held = set(reply.output.tolist())
        if held - self.cache.known():  # a NEW was lost, and what it announced holds
            self.announced_ms = max(self.announced_ms, self._announcing_ms)
        lost = self.cache.reconcile(held)
        for cid in self._lost.keys() & held:  # they belong to this session again
            del self._lost[cid]
        if lost:
            _log.error("%r: %s are not the session's any more", self, _some(lost))
            self._lost.update(dict.fromkeys(lost, _NOT_COUNTED))
        self.doubtful = False

    def release(self, deadline: float) -> Flow[None]:
        """Release at the manager the IDs that have to leave now; more may have to meanwhile."""
        left = sum(map(len, (self.cache.releasing, *self.cache.to_release.values())))
        while left > 0 or self.doubtful:
            if self.doubtful:
                yield from self.reconcile(deadline)
            cids = self.cache.send(self._most, self._link.now())
            if not cids:
                return
            cooldown_ms = self.cache.releasing_cooldown
            ended = cooldown_ms == ENDED
            how: dict[str, Parameter] = {"ended": True} if ended else {"cooldown_ms": cooldown_ms}
            try:
                yield from self._ask(Operation.DELETE, deadline, how, cids)
            except LimitExceeded as error:
                self._most = max(1, len(cids) // 8)
                if len(cids) == 1:
                    if not error.answered:  # by a proxy, which may change its mind
                        raise
                    # Not their number is too large, but the cooldown.
                    _log.error("%r: %s is held until close: %s", self, _some(cids), error)
                    self.cache.keep(cids[0], cooldown_ms)
                    self._most = _MOST_AT_ONCE
            except (NotHeld, NotOwner, OutOfRange):
                self.doubtful = True  # this client is wrong about what it holds
            else:
                self.cache.releasing = []
                self.doubtful = False
                left -= len(cids)


def _some(cids: Iterable[int]) -> str:
    """Return the first few IDs as text."""
    found = sorted(cids)
    return ", ".join(f"ID {cid}" for cid in found[:3]) + (" and others" if len(found) > 3 else "")
