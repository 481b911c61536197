"""The service: all that the manager model does, without Triton.

It decodes a request, applies it to the registry, and returns the tensors of the answer. It has the
clock and the lock.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import __version__
from ..codes import Operation
from ..errors import CidError, Draining, InternalError, InvalidArgument, RegistryMismatch
from ..protocol import DRAINING, MODEL, PROTOCOL, ROUTE_HEADER, IDs, Request
from . import slices
from .inspection import SHOWN, status_of
from .registry import Registry
from .settings import Settings
from .storage.drain import is_draining
from .takeover import OWNER_POLL_S, WAITING_POLL_S, RegistryHolder

__all__ = ["Service", "boottime_ms"]

_log = logging.getLogger("cidalloc.manager.service")

Answer = tuple[IDs, str]
"""The tensor OUTPUT, uint64 [1, n], and the text in DETAIL."""


def boottime_ms() -> int:
    """Return the time since boot in milliseconds; it runs on in suspend and never jumps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class Service:
    """Answers requests from one registry.

    Args:
        settings: what the operator chose.
        clock: returns the time in milliseconds.
        name: the manager's; its file is named by it.

    Raises what `RegistryHolder` and `Settings.on_host` do.
    """

    def __init__(
        self, settings: Settings, clock: Callable[[], int] = boottime_ms, name: str = MODEL
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._host = socket.gethostname()
        self._holder = RegistryHolder(settings.on_host(self._host), name, clock)
        self._operations: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._stopped = threading.Event()
        self._apply: dict[Operation, Callable[[Registry, Request, int], IDs | list[int] | int]] = {
            Operation.NEW: _new,
            Operation.DELETE: _delete,
            Operation.ACTIVE: lambda registry, request, now: registry.tick(now).active,
            Operation.INACTIVE: lambda registry, request, now: registry.tick(now).inactive,
            Operation.PEAK: lambda registry, request, now: registry.tick(now).peak,
            Operation.OPEN: _open,
            Operation.RENEW: _renew,
            Operation.CLOSE: _close,
            Operation.HELD: _held,
            Operation.DEAD: _dead,
        }

    def start(self) -> None:
        """Start the thread that calls `poll` while no requests come."""
        threading.Thread(target=self._look_after, name="cidalloc", daemon=True).start()

    def close(self) -> None:
        """Stop that thread and let go of the registry, so that another process can have it."""
        self._stopped.set()
        with self._lock:
            self._holder.close()

    def poll(self) -> None:
        """Hand the registry over, or take it over, if it is time to; let time pass in it."""
        with self._lock:
            self._holder.poll()

    def figures(self) -> dict[str, Any] | None:
        """Return the status without its sessions, or None while another process has the registry.

        This does not count as a request.
        """
        with self._lock:
            try:
                return self._status(self._holder.registry(), self._clock(), 0)
            except CidError:
                return None

    def answer(
        self, code: npt.NDArray[Any], ids: npt.NDArray[Any] | None, parameters: str
    ) -> Answer | CidError:
        """Answer one request; never raises.

        Args:
            code: the tensor ``CODE``.
            ids: the tensor ``CORRELATION_ID``; None if the request has none.
            parameters: the request's parameters as a JSON object.

        Returns:
            The tensors of the answer, or the error to send.
        """
        with self._lock:
            try:
                request = Request.decode(code, ids, parameters)
                self._operations[request.operation.name] += 1
                return self._answered(request)
            except CidError as error:
                failure = error
            except Exception as error:
                # The text of an unknown exception may have paths: it stays in the server's log.
                _log.exception("a request failed in an unexpected way")
                failure = InternalError(f"unexpected {type(error).__name__} in the manager")
            self._errors[failure.code.name] += 1
            return failure

    def _answered(self, request: Request) -> Answer:
        registry, now = self._holder.registry(), self._clock()
        registry.tick(now)  # raises `Forked`, before the child reads a header that it does not have
        seen = request.parameters.get("seen")
        if seen and (changes := registry.stamps.unknown(seen)):
            registry = self._holder.begin_anew(changes)
        wanted = request.parameters.get("registry")
        if wanted is not None and wanted != str(registry.uuid):
            raise RegistryMismatch(
                f"this is the registry {registry.uuid}, not {wanted}: is there a load balancer"
                f" between client and server, or a proxy that drops the header {ROUTE_HEADER}? A"
                " session belongs to one manager"
            )
        if request.operation is Operation.STATUS:
            return _NOTHING, json.dumps(self._status(registry, now, SHOWN))
        draining = is_draining(registry.store.header)
        if draining and request.operation in (Operation.OPEN, Operation.NEW):
            _refuse(registry, request, now)
        output = self._apply[request.operation](registry, request, now)
        detail = DRAINING if draining else ""
        if seen is not None:
            detail = f"{detail} {registry.stamps.latest}".lstrip()
        return np.asarray(output, np.uint64).reshape(1, -1), detail

    def _status(self, registry: Registry, now: int, sessions: int) -> dict[str, Any]:
        return {
            "version": __version__,
            "host": self._host,
            "slice": registry.settings.slice or None,
            **status_of(registry, now, sessions),
            "operations": dict(self._operations),
            "errors": dict(self._errors),
        }

    def _look_after(self) -> None:
        while not self._stopped.wait(WAITING_POLL_S if self._holder.waits else OWNER_POLL_S):
            try:
                self.poll()
            except Exception:
                _log.exception("cannot look after the registry")


_NOTHING: IDs = np.empty((1, 0), np.uint64)


def _refuse(registry: Registry, request: Request, now: int) -> None:
    """Refuse what could begin a sequence; its lease is renewed and its seq noted all the same."""
    if request.operation is Operation.NEW and request.token is not None:
        _held(registry, request, now)
    raise Draining(
        "the server is being drained: running sequences continue, and no new one begins here"
    )


def _token(request: Request) -> bytes:
    token = request.token
    if token is None:
        raise InvalidArgument(f"{request.operation.name} needs the parameter session")
    return token


def _change(request: Request) -> dict[str, Any]:
    """Return the arguments that each change of a session has."""
    given, token = request.parameters, request.token
    if token is not None and "seq" not in given:
        raise InvalidArgument(
            "a change of a session needs the parameter seq, which rises with each change"
        )
    return {
        "token": token,
        "seq": given.get("seq", 0),
        "cooldown_ms": given.get("cooldown_ms"),
        "used": given.get("used"),
    }


def _new(registry: Registry, request: Request, now: int) -> IDs:
    given = request.parameters
    wait_ms = given.get("wait_ms")
    return registry.acquire(given.get("count", 1), now, wait_ms=wait_ms, **_change(request))


def _delete(registry: Registry, request: Request, now: int) -> int:
    ended = request.parameters.get("ended", False)
    return registry.release(request.ids, now, ended=ended, **_change(request))


def _open(registry: Registry, request: Request, now: int) -> list[int]:
    given = request.parameters
    if "ttl_ms" not in given:
        raise InvalidArgument("OPEN needs the parameter ttl_ms")
    grant = registry.open(
        _token(request),
        now,
        ttl_ms=given["ttl_ms"],
        cooldown_ms=given.get("cooldown_ms"),
        label=given.get("label", ""),
    )
    high, low = divmod(registry.uuid.int, 2**64)
    times = (registry.settings.cooldown_ms, registry.settings.unended_cooldown_ms)
    of_pool = slices.numbers(registry.settings.slice)
    return [PROTOCOL, grant.generation, grant.ttl_ms, high, low, *times, *of_pool]


def _renew(registry: Registry, request: Request, now: int) -> list[int]:
    given = request.parameters
    grant = registry.renew(
        _token(request),
        now,
        cooldown_ms=given.get("cooldown_ms"),
        used=given.get("used"),
        models=request.models or (),
    )
    return [grant.generation, grant.ttl_ms, registry.waiting.any(now)]


def _close(registry: Registry, request: Request, now: int) -> int:
    ended = request.parameters.get("ended", False)
    return registry.close_session(_token(request), now, ended=ended)


def _held(registry: Registry, request: Request, now: int) -> IDs:
    return registry.held(_token(request), now, seq=request.parameters.get("seq"))


def _dead(registry: Registry, request: Request, now: int) -> IDs:
    given = request.parameters
    if "model" not in given:
        raise InvalidArgument("DEAD needs the parameter model")
    count = given.get("count", 1000)
    return registry.dead_ids(_token(request), now, given["model"], count)
