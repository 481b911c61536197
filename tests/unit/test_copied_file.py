"""A registry whose file was copied or restored: what was issued since is unknown to it."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from sparse import content

from cidalloc.errors import Exhausted, SessionUnknown
from cidalloc.manager.registry import Registry
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file import _identity
from cidalloc.manager.storage.file_format import Word

BOOT, NEXT_BOOT = b"1" * 16, b"2" * 16
SETTINGS = Settings(first=1, capacity=2**24, cooldown_ms=0, max_ttl_ms=600_000, grace_ms=1_000)
TOKEN, NOW = b"t" * 16, 1_000
WAIT_MS = SETTINGS.max_ttl_ms + SETTINGS.grace_ms


def opened(path: Path, now: int = NOW, boot: bytes = BOOT) -> Registry:
    return Registry.in_file(path, SETTINGS, now, boot)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A file with a session and an ID."""
    path = tmp_path / "original"
    registry = opened(path)
    registry.open(TOKEN, NOW, ttl_ms=10_000)
    registry.acquire(1, NOW, token=TOKEN, seq=1)
    registry.close()
    return path


def issues(registry: Registry, now: int) -> bool:
    registry.open(b"n" * 16, now, ttl_ms=10_000)
    try:
        registry.acquire(1, now, token=b"n" * 16, seq=now)
    except Exhausted:
        return False
    return True


def knows(registry: Registry, now: int = NOW) -> bool:
    try:
        registry.renew(TOKEN, now)
    except SessionUnknown:
        return False
    return True


def test_a_copy_is_another_registry_and_waits(original: Path, tmp_path: Path) -> None:
    copy = content(original).put(tmp_path / "copy")
    first, second = opened(original), opened(copy)
    assert first.uuid != second.uuid
    assert knows(first) and not knows(second)
    assert issues(first, NOW)
    assert not issues(second, NOW)
    assert second.issues_in_ms == WAIT_MS
    second.close()
    again = opened(copy, NOW + 1)
    assert again.uuid == second.uuid
    assert not issues(again, NOW + WAIT_MS - 1)
    assert issues(again, NOW + WAIT_MS)
    first.close()
    again.close()


def test_a_copy_waits_for_the_longest_time_that_it_knows_of(tmp_path: Path) -> None:
    path = tmp_path / "original"
    registry = opened(path)
    registry.open(TOKEN, NOW, ttl_ms=10_000, cooldown_ms=5 * WAIT_MS)
    horizon = registry.store.read(Word.HORIZON)
    assert horizon > 5 * WAIT_MS
    registry.close()
    copy = opened(content(path).put(tmp_path / "copy"))
    assert not issues(copy, NOW + horizon - 1)
    assert issues(copy, NOW + horizon)


def test_a_power_cut_while_a_copy_waits(original: Path, tmp_path: Path) -> None:
    copy = content(original).put(tmp_path / "copy")
    opened(copy).close()
    registry = opened(copy, 5, NEXT_BOOT)
    assert registry.issues_in_ms == WAIT_MS
    registry.close()


def test_a_file_that_was_moved_is_no_copy(original: Path, tmp_path: Path) -> None:
    before = opened(original)
    before.close()
    after = opened(original.rename(tmp_path / "moved"))
    assert after.uuid == before.uuid and knows(after)
    after.close()


def test_a_file_with_another_version_of_the_same_inode(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the next test on file systems that cannot show it."""
    monkeypatch.setattr(fcntl, "ioctl", lambda fd, request, version: b"\1" * len(version))
    registry = opened(original)
    assert not knows(registry)
    registry.close()


def test_a_backup_that_gets_the_number_of_the_deleted_file(original: Path, tmp_path: Path) -> None:
    backup = Path(shutil.copy(original, tmp_path / "backup"))
    with original.open() as file:
        number, identity = os.fstat(file.fileno()).st_ino, _identity(file.fileno())
    original.unlink()
    for n in range(100):  # ext4 takes the lowest number that is free
        shutil.copy(backup, original)
        if original.stat().st_ino == number:
            break
        original.rename(tmp_path / f"other {n}")
    else:
        pytest.skip("this file system does not use a number again soon")
    with original.open() as file:
        if identity == _identity(file.fileno()):
            pytest.skip("this file system has no versions of numbers")
    registry = opened(original)
    assert not knows(registry)
    registry.close()
