"""What `Client` and `AsyncClient` have in common: everything but how they wait."""

from __future__ import annotations

import math
import operator
import os
import platform
import random
from collections.abc import Iterable
from typing import Any, Literal, SupportsIndex

import numpy as np

from ...errors import InvalidArgument, LimitExceeded, SessionExpired, Unavailable
from ...protocol import MAX_COOLDOWN_MS, IDs, as_ids
from .effects import Flow
from .fork_guard import ForkGuard
from .handle import warn_unclosed
from .id_cache import ENDED, MAX_AHEAD, need_ms
from .model_info import HIGHEST_CID, ModelInfo
from .sequence import UNMANAGED, Plan
from .session import Acquired, Session
from .transport import check_inputs

__all__ = ["Base", "several", "whole"]

Fallback = Literal["random"] | None

DAY_S = 86_400.0
LABEL_BYTES = 64
_FALLBACK_S = 1.0  # how long a sequence waits for the manager if it can do without
_RANDOM_BITS = 62


class Base(ForkGuard):
    """A client without its ways to wait."""

    def __init__(
        self,
        model: str,
        ttl: float,
        label: str | None,
        timeout: float,
        ahead: int,
        fallback: Fallback,
        transport: Any,
        opened_at: tuple[str, int],
    ) -> None:
        super().__init__()
        self._transport = transport
        self._opened_at = opened_at
        if fallback not in (None, "random"):
            raise InvalidArgument(f"fallback={fallback!r} is neither None nor 'random'")
        self._model = model
        self._url: str = transport.url
        self._timeout = seconds("timeout", timeout, DAY_S)
        self._fallback = fallback
        self._rng = random.SystemRandom()
        self._session = Session(
            ttl=seconds("ttl", ttl, 30 * DAY_S, low=0.001),
            label=_label(label),
            timeout=self._timeout,
            rng=self._rng,
            clock=transport.now,
            ahead=_ahead(ahead),
        )

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is None or session.closed or not self._at_home:
            return
        self._abandon()
        if session.opened:
            words = f"unclosed {type(self).__name__} of {self._url}"
            warn_unclosed(self, words, self._opened_at)

    def _abandon(self) -> None:
        """Let the background close what nobody has any more."""
        raise NotImplementedError

    def __repr__(self) -> str:
        session, name = self._session, type(self).__name__
        held = len(session.cache.used)
        return f"<cidalloc {name} of {self._model} at {self._url}, {session.state}, {held} in use>"

    def held(self) -> IDs:
        """Return the IDs that are in use: acquired and not released, in order; no round trip.

        The manager counts those in stock as held, too.
        """
        super()._check_home()
        return as_ids(sorted(self._session.cache.used))

    # ---- Flows

    def _deadline(self) -> float:
        return self._session.now() + self._timeout

    def _acquire(self, count: int, taken: Acquired) -> Flow[None]:
        return self._session.acquire(count, None, self._deadline(), taken)

    def _begin_sequence(
        self,
        model: str,
        timeout: float,
        cooldown: float | None,
        check: bool,
        end_inputs: list[Any] | None,
        taken: Acquired,
    ) -> Flow[Plan]:
        """Find out what the model needs, and get an ID that is good for it, which is ``taken``."""
        session = self._session
        session.check_open()
        timeout = seconds("timeout", timeout, DAY_S)
        if end_inputs is not None:
            check_inputs(end_inputs, self._transport.inputs)
        target = yield from self._target(model, timeout, cooldown, check)
        need = need_ms(target.idle_s, timeout)
        if need > MAX_COOLDOWN_MS:
            raise InvalidArgument(
                f"model {model} keeps idle sequences for {target.idle_s:g} s: with the timeout,"
                " longer than an ID can cool"
            )
        alone = self._fallback == "random" and target.highest_cid == HIGHEST_CID
        if alone and session.now() < session.away_until and session.now() >= session.lease_deadline:
            return self._random_plan(target, timeout, check)
        deadline = session.now() + (min(self._timeout, _FALLBACK_S) if alone else self._timeout)
        try:
            if target.highest_cid < HIGHEST_CID:
                pool = yield from session.pool(deadline)
                if pool[-1] > target.highest_cid:
                    raise InvalidArgument(
                        f"model {model} takes correlation IDs up to {target.highest_cid}, and"
                        f" {pool[-1]} would be cut: give the manager a lower pool, or the model a"
                        " wider CORRID"
                    )
            yield from session.acquire(1, need, deadline, taken)
        except (Unavailable, SessionExpired):
            if not alone:
                raise
            return self._random_plan(target, timeout, check)
        return Plan(target, taken[0], taken.epoch, timeout, check)

    def _target(
        self, model: str, timeout: float, cooldown: float | None, check: bool
    ) -> Flow[ModelInfo]:
        if cooldown is not None:
            cooldown = seconds("cooldown", cooldown, MAX_COOLDOWN_MS / 1000, low=0.0)
        if not check:
            if cooldown is None:
                raise InvalidArgument("check=False: say with cooldown= when the model forgets")
            return ModelInfo(model, cooldown, exact=False)
        session = self._session
        target = yield from session.models.begin(model, timeout, session.now(), self._timeout)
        if cooldown is not None:
            target = ModelInfo(model, max(cooldown, target.idle_s), target.highest_cid, exact=False)
        return target

    def _random_plan(self, target: ModelInfo, timeout: float, check: bool) -> Plan:
        cid = 2**_RANDOM_BITS + self._rng.getrandbits(_RANDOM_BITS)
        return Plan(target, cid, UNMANAGED, timeout, check)

    def _give(self, cids: list[int], ended: bool, cooldown: float | None) -> None:
        self._session.check_open()
        cooldown_ms = None
        if cooldown is not None:
            limit = seconds("cooldown", cooldown, MAX_COOLDOWN_MS / 1000, low=0.0)
            cooldown_ms = math.ceil(limit * 1000)  # never shorter than asked for
        self._session.give(cids, ENDED if ended else cooldown_ms)


def several(cids: Iterable[int]) -> list[int]:
    """Return IDs as a list.

    Raises:
        InvalidArgument, OutOfRange: something that are no IDs.
    """
    found: list[int] = as_ids(cids).tolist()
    if not found:
        raise InvalidArgument("no correlation IDs to release: say which")
    return found


def whole(name: str, value: object) -> int:
    """Return a positive integer.

    Raises:
        InvalidArgument, LimitExceeded: it is none.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, SupportsIndex):
        raise InvalidArgument(f"{name}={value!r} is not an integer")
    try:
        number = operator.index(value)
    except TypeError:  # an array of several
        raise InvalidArgument(f"{name}={value!r} is not an integer") from None
    if number < 1:
        raise InvalidArgument(f"{name}={number} is less than 1")
    if number >= 2**63:
        raise LimitExceeded(f"{name}={number} is more than any pool has")
    return number


def seconds(name: str, value: object, high: float, low: float = 1e-6) -> float:
    """Return a time in seconds.

    Raises:
        InvalidArgument: it is none within these bounds.
    """
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, str | bytes | bool) or not low <= found <= high:
        raise InvalidArgument(f"{name}={value!r} is not a time of {low:g} to {high:g} seconds")
    return found


def _ahead(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_AHEAD:
        raise InvalidArgument(f"ahead={value!r} is not an integer of 0 to {MAX_AHEAD}")
    return value


def _label(label: str | None) -> str:
    if label is None:
        # Who that is, where people look for what holds so many IDs. Hosts have names of any kind.
        node = "".join(each if each.isprintable() else "?" for each in platform.node())
        node = node.encode(errors="replace")[: LABEL_BYTES - 16].decode(errors="ignore")
        return f"{node}:{os.getpid()}"
    fits = isinstance(label, str) and label.isprintable()
    if not fits or len(label.encode(errors="replace")) > LABEL_BYTES:
        raise InvalidArgument(f"label={label!r} is not printable text of {LABEL_BYTES} bytes")
    return label
