"""What a client must know of the model it sends sequences to, read from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import InvalidArgument
from .effects import Config, Flow

__all__ = ["HIGHEST_CID", "KNOWN_S", "ModelCache", "ModelInfo", "read_model_info"]

HIGHEST_CID = 2**63 - 1
"""What gRPC carries."""

KNOWN_S = 30.0
"""For so many seconds a configuration is taken to be as it was read, without a look."""

_HIGHEST = {
    "TYPE_INT32": 2**31 - 1,
    "TYPE_UINT32": 2**32 - 1,
    "TYPE_INT64": HIGHEST_CID,
    "TYPE_UINT64": HIGHEST_CID,
}


@dataclass(frozen=True, slots=True)
class ModelInfo:
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
    def from_config(cls, config: Mapping[str, Any]) -> ModelInfo:
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
                        raise InvalidArgument(
                            f"model {name} takes {kind} as correlation ID, and these IDs are"
                            " integers: let its CONTROL_SEQUENCE_CORRID have the data_type"
                            " TYPE_UINT64"
                        )
                    highest = min(highest, _HIGHEST[kind])
        return cls(name, idle_us / 1e6, highest)

    @classmethod
    def of_steps(cls, name: str, steps: list[ModelInfo]) -> ModelInfo:
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


class ModelCache:
    """The models that a client has read the configuration of. A reload may change it at any time.

    Who begins a sequence may use what was read at most `KNOWN_S` before. For how long an ID cools
    whose sequence got no END is reckoned with a configuration that was read after its last request.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[ModelInfo, float]] = {}
        self._versions: dict[str, str] = {}
        self.to_check: dict[str, float] = {}
        """ModelCache on which a sequence has begun since the last look, and its longest timeout."""

    def begin(self, model: str, timeout: float, now: float, limit: float) -> Flow[ModelInfo]:
        """Return what a new sequence on ``model`` is to know.

        Args:
            model: its name.
            timeout: seconds that a request of the sequence may take.
            now: the time.
            limit: seconds for each answer.

        Raises what `read_model_info` does.
        """
        known = self._known.get(model)
        if known is None or now - known[1] >= KNOWN_S:
            return (yield from self.look(model, now, limit))
        self.to_check[model] = max(timeout, self.to_check.get(model, 0.0))
        return known[0]

    def look(self, model: str, now: float, timeout: float) -> Flow[ModelInfo]:
        """Read the configuration of ``model`` anew; raises what `read_model_info` does."""
        self._known.pop(model, None)
        target = yield from read_model_info(model, timeout)
        self._known[model] = target, now
        return target

    def forget(self, model: str) -> None:
        """There was a sign that the model was loaded anew."""
        self._known.pop(model, None)

    def answered_by(self, model: str, version: str) -> None:
        """Note which version of a model has answered; another one is such a sign."""
        if self._versions.setdefault(model, version) != version:
            self._versions[model] = version
            self.forget(model)


def read_model_info(model: str, timeout: float) -> Flow[ModelInfo]:
    """Read the configuration of a model, and of its steps if it is an ensemble.

    Args:
        model: its name.
        timeout: seconds for each answer.

    Raises:
        InvalidArgument: `ModelInfo.from_config` says when.
        Unavailable: the server does not answer, or serves no such model.
    """
    config = yield from _read(model, timeout)
    if not _is_ensemble(config):
        return ModelInfo.from_config(config)
    _refuse_decoupled(model, config)
    found: list[ModelInfo] = []
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
            found.append(ModelInfo.from_config(step))
    return ModelInfo.of_steps(model, found)


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
