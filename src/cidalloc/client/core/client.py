"""What `Client` and `AsyncClient` have in common: all that does not wait."""

from __future__ import annotations

import math
import os
import platform
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from ...errors import CidError, InvalidArgument, SessionExpired, Unavailable
from ...protocol import MAX_COOLDOWN_MS, MAX_MODELS, MODEL, IDs, as_ids
from .arguments import seconds
from .effects import Flow
from .fork_guard import ForkGuard, caller
from .handle import warn_unclosed
from .id_cache import ENDED, MAX_AHEAD, need_ms
from .lease import Acquired
from .link import Link
from .model_info import HIGHEST_CID, ModelInfo
from .plan import Plan
from .session import Session
from .tensors import Inputs
from .tidy import Tidier
from .transport import DAY_S, DEFAULT_URL, Transport

__all__ = ["SEQUENCE_TIMEOUT_S", "Base"]

Fallback = Literal["random"] | None

SEQUENCE_TIMEOUT_S = 60.0
"""Seconds that a request of a sequence may take, by default."""

_MAX_TTL_S = 30 * DAY_S
_MAX_COOLDOWN_S = MAX_COOLDOWN_MS / 1000
_LABEL_BYTES = 64
_FALLBACK_S = 1.0  # a sequence that can do without the manager waits for it so long
_RANDOM_BITS = 62
_HEARD_S = 0.1  # a server of a fleet that has answered within this time is taken to be there


class Base(ForkGuard):
    """A client without its ways to wait. `Client` describes the arguments."""

    _connect: ClassVar[Any]  # returns the transport for a URL, headers and options
    _new_runner: ClassVar[Any]  # returns the runner of a session, a transport and a model

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str = MODEL,
        ttl: float = 120.0,
        label: str | None = None,
        timeout: float = 10.0,
        headers: Mapping[str, str] | None = None,
        transport: Transport | None = None,
        ahead: int = MAX_AHEAD,
        fallback: Fallback = None,
        tidy: Mapping[str, Inputs] | None = None,
        servers: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._opened_at = caller()
        self._transport: Transport = transport or self._connect(url, headers, options)
        if fallback not in (None, "random"):
            raise InvalidArgument(f"fallback={fallback!r} is neither None nor 'random'")
        self._model = model
        self._timeout = seconds("timeout", timeout, DAY_S)
        self._fallback = fallback
        self._connect_s: float | None = None  # in a fleet: for how long a server is tried
        self._rng = random.SystemRandom()
        ttl = seconds("ttl", ttl, _MAX_TTL_S, low=0.001)
        link = Link(self._timeout, ttl, self._rng, self._transport.now)
        self._session = Session(link, _label(label), _ahead(ahead))
        self._transport.route = self._session.route
        beside = None if servers is None else self._connect(servers, headers, options)
        self._central = beside is not None
        self._runner = self._new_runner(self._session, self._transport, model, beside)
        self._tidy = dict(tidy or {})
        if self._tidy:
            if beside is not None:
                raise InvalidArgument(
                    "tidy goes without servers=: what the manager names and END for it must reach"
                    f" one server, and {beside.url} may be several"
                )
            if not self._transport.streams:
                raise InvalidArgument(f"tidy needs gRPC, and {self._transport.url} is HTTP")
            if len(self._tidy) > MAX_MODELS:
                raise InvalidArgument(f"tidy has {len(self._tidy)} models: {MAX_MODELS} at most")
            self._runner.tidier = Tidier(self._runner, self._tidy)

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is None or session.closed or not self._at_home:
            return
        self._runner.abandon()
        if session.lease.opened:
            words = f"unclosed {type(self).__name__} of {self._transport.url}"
            warn_unclosed(self, words, self._opened_at)

    def __repr__(self) -> str:
        session, name = self._session, type(self).__name__
        return (
            f"<cidalloc {name} of {self._model} at {self._transport.url}, {session.state},"
            f" {len(session.lease.cache.used)} in use>"
        )

    def held(self) -> IDs:
        """Return the IDs in use, in order: acquired and not released. Needs no round trip.

        The manager also counts the IDs in the client's cache as held.
        """
        super()._check_home()
        return as_ids(sorted(self._session.lease.cache.used))

    def _end_inputs(self, model: str, *given: Inputs | None) -> Inputs | None:
        return next((each for each in given if each is not None), self._tidy.get(model))

    # ---- Releasing, which never waits

    def _release(self, cid: int, ended: bool, cooldown: float | None) -> None:
        self._check_home()
        session = self._session
        if ended and type(cid) is int and not session.closed:
            with self._runner.lock:
                cache = session.lease.cache
                done = cache.recycle(cid, session.now())
            if done:
                if cache.needs_maintenance:
                    self._runner.wake()
                return
        self._release_many([cid], ended, cooldown)

    def _release_many(self, cids: Iterable[int], ended: bool, cooldown: float | None) -> None:
        self._check_home()
        found: list[int] = as_ids(cids).tolist()
        if not found:
            raise InvalidArgument("no correlation IDs to release: say which")
        try:
            with self._runner.lock:
                self._session.check_open()
                cooldown_ms = None
                if cooldown is not None:
                    limit = seconds("cooldown", cooldown, _MAX_COOLDOWN_S, low=0.0)
                    cooldown_ms = math.ceil(limit * 1000)  # never shorter than asked for
                self._session.lease.give(found, ENDED if ended else cooldown_ms)
        finally:
            self._runner.wake()

    # ---- Flows

    def _deadline(self) -> float:
        return self._session.now() + self._timeout

    def _until(self, name: str, wait: float | None) -> float | None:
        """Return when to stop waiting for IDs, by an argument of the caller; None: do not wait."""
        found = 0.0 if wait is None else seconds(name, wait, DAY_S, low=0.0)
        return self._session.now() + found if found else None

    def _begin_sequence(
        self,
        model: str,
        timeout: float,
        cooldown: float | None,
        check: bool,
        taken: Acquired,
        wait: float | None = None,
    ) -> Flow[Plan]:
        """Read what the model needs, and acquire an ID for it into ``taken``."""
        session = self._session
        session.check_open()
        timeout = seconds("timeout", timeout, DAY_S)
        until = self._until("wait", wait)
        longest = max(timeout, wait or 0.0)  # that a request may take
        patience = self._connect_s or self._timeout
        away: CidError | None = None
        try:
            most = patience if self._fallback is None else min(patience, _FALLBACK_S)
            yield from self._confirm(session.now() + most)
        except (Unavailable, SessionExpired) as error:
            if self._fallback is None:
                raise
            away = error
        if cooldown is not None:
            cooldown = seconds("cooldown", cooldown, _MAX_COOLDOWN_S, low=0.0)
        if check:
            target = session.models.known(model, longest, session.now())
            if target is None:
                target = yield from session.models.look(model, session.now(), patience)
            if cooldown is not None:
                target = replace(target, idle_s=max(cooldown, target.idle_s), exact=False)
        elif cooldown is None:
            raise InvalidArgument("check=False: say with cooldown= when the model forgets")
        else:
            target = ModelInfo(model, cooldown, exact=False)
        need = need_ms(target.idle_s, longest)
        if need > MAX_COOLDOWN_MS:
            raise InvalidArgument(
                f"model {model} keeps idle sequences for {target.idle_s:g} s: with the timeout,"
                " longer than an ID can cool"
            )
        alone = self._fallback == "random" and target.highest_cid == HIGHEST_CID
        now = session.now()
        if away is not None and not alone:
            raise away
        if away or (alone and session.lease.deadline <= now < session.link.away_until):
            return self._random_plan(target, timeout, check)
        deadline = now + (min(patience, _FALLBACK_S) if alone else patience)
        try:
            if target.highest_cid < HIGHEST_CID:
                pool = yield from session.pool(deadline)
                if pool[-1] > target.highest_cid:
                    raise InvalidArgument(
                        f"model {model} takes correlation IDs up to {target.highest_cid}, and"
                        f" {pool[-1]} would be cut: give the manager a lower pool (its settings"
                        " first and slice), or the model a wider CORRID"
                    )
            if not session.line:  # else others come first
                session.lease.take_ready(1, need, taken)
            if not taken:
                yield from session.acquire(1, need, deadline, taken, until)
        except (Unavailable, SessionExpired):
            if not alone:
                raise
            return self._random_plan(target, timeout, check)
        assert taken.lease is not None
        key = taken.lease.begin_sequence(taken[0], target.name)
        left = round(until - session.now(), 1) if until else 0.0
        return Plan(target, taken[0], taken.lease, timeout, key, check, left)

    def _confirm(self, deadline: float) -> Flow[None]:
        """Find out whether the manager is still at its address, if there is a doubt.

        In a fleet that is so after each `_HEARD_S` without an answer, and one try has to be enough.
        """
        session, alone = self._session, self._connect_s is None
        session.suspect(not self._central and self._transport.broke())
        unheard = not alone and session.now() >= session.link.heard_at + _HEARD_S
        lease = session.lease
        # A proxy finds no other server before a lease that ran out is given up.
        ran_out = lease.slice is not None and session.now() >= lease.deadline
        if unheard or ran_out or (session.suspected and lease.opened):
            yield from session.confirm(deadline, alone)

    def _random_plan(self, target: ModelInfo, timeout: float, check: bool) -> Plan:
        cid = 2**_RANDOM_BITS + self._rng.getrandbits(_RANDOM_BITS)
        return Plan(target, cid, None, timeout, f"random-{cid}", check)


def _ahead(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_AHEAD:
        raise InvalidArgument(f"ahead={value!r} is not an integer of 0 to {MAX_AHEAD}")
    return value


def _label(label: str | None) -> str:
    if label is None:
        # The status shows it beside the number of IDs. Host names may have any characters.
        node = "".join(each if each.isprintable() else "?" for each in platform.node())
        node = node.encode(errors="replace")[: _LABEL_BYTES - 16].decode(errors="ignore")
        return f"{node}:{os.getpid()}"
    fits = isinstance(label, str) and label.isprintable()
    if not fits or len(label.encode(errors="replace")) > _LABEL_BYTES:
        raise InvalidArgument(f"label={label!r} is not printable text of {_LABEL_BYTES} bytes")
    return label
