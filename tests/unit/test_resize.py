"""A pool that grows: nothing of it is lost, and the file is one of a larger pool."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from sparse import content

from cidalloc import cli
from cidalloc.errors import (
    InvalidArgument,
    RegistryCorrupt,
    RegistryLocked,
    RegistryMismatch,
    Unavailable,
)
from cidalloc.manager.registry import Registry
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file import Storage, enlarge
from cidalloc.manager.storage.file_format import Part, Shape, Word
from cidalloc.manager.takeover import boot_id

BOOT = b"b" * 16
TOKEN = b"t" * 16


def settings(capacity: int) -> Settings:
    return Settings(first=100, capacity=capacity, fresh=True, max_held=2**20, max_count=10**6)


@pytest.mark.parametrize("offset", [0, 1, 2048, 5_000])
@pytest.mark.parametrize("used", [0.1, 0.6, 0.99, 1.0])
def test_what_is_held_stays_held(tmp_path: Path, offset: int, used: float) -> None:
    path, capacity = tmp_path / "it", 5_001
    shape = Shape(100, capacity, offset=offset)
    registry = Registry(settings(capacity), 0, Storage.open(path, shape, boot=BOOT), BOOT)
    grant = registry.open(TOKEN, 0, ttl_ms=60_000, label="it")
    ids = registry.acquire(int(capacity * used), 0, token=TOKEN, seq=1)
    registry.release(ids[::3].copy(), 10, token=TOKEN, seq=2, ended=True)
    held, name = registry.held(TOKEN, 10), registry.uuid
    with pytest.raises(RegistryLocked):
        enlarge(path, 2 * capacity)
    registry.close()
    more = capacity + 12_345
    assert enlarge(path, more) == Shape(100, more, capacity, offset)
    with pytest.raises(RegistryMismatch, match="capacity"):
        Registry.in_file(path, settings(capacity), 20, BOOT)
    registry = Registry(settings(more), 20, Storage.open(path, None, boot=BOOT), BOOT)
    registry._check()
    assert registry.uuid == name
    assert registry.renew(TOKEN, 20) == grant
    assert registry.held(TOKEN, 20).tolist() == held.tolist()
    # All others can be had, those that cooled when they are due.
    later = 10 + registry.settings.cooldown_ms
    registry.close_session(TOKEN, later)
    other = bytes(16)
    registry.open(other, later, ttl_ms=600_000)
    rest = registry.acquire(more, later + 120_000, token=other, seq=1)
    assert sorted(rest.tolist()) == list(range(100, 100 + more))
    registry._check()


def test_it_only_grows(tmp_path: Path) -> None:
    path = tmp_path / "it"
    with pytest.raises(InvalidArgument, match="no registry"):
        enlarge(path, 5)
    Registry.in_file(path, settings(100), 0, BOOT).close()
    before = content(path)
    for wrong in (99, 2**38 + 1):
        with pytest.raises(InvalidArgument, match="only grows"):
            enlarge(path, wrong)
    enlarge(path, 100)
    assert content(path).bytes(0, 128) == before.bytes(0, 128)
    assert [each.name for each in tmp_path.iterdir()] == ["it"]


def test_it_grows_to_the_last_id(tmp_path: Path) -> None:
    path, first = tmp_path / "it", 2**63 - 200
    Registry.in_file(path, Settings(first=first, capacity=100, fresh=True), 0, BOOT).close()
    with pytest.raises(InvalidArgument, match="below 2"):
        enlarge(path, 201)
    assert enlarge(path, 200).capacity == 200


def test_a_disk_that_fails_leaves_a_file_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it"
    registry = Registry.in_file(path, settings(100), 0, BOOT)
    registry.acquire(3, 0)
    registry.close()

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(Unavailable, match="Input/output error"):
            enlarge(path, 200)
    assert [each.name for each in tmp_path.iterdir()] == ["it"]
    enlarge(path, 200)
    assert Registry.in_file(path, settings(200), 0, BOOT).anonymous == 3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ids.cidalloc"
    registry = Registry.in_file(path, settings(1000), 0, boot_id())
    registry.open(TOKEN, 0, ttl_ms=60_000, label="camera 7")
    registry.acquire(5, 0, token=TOKEN, seq=1)
    registry.acquire(2, 0)
    registry.close()
    return path


def run(*arguments: object) -> str:
    done = CliRunner().invoke(cli.main, [str(each) for each in arguments], catch_exceptions=False)
    return done.output


def test_show(file: Path) -> None:
    before = content(file)
    printed = run("registry", "show", file)
    assert "7, 2 of them without a session" in printed
    assert "100 to 1099, 1,000 IDs" in printed
    assert "camera 7" in printed
    assert TOKEN.hex() not in printed
    assert '"held": 7' in run("registry", "show", "--json", file)
    assert content(file) == before, "it was only read"


def test_show_what_became_of_a_file(file: Path, tmp_path: Path) -> None:
    assert "see docs/operations.md" not in run("registry", "show", file)
    copy = content(file).put(tmp_path / "copy")
    assert "is or was a copy" in run("registry", "show", copy)
    with file.open("r+b") as opened:
        opened.seek(Word.BOOT * 8)
        opened.write(BOOT)
    assert "The machine has restarted since the last write" in run("registry", "show", file)


def test_check(file: Path) -> None:
    before = content(file)
    assert "is sound: 7 held, 0 cooling, 1 sessions" in run("registry", "check", file)
    assert content(file) == before, "it was only read"
    with file.open("r+b") as opened:
        opened.seek(Part.RECORDS.place + 32)
        opened.write(b"\xff")
    with pytest.raises(RegistryCorrupt, match=r"ids\.cidalloc"):
        run("registry", "check", file)


def test_grow(file: Path) -> None:
    printed = run("registry", "upgrade", file, "--capacity", 2000)
    assert "2,000 IDs from 100 on" in printed
    assert "capacity to 2000" in printed
    assert "7, 2 of them" in run("registry", "show", file)


def test_a_link_stays_a_link_and_the_owner_the_owner(file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file.name)
    os.chown(file, 1234, 2345)
    file.chmod(0o640)
    enlarge(link, 3000)
    assert link.is_symlink()
    status = file.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (1234, 2345, 0o640)
    assert "3,000 IDs" in run("registry", "show", file)
