"""What a client needs to know of a model before it sends sequences to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import InvalidArgument
from .effects import Config, Flow, ServerVersion
from .tensors import Inputs, Library, Signature, check_inputs

__all__ = [
    "HIGHEST_CID",
    "KNOWN_S",
    "ModelCache",
    "ModelInfo",
    "check_text_ids",
    "read_model_info",
]

HIGHEST_CID = 2**63 - 1
"""The highest ID that gRPC carries."""

KNOWN_S = 30.0
"""A configuration is read again after so many seconds."""

_TEXT_IDS_FROM = (2, 54)  # before, such an ID overflows a buffer of the server

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
        idle_s: the idle time: seconds without a request after which Triton forgets a sequence.
        highest_cid: the highest ID that reaches the model whole. Triton would cut a higher ID to
            its low bits without an error, and so use another ID.
        exact: Triton forgets after ``idle_s``, and not earlier.
        decoupled: it answers a request any number of times.
        iterative: a request is a whole sequence, which ends with its answer, and takes no END.
        text_ids: it takes IDs as text: "7" instead of 7.
        signature: its inputs.
    """

    name: str
    idle_s: float
    highest_cid: int = HIGHEST_CID
    exact: bool = True
    decoupled: bool = False
    iterative: bool = False
    text_ids: bool = False
    signature: Signature | None = field(default=None, repr=False, compare=False)

    def tensors(self, inputs: Inputs, library: Library) -> list[Any]:
        """Return tritonclient's inputs.

        Raises:
            InvalidArgument: they do not fit the model, or are of another protocol.
        """
        if not isinstance(inputs, list):
            if isinstance(inputs, Mapping):
                signature = self.signature or Signature(self.name)
                return signature.tensors(inputs, library.inputs)
            inputs = list(inputs) if isinstance(inputs, tuple) else inputs
        return check_inputs(inputs, library)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelInfo:
        """Return what a configuration says: Triton's JSON, or gRPC's with strings for int64.

        Raises:
            InvalidArgument: the model keeps no sequences.
        """
        name = config.get("name", "")
        batching = config.get("sequence_batching")
        if batching is None:
            raise InvalidArgument(
                f"model {name} has no sequence_batching in its configuration: Triton keeps no"
                " sequences for it, and needs no correlation IDs (if the model itself does, say"
                " check=False and cooldown=)"
            )
        idle_us = int(batching.get("max_sequence_idle_microseconds", 0)) or 1_000_000
        kinds = {
            control.get("data_type")
            for control_input in batching.get("control_input", ())
            for control in control_input.get("control", ())
            if control.get("kind") == "CONTROL_SEQUENCE_CORRID"
        }
        return cls(
            name,
            idle_us / 1e6,
            min((_HIGHEST.get(kind, HIGHEST_CID) for kind in kinds), default=HIGHEST_CID),
            decoupled=_is_decoupled(config),
            iterative=bool(batching.get("iterative_sequence")),
            text_ids="TYPE_STRING" in kinds,
            signature=Signature.from_config(config),
        )

    @classmethod
    def of_steps(cls, config: Mapping[str, Any], steps: list[ModelInfo]) -> ModelInfo:
        """Return what holds for an ensemble: the lowest maximum ID and the longest idle time.

        Raises:
            InvalidArgument: none of its steps keeps sequences, or they take different IDs.
        """
        name = config.get("name", "")
        if not steps:
            raise InvalidArgument(
                f"no step of the ensemble {name} has sequence_batching in its configuration:"
                " Triton keeps no sequences for it, and needs no correlation IDs"
            )
        if len({step.text_ids for step in steps}) > 1:
            raise InvalidArgument(
                f"some steps of the ensemble {name} take correlation IDs as TYPE_STRING, others as"
                " integers, and a request has one or the other: give all the same data_type"
            )
        return cls(
            name,
            max(step.idle_s for step in steps),
            min(step.highest_cid for step in steps),
            # Triton may forget one step earlier than another, if not all requests reach it.
            exact=len(steps) == 1 and steps[0].exact,
            decoupled=_is_decoupled(config),
            iterative=any(step.iterative for step in steps),
            text_ids=steps[0].text_ids,
            signature=Signature.from_config(config),
        )


class ModelCache:
    """The models whose configurations a client has read. A reload may change one at any time.

    A new sequence may use a configuration that was read at most `KNOWN_S` before. The cooldown
    after a sequence without END needs a configuration that was read after its last request.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[ModelInfo, float]] = {}
        self._versions: dict[str, str] = {}
        self.to_check: dict[str, float] = {}
        """Models with new sequences since the last look, and the longest timeout of these."""

    def known(self, model: str, timeout: float, now: float) -> ModelInfo | None:
        """Return what a new sequence on ``model`` needs to know; None if it has to be read.

        Args:
            model: the name of the model.
            timeout: seconds that a request of the sequence may take.
            now: the time.
        """
        known = self._known.get(model)
        if known is None or now - known[1] >= KNOWN_S:
            return None
        self.to_check[model] = max(timeout, self.to_check.get(model, 0.0))
        return known[0]

    def look(self, model: str, now: float, timeout: float) -> Flow[ModelInfo]:
        """Read the configuration of ``model`` again; raises what `read_model_info` does."""
        self._known.pop(model, None)
        target = yield from read_model_info(model, timeout)
        self._known[model] = target, now
        return target

    def forget(self, model: str) -> None:
        """Note a sign that the model was reloaded."""
        self._known.pop(model, None)

    def answered_by(self, model: str, version: str) -> None:
        """Note which version of a model has answered. Another version is a sign of a reload."""
        if self._versions.setdefault(model, version) != version:
            self._versions[model] = version
            self.forget(model)


def read_model_info(model: str, timeout: float) -> Flow[ModelInfo]:
    """Read the configuration of a model, and of its steps if it is an ensemble.

    Args:
        model: the name of the model.
        timeout: seconds to wait for each answer.

    Raises:
        InvalidArgument: see `ModelInfo.from_config` and `ModelInfo.of_steps`; or the model takes
            IDs as text, and the server is too old for that.
        Unavailable: the server does not answer, or serves no such model.
    """
    config = yield from _read(model, timeout)
    if _is_ensemble(config):
        found = ModelInfo.of_steps(config, (yield from _read_steps(model, config, timeout)))
    else:
        found = ModelInfo.from_config(config)
    if found.text_ids:
        reply = yield ServerVersion(timeout)
        if reply.error is not None:
            raise reply.error
        check_text_ids(model, reply.detail)
    return found


def check_text_ids(model: str, version: str) -> None:
    """Check that a server of this version may get correlation IDs as text.

    Raises:
        InvalidArgument: it is older than 2.54, and may crash from such an ID.
    """
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or tuple(map(int, number.groups())) < _TEXT_IDS_FROM:
        raise InvalidArgument(
            f"model {model} takes correlation IDs as TYPE_STRING, which can crash a Triton server"
            f" before 2.54 (release 25.01), and this one is {version or 'of an unknown version'}:"
            " let its CONTROL_SEQUENCE_CORRID have the data_type TYPE_UINT64"
        )


def _read_steps(model: str, config: Mapping[str, Any], timeout: float) -> Flow[list[ModelInfo]]:
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
    return found


def _read(model: str, timeout: float) -> Flow[Mapping[str, Any]]:
    reply = yield Config(model, timeout)
    if reply.error is not None:
        raise reply.error
    assert reply.config is not None
    return reply.config


def _is_ensemble(config: Mapping[str, Any]) -> bool:
    return "ensemble_scheduling" in config


def _steps(config: Mapping[str, Any]) -> list[str]:
    return [step["model_name"] for step in config["ensemble_scheduling"].get("step", ())]


def _is_decoupled(config: Mapping[str, Any]) -> bool:
    return bool(config.get("model_transaction_policy", {}).get("decoupled"))
