"""What a client must know of the model it sends sequences to, read from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidArgument
from ._flow import Config, Flow

__all__ = ["HIGHEST_CID", "Target", "read_target"]

HIGHEST_CID = 2**63 - 1
"""What gRPC carries."""

_HIGHEST = {
    "TYPE_INT32": 2**31 - 1,
    "TYPE_UINT32": 2**32 - 1,
    "TYPE_INT64": HIGHEST_CID,
    "TYPE_UINT64": HIGHEST_CID,
}


@dataclass(frozen=True, slots=True)
class Target:
    """A model with sequence batching, or an ensemble with such models among its steps.

    Args:
        name: the model.
        idle_s: seconds without a request after which Triton forgets a sequence of it.
        highest_cid: the highest ID that arrives whole; a higher one would be cut to its low
            bits without a word, and meet another.
        exact: ``idle_s`` is when Triton forgets, and not just a time that is long enough.
    """

    name: str
    idle_s: float
    highest_cid: int = HIGHEST_CID
    exact: bool = True

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
                " sequences for it, and needs no correlation IDs (if the model itself does, say"
                " check=False and cooldown=)"
            )
        _refuse_decoupled(name, config)
        idle_us = int(batching.get("max_sequence_idle_microseconds", 0)) or 1_000_000
        highest = HIGHEST_CID
        for control_input in batching.get("control_input", ()):
            for control in control_input.get("control", ()):
                if control.get("kind") == "CONTROL_SEQUENCE_CORRID":
                    kind = control.get("data_type")
                    if kind not in _HIGHEST:
                        raise InvalidArgument(f"model {name} takes {kind} as correlation ID")
                    highest = min(highest, _HIGHEST[kind])
        return cls(name, idle_us / 1e6, highest)

    @classmethod
    def of_steps(cls, name: str, steps: list[Target]) -> Target:
        """Return what holds for an ensemble: the narrowest ID, and the longest idle time.

        Raises:
            InvalidArgument: none of its steps keeps sequences.
        """
        if not steps:
            raise InvalidArgument(
                f"no step of the ensemble {name} has sequence_batching in its configuration:"
                " Triton keeps no sequences for it, and needs no correlation IDs"
            )
        idle = [step.idle_s for step in steps]
        # A step is forgotten before the others if it is not reached by every request.
        exact = len(steps) == 1 and steps[0].exact
        return cls(name, max(idle), min(step.highest_cid for step in steps), exact)


def read_target(model: str, timeout: float) -> Flow[Target]:
    """Read the configuration of a model, and of its steps if it is an ensemble.

    Args:
        model: its name.
        timeout: seconds for each answer.

    Raises:
        InvalidArgument: `Target.from_config` says when.
        Unavailable: the server does not answer, or serves no such model.
    """
    config = yield from _read(model, timeout)
    if not _is_ensemble(config):
        return Target.from_config(config)
    _refuse_decoupled(model, config)
    found: list[Target] = []
    names, seen = _steps(config), {model}
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        step = yield from _read(name, timeout)
        if _is_ensemble(step):
            names += _steps(step)
        elif "sequence_batching" in step:
            found.append(Target.from_config(step))
    return Target.of_steps(model, found)


def _read(model: str, timeout: float) -> Flow[Mapping[str, Any]]:
    event = yield Config(model, timeout)
    if event.error is not None:
        raise event.error
    assert event.config is not None
    return event.config


def _is_ensemble(config: Mapping[str, Any]) -> bool:
    return "ensemble_scheduling" in config


def _steps(config: Mapping[str, Any]) -> list[str]:
    return [step["model_name"] for step in config["ensemble_scheduling"].get("step", ())]


def _refuse_decoupled(name: str, config: Mapping[str, Any]) -> None:
    if config.get("model_transaction_policy", {}).get("decoupled"):
        raise InvalidArgument(
            f"model {name} is decoupled: its requests have any number of answers, which a"
            " sequence cannot tell apart yet; acquire an ID and send the requests by yourself"
        )
