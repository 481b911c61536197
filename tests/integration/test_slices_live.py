"""Slices on real servers: no ID of one is an ID of another, and ``doctor`` sees who shares some."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tritonclient.grpc
from command import run
from servers import Server
from test_cli_live import Opened, opened  # noqa: F401
from tritonclient.utils import InferenceServerException

from cidalloc.client import Client
from cidalloc.devserver import demo
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import Exhausted, InvalidArgument, Unavailable
from cidalloc.manager.settings import Settings

pytestmark = pytest.mark.server

POOL = {"first": 1000, "capacity": 64, "cooldown_ms": 100, "fresh": True}


class Servers(NamedTuple):
    """Two with a slice each, one with a copy of the first one's file, and a random one."""

    zero: TritonServer
    one: TritonServer
    copy: TritonServer
    random: TritonServer


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("slices")
    found = []
    with ExitStack() as stack:
        for name, values in (
            ("zero", {**POOL, "slice": "0/2"}),
            ("one", {**POOL, "slice": "1/2"}),
            ("copy", {**POOL, "slice": "0/2"}),
            ("random", {"slice": "random"}),
        ):
            state = folder / name / "state"
            settings = Settings(state=str(state), **values)  # type: ignore[arg-type]
            demo.write_repository(folder / name / "models", settings)
            if name == "copy":
                shutil.copytree(folder / "zero" / "state", state)
            if name == "random":
                _narrow(folder / name / "models")
            server = Server(folder / name / "models")
            server.start()
            stack.callback(server.stop)
            found.append(server)
        yield Servers(*found)


def _narrow(folder: Path) -> None:
    shutil.copytree(folder / demo.MODEL, folder / "narrow")
    config = folder / "narrow" / "config.pbtxt"
    text = config.read_text().replace("TYPE_UINT64", "TYPE_INT32").replace(demo.MODEL, "narrow")
    config.write_text(text)


def urls(*servers: TritonServer) -> list[str]:
    return [server.grpc_url for server in servers]


def status(url: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("status", url, "--json").stdout)
    return found


def test_the_ids_of_two_slices_never_meet(servers: Servers) -> None:
    """All IDs that both can issue; and a request at the wrong server is an error."""
    with Client(servers.zero.grpc_url) as zero, Client(servers.one.http_url) as one:
        for _ in range(3):
            ids = [client.acquire_many(32, timeout=5.0) for client in (zero, one)]
            assert sorted(ids[0]) == list(range(1000, 1032))
            assert sorted(ids[1]) == list(range(1032, 1064))
            for client in (zero, one):
                with pytest.raises(Exhausted):
                    client.acquire()
            wrong = run("release", servers.zero.grpc_url, str(ids[1][0]))
            assert wrong.stderr.startswith("error: OUT_OF_RANGE: "), wrong
            for client, cids in zip((zero, one), ids, strict=True):
                client.release_many(cids, ended=True)
        with (
            zero.sequence(demo.MODEL, wait=5.0) as there,
            one.sequence(demo.MODEL, wait=5.0) as here,
            tritonclient.grpc.InferenceServerClient(servers.one.grpc_url) as raw,
        ):
            assert there.infer({"INPUT": [[5]]})["OUTPUT"][0, 0] == 5
            assert here.infer({"INPUT": [[7]]})["OUTPUT"][0, 0] == 7
            tensor = tritonclient.grpc.InferInput("INPUT", [1, 1], "INT32")
            tensor.set_data_from_numpy(np.array([[1]], np.int32))
            with pytest.raises(InferenceServerException, match="START"):
                raw.infer(demo.MODEL, [tensor], sequence_id=there.cid)
            assert here.infer({"INPUT": [[7]]}, end=True)["OUTPUT"][0, 0] == 14
            assert there.infer({"INPUT": [[5]]}, end=True)["OUTPUT"][0, 0] == 10
    until = time.monotonic() + 10
    while not all(status(url)["free"] == 32 for url in urls(servers.zero, servers.one)):
        assert time.monotonic() < until, "they cool for 0.1 s"
        time.sleep(0.02)


def test_what_they_tell(servers: Servers) -> None:
    found = [status(url) for url in urls(*servers)]
    assert [each["slice"] for each in found] == ["0/2", "1/2", "0/2", "random"]
    assert [each["pool"]["first"] for each in found][:2] == [1000, 1032]
    assert found[3]["pool"]["first"] >= 2**62
    assert len({each["host"] for each in found}) == 1
    text = run("status", servers.one.grpc_url).stdout
    assert "1032 to 1063, 32 IDs, the slice 1/2" in text


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_doctor_over_three_servers(servers: Servers, options: list[str]) -> None:
    options = ["--target", demo.MODEL, *options]
    sound = run("doctor", *urls(servers.zero, servers.one, servers.random), *options)
    assert sound.returncode == 0, sound.stdout
    assert "the pools of 3 servers do not overlap" in sound.stdout
    assert sound.stderr == "", "no progress where there is no terminal"
    copied = run("doctor", *urls(servers.zero, servers.one, servers.copy), *options)
    assert copied.returncode == 1
    zero, _, copy = urls(servers.zero, servers.one, servers.copy)
    assert f"{zero} and {copy} have one slice, 0/2: they issue the same IDs" in copied.stdout
    names = run("doctor", servers.one.grpc_url, servers.one.http_url, *options)
    assert names.returncode == 1 and "they are one server" in names.stdout
    address = f"dns:localhost:{servers.one.grpc_port}"
    both = run("doctor", address, servers.zero.grpc_url, *options)
    assert f"grpc://127.0.0.1:{servers.one.grpc_port}" in both.stdout.replace("[::1]", "127.0.0.1")
    away = run("doctor", servers.one.grpc_url, "127.0.0.1:1", *options)
    assert away.returncode == 1 and "did not answer: 1" in away.stdout


def test_doctor_shows_progress_on_a_terminal(servers: Servers, opened: Opened) -> None:  # noqa: F811
    terminal = opened("doctor", *urls(servers.zero, servers.one))
    assert terminal.status() == 0
    shown = terminal.text.partition("the pools of 2 servers do not overlap")[0]
    for url in urls(servers.zero, servers.one):
        assert f"\rAsking {url}" in shown
        assert f"\rReading the configuration of {demo.MODEL} at {url}" in shown


def test_a_random_slice_and_a_model_of_32_bits(servers: Servers) -> None:
    with Client(servers.random.grpc_url) as cids:
        with pytest.raises(InvalidArgument, match=r"narrow .* \(its settings first and slice\)"):
            cids.sequence("narrow")
        with cids.sequence(demo.MODEL) as sequence:
            assert sequence.infer({"INPUT": [[5]]}, end=True)["OUTPUT"][0, 0] == 5
            assert sequence.cid >= 2**62
    done = run("doctor", servers.random.grpc_url, "--target", "narrow")
    assert done.returncode == 1
    assert "FAIL  narrow takes IDs up to 2147483647" in done.stdout
    assert "settings first and slice" in done.stdout


@pytest.mark.parametrize(
    ("slice_", "words"),
    [
        ("auto/1", ["slice='auto/1'", socket.gethostname()]),
        (
            "1/2",
            ["first=1000, capacity=32, and not first=1032, capacity=32, the slice 1/2", "mv /"],
        ),
        ("3/63", ["slice='3/63': 63 is not a power of two"]),
    ],
)
def test_a_server_in_doubt_does_not_load(
    servers: Servers, tmp_path: Path, slice_: str, words: list[str]
) -> None:
    """On a host without an ordinal, with the file of another slice, with a slice that is none."""
    state = tmp_path / "state"
    file = json.loads(run("status", servers.zero.grpc_url, "--json").stdout)["file"]
    state.mkdir()
    shutil.copy(file, state)
    demo.write_repository(tmp_path / "models", Settings(state=str(state), **POOL))  # type: ignore[arg-type]
    config = tmp_path / "models" / "cidmgr" / "config.pbtxt"
    old, new = (f'"slice" value {{ string_value: "{text}" }}' for text in ("", slice_))
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(Unavailable) as caught, Server(tmp_path / "models"):
        pass
    for each in words:
        assert each in str(caught.value)
