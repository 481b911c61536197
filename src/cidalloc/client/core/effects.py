"""Flows: the client's decisions as generators, which say what they need and never do it.

A flow yields one of the effects below and is resumed with its `Reply`. Two short runners run
flows, one blocking and one awaiting; so each decision is written once, and tests run it without a
server, a thread or a clock. While a flow waits, other flows go on, so the state may be another one
after each yield.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ...errors import CidError, Draining
from ...protocol import DRAINING, STAMP_DIGITS, IDs, Request

__all__ = [
    "NEVER",
    "Config",
    "Effect",
    "Flow",
    "Idle",
    "Reply",
    "Send",
    "ServerVersion",
    "runs",
]

T = TypeVar("T")

NEVER = float("-inf")
"""A time before all others."""

_NOTHING: IDs = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request to the manager, and wait at most ``timeout`` seconds for its answer."""

    request: Request
    timeout: float


@dataclass(frozen=True, slots=True)
class Config:
    """Read the configuration of a model, in at most ``timeout`` seconds."""

    model: str
    timeout: float


@dataclass(frozen=True, slots=True)
class ServerVersion:
    """Ask for the version of the server, in at most ``timeout`` seconds; `Reply.detail` gets it."""

    timeout: float


@dataclass(frozen=True, slots=True)
class Idle:
    """Wait until the time ``until``, or until another flow has changed something."""

    until: float


@dataclass(frozen=True, slots=True)
class Reply:
    """The result of an effect: the answer to a request, a configuration, an error, or nothing."""

    output: IDs = field(default_factory=lambda: _NOTHING)
    detail: str = ""
    config: Mapping[str, Any] | None = None
    error: CidError | None = None

    @property
    def draining(self) -> bool | None:
        """Whether the manager says that its server is being drained; None if it says nothing.

        The answer to STATUS says it in its JSON, which this does not read.
        """
        if self.error is not None:
            return True if isinstance(self.error, Draining) else None
        return DRAINING in self.detail.split()

    @property
    def stamp(self) -> str:
        """The registry's stamp; empty if the manager has sent none."""
        return next((word for word in self.detail.split() if len(word) == STAMP_DIGITS), "")


Effect = Send | Config | ServerVersion | Idle
Flow = Generator[Effect, Reply, T]


def runs(flow: Flow[Any] | None) -> bool:
    """Whether a flow has neither ended nor been broken off, for example by a signal handler."""
    return flow is not None and inspect.getgeneratorstate(flow) != inspect.GEN_CLOSED
