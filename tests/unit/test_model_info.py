"""What a client reads from a model's configuration."""

from __future__ import annotations

from typing import Any

import pytest

from cidalloc.client.core.effects import Config, Reply, ServerVersion
from cidalloc.client.core.model_info import ModelInfo, read_model_info
from cidalloc.errors import CidError, InvalidArgument, Unavailable


def config(kind: str | None = None, **batching: Any) -> dict[str, Any]:
    controls: list[dict[str, Any]] = [
        {"name": "START", "control": [{"int32_false_true": [0, 1]}]},
    ]
    if kind:
        corrid = {"kind": "CONTROL_SEQUENCE_CORRID", "data_type": kind}
        controls.append({"name": "CORRID", "control": [corrid]})
    return {"name": "m", "sequence_batching": {"control_input": controls, **batching}}


@pytest.mark.parametrize(
    ("kind", "highest"),
    [
        (None, 2**63 - 1),
        ("TYPE_UINT64", 2**63 - 1),
        ("TYPE_INT64", 2**63 - 1),
        ("TYPE_UINT32", 2**32 - 1),
        ("TYPE_INT32", 2**31 - 1),
    ],
)
def test_the_highest_id(kind: str | None, highest: int) -> None:
    assert ModelInfo.from_config(config(kind)).highest_cid == highest


@pytest.mark.parametrize(("idle", "seconds"), [("2500000", 2.5), (2500000, 2.5), (0, 1.0)])
def test_idle_time_of_grpc_and_http(idle: Any, seconds: float) -> None:
    read = ModelInfo.from_config(config(max_sequence_idle_microseconds=idle))
    assert read.idle_s == seconds


def test_tritons_default_idle_time_is_a_second() -> None:
    assert ModelInfo.from_config(config()).idle_s == 1.0


def read_from(version: str | CidError, models: dict[str, Any], name: str = "m") -> ModelInfo:
    """Read a model of a server of this version."""
    flow = read_model_info(name, 1.0)
    reply: Any = None
    try:
        while True:
            effect = flow.send(reply)
            if isinstance(effect, ServerVersion):
                gone = isinstance(version, CidError)
                reply = Reply(error=version) if gone else Reply(detail=version)  # type: ignore[arg-type]
            else:
                assert isinstance(effect, Config)
                reply = Reply(config={**models[effect.model], "name": effect.model})
    except StopIteration as stop:
        found: ModelInfo = stop.value
        return found


@pytest.mark.parametrize("version", ["2.54.0", "2.54.0dev", "2.100.1", "3.0.0"])
def test_strings_are_sent_to_servers_that_take_them(version: str) -> None:
    """No such server runs here, so this decision is tested alone."""
    found = read_from(version, {"m": config("TYPE_STRING")})
    assert (found.text_ids, found.highest_cid) == (True, 2**63 - 1)
    assert not read_from("", {"m": config("TYPE_UINT64")}).text_ids


@pytest.mark.parametrize("version", ["2.51.0", "2.53.9", "1.99.0", "", "new"])
def test_strings_are_refused_for_servers_that_crash(version: str) -> None:
    with pytest.raises(InvalidArgument, match=r"TYPE_STRING.* before 2.54 .*TYPE_UINT64"):
        read_from(version, {"m": config("TYPE_STRING")})


def test_strings_need_an_answer() -> None:
    with pytest.raises(Unavailable):
        read_from(Unavailable("no"), {"m": config("TYPE_STRING")})


def test_steps_with_strings() -> None:
    models = {
        "all": ensemble("one", "two"),
        "one": config("TYPE_STRING"),
        "two": config("TYPE_STRING"),
        "mixed": ensemble("one", "number"),
        "number": config("TYPE_UINT64"),
    }
    assert read_from("2.60.0", models, "all").text_ids
    with pytest.raises(InvalidArgument, match=r"2\.54"):
        read_from("2.51.0", models, "all")
    with pytest.raises(InvalidArgument, match="some steps of the ensemble mixed"):
        read_from("2.60.0", models, "mixed")


@pytest.mark.parametrize("scheduling", [{}, {"dynamic_batching": {}}])
def test_models_without_sequences_are_refused(scheduling: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="sequence_batching"):
        ModelInfo.from_config({"name": "m", **scheduling})


# ---- Ensembles


def read(models: dict[str, Any], name: str) -> ModelInfo:
    return read_from("2.51.0", models, name)


def ensemble(*steps: str, **more: Any) -> dict[str, Any]:
    return {"ensemble_scheduling": {"step": [{"model_name": step} for step in steps]}, **more}


def test_an_ensemble_is_as_narrow_as_its_narrowest_step_and_as_slow_as_its_slowest() -> None:
    models = {
        "all": ensemble("plain", "wide", "inner"),
        "inner": ensemble("narrow", "wide", "inner"),
        "plain": {},
        "wide": config("TYPE_UINT64", max_sequence_idle_microseconds="9000000"),
        "narrow": config("TYPE_INT32", max_sequence_idle_microseconds="3000000"),
    }
    found = read(models, "all")
    assert (found.name, found.idle_s, found.highest_cid) == ("all", 9.0, 2**31 - 1)
    assert not found.exact
    assert read(models, "narrow").exact


def test_ensembles_that_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="no step of the ensemble all"):
        read({"all": ensemble("plain"), "plain": {}}, "all")


def test_decoupled_models_and_ensembles() -> None:
    policy = {"decoupled": True}
    steps = {"m": {"sequence_batching": {}}}
    assert read({"m": {**steps["m"], "model_transaction_policy": policy}}, "m").decoupled
    assert read({**steps, "all": ensemble("m", model_transaction_policy=policy)}, "all").decoupled
    assert not read({**steps, "all": ensemble("m")}, "all").decoupled


def test_iterative_models_and_ensembles() -> None:
    models = {
        "all": ensemble("plain", "m"),
        "m": config(iterative_sequence=True),
        "plain": config(iterative_sequence=False),
    }
    assert read(models, "m").iterative and read(models, "all").iterative
    assert not read(models, "plain").iterative


def test_a_server_that_does_not_answer() -> None:
    flow = read_model_info("m", 1.0)
    next(flow)
    with pytest.raises(Unavailable):
        flow.send(Reply(error=Unavailable("no")))
