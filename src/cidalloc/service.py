"""The service: everything that the manager model does, without Triton.

Decodes a request, applies it to the registry, and returns the numbers of the answer. It owns the
clock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .codes import Operation
from .errors import CidError, InternalError
from .registry import Registry, Settings
from .wire import IDs, Request

__all__ = ["Service", "boottime_ms"]

_log = logging.getLogger("cidalloc.service")


def boottime_ms() -> int:
    """Return the time since boot in milliseconds; it runs on in suspend and never jumps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class Service:
    """Answers requests from one registry.

    Args:
        settings: what the operator chose.
        clock: returns the time in milliseconds.
    """

    def __init__(self, settings: Settings, clock: Callable[[], int] = boottime_ms) -> None:
        self.registry = Registry(settings)
        self._clock = clock
        self._apply: dict[Operation, Callable[[Request], IDs | int]] = {
            Operation.NEW: self._new,
            Operation.DELETE: self._delete,
            Operation.ACTIVE: lambda request: self.registry.pool.active,
            Operation.INACTIVE: lambda request: self.registry.pool.inactive,
            Operation.PEAK: lambda request: self.registry.pool.peak,
        }

    def answer(
        self, code: npt.NDArray[Any], ids: npt.NDArray[Any] | None, parameters: str
    ) -> IDs | CidError:
        """Answer one request; never raises.

        Args:
            code: the tensor ``CODE``.
            ids: the tensor ``CORRELATION_ID``, or None if it was left out.
            parameters: the request's parameters as a JSON object.

        Returns:
            The tensor ``OUTPUT``, uint64 [1, n], or the error to send in its place.
        """
        try:
            request = Request.decode(code, ids, parameters)
            output = self._apply[request.operation](request)
        except CidError as error:
            return error
        except Exception as error:
            # The text of a stranger's exception may carry paths: it stays in the server's log.
            _log.exception("a request failed in an unexpected way")
            return InternalError(f"unexpected {type(error).__name__} in the manager")
        return np.asarray(output, np.uint64).reshape(1, -1)

    def _new(self, request: Request) -> IDs:
        return self.registry.acquire(request.integer("count", 1, 1), self._clock())

    def _delete(self, request: Request) -> int:
        cooldown_ms = None
        if "cooldown_ms" in request.parameters:
            cooldown_ms = request.integer("cooldown_ms", 0, 0)
        ended = request.boolean("ended")
        return self.registry.release(
            request.ids, self._clock(), ended=ended, cooldown_ms=cooldown_ms
        )
