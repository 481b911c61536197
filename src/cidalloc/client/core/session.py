"""The session of a client with its manager, as flows: leases in turn, retries and the heartbeat.

The clock is given at construction. A runner runs one step of a flow at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from ...codes import Operation
from ...errors import (
    CidError,
    Exhausted,
    InvalidArgument,
    ProtocolError,
    RegistryMismatch,
    SessionExpired,
    SessionUnknown,
    Unavailable,
)
from ...protocol import Request
from .effects import NEVER, Flow, Idle, Reply, Send, runs
from .id_cache import MAX_AHEAD, need_ms
from .lease import Acquired, Lease
from .link import Link
from .model_info import ModelCache

__all__ = ["Session"]

_log = logging.getLogger("cidalloc.client")

_LOOK_S = 1.0  # between two looks whether the flow that has the turn was broken off
_KEEP_PLACE_S = 3.0  # the manager keeps a place for so long after each request for IDs
_PAUSE_S = (0.02, 1.0)  # the shortest and the longest pause between two such requests
_TRIES_APART = 3
_STRANGERS = 3  # so many answers of another registry prove that the lease's own is gone


class Session:
    """One client's session with its manager: one lease after the other.

    Args:
        link: the way to the manager, and the clock.
        label: the name of the session in the manager's status.
        ahead: the maximum number of unused IDs in the cache.

    Attributes:
        lease: the current lease. A new object takes its place when it was lost.
        models: what is known of models.
        line: the calls that may wait for IDs, in their order, by place; some may have ended.
        version: rises when something changes that a flow may wait for.
        closed: the session was closed.
        abandoned: the client was collected as garbage.
        suspected: a connection broke, and another server may have its address since then.
        confirming: therefore the heartbeat renews the lease, and requests of sequences wait.
        doubts: how many times that began.
        trouble: why it failed the last time.
        on_confirmed: is called when it is over.
    """

    def __init__(self, link: Link, label: str, ahead: int = MAX_AHEAD) -> None:
        self.link = link
        self.now = link.now
        self.models = ModelCache()
        self.version = 0
        self.closed = False
        self.abandoned = False
        self.suspected = self.confirming = False
        self.doubts = self._breaks = 0
        self.trouble: CidError | None = None
        self.on_confirmed: Callable[[], object] = lambda: None
        self._new_lease = partial(Lease, link, label, ahead, lost={})
        self.lease = self._new_lease()
        self.line: dict[object, Flow[None]] = {}
        self._turn: Flow[None] | None = None  # the flow that has it, until that flow has ended
        self._ending: Flow[None] | None = None  # the flow that closes the session
        self._gone = False  # the manager was told of the end, or cannot be told
        self._all_ended = False

    def __repr__(self) -> str:  # never with the token
        return f"<Session {self.lease.label!r}, {self.state}>"

    @property
    def state(self) -> str:
        """The state in a word or two."""
        return "closed" if self.closed else self.lease.state

    def route(self) -> int | None:
        """Return the slice by which proxies find the server of the current lease, if it has one."""
        return self.lease.slice

    def check_open(self) -> None:
        """Raise `InvalidArgument` if the client is closed."""
        if self.closed:
            raise InvalidArgument("this client is closed")

    # ---- For the application

    def acquire(
        self,
        count: int,
        need_ms: int | None,
        deadline: float,
        taken: Acquired,
        until: float | None = None,
    ) -> Flow[None]:
        """Put ``count`` IDs into ``taken``; for the arguments see `Lease.take_ready`.

        With ``until`` it waits for IDs of an exhausted pool until this time, after the calls before
        it. Without, it takes no ID that calls wait for. Raises what `Client.acquire_many` does.
        """
        if until is None:
            if self._first() and self.lease.starved:
                raise Exhausted(f"{self.lease.starved}; calls before this one wait")
            yield from self._acquire(count, need_ms, deadline, taken, None)
            return
        began, place = self.now(), object()
        waiting = self._wait(place, count, need_ms, deadline, taken, until)
        try:
            self.line[place] = waiting
            yield from waiting
        except Exhausted as error:
            raise Exhausted(f"{error}; waited {self.now() - began:.1f} s") from error
        finally:
            self.line.pop(place, None)
            self._first()
            self.version += 1

    def _first(self) -> object:
        """Return the place of the call that is the first in line; None if no call waits."""
        while self.line:
            place, waiting = next(iter(self.line.items()))
            if runs(waiting):
                return place
            del self.line[place]
        self.lease.starved = None
        return None

    def _wait(
        self,
        place: object,
        count: int,
        need_ms: int | None,
        deadline: float,
        taken: Acquired,
        until: float,
    ) -> Flow[None]:
        """Stand in line, then ask for IDs until there are enough."""
        patience, tries = deadline - self.now(), 0
        while self._first() is not place:
            limit = until if self.lease.starved else max(until, deadline)
            if self.now() >= limit:
                raise self.lease.starved or Unavailable("no answer: other calls come first")
            yield Idle(min(limit, self.now() + _LOOK_S))
        while not taken:
            keep = _KEEP_PLACE_S
            if len(self.line) == 1:  # else the next call takes over the place at the manager
                keep = min(keep, max(until - self.now(), 0.0))
            deadline = self.now() + patience  # for each answer
            try:
                yield from self._acquire(count, need_ms, deadline, taken, math.ceil(keep * 1000))
            except Exhausted as error:
                if self.now() >= until:
                    raise
                self.lease.starved = error
                self.lease.cache.share(self.now())
                tries += 1
                yield from self._pause(count, error, tries, until)
        if not tries:
            self.lease.starved = None

    def _pause(self, count: int, error: Exhausted, tries: int, until: float) -> Flow[None]:
        """Wait until there may be IDs, for a second at most: some may be released early."""
        wait = self.link.pause(tries)
        if error.due_s and not error.others_wait:
            wait = max(error.due_s, _PAUSE_S[0])
        ask_at = min(self.now() + min(wait, _PAUSE_S[1]), until)
        while self.now() < (at := min(ask_at, self.lease.cache.ready_at(count))):
            self.check_open()
            yield Idle(at)

    def _acquire(
        self, count: int, need_ms: int | None, deadline: float, taken: Acquired, keep_ms: int | None
    ) -> Flow[None]:
        """Put IDs into ``taken``, from the cache or from the manager; see `Lease.fetch`."""
        tries = 0
        while not taken:
            try:
                yield from self.establish(deadline)
                lease = self.lease
                lease.take_ready(count, need_ms, taken)
                if not taken:
                    # If no call waits, a place at the manager is given up.
                    wait_ms = keep_ms if self.line else 0
                    fetching = lease.fetch(count, need_ms, deadline, taken, wait_ms)
                    yield from self._in_turn(fetching, deadline)
            except CidError as error:
                tries += 1
                yield from self._recover(error, tries, deadline)

    def establish(self, deadline: float) -> Flow[None]:
        """Open the session if it is not open, and renew its lease if that has run out."""
        if self.now() >= self.lease.deadline:
            yield from self._in_turn(self._establish(deadline), deadline)

    def flush(self, deadline: float) -> Flow[None]:
        """Release at the manager all IDs that have to leave, so that others see them released."""
        tries = 0
        if self.now() < self.lease.deadline and self.lease.cache.awaiting_model:
            with contextlib.suppress(CidError):  # the model may be away, which does not matter here
                yield from self._in_turn(self._give_back(deadline), deadline)
        while self.now() < (lease := self.lease).deadline and (
            lease.cache.to_release or lease.cache.releasing
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
            reply = yield Send(Request(operation), self.link.limit(deadline))
            error = self.link.note(reply)
            if error is None:
                return reply
            tries += 1
            yield from self._recover(error, tries, deadline)

    def number(self, operation: Operation, deadline: float) -> Flow[int]:
        """Ask the manager for a number."""
        reply = yield from self.read(operation, deadline)
        return int(reply.output[0])

    def status(self, deadline: float) -> Flow[dict[str, Any]]:
        """Return the manager's status."""
        reply = yield from self.read(Operation.STATUS, deadline)
        try:
            found = json.loads(reply.detail)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ProtocolError("the manager's status is not a JSON object")
        return found

    def pool(self, deadline: float) -> Flow[range]:
        """Return the manager's pool, which is read once for each lease."""
        lease = self.lease
        if lease.pool is None:
            status = yield from self.status(deadline)
            try:
                first, capacity = (status["pool"][name] for name in ("first", "capacity"))
                lease.pool = range(first, first + capacity)
            except (LookupError, TypeError):
                raise ProtocolError("the manager's status does not tell its pool") from None
        return lease.pool

    # ---- The heartbeat

    def heartbeat(self) -> Flow[None]:
        """Renew the lease, refill the cache and release IDs until the session is closed.

        Never raises.
        """
        tries = 0
        while not (self.closed or self.abandoned):
            lease = self.lease
            lease.cache.needs_maintenance = False
            confirming, breaks = self.confirming, self._breaks
            due = lease.retry_at if confirming else lease.due()
            if due > self.now():
                yield Idle(due)
                continue
            # Short enough for some tries before the lease runs out.
            deadline = self.now() + min(self.link.timeout, self.link.ttl / 8)
            try:
                if lease.to_renew or confirming:
                    yield from lease.renew(deadline)
                    self._confirmed(confirming, breaks, None)
                    confirming = False  # whatever fails now
                    yield from self._check_models(deadline)
                else:
                    yield from self._in_turn(self._maintain(deadline), deadline)
                tries = 0
            except CidError as error:
                if self.state == "closed":
                    return
                tries += 1
                level = logging.INFO if tries == 1 else logging.DEBUG
                _log.log(level, "%r: a heartbeat or refill failed: %s", self, error)
                # Requests wait for a renewal that confirms, so its pauses stay short.
                lease.put_off(min(tries, _TRIES_APART) if confirming else tries)
                if isinstance(error, RegistryMismatch):
                    with contextlib.suppress(RegistryMismatch):
                        yield from self._probe(error, deadline)
                # While a process of the manager takes over from another one, requests wait on.
                if not (error.answered and isinstance(error, Unavailable)):
                    self._confirmed(confirming, breaks, error)

    def unsure(self, broke: bool) -> bool:
        """Return whether a request has to wait until the heartbeat knows which server is there.

        Args:
            broke: a connection has broken since the last call.
        """
        self.suspect(broke)
        if self.suspected and self.lease.opened and not self.confirming:
            self.confirming, self.trouble = True, None
            self.doubts += 1
            self.lease.retry_at = NEVER
        return self.confirming

    def suspect(self, broke: bool) -> None:
        """Note whether a connection has broken since the last call."""
        self._breaks += broke
        self.suspected = self.suspected or broke

    def confirm(self, deadline: float, retry: bool) -> Flow[None]:
        """Renew the lease, or open a session: then the manager is still at its address.

        With ``retry`` it tries again while there is no answer, until the deadline.
        """
        tries, done = 0, False
        while not done:
            breaks = self._breaks
            try:
                if self.now() < self.lease.deadline:
                    yield from self.lease.renew(deadline)
                else:
                    yield from self.establish(deadline)
                done = True
                self.suspected = self._breaks > breaks
            except CidError as error:
                tries += 1
                if not retry and isinstance(error, Unavailable | SessionExpired):
                    raise
                yield from self._recover(error, tries, deadline)

    def _confirmed(self, confirming: bool, breaks: int, error: CidError | None) -> None:
        """Note the result of a renewal; it counts if it began after the connection broke."""
        if confirming:
            self.confirming, self.trouble = False, error
            self.suspected = error is not None or self._breaks > breaks
            self.on_confirmed()

    def _maintain(self, deadline: float) -> Flow[None]:
        """Trim the cache, release IDs and refill the cache. In turn."""
        cache = self.lease.cache
        if self.now() >= cache.trim_at or cache.draining:
            cache.trim(self.now())
        yield from self._give_back(deadline)
        if cache.needs_refill:
            cache.needs_refill = False
            yield from self.lease.fetch(0, 0, deadline, None)

    def _give_back(self, deadline: float) -> Flow[None]:
        """Release all IDs that have to leave. In turn."""
        lease = self.lease
        yield from lease.release(deadline)
        while lease.cache.awaiting_model:
            yield from self._ask_models(lease, deadline)
            yield from lease.release(deadline)

    def _ask_models(self, lease: Lease, deadline: float) -> Flow[None]:
        """Find out the cooldown of the IDs that came back without END."""
        cache = lease.cache
        away: list[Unavailable] = []
        for model in list(cache.awaiting_model):
            try:
                cache.model_was_read(model, (yield from self._idle_s(model, deadline)))
            except Unavailable as error:
                if self.now() < cache.await_until[model]:
                    away.append(error)
                else:
                    cache.model_was_read(model, 0.0)
        if away:
            raise away[0]

    def _check_models(self, deadline: float) -> Flow[None]:
        """Announce a longer cooldown if a model with new sequences was reloaded."""
        for model, timeout in list(self.models.to_check.items()):
            try:
                idle = yield from self._idle_s(model, deadline)
            except Unavailable:
                continue
            self.models.to_check.pop(model, None)
            yield from self.lease.announce(need_ms(idle, timeout), deadline)

    def _idle_s(self, model: str, deadline: float) -> Flow[float]:
        """Return a model's present idle time; 0 if what was known before has to be enough."""
        try:
            found = yield from self.models.look(model, self.now(), self.link.limit(deadline))
        except CidError as error:
            if isinstance(error, Unavailable):
                raise
            return 0.0  # it may not be read any more, or keeps no sequences
        return found.idle_s

    # ---- Closing

    def close(self, deadline: float) -> Flow[None]:
        """Release all IDs and close the session.

        A manager that does not answer ends the session when its lease runs out.
        """
        while runs(self._ending) and self.now() < deadline:  # another call closes it
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
        lease = self.lease
        if not self.closed:
            self._all_ended = not (lease.cache.used or lease.cache.outgoing or lease.doubtful)
            self.closed = True
        lease.end("the client was closed")
        self.version += 1

    def _close(self, deadline: float) -> Flow[None]:
        tries = 0
        try:
            if self.now() < self.lease.deadline and self.lease.cache.outgoing:
                yield from self._in_turn(self._give_back(deadline), deadline)
        except CidError as error:
            _log.info("%r: could not release IDs before closing: %s", self, error)
        self._shut()
        while self.lease.opened:
            try:
                yield from self.lease.close(deadline, self._all_ended)
            except SessionUnknown:
                return
            except CidError as error:
                tries += 1
                wait = self.link.pause(tries)
                # To close twice does no harm, and the connection may just have been old.
                passes = isinstance(error, Unavailable) and (error.answered or tries == 1)
                if passes and self.now() + wait < deadline:
                    yield from self.link.sleep(wait)
                    continue
                _log.info("%r: it ends when its lease runs out, since: %s", self, error)
            return

    # ---- One flow at a time, and another try

    def _in_turn(self, flow: Flow[None], deadline: float) -> Flow[None]:
        """Run a flow while no other flow has the turn."""
        began = self.now()
        while runs(self._turn):
            if self.now() >= deadline:
                flow.close()
                raise Unavailable(
                    f"no answer within {self.now() - began:.1f} s: other requests come first"
                )
            yield Idle(min(deadline, self.now() + _LOOK_S))
        try:
            self._turn = flow
            yield from flow
        finally:
            flow.close()
            self.version += 1

    def _establish(self, deadline: float) -> Flow[None]:
        """Open a session if there is none; renew the lease if it has run out. In turn."""
        self.check_open()  # it may have been closed while this waited for its turn
        if self.lease.spent and not self.lease.opened:
            self.lease = self._new_lease()
        lease = self.lease
        if not lease.opened:
            yield from lease.open(deadline)
            self.version += 1
        elif self.now() >= lease.deadline:
            try:
                yield from lease.renew(deadline)
            except Unavailable as error:
                expired = SessionExpired(f"{lease.expired()}; {error}")
                if lease.slice is None:
                    raise expired from error
                lease = yield from self._move(expired, deadline)
        if self.now() >= lease.deadline:
            slow = Unavailable("the manager takes longer to answer than the lease lasts")
            raise SessionExpired(f"{lease.expired()}; {slow}") from slow

    def _move(self, expired: SessionExpired, deadline: float) -> Flow[Lease]:
        """Open a session on whichever server a proxy chooses, and give up the one that expired."""
        lease = self._new_lease()
        try:
            yield from lease.open(deadline)
        except CidError as error:
            raise expired from error
        self.lease.lose(f"{expired}; a new session was opened")
        self.lease = lease
        self.version += 1
        return lease

    def _recover(self, error: CidError, tries: int, deadline: float) -> Flow[None]:
        """Return when another try may help; raise the error if no try can help in time."""
        if isinstance(error, RegistryMismatch):
            yield from self._probe(error, deadline)
        else:
            yield from self.link.recover(error, tries, deadline)

    def _probe(self, error: RegistryMismatch, deadline: float) -> Flow[None]:
        """Find out whether another registry has replaced the lease's own, or both answer.

        Raises:
            RegistryMismatch: both answer.
        """
        lease = self.lease
        for _ in range(_STRANGERS):
            try:
                yield from lease.renew(deadline)
            except RegistryMismatch:
                continue
            except CidError:
                return
            raise error
        if not lease.lost_why:
            lease.lose(
                "another registry answers in place of its manager's: was the manager restarted"
                " without a file to remember by, or was the file restored from a copy?"
            )
