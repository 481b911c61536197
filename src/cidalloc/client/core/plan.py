"""What a sequence begins with."""

from __future__ import annotations

from typing import NamedTuple

from .lease import Lease
from .model_info import ModelInfo

__all__ = ["Plan"]


class Plan(NamedTuple):
    """What a sequence begins with.

    Attributes:
        target: the model.
        cid: the ID.
        lease: the lease that the ID belongs to; None for a random ID, which is not managed.
        timeout: seconds that a request may take.
        key: a name of the sequence that no other sequence ever has.
        checked: the model's configuration was read.
        wait: seconds that requests may take before the first one is answered, since START waits
            for a slot; it counts if it is longer than ``timeout``.
    """

    target: ModelInfo
    cid: int
    lease: Lease | None
    timeout: float
    key: str
    checked: bool = True
    wait: float = 0.0
