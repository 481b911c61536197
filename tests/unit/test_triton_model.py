"""The model's folder and configuration: a person may edit it, and hears of every mistake."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from servers import Server

from cidalloc.errors import InvalidArgument, Unavailable
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import config, export, settings_from

CONFIG: dict[str, Any] = {
    "name": "cidmgr",
    "max_batch_size": 256,
    "instance_group": [{"kind": "KIND_CPU", "count": 1}],
    "parameters": {
        "first": {"string_value": "5"},
        "capacity": {"string_value": "10"},
        "fresh": {"string_value": "true"},
        "FORCE_CPU_ONLY_INPUT_TENSORS": {"string_value": "no"},
    },
}


def test_settings() -> None:
    assert settings_from(CONFIG) == Settings(first=5, capacity=10, fresh=True)
    assert settings_from({"max_batch_size": 1}) == Settings()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("frist", "1", "frist"),
        ("first", "", "first"),
        ("first", "1.0", "first"),
        ("first", "1_0", "first='1_0'"),
        ("first", " 5 ", "first=' 5 '"),
        ("first", "\u0665", "first"),
        ("first", "9" * 5000, "first"),
        ("first", "0", "first=0"),
        ("cooldown_ms", "-1", "cooldown_ms"),
        ("fresh", "yes", "fresh"),
    ],
)
def test_parameters_that_are_wrong(key: str, value: str, words: str) -> None:
    config = copy.deepcopy(CONFIG)
    config["parameters"][key] = {"string_value": value}
    with pytest.raises(InvalidArgument, match=words):
        settings_from(config)


@pytest.mark.parametrize(
    "groups",
    [
        [{"count": 1, "gpus": [0, 1]}],
        [{"count": 2}],
        [{"count": 1}, {"count": 1}],
        [{"count": "2"}],
    ],
)
def test_a_second_instance_would_be_a_second_manager(groups: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidArgument, match="instance_group"):
        settings_from({**CONFIG, "instance_group": groups})


@pytest.mark.parametrize(
    "policy", [{"all": {}}, {"latest": {"num_versions": 2}}, {"specific": {"versions": [1, 2]}}]
)
def test_a_second_version_would_be_one_too(policy: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="version_policy"):
        settings_from({**CONFIG, "version_policy": policy})
    settings_from({**CONFIG, "version_policy": {"latest": {"num_versions": 1}}})


@pytest.mark.parametrize("name", ["", "a/b", ".a", 'a"b', "a\nb", ".."])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        export(tmp_path, name=name)
    assert list(tmp_path.iterdir()) == []


def test_without_batching_the_tensors_would_have_other_shapes() -> None:
    with pytest.raises(InvalidArgument, match="max_batch_size"):
        settings_from({**CONFIG, "max_batch_size": 0})


def test_export_refuses_and_replaces(tmp_path: Path) -> None:
    folder = export(tmp_path, name="ids")
    (folder / "config.pbtxt").write_text("mine")
    with pytest.raises(InvalidArgument, match="exists"):
        export(tmp_path, name="ids")
    assert (folder / "config.pbtxt").read_text() == "mine"
    export(tmp_path, name="ids", overwrite=True)
    assert "dynamic_batching" in (folder / "config.pbtxt").read_text()
    assert sorted(path.name for path in folder.rglob("*")) == ["1", "config.pbtxt", "model.py"]


def test_a_new_model_is_there_at_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    write = config._write

    def watch(path: Path, text: str) -> None:
        seen.append([each.name for each in tmp_path.glob("[!.]*")])
        if path.name == "config.pbtxt" and len(seen) < 3:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(config, "_write", watch)
    with pytest.raises(OSError, match="No space"):
        export(tmp_path)
    assert list(tmp_path.iterdir()) == []
    export(tmp_path)
    assert seen == [[]] * 4
    assert [each.name for each in tmp_path.iterdir()] == ["cidmgr"]


def test_two_that_export_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = config._fill

    def late(folder: Path, *args: Any, **named: Any) -> None:
        fill(folder, *args, **named)
        fill(tmp_path / "cidmgr", *args, **named)

    monkeypatch.setattr(config, "_fill", late)
    with pytest.raises(InvalidArgument, match="just made"):
        export(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["cidmgr"]


WRONG = (
    ("count: 1", "count: 2", "instance_group has 2 instances"),
    ('key: "capacity"', 'key: "capcity"', "unknown parameter capcity"),
    ('value { string_value: "5000" }', 'value { string_value: "5s" }', "cooldown_ms='5s'"),
)


@pytest.mark.server
def test_triton_shows_what_is_wrong(tmp_path: Path) -> None:
    """Of each model that it cannot load."""
    for number, (old, new, _) in enumerate(WRONG):
        config = export(tmp_path, name=f"ids{number}") / "config.pbtxt"
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))
    with pytest.raises(Unavailable) as caught, Server(tmp_path):
        pass
    for number, (_, _, words) in enumerate(WRONG):
        (line,) = (each for each in str(caught.value).splitlines() if f"'ids{number}'" in each)
        assert words in line
