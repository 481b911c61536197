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
import sparse
from hypothesis import given, settings
from sparse import Content

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
from cidalloc.manager.inspection import look, status_of
from cidalloc.manager.registry import Registry
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage import drain
from cidalloc.manager.storage.file import Storage
from cidalloc.manager.storage.file_format import GRANULE, Part, Shape, Word, checked, new_content
from cidalloc.manager.storage.file_lock import TakeoverRequest, process_id, writer_of

PER = GRANULE // 32  # records in a granule
BOOT = b"this boot of it!"
VALUES = Settings(first=10, capacity=50, fresh=True)


def opened(path: Path, values: Settings = VALUES, now: int = 0, boot: bytes = BOOT) -> Registry:
    return Registry.in_file(path, values, now, boot)


def content(path: Path) -> Content:
    """All that the file holds, but for who writes it."""
    size, pages = sparse.content(path)
    header = bytearray(pages.get(0, b""))
    header[Word.PID * 8 : Word.REQUESTER * 8] = bytes(16)
    return Content(size, {**pages, 0: bytes(header)})


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
    for call in (lambda: opened(path, **how), lambda: look(path, 0, BOOT)):
        with pytest.raises(error, match=words) as caught:
            call()
        assert type(caught.value) is error
        assert str(path) in str(caught.value)
        assert content(path) == before
    assert list(path.parent.iterdir()) == [path], "no leftovers"


# ---- The shape


@settings(max_examples=200, deadline=None)
@given(
    first=st.sampled_from([1, 7, 2**30, 2**62]),
    modulus=st.sampled_from([1, 2, 3, 50, 2047, 2**24]),
    more=st.sampled_from([0, 1, 10, 10**6]),
    part=st.floats(0, 1, exclude_max=True),
    places=st.lists(st.integers(0, 10**8), max_size=10),
)
def test_each_id_has_a_number(
    first: int, modulus: int, more: int, part: float, places: list[int]
) -> None:
    shape = Shape(first, modulus + more, modulus, int(part * modulus))
    numbers = np.array([first + place % shape.capacity for place in places], np.uint64)
    ids = shape.ids(numbers)
    assert shape.numbers(ids).tolist() == numbers.tolist()
    for number, cid in zip(numbers.tolist(), ids.tolist(), strict=True):
        rotated = first + (number - first + shape.offset) % modulus
        assert cid == (rotated if number < first + modulus else number)
        assert first <= cid < first + shape.capacity


@pytest.mark.parametrize("cid", [0, 6, 7 + 60, 2**63, 2**64 - 1])
def test_no_other_id_has_a_number(cid: int) -> None:
    shape = Shape(7, 60, 50, 20)
    (number,) = shape.numbers(np.array([cid], np.uint64)).tolist()
    assert not 7 <= number < 67


def test_a_pool_that_grows_renumbers_nothing() -> None:
    before, after = Shape(7, 50, offset=20), Shape(7, 900, 50, 20)
    numbers = np.arange(7, 57, dtype=np.uint64)
    assert before.ids(numbers).tolist() == after.ids(numbers).tolist()


def test_memory_grows_too() -> None:
    store = Storage.memory(Shape(1, 10**6))
    assert (store.ready_ids, store.ready_rows) == (PER - 1, GRANULE // 128)
    with pytest.raises(ValueError, match="are more than"):
        store.records.extend(len(store.records) + 1)
    last = 0
    while last < 10**6:
        store.grow(Part.RECORDS, 1)
        assert store.ready_ids > last
        last = store.ready_ids
    store.grow(Part.RECORDS, 1)
    assert store.ready_ids == 10**6
    store.grow(Part.ROWS, 1)
    assert store.ready_rows > GRANULE // 128
    store.close()
    assert store.path is None
    assert not store.takeover_requested_by()


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 3), (2047, 1)])
def test_each_new_row_tells_its_place(first: int, count: int) -> None:
    words = memoryview(new_content(Part.ROWS, first, count)).cast("Q")
    for number in range(count * 512):
        row, place = words[16 * number : 16 * number + 16], Part.ROWS.word(first * 512 + number)
        assert row[0] == (checked(place, 0) if place > Part.ROWS.word(0) else 0)
        assert not any(row[1:])


@pytest.mark.parametrize("offset", [0, 1, 2046, 10_139])
def test_a_pool_that_begins_in_the_middle_wraps_around(path: Path, offset: int) -> None:
    capacity = 5 * PER - 100
    shape = Shape(1, capacity, offset=offset)
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
    assert ids == [*range(1 + offset, capacity + 1), *range(1, 1 + offset)][: len(ids)]


def test_an_error_names_the_id(path: Path) -> None:
    registry = Registry(VALUES, 0, Storage.open(path, Shape(10, 50, offset=20), boot=BOOT), BOOT)
    registry.open(bytes(16), 0, ttl_ms=10_000)
    ids = registry.acquire(3, 0, token=bytes(16), seq=1)
    assert ids.tolist() == [30, 31, 32]
    anonymous = registry.acquire(1, 0)
    wrong = {
        "ID 40 at position 1 is not held": [30, 40],
        "ID 31 at position 2 is a duplicate": [30, 31, 31],
        "ID 33 at position 1 is held by another owner": [30, int(anonymous[0])],
        "the ID at position 0 is outside the pool, whose IDs are 10 to 59": [60],
    }
    for seq, (words, each) in enumerate(wrong.items(), 2):
        with pytest.raises(CidError, match=words):
            registry.release(np.array(each, np.uint64), 0, token=bytes(16), seq=seq)
    for words, each in {"ID 31 is held by a session": [31], "ID 45 is not held": [45]}.items():
        with pytest.raises(CidError, match=words):
            registry.release(np.array(each, np.uint64), 0)
    assert registry.held(bytes(16), 0).tolist() == ids.tolist()


class NoMemory:
    def __setitem__(self, place: int, value: int) -> None:
        raise MemoryError


def test_a_file_is_let_go_of_without_memory(path: Path) -> None:
    registry = opened(path)
    registry.store.header = NoMemory()  # type: ignore[assignment]
    registry.close()
    opened(path).close()


# ---- How a file comes into being


def test_a_new_file(path: Path) -> None:
    registry = opened(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == Part.RECORDS.place + GRANULE
    assert path.stat().st_blocks * 512 <= 3 * GRANULE, "the holes take no space"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert registry.acquire(1, 0).tolist() == [10]
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


@pytest.mark.parametrize("size", [GRANULE, 2 * GRANULE, 10**6, Part.RECORDS.place, -1])
def test_a_truncated_file(used: Path, size: int) -> None:
    size = size if size > 0 else used.stat().st_size - 1
    os.truncate(used, size)
    refused(used, RegistryCorrupt, f"is truncated: {size} bytes, and at least .* were in use")


def test_a_truncated_file_shows_before_it_is_mapped(used: Path) -> None:
    os.truncate(used, Part.RECORDS.place)
    with pytest.raises(RegistryCorrupt, match="is truncated"):
        Storage.expect(used, Shape(10, 50))


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
    poke(used, Word.FORMAT * 8, struct.pack("=Q", 1))
    refused(used, RegistryMismatch, "the format 1, and this version of cidalloc writes 2: use")


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
    assert look(used, 0, BOOT).pool.active == 15, "which asks for none"


@pytest.mark.parametrize("place", range(13 * 8))
def test_a_damaged_header(used: Path, place: int) -> None:
    poke(used, place, bytes([sparse.content(used).byte(place) ^ 0x41]))
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
            look(path, 5, BOOT)
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
        status_of(registry, 10**12)
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
    whole, taken, refusals = sparse.content(path), 0, 0
    for place, bit in places:
        poke(path, place, bytes([whole.byte(place) ^ bit]))
        if survives(path):
            taken += 1
            whole.put(path)  # in place, so that it is the same file
        else:
            refusals += 1
            poke(path, place, whole.bytes(place, 1))
    return taken, refusals


def test_damaged_words_that_change(used: Path) -> None:
    for word in (Word.BOOT, Word.GENERATION, Word.HORIZON):
        flipped(used, ((place, 1 << (place & 7)) for place in range(word * 8, word * 8 + 8)))


def test_a_damaged_length(used: Path) -> None:
    for word in (Word.CAPACITY, *Part):
        assert flipped(used, bits_of(word * 8, 8)) == (0, 64), "each is seen"


@pytest.mark.parametrize("part", Part)
def test_a_length_that_is_behind_the_records(used: Path, part: Part) -> None:
    """The records beyond it would be taken for new ones."""
    poke(used, part.place + GRANULE + 100, b"x")
    refused(used, RegistryCorrupt, "records beyond what it says is in use|truncated")


@pytest.mark.parametrize(("part", "granules"), [(Part.ROWS, 2**12), (Part.RECORDS, 3)])
def test_a_length_beyond_the_end(used: Path, part: Part, granules: int) -> None:
    poke(used, part * 8, struct.pack("=Q", checked(part, granules)))
    refused(used, RegistryCorrupt, "header is damaged")


def test_space_that_was_never_put_to_use(used: Path) -> None:
    """As after a crash between the growth of the file and that of the list."""
    with used.open("r+b") as file:
        os.posix_fallocate(file.fileno(), used.stat().st_size, 3 * GRANULE)
    opened(used).close()


@pytest.mark.parametrize("block", [0, 1, 2, 18])
def test_damaged_records_of_blocks(used: Path, block: int) -> None:
    start = Part.RECORDS.place + block * 32
    _, refusals = flipped(used, some_bits(start, 32))
    assert refusals, "some are seen"


@pytest.mark.parametrize("row", [1, 3, 4])
def test_damaged_records_of_sessions(used: Path, row: int) -> None:
    start = Part.ROWS.place + row * 128
    flipped(used, some_bits(start, 64))


@pytest.mark.parametrize("part", Part)
@pytest.mark.parametrize("fill", [b"\xff", b"y"])
def test_records_that_were_overwritten(used: Path, part: Part, fill: bytes) -> None:
    poke(used, part.place, fill * 4096)
    refused(used, RegistryCorrupt, "records? of")


def test_sessions_that_were_overwritten_by_zeros(used: Path) -> None:
    poke(used, Part.ROWS.place, bytes(4096))
    refused(used, RegistryCorrupt, "record of session 1 is damaged")


def test_damage_names_the_id(path: Path) -> None:
    shape = Shape(10, 50, offset=20)
    Storage.open(path, shape, boot=BOOT).close()
    poke(path, Part.RECORDS.place + 3 * 32, b"\xff" * 32)
    refused(path, RegistryCorrupt, "the record of ID 32 is damaged")


def test_after_a_reboot_a_refusal_writes_nothing_either(used: Path) -> None:
    poke(used, Part.RECORDS.place, b"\xff" * 4096)
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
        look(path, 0, BOOT)


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


def test_a_drain_on_a_full_disk(disk: Disk) -> None:
    """Its words have had their place since the file was made."""
    path = disk.folder / "registry"
    registry = opened(path)
    disk.leave(0)
    switch = drain.DrainSwitch(path)
    for on in (True, False):
        switch.set(on)
        assert drain.answer(registry.store.header) and switch.answered
        assert drain.is_draining(registry.store.header) is on
    switch.close()
    registry.close()


def test_waiting_on_a_full_disk(disk: Disk) -> None:
    """Clients that wait have places, so that others return what they do not need."""
    values = Settings(first=1, capacity=10**6, fresh=True, cooldown_ms=0, max_anonymous=10**6)
    registry = opened(disk.folder / "registry", values)
    one, other = bytes(16), bytes(15) + b"1"
    for token in (one, other):
        registry.open(token, 0, ttl_ms=10_000)
    disk.leave(0)
    held = registry.acquire(registry.pool.ready, 0)
    with pytest.raises(Exhausted, match="make room on its disk"):
        registry.acquire(1, 0, token=one, seq=1, wait_ms=1000)
    assert registry.waiting.any(0)
    registry.release(held[:1], 0, ended=True)
    with pytest.raises(Exhausted, match="others wait before"):
        registry.acquire(1, 0, token=other, seq=1)
    assert len(registry.acquire(1, 0, token=one, seq=2, wait_ms=0)) == 1


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
        with pytest.raises(Exhausted, match=r"cannot grow by .*make room on its disk"):
            registry.acquire(1, 0)
        registry._check()
    registry.release(first, 0, ended=True)
    assert len(registry.acquire(50, 0)) == 50, "what was given back goes on"
    with pytest.raises(Exhausted):
        registry.acquire(51, 0)
    for name in range(1, GRANULE // 128 - 2):
        registry.open(name.to_bytes(16, "big"), 0, ttl_ms=10_000)
    disk.leave(0)
    with pytest.raises(Unavailable, match="cannot grow"):
        for name in range(1000, 3000):
            registry.open(name.to_bytes(16, "big"), 0, ttl_ms=10_000)
    registry._check()
    registry.renew(bytes(16), 1)
    sessions = status_of(registry, 1)["sessions_total"]
    disk.make_room()
    registry.open(b"\xff" * 16, 1, ttl_ms=10_000)
    assert len(registry.acquire(1000, 1)) == 1000
    registry.close()
    registry = opened(path, values, now=1)
    assert registry.pool.active == len(rest) + 50 + 1000
    assert status_of(registry, 1)["sessions_total"] == sessions + 1
    registry._check()


# ---- One writer


def test_the_lock_names_the_writer(path: Path) -> None:
    other = child(RACE, path)
    assert said(other, "\n") == "10"
    with pytest.raises(RegistryLocked, match=rf"process {other.pid} writes {re.escape(str(path))}"):
        opened(path)
    assert look(path, 0, BOOT).pool.active == 1
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
    look(path, 0, BOOT)
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
        lambda registry: status_of(registry, 0),
        lambda registry: registry.anonymous,
    ],
)
def test_a_forked_child_is_refused(path: Path, call: Callable[[Registry], object]) -> None:
    registry = opened(path)
    registry.acquire(1, 0)
    before = sparse.content(path)
    assert forked(lambda: call(registry)) == 1
    assert sparse.content(path) == before
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


FORKS = """if True:
    import os, sys, time
    from pathlib import Path
    from cidalloc.manager.storage.file import Storage
    from cidalloc.manager.storage.file_format import Shape
    store = Storage.open(Path(sys.argv[1]), Shape(1, 10), boot=bytes(16))
    if not os.fork():
        print(os.getpid(), flush=True)  # the child runs, so it has closed the file
    time.sleep(60)
"""


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_process(path: Path) -> None:
    command = [sys.executable, "-c", FORKS, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        try:
            Storage.open(path, None, boot=bytes(16)).close()
        finally:
            os.kill(child, signal.SIGKILL)


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
    assert process_id(os.getpid()) >> 22 > process_id(1) >> 22, "when it was started"
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
    now, seq, end = 0, 0, time.monotonic() + 0.7
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
            registry = look(path, 0, BOOT)
            status = status_of(registry, 0)
            assert 0 <= status["held"] <= 10**6
            registry.close()
            looks += 1
    assert writer.returncode == 0
    assert looks > 5
    before = sparse.content(path)
    registry = look(path, 0, BOOT)
    registry._check()
    registry.acquire(5, 0)
    registry.close()
    assert sparse.content(path) == before, "it is only a copy"


def test_a_copy_of_a_file_that_moved_meanwhile(used: Path) -> None:
    """A file that is always busy is copied in pieces of different times."""
    registry = look(used, 0, BOOT)
    held = status_of(registry, 0)["held"]
    registry.close()
    place = Part.ROWS.place + 128  # of a session that ended before its row was copied
    poke(used, place, struct.pack("=Q", checked(place // 8, 1 << 2)))
    place = Part.RECORDS.place + 32  # of an ID that was issued after its record was
    poke(used, place, new_content(Part.RECORDS, 0, 1)[32:64])
    with pytest.raises(RegistryCorrupt, match="the record of ID"):
        look(used, 0, BOOT)
    poke(used, Word.PID * 8, struct.pack("=Q", os.getpid()))
    registry = look(used, 0, BOOT)
    registry._check()
    assert 0 < status_of(registry, 0)["held"] < held
    registry.close()


def test_a_look_at_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no registry at"):
        look(tmp_path / "registry", 0, BOOT)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_mapped_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = Settings(first=1, capacity=10**6, fresh=True)
    registry = opened(tmp_path / "it", values)
    first = registry.acquire(5, 0)

    class Broken:
        def extend(self, *arguments: int) -> None:
            raise OSError(12, "Cannot allocate memory")

        def __len__(self) -> int:
            return 10**8

    with monkeypatch.context() as patch:
        patch.setattr(registry.store, "records", Broken())
        with pytest.raises(Unavailable, match="Cannot allocate memory"):
            registry.store.grow(Part.RECORDS, 10**5)
    registry.store.grow(Part.RECORDS, 10**5)
    registry.pool.ready = registry.store.ready_ids
    registry._check()
    registry.close()
    registry = opened(tmp_path / "it", values)
    registry._check()
    assert all(cid in registry.pool for cid in first.tolist())
