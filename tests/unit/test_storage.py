"""Tests where a registry keeps its records: the shape of the file, its refusals, and its lock."""

from __future__ import annotations

import errno
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from cidalloc.errors import (
    CidError,
    Exhausted,
    Forked,
    InvalidArgument,
    RegistryCorrupt,
    RegistryLocked,
    RegistryMismatch,
    SessionUnknown,
    Unavailable,
)
from cidalloc.manager._sessions import Sessions
from cidalloc.manager.registry import Registry
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file import Storage, TakeoverRequest, writer_of
from cidalloc.manager.storage.file_format import GRANULE, Kind, Shape, Word, extents_of
from cidalloc.manager.storage.file_lock import process_id

PER = GRANULE // 32  # blocks in a granule
BOOT = b"this boot of it!"
VALUES = Settings(first=10, capacity=50, fresh=True)
SHAPE = Shape(10, 50, 1)
NOTES = slice(Word.PID * 8, Word.REQUESTER * 8)  # who writes it: no part of what is refused


def opened(path: Path, values: Settings = VALUES, now: int = 0, boot: bytes = BOOT) -> Registry:
    return Registry.in_file(path, values, now, boot)


def content(path: Path) -> bytes:
    """All that the file holds, but for who writes it."""
    data = bytearray(path.read_bytes())
    data[NOTES] = bytes(len(data[NOTES]))
    return bytes(data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.cidalloc"


@pytest.fixture
def used(path: Path) -> Path:
    """A file with two sessions that hold IDs, an anonymous one, and IDs that cool."""
    registry = opened(path)
    for name in (b"a", b"b"):
        registry.open(name * 16, 0, ttl_ms=10_000, label=f"of {name.decode()}")
        registry.acquire(7, 0, token=name * 16, seq=1)
    registry.acquire(3, 0)
    registry.release(np.array([11, 13], np.uint64), 0, token=b"a" * 16, seq=2)
    registry.close()
    return path


def refused(path: Path, error: type[CidError], words: str, **how: Any) -> None:
    """Opening and looking are refused with a text that names the file; nothing is written."""
    before = content(path)
    for call in (lambda: opened(path, **how), lambda: Registry.look(path, 0, BOOT)):
        with pytest.raises(error, match=words) as caught:
            call()
        assert type(caught.value) is error
        assert str(path) in str(caught.value)
        assert content(path) == before
    assert list(path.parent.iterdir()) == [path], "no leftovers"


# ---- The shape


class Naive:
    """Every block of a pool by the place of its record in the file, counted one by one."""

    def __init__(self, shape: Shape) -> None:
        records = list(range(shape.count + 1))
        records += [-1] * (-len(records) % PER)  # up to a whole granule
        order = records[shape.split :] + records[: shape.split]
        self.granules = [order[i : i + PER] for i in range(0, len(order), PER)]

    def ready(self, granules: int) -> int:
        return sum(number > 0 for each in self.granules[:granules] for number in each)


def agrees(count: int, split: int, block: int = 1) -> None:
    shape = Shape(5, (count - 1) * block + 1, block, split * PER)
    naive = Naive(shape)
    assert shape.count == count
    assert shape.granules == len(naive.granules)
    assert shape.start == 5 + (max(shape.split, 1) - 1) * block
    for n, records in enumerate(naive.granules):
        number = next(iter(records))
        assert shape.place(n) == number * 32
        assert shape.ready(n) == naive.ready(n)
    assert shape.ready(shape.granules) == count


@pytest.mark.parametrize("count", [*range(1, 4), *range(2045, 2051), *range(4093, 4099), 10_000])
def test_the_arithmetic_of_a_file(count: int) -> None:
    for split in range(count // PER + 1):
        agrees(count, split)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 30_000), part=st.floats(0, 1), block=st.sampled_from([1, 2, 64]))
def test_the_arithmetic_of_any_file(count: int, part: float, block: int) -> None:
    agrees(count, int(part * (count // PER)), block)


@pytest.mark.parametrize("capacity", [1, 2046, 2047, 2048, 2049, 2**24, 2**30, 2**38])
def test_a_random_place_is_within_the_pool(capacity: int) -> None:
    for _ in range(50):
        shape = Shape.anywhere(7, capacity, 1)
        assert shape.split % PER == 0
        assert 7 <= shape.start < 7 + capacity


def test_memory_grows_too() -> None:
    store = Storage.memory(Shape(1, 10**6, 1, 100 * PER))
    assert store.ready_blocks == store.ready_rows == 0
    with pytest.raises(ValueError, match="not within"):
        store.blocks.put_memory(len(store.blocks), 1)
    last = 0
    while last < 10**6:
        store.grow(Kind.BLOCKS, 1)
        assert store.ready_blocks > last
        last = store.ready_blocks
    store.grow(Kind.BLOCKS, 1)
    assert store.ready_blocks == 10**6
    store.grow(Kind.ROWS, 1)
    assert store.ready_rows == GRANULE // 128
    store.close()
    assert store.path is None and not store.takeover_requested_by()


@pytest.mark.parametrize("split", [0, 1, 3, 4])
def test_a_pool_that_begins_in_the_middle_wraps_around(path: Path, split: int) -> None:
    capacity = 5 * PER - 100
    shape = Shape(1, capacity, 1, split * PER)
    ids: list[int] = []
    for _ in range(3):
        registry = Registry(
            Settings(first=1, capacity=capacity, fresh=True, max_anonymous=10**6),
            0,
            Storage.open(path, shape, boot=BOOT),
            BOOT,
        )
        ids += registry.acquire(capacity // 3, 0).tolist()
        registry._check()
        registry.close()
    first = shape.start
    assert ids == [*range(first, capacity + 1), *range(1, first)][: len(ids)]
    assert path.stat().st_size == GRANULE * 7


# ---- How a file comes into being


def test_a_new_file(path: Path) -> None:
    registry = opened(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == GRANULE
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert extents_of(registry.store.header, None) == []
    assert registry.acquire(1, 0).tolist() == [10]
    assert {kind for kind, _ in extents_of(registry.store.header, None)} == {Kind.BLOCKS, Kind.ROWS}
    assert writer_of(path) == (os.getpid(), process_id(os.getppid()))
    uuid = registry.uuid
    registry.close()
    registry.close()
    assert writer_of(path)[0] == 0
    assert opened(path).uuid == uuid


def test_leftovers_of_another_draft_do_no_harm(path: Path) -> None:
    path.with_name(f".{path.name}.1.abcdef").write_bytes(b"half a draft")
    assert opened(path).acquire(1, 0).tolist() == [10]


def test_another_process_may_be_faster(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def slow(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        opened(path).close()
        link(source, target)

    monkeypatch.setattr(os, "link", slow)
    registry = opened(path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert registry.acquire(1, 0).tolist() == [10]


RACE = """if True:
    import sys, time
    from pathlib import Path
    from cidalloc.errors import RegistryLocked
    from cidalloc.manager.registry import Registry
    from cidalloc.manager.settings import Settings
    sys.stdin.readline()
    try:
        registry = Registry.in_file(
            Path(sys.argv[1]), Settings(first=10, capacity=50, fresh=True), 0, b"this boot of it!")
        print(*registry.acquire(1, 0), flush=True)
    except RegistryLocked as error:
        print("locked", flush=True)
    sys.stdin.readline()
"""


def child(script: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str], line: str = "") -> str:
    assert process.stdin and process.stdout
    if line:
        process.stdin.write(line)
        process.stdin.flush()
    return process.stdout.readline().strip()


def test_of_processes_that_come_at_once_one_wins(path: Path) -> None:
    processes = [child(RACE, path) for _ in range(3)]
    for each in processes:
        assert each.stdin
        each.stdin.write("\n")
        each.stdin.flush()
    answers = sorted(said(each) for each in processes)
    for each in processes:
        each.communicate("\n")
    assert answers == ["10", "locked", "locked"]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_replaced_before_it_is_locked(
    used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    lock = fcntl.fcntl

    def slow(*arguments: Any) -> Any:
        monkeypatch.setattr(fcntl, "fcntl", lock)
        used.unlink()
        opened(used).close()
        return lock(*arguments)

    monkeypatch.setattr(fcntl, "fcntl", slow)
    registry = opened(used)
    assert registry.pool.active == 0, "the new one"
    assert os.path.samestat(os.fstat(registry.store._fd), used.stat())


def test_a_file_that_is_gone_before_it_is_locked(
    used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    lock = fcntl.fcntl

    def slow(*arguments: Any) -> Any:
        monkeypatch.setattr(fcntl, "fcntl", lock)
        used.unlink()
        return lock(*arguments)

    monkeypatch.setattr(fcntl, "fcntl", slow)
    assert opened(used).pool.active == 0


# ---- What is refused


@pytest.mark.parametrize("size", [0, 1, 7, 8, 80, 88, 4095, 4096, GRANULE - 1])
def test_a_file_that_is_too_short(used: Path, size: int) -> None:
    os.truncate(used, size)
    refused(used, RegistryCorrupt, f"too short for a registry: {size} bytes")


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(used: Path, part: float) -> None:
    size = GRANULE + int((used.stat().st_size - GRANULE) * part)
    os.truncate(used, size)
    refused(used, RegistryCorrupt, f"is truncated: {size} bytes, and at least .* were in use")


def test_a_file_may_be_longer(used: Path) -> None:
    os.truncate(used, used.stat().st_size + 12_345)
    registry = opened(used)
    assert registry.pool.active == 15
    registry._check()


def test_a_foreign_file(path: Path) -> None:
    path.write_bytes(b"something else, " * 10_000)
    refused(path, RegistryCorrupt, "is not a registry of cidalloc")


def poke(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def test_another_format(used: Path) -> None:
    poke(used, Word.FORMAT * 8, struct.pack("=Q", 2))
    refused(used, RegistryMismatch, "the format 2, and this version of cidalloc writes 1: use")


@pytest.mark.parametrize(
    ("name", "value"), [("first", 11), ("first", 9), ("capacity", 51), ("capacity", 49)]
)
def test_settings_of_another_pool(used: Path, name: str, value: int) -> None:
    before = content(used)
    values = {"first": 10, "capacity": 50, "fresh": True, name: value}
    with pytest.raises(RegistryMismatch, match=rf"first=10, capacity=50.*{name}={value}") as caught:
        opened(used, Settings(**values))
    assert str(used) in str(caught.value)
    assert content(used) == before
    assert Registry.look(used, 0, BOOT).pool.active == 15, "which asks for none"


@pytest.mark.parametrize("place", range(11 * 8))
def test_a_damaged_header(used: Path, place: int) -> None:
    data = used.read_bytes()
    poke(used, place, bytes([data[place] ^ 0x41]))
    error = RegistryMismatch if place // 8 == Word.FORMAT else RegistryCorrupt
    words = "not a registry" if place < 8 else "format" if place < 16 else "header is damaged"
    refused(used, error, words)


def survives(path: Path) -> bool:
    """Whether the file is taken; if it is, all fits together, and if not, nothing is written."""
    before = content(path)
    try:
        registry = opened(path, now=5)
    except RegistryCorrupt:
        with pytest.raises(RegistryCorrupt, match=re.escape(str(path))):
            Registry.look(path, 5, BOOT)
        assert content(path) == before
        return False
    try:
        registry._check()
        for name in (b"a", b"b"):
            try:
                held = registry.held(name * 16, 5)
                registry.close_session(name * 16, 5, ended=True)
                assert not any(cid in registry.pool for cid in held.tolist())
            except SessionUnknown:
                pass
        registry._check()
        try:
            taken = registry.acquire(10, 10**9)
            registry.release(taken, 10**9)
        except Exhausted:
            pass
        registry.status(10**12)
        registry._check()
    finally:
        registry.close()
    return True


def bits_of(start: int, length: int) -> Iterator[tuple[int, int]]:
    for place in range(start, start + length):
        for bit in range(8):
            yield place, 1 << bit


def some_bits(start: int, length: int) -> Iterator[tuple[int, int]]:
    yield from ((place, 1 << (place * 3 & 7)) for place in range(start, start + length))
    yield from bits_of(start, 2)


def flipped(path: Path, places: Iterator[tuple[int, int]]) -> tuple[int, int]:
    """Flip one bit after the other; how many were taken and refused."""
    whole, taken, refusals = path.read_bytes(), 0, 0
    for place, bit in places:
        poke(path, place, bytes([whole[place] ^ bit]))
        if survives(path):
            taken += 1
            path.write_bytes(whole)  # in place, so that it is the same file
        else:
            refusals += 1
            poke(path, place, whole[place : place + 1])
    return taken, refusals


def test_damaged_words_that_change(used: Path) -> None:
    for word in (Word.BOOT, Word.GENERATION, Word.HORIZON):
        flipped(used, ((place, 1 << (place & 7)) for place in range(word * 8, word * 8 + 8)))


def test_a_damaged_list_of_extents(used: Path) -> None:
    assert flipped(used, bits_of(Word.EXTENTS * 8, 3 * 8)) == (0, 3 * 64), "each is seen"
    poke(used, Word.EXTENTS * 8, struct.pack("=Q", 1 << 1) * (Word.END - Word.EXTENTS))
    refused(used, RegistryCorrupt, "header is damaged")


@pytest.mark.parametrize("n", [0, 1])
def test_an_extent_that_was_wiped_from_the_list(used: Path, n: int) -> None:
    """Its records would be taken for new ones."""
    poke(used, (Word.EXTENTS + n) * 8, bytes(8))
    refused(used, RegistryCorrupt, "list of extents")


def test_space_that_was_never_put_to_use(used: Path) -> None:
    """As after a crash between the growth of the file and that of the list."""
    with used.open("r+b") as file:
        os.posix_fallocate(file.fileno(), used.stat().st_size, 3 * GRANULE)
    opened(used).close()


def offset_of(path: Path, kind: Kind) -> int:
    """Where the first extent of a kind begins."""
    store = Storage.look(path)
    offset = GRANULE
    for each, granules in extents_of(store.header, None):
        if each is kind:
            return offset
        offset += granules * GRANULE
    raise AssertionError(kind)


@pytest.mark.parametrize("block", [0, 1, 2, 18])
def test_damaged_records_of_blocks(used: Path, block: int) -> None:
    start = offset_of(used, Kind.BLOCKS) + block * 32
    _, refusals = flipped(used, some_bits(start, 32))
    assert refusals, "some are seen"


@pytest.mark.parametrize("row", [1, 3, 4])
def test_damaged_records_of_sessions(used: Path, row: int) -> None:
    start = offset_of(used, Kind.ROWS) + row * 128
    flipped(used, some_bits(start, 64))


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("fill", [b"\xff", b"y"])
def test_records_that_were_overwritten(used: Path, kind: Kind, fill: bytes) -> None:
    poke(used, offset_of(used, kind), fill * 4096)
    refused(used, RegistryCorrupt, "records? of")


def test_sessions_that_were_overwritten_by_zeros(used: Path) -> None:
    poke(used, offset_of(used, Kind.ROWS), bytes(4096))
    refused(used, RegistryCorrupt, "record of ID 10 is damaged")


def test_after_a_reboot_a_refusal_writes_nothing_either(used: Path) -> None:
    poke(used, offset_of(used, Kind.BLOCKS), b"\xff" * 4096)
    before = content(used)
    with pytest.raises(RegistryCorrupt, match=re.escape(str(used))):
        opened(used, boot=b"another boot ...")
    assert content(used) == before


# ---- What cannot be used


def unusable(path: Path, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        opened(path)
    assert str(path.parent) in str(caught.value)


def test_a_folder_that_cannot_be_made() -> None:
    unusable(Path("/proc/nowhere/registry"), "make it for the server's user")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    unusable(tmp_path / "file" / "registry", "Not a directory")


def test_a_folder_in_its_place(path: Path) -> None:
    path.mkdir()
    unusable(path, f"{re.escape(str(path))}: Is a directory")
    with pytest.raises(InvalidArgument):
        Registry.look(path, 0, BOOT)


def test_a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")
    unusable(path, "link")


def test_a_link_to_a_file(used: Path) -> None:
    link = used.with_name("link")
    link.symlink_to(used.name)
    assert opened(link).pool.active == 15


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_file_that_may_not_be_written(
    used: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    unusable(used, rf"{os.strerror(number)}; the server's user \(uid {os.geteuid()}\)")


# ---- A full disk


class Disk:
    """A disk of its own, in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def leave(self, kib: int) -> None:
        """Fill it up to so much."""
        (self.folder / "filler").unlink(missing_ok=True)
        status = os.statvfs(self.folder)
        free = status.f_bavail * status.f_frsize - kib * 1024
        with (self.folder / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free)

    def make_room(self) -> None:
        (self.folder / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("to mount a disk takes the rights to")
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kib", [0, 4, 60])
def test_a_disk_too_full_for_a_new_file(disk: Disk, kib: int) -> None:
    disk.leave(kib)
    path = disk.folder / "registry"
    with pytest.raises(Unavailable, match="make room on its disk") as caught:
        opened(path)
    assert str(path) in str(caught.value)
    assert os.listdir(disk.folder) == ["filler"], "no leftovers"
    disk.make_room()
    assert opened(path).acquire(1, 0).tolist() == [10]


def test_a_disk_too_full_for_a_pool_that_waits(disk: Disk) -> None:
    path = disk.folder / "registry"
    with pytest.raises(Unavailable, match="make room") as caught:
        opened(path, Settings(first=1, capacity=200_000))
    assert str(path) in str(caught.value)
    assert ".registry" not in str(caught.value), "not the draft's name"
    assert os.listdir(disk.folder) == []


def test_a_disk_that_fills_up(disk: Disk) -> None:
    path = disk.folder / "registry"
    values = Settings(first=1, capacity=10**6, fresh=True, cooldown_ms=0, max_anonymous=10**6)
    registry = opened(path, values)
    registry.open(bytes(16), 0, ttl_ms=10_000)
    first = registry.acquire(100, 0)
    disk.leave(300)
    ready = registry.pool.ready
    rest = registry.acquire(ready - 100, 0)
    for _ in range(3):
        with pytest.raises(Unavailable, match=r"cannot grow by .*make room on its disk"):
            registry.acquire(1, 0)
        registry._check()
    registry.release(first, 0, ended=True)
    assert len(registry.acquire(50, 0)) == 50, "what was given back goes on"
    with pytest.raises(Unavailable):
        registry.acquire(51, 0)
    for name in range(1, GRANULE // 128 - 2):
        registry.open(name.to_bytes(16, "big"), 0, ttl_ms=10_000)
    disk.leave(0)
    with pytest.raises(Unavailable, match="cannot grow"):
        for name in range(1000, 3000):
            registry.open(name.to_bytes(16, "big"), 0, ttl_ms=10_000)
    registry._check()
    registry.renew(bytes(16), 1)
    sessions = registry.status(1)["sessions_total"]
    disk.make_room()
    registry.open(b"\xff" * 16, 1, ttl_ms=10_000)
    assert len(registry.acquire(1000, 1)) == 1000
    registry.close()
    registry = opened(path, values, now=1)
    assert registry.pool.active == len(rest) + 50 + 1000
    assert registry.status(1)["sessions_total"] == sessions + 1
    registry._check()


# ---- One writer


def test_the_lock_names_the_writer(path: Path) -> None:
    other = child(RACE, path)
    assert said(other, "\n") == "10"
    with pytest.raises(RegistryLocked, match=rf"process {other.pid} writes {re.escape(str(path))}"):
        opened(path)
    assert Registry.look(path, 0, BOOT).pool.active == 1
    other.send_signal(signal.SIGKILL)
    other.communicate()
    registry = opened(path)
    assert registry.pool.active == 1, "nothing is lost"
    assert registry.acquire(1, 0).tolist() == [11]


def test_the_same_process_has_it_once(path: Path) -> None:
    registry = opened(path)
    for _ in range(2):
        with pytest.raises(RegistryLocked, match=f"process {os.getpid()} writes"):
            opened(path)
    with path.open("rb"):
        pass  # which would release a lock of the other kind
    with pytest.raises(RegistryLocked):
        opened(path)
    registry.close()
    opened(path).close()


def test_a_refusal_does_not_keep_the_lock(used: Path) -> None:
    with pytest.raises(RegistryMismatch) as caught:
        opened(used, Settings(first=10, capacity=51, fresh=True))
    assert opened(used).pool.active == 15, "though somebody keeps the error"
    del caught


def test_no_file_stays_open(path: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    registry = opened(path)
    with pytest.raises(RegistryLocked):
        opened(path)
    Registry.look(path, 0, BOOT)
    registry.close()
    with pytest.raises(RegistryMismatch):
        opened(path, Settings(first=10, capacity=51, fresh=True))
    os.truncate(path, 100)
    with pytest.raises(RegistryCorrupt):
        opened(path)
    assert count() == before


def forked(call: Callable[[], object]) -> int:
    """Run something in a child; its exit code, or less than 0 by a signal."""
    pid = os.fork()
    if pid == 0:
        status = 9
        try:
            call()
            status = 0
        except Forked:
            status = 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(
    "call",
    [
        lambda registry: registry.acquire(1, 0),
        lambda registry: registry.release(np.array([10], np.uint64), 0),
        lambda registry: registry.open(bytes(16), 0, ttl_ms=1_000),
        lambda registry: registry.renew(bytes(16), 0),
        lambda registry: registry.tick(10**9),
        lambda registry: registry.status(0),
        lambda registry: registry.anonymous,
    ],
)
def test_a_forked_child_is_refused(path: Path, call: Callable[[Registry], object]) -> None:
    registry = opened(path)
    registry.acquire(1, 0)
    before = path.read_bytes()
    assert forked(lambda: call(registry)) == 1
    assert path.read_bytes() == before
    assert registry.acquire(1, 0).tolist() == [11]


def test_a_forked_child_may_ask_who_it_was(path: Path) -> None:
    registry = opened(path)
    assert forked(lambda: str(registry.uuid)) == 0, "and does not die of it"


def test_a_forked_child_does_not_keep_the_lock(path: Path) -> None:
    registry = opened(path)
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    try:
        registry.close()
        opened(path).close()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_forked_child_does_not_release_the_lock(path: Path) -> None:
    registry = opened(path)
    assert forked(registry.close) in (0, 1)
    with pytest.raises(RegistryLocked):
        opened(path)
    assert writer_of(path)[0] == os.getpid()


def test_no_file_stays_open_on_a_full_disk(disk: Disk) -> None:
    disk.leave(0)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Unavailable):
        opened(disk.folder / "registry")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_claim(path: Path) -> None:
    registry = opened(path)
    assert not registry.store.takeover_requested_by()
    claim, other = TakeoverRequest(path), TakeoverRequest(path)
    assert not registry.store.takeover_requested_by(), "not made yet"
    claim.make()
    other.make()
    assert registry.store.takeover_requested_by() == process_id(os.getppid())
    other.close()
    assert registry.store.takeover_requested_by()
    claim.close()
    assert not registry.store.takeover_requested_by()


def test_a_forked_child_does_not_keep_a_claim(path: Path) -> None:
    registry, claim = opened(path), TakeoverRequest(path)
    claim.make()
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    try:
        claim.close()
        assert not registry.store.takeover_requested_by()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_number_of_a_process_is_its_own() -> None:
    assert process_id(os.getpid()) & 2**22 - 1 == os.getpid()
    gone = subprocess.Popen(["sleep", "60"])
    number = process_id(gone.pid)
    gone.kill()
    gone.wait()
    assert number and process_id(gone.pid) == 0


# ---- A look

BUSY = """if True:
    import sys, time
    from pathlib import Path
    from cidalloc.manager.registry import Registry
    from cidalloc.manager.settings import Settings
    values = Settings(first=1, capacity=10**6, fresh=True, cooldown_ms=0, unended_cooldown_ms=0,
                      anonymous_age_ms=1000)
    registry = Registry.in_file(Path(sys.argv[1]), values, 0, b"this boot of it!")
    print("ready", flush=True)
    now, seq, end = 0, 0, time.monotonic() + 2
    while time.monotonic() < end:
        now += 1
        token = now.to_bytes(16, "big")
        registry.open(token, now, ttl_ms=1000)
        ids = registry.acquire(1 + now % 50, now, token=token, seq=1)
        registry.release(ids[::2], now, token=token, seq=2, ended=True)
        registry.acquire(1, now)
        if now % 3:
            registry.close_session(token, now, ended=True)
    print(now, flush=True)
"""


def test_a_look_beside_a_busy_writer(path: Path) -> None:
    looks = 0
    with child(BUSY, path) as writer:
        assert said(writer) == "ready"
        while writer.poll() is None:
            registry = Registry.look(path, 0, BOOT)
            status = registry.status(0)
            assert 0 <= status["held"] <= 10**6
            registry.close()
            looks += 1
    assert writer.returncode == 0
    assert looks > 5
    before = path.read_bytes()
    registry = Registry.look(path, 0, BOOT)
    registry._check()
    registry.acquire(5, 0)
    registry.close()
    assert path.read_bytes() == before, "it is only a copy"


def test_a_copy_of_a_file_that_moved_meanwhile(used: Path) -> None:
    """A file that is always busy is copied in pieces of different times."""
    registry = Registry.look(used, 0, BOOT)
    held = registry.status(0)["held"]
    registry.close()
    gone = offset_of(used, Kind.ROWS) + 128
    poke(used, gone, bytes(128))  # a session that ended before its row was copied
    poke(used, offset_of(used, Kind.BLOCKS) + 32, bytes(32))  # opened after its record was
    with pytest.raises(RegistryCorrupt, match="the record of ID"):
        Registry.look(used, 0, BOOT)
    poke(used, Word.PID * 8, struct.pack("=Q", os.getpid()))
    registry = Registry.look(used, 0, BOOT)
    registry._check()
    assert 0 < registry.status(0)["held"] < held
    registry.close()


def test_a_look_at_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no registry at"):
        Registry.look(tmp_path / "registry", 0, BOOT)
    assert list(tmp_path.iterdir()) == []


def test_the_rows_fit_the_sessions() -> None:
    assert Sessions.size(0) == 128
    assert Sessions.size(2**24 - 2) % GRANULE + 128 in (128, GRANULE)


def test_a_file_that_cannot_be_mapped_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = Settings(first=1, capacity=10**6, fresh=True)
    registry = opened(tmp_path / "it", values)
    first = registry.acquire(5, 0)
    grow, broken = Storage._put, [True]

    def put(store: Storage, *arguments: Any) -> None:
        if broken[0]:
            raise OSError(12, "Cannot allocate memory")
        grow(store, *arguments)

    monkeypatch.setattr(Storage, "_put", put)
    with pytest.raises(Unavailable, match="Cannot allocate memory"):
        registry.store.grow(Kind.BLOCKS, 10**5)
    broken[0] = False
    registry.store.grow(Kind.BLOCKS, 10**5)
    registry.pool.ready = registry.store.ready_blocks
    registry._check()
    registry.close()
    registry = opened(tmp_path / "it", values)
    registry._check()
    assert all(cid in registry.pool for cid in first.tolist())
