"""The faults of a run: what happens to each message, by the seed and the number of the message."""

from __future__ import annotations

import random
from typing import NamedTuple

__all__ = ["LOST", "NO_FAULT", "Fate", "fate_of"]


class Fate(NamedTuple):
    """What happens to one message.

    Attributes:
        name: in words; empty if nothing happens to it.
        before: seconds until the manager gets the request; None if it never does.
        after: seconds from then until the client gets the answer; None if it never does.
        hangs: without an answer the connection stays open; otherwise it is closed at once.
        again: seconds after which the manager gets the request once more; None: only once.
        page: the client gets the error page of a proxy instead of the answer.
    """

    name: str
    before: float | None = 0.0
    after: float | None = 0.0
    hangs: bool = False
    again: float | None = None
    page: bool = False


NO_FAULT = Fate("")
LOST = Fate("request lost", before=None, after=None, hangs=True)

_KINDS = {
    NO_FAULT: 58,
    LOST: 5,
    Fate("answer lost", after=None, hangs=True): 6,
    Fate("connection cut before the request arrived", before=None, after=None): 4,
    Fate("connection cut before the answer", after=None): 6,
    Fate("request delayed", before=1.0): 5,
    Fate("answer delayed", after=1.0): 4,
    Fate("request delivered twice", again=1.0): 5,
    Fate("connection cut, and the request delivered later", before=1.0, after=None): 5,
    Fate("answer replaced by the error page of a proxy", page=True): 2,
}
"""How often each happens; a time of 1 stands for a random one."""


def fate_of(seed: int, number: int) -> Fate:
    """Return what happens to the message of this number: always the same."""
    dice = random.Random(seed * 1_000_003 + number)  # noqa: S311 not for secrets
    (kind,) = dice.choices(list(_KINDS), list(_KINDS.values()))
    delay = dice.uniform(0.02, 0.6)
    return kind._replace(
        before=kind.before and delay, after=kind.after and delay, again=kind.again and delay
    )
