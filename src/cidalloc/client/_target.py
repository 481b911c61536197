"""What a client must know of the model it sends sequences to, read from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidArgument

__all__ = ["Target"]

_HIGHEST = {
    "TYPE_INT32": 2**31 - 1,
    "TYPE_UINT32": 2**32 - 1,
    "TYPE_INT64": 2**63 - 1,
    "TYPE_UINT64": 2**63 - 1,  # what gRPC carries
}


@dataclass(frozen=True, slots=True)
class Target:
    """A model with sequence batching.

    Args:
        name: the model.
        idle_s: seconds without a request after which Triton forgets a sequence of it.
        highest_cid: the highest ID that arrives whole; a higher one would be cut to its low
            bits without a word, and meet another.
    """

    name: str
    idle_s: float
    highest_cid: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Target:
        """Read a configuration as Triton gives it (as JSON; gRPC's has strings for int64).

        Raises:
            InvalidArgument: the model keeps no sequences, takes only strings as IDs, or is
                decoupled.
        """
        name = config.get("name", "")
        batching = config.get("sequence_batching")
        if batching is None:
            raise InvalidArgument(
                f"model {name} has no sequence_batching in its configuration: Triton keeps no"
                " sequences for it, and needs no correlation IDs"
            )
        if config.get("model_transaction_policy", {}).get("decoupled"):
            raise InvalidArgument(
                f"model {name} is decoupled: its requests have any number of answers, which a"
                " sequence cannot tell apart yet; acquire an ID and send the requests by yourself"
            )
        idle_us = int(batching.get("max_sequence_idle_microseconds", 0)) or 1_000_000
        highest = _HIGHEST["TYPE_UINT64"]
        for control_input in batching.get("control_input", ()):
            for control in control_input.get("control", ()):
                if control.get("kind") == "CONTROL_SEQUENCE_CORRID":
                    kind = control.get("data_type")
                    if kind not in _HIGHEST:
                        raise InvalidArgument(f"model {name} takes {kind} as correlation ID")
                    highest = min(highest, _HIGHEST[kind])
        return cls(name, idle_us / 1e6, highest)
