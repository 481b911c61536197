"""Slices: what the setting becomes on a host, what it refuses, and what its registry does."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run
from loopback import Loopback

from cidalloc.client import Client
from cidalloc.codes import Operation
from cidalloc.errors import CidError, Exhausted, InvalidArgument, OutOfRange, RegistryMismatch
from cidalloc.manager import slices
from cidalloc.manager.inspection import status_of
from cidalloc.manager.recovery import shape_for
from cidalloc.manager.registry import Registry
from cidalloc.manager.service import Service
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file import Storage
from cidalloc.manager.storage.file_format import Word
from cidalloc.manager.takeover import RegistryHolder

BOOTS = [bytes([n]) * 16 for n in range(3)]
A = bytes(16)


def in_file(path: Path, values: Settings, now: int, boot: int = 0) -> Registry:
    return Registry.in_file(path, values, now, BOOTS[boot])


def ids(*values: int) -> Any:
    return np.array(values, np.uint64)


# ---- What the setting says


@pytest.mark.parametrize("count", [1, 2, 64, 1024])
def test_slices_are_disjoint_and_cover_the_pool(count: int) -> None:
    values = {"first": 5, "capacity": 4096}
    end = 5
    for number in range(count):
        shape = shape_for(Settings(**values, slice=f"{number}/{count}"))  # type: ignore[arg-type]
        assert (shape.first, shape.capacity) == (end, 4096 // count)
        end += shape.capacity
    assert end == 5 + 4096


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("9/8", "8 slices have the numbers 0 to 7"),
        ("8/8", "8 slices have the numbers 0 to 7"),
        ("3/63", "63 is not a power of two that divides the capacity, 1073741824"),
        ("0/2147483648", "is not a power of two that divides the capacity"),
        ("auto/63", "63 is not a power of two"),
        ("auto/32768", "auto takes at most 16384 slices"),
        *((text, "is not of the form K/N") for text in ("3", "auto", "auto/", "/8", "3/0", "-1/8")),
        *((text, "is not of the form K/N") for text in ("03/8", "3/08", " 3/8", "3/8\n", "٣/8")),
        *((text, "is not of the form K/N") for text in ("Random", "1/2/4", "0x1/8", None, 3)),
    ],
)
def test_a_slice_that_is_none(text: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=f"slice=.*{re.escape(words)}"):
        Settings(slice=text)


def test_a_slice_of_a_pool_that_cannot_be_divided() -> None:
    with pytest.raises(InvalidArgument, match=r"2 is not a power of two that divides .* 99"):
        Settings(first=1, capacity=99, slice="0/2")


@pytest.mark.parametrize("values", [{"first": 7}, {"capacity": 2**24}])
def test_a_random_slice_of_a_pool_that_is_said(values: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument, match="slice=random has a pool of its own"):
        Settings(slice="random", **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "slice_"),
    [
        ("triton-0", "0/64"),
        ("triton-63", "63/64"),
        ("my-web-2-7", "7/64"),
        ("triton-3.triton.ns.svc.cluster.local", "3/64"),
    ],
)
def test_the_ordinal_of_a_host(host: str, slice_: str) -> None:
    values = Settings(slice="auto/64").on_host(host)
    assert values == Settings(slice=slice_)
    assert values.on_host("another") == values, "it is decided"


@pytest.mark.parametrize(
    "host",
    [
        *("triton-7f9c4d-x2x8p", "3f2a9c1d0e4b", "triton", "triton-", "triton-0x3", "triton-3a"),
        *("triton-03", "triton-٣", "3", "ip-10-0-0-12", "triton.ns-3", ""),
    ],
)
def test_a_host_without_an_ordinal(host: str) -> None:
    with pytest.raises(InvalidArgument, match="ends in a dash and an ordinal") as caught:
        Settings(slice="auto/64").on_host(host)
    for words in ("slice='auto/64'", repr(host), "StatefulSet", "slice=K/N", "slice=random"):
        assert words in str(caught.value)


@pytest.mark.parametrize("host", ["triton-64", "triton-100", "triton-7f9c4d-22222"])
def test_an_ordinal_is_never_reduced(host: str) -> None:
    """Two servers would have one slice. The last host is a pod of a Deployment."""
    with pytest.raises(InvalidArgument, match=r"which is not below 64: choose a larger power"):
        Settings(slice="auto/64").on_host(host)
    with pytest.raises(InvalidArgument):
        Settings(slice="auto/16384").on_host("triton-7f9c4d-22222")


def test_random_slices() -> None:
    """They cannot meet the default pool, nor one another, except by chance."""
    found = {(shape.first, shape.capacity) for shape in (shape_for(RANDOM) for _ in range(1000))}
    assert len(found) == 1000, "the probability that two are equal is 2e-6"
    for first, capacity in found:
        assert capacity == 2**24 and 2**62 <= first <= 2**63 - capacity
        assert slices.is_random(first, capacity)
    assert not slices.is_random(2**30, 2**24)
    assert not slices.is_random(2**62 + 1, 2**24)
    assert not slices.is_random(2**62, 2**25)


RANDOM = Settings(slice="random")


# ---- Its registry


@pytest.mark.parametrize("fixed", ["0/1", "3/64"])
@pytest.mark.parametrize("place", ["memory", "file"])
def test_a_new_slice_waits_whatever_its_size(tmp_path: Path, place: str, fixed: str) -> None:
    values = Settings(slice=fixed, max_ttl_ms=20_000, grace_ms=5_000)
    file = tmp_path / "r"
    registry = in_file(file, values, 7) if place == "file" else Registry(values, 7)
    registry.open(A, 7, ttl_ms=20_000)
    for token, seq in ((None, 0), (A, 1)):
        with pytest.raises(Exhausted, match=r"this registry is new.* due in 25 s") as caught:
            registry.acquire(1, 7, token=token, seq=seq)
        assert caught.value.due_s == 25.0
    assert status_of(registry, 10_007)["issues_in_s"] == 15.0
    if place == "file":
        assert file.stat().st_blocks * 512 < 2**20, "it takes no room for the IDs"
        registry.close()
        registry = in_file(file, values, 20_000)
    with pytest.raises(Exhausted, match=r"due in 0\.001 s"):
        registry.acquire(1, 25_006)
    shape = shape_for(values)
    (cid,) = registry.acquire(1, 25_007).tolist()
    assert shape.first <= cid < shape.first + shape.capacity
    assert registry.store.read(Word.ISSUES_FROM) == 0
    assert status_of(registry, 25_007)["issues_in_s"] == 0.0
    registry._check()
    registry.close()


def test_a_power_cut_while_it_waits(tmp_path: Path) -> None:
    """How much of the time is over is not known then. Once it has issued, it never waits again."""
    values = Settings(slice="1/2", max_ttl_ms=20_000, grace_ms=5_000)
    in_file(tmp_path / "r", values, 10**9).close()
    registry = in_file(tmp_path / "r", values, 50, boot=1)
    with pytest.raises(Exhausted, match="due in 25 s"):
        registry.acquire(1, 50)
    registry.acquire(1, 25_050)
    registry.close()
    registry = in_file(tmp_path / "r", values, 10, boot=2)
    registry.acquire(1, 10)
    registry.close()


def test_a_long_wait_is_told_in_seconds() -> None:
    registry = Registry(Settings(slice="3/64", max_ttl_ms=30 * 86_400_000), 7)
    with pytest.raises(Exhausted) as caught:
        registry.acquire(1, 8)
    assert caught.value.due_s == 30 * 86_400 + 10 - 0.001


@pytest.mark.parametrize("values", [Settings(slice="3/64", fresh=True), RANDOM])
def test_a_slice_that_cannot_have_a_past_issues_at_once(values: Settings) -> None:
    assert len(Registry(values, 7).acquire(5, 7)) == 5


def test_the_ids_of_another_slice_are_refused() -> None:
    """All of them, so a request that reaches the wrong manager is an error."""
    one, two = (Registry(Settings(slice=f"{n}/2", fresh=True), 0) for n in range(2))
    cids = two.acquire(3, 0)
    for cid in cids.tolist():
        with pytest.raises(OutOfRange):
            one.release(ids(cid), 0)


def test_a_random_slice_is_remembered_by_its_file(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    found = []
    for path in (first, second, first, second):
        registry = in_file(path, RANDOM, 0)
        found.append(registry.pool.first)
        assert registry.pool.first <= registry.acquire(1, 0)[0]
        registry.close()
    assert found[0] == found[2] != found[1] == found[3]
    memory = {Registry(RANDOM, 0).pool.first for _ in range(3)}
    assert len(memory) == 3, "without a file it is drawn at each start"


def test_a_reload_of_a_random_slice(tmp_path: Path) -> None:
    """The new process draws none, but waits for the old one's file."""
    values = Settings(slice="random", state=str(tmp_path))
    old, new = (RegistryHolder(values, "it", lambda: 0) for _ in range(2))
    first = old.registry().pool.first
    assert new.waits
    old.poll()
    new.poll()
    assert new.registry().pool.first == first
    new.close()


@pytest.mark.parametrize(
    ("made", "wanted", "words"),
    [
        ({}, {"slice": "3/64"}, "first=1124073472, capacity=16777216, the slice 3/64"),
        ({}, {"slice": "0/64"}, "first=1073741824, capacity=16777216, the slice 0/64"),
        ({"slice": "3/64"}, {"slice": "4/64"}, "the slice 4/64"),
        ({"slice": "3/64"}, {"slice": "3/128"}, "the slice 3/128"),
        ({"slice": "3/64"}, {}, "not first=1073741824, capacity=1073741824:"),
        ({"slice": "3/64"}, {"slice": "random"}, "not a random slice"),
        ({"slice": "random"}, {"slice": "3/64"}, "the slice 3/64"),
        ({"slice": "random"}, {}, "not first=1073741824"),
    ],
)
def test_a_file_of_another_pool_is_refused(
    tmp_path: Path, made: dict[str, str], wanted: dict[str, str], words: str
) -> None:
    path = tmp_path / "r"
    in_file(path, Settings(**made, fresh=True), 0).close()  # type: ignore[arg-type]
    before = path.read_bytes()[: 2**16]
    with pytest.raises(RegistryMismatch) as caught:
        in_file(path, Settings(**wanted), 0)  # type: ignore[arg-type]
    text = str(caught.value)
    assert words in text
    for way in ("change the settings back", f"mv {path} {path}.old", f"cidalloc drain {path}"):
        assert way in text
    assert "upgrade" not in text, "an enlarged slice would overlap the next one"
    assert path.read_bytes()[: 2**16] == before


def test_the_way_to_migrate(tmp_path: Path) -> None:
    """As the error says: the new file waits until no client can use the old IDs."""
    path, slice_ = tmp_path / "r", Settings(slice="0/64")
    old = in_file(path, Settings(), 0)
    old.acquire(1, 0)
    old.close()
    path.rename(tmp_path / "r.old")
    registry = in_file(path, slice_, 5)
    with pytest.raises(Exhausted, match="due in 610 s"):
        registry.acquire(1, 5)
    registry.close()


def test_a_pool_that_only_grew_says_how(tmp_path: Path) -> None:
    in_file(tmp_path / "r", Settings(first=1, capacity=50, fresh=True), 0).close()
    with pytest.raises(RegistryMismatch, match="registry upgrade --capacity N"):
        in_file(tmp_path / "r", Settings(first=1, capacity=60), 0)
    with pytest.raises(RegistryMismatch, match="mv "):
        in_file(tmp_path / "r", Settings(first=1, capacity=40), 0)


# ---- What the manager tells


def told(service: Service) -> tuple[list[int], dict[str, Any]]:
    """Return OUTPUT of OPEN, and the status."""
    answers = []
    for code, given in ((Operation.OPEN, {"session": "00" * 16, "ttl_ms": 10_000}), (9, {})):
        answer = service.answer(np.array([[code]], np.int8), None, json.dumps(given))
        assert not isinstance(answer, CidError), answer
        answers.append(answer)
    return answers[0][0][0].tolist(), json.loads(answers[1][1])


@pytest.mark.parametrize(
    ("setting", "host", "numbers", "slice_"),
    [
        ("", "triton-3", [0, 0], None),
        ("3/64", "vm", [3, 64], "3/64"),
        ("0/1", "vm", [0, 1], "0/1"),
        ("auto/64", "triton-3", [3, 64], "3/64"),
        ("random", "triton-3", [0, 0], "random"),
    ],
)
def test_open_and_status(
    monkeypatch: pytest.MonkeyPatch, setting: str, host: str, numbers: list[int], slice_: str | None
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    output, status = told(Service(Settings(slice=setting), lambda: 0))
    assert output[:3] == [1, 1, 10_000]
    assert output[5:] == [5_000, 120_000, *numbers]
    assert (status["slice"], status["host"]) == (slice_, host)
    if numbers[1]:
        size = 2**30 // numbers[1]
        pool = {"first": 2**30 + numbers[0] * size, "capacity": size, "block": 1}
        assert status["pool"] == pool


def test_no_manager_in_doubt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "triton-7f9c4d-x2x8p")
    with pytest.raises(InvalidArgument, match="'triton-7f9c4d-x2x8p'"):
        Service(Settings(slice="auto/64", state=str(tmp_path)), lambda: 0)
    assert list(tmp_path.iterdir()) == [], "no file"


def test_a_client_waits_until_a_new_slice_issues() -> None:
    values = Settings(slice="1/4", max_ttl_ms=1_000, min_ttl_ms=1_000, grace_ms=0)
    with Client("loopback", transport=Loopback(values), ttl=1.0) as cids:
        with pytest.raises(Exhausted, match="this registry is new"):
            cids.acquire(timeout=0.0)
        assert cids.acquire(timeout=5.0) >= 2**30 + 2**28


# ---- `cidalloc model`


def test_the_command_writes_it(tmp_path: Path) -> None:
    done = run("model", str(tmp_path / "m"), "--no-state", "--slice", "auto/64", "--max-ttl", "1m")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "issues no ID for 70s" in done.stdout.replace("70000ms", "70s")
    text = (tmp_path / "m" / "cidmgr" / "config.pbtxt").read_text()
    assert 'parameters { key: "slice" value { string_value: "auto/64" } }' in text
    again = run("model", str(tmp_path / "m"), "-o", "--max-ttl", "2m")
    assert "Kept settings: slice=auto/64" in again.stdout
    assert 'string_value: "auto/64"' in (tmp_path / "m/cidmgr/config.pbtxt").read_text()
    whole = run("model", str(tmp_path / "m"), "--reset", "--no-state")
    assert "issues no ID" not in whole.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--slice", "9/8"], "slice='9/8'"),
        (["--slice", "3/63"], "slice='3/63': 63 is not a power of two"),
        (["--slice", "soon"], "slice='soon' is not of the form"),
        (["--slice", "random", "--first", "1"], "slice=random has a pool of its own"),
    ],
)
def test_the_command_refuses(tmp_path: Path, options: list[str], words: str) -> None:
    done = run("model", str(tmp_path / "m"), "--no-state", *options)
    assert done.returncode == 1
    assert done.stderr.startswith("error: INVALID_ARGUMENT: ") and words in done.stderr
    assert not (tmp_path / "m").exists()


def test_random_ids_are_above_what_javascript_reads(tmp_path: Path) -> None:
    done = run("model", str(tmp_path / "m"), "--no-state", "--slice", "random")
    assert "warning: a random slice is above 2^62: JavaScript" in done.stderr
    assert "issues no ID" not in done.stdout


@pytest.mark.parametrize("how", ["-o", "--reset"])
@pytest.mark.parametrize("visible", [True, False])
def test_a_deployment_that_has_a_file(tmp_path: Path, how: str, visible: bool) -> None:
    """What will happen is said before the files are written, and it is what happens."""
    state, file = tmp_path / "state", tmp_path / "state" / "cidmgr.cidalloc"
    model = ["model", str(tmp_path / "m"), "--state", str(state)]
    assert run(*model).stderr == ""
    if visible:
        state.mkdir()
        in_file(file, Settings(), 0).close()
    same = run(*model, how)
    assert same.stderr == "" and same.returncode == 0
    done = run(*model, how, "--slice", "3/64")
    assert done.returncode == 0
    assert "warning: " in done.stderr and f"mv {file} {file}.old" in done.stderr
    assert ("first=1073741824, capacity=1073741824, and not" in done.stderr) is visible
    if visible:
        with pytest.raises(RegistryMismatch):
            Storage.expect(file, shape_for(Settings(slice="3/64")))
        file.rename(f"{file}.old")
    else:
        assert "If the server has the file" in done.stderr
    assert run(*model, how, "--slice", "3/64").stderr == "", "it was done"
