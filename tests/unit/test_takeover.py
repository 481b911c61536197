"""Tests how the registry's file goes from one process to the next; time is passed in."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cidalloc.errors import InvalidArgument, RegistryLocked, RegistryMismatch, Unavailable
from cidalloc.manager import takeover as handover
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file import Storage
from cidalloc.manager.storage.file_format import GRANULE, Word
from cidalloc.manager.storage.file_lock import TakeoverRequest, process_id, writer_of
from cidalloc.manager.takeover import RegistryHolder, boot_id


class Clock:
    """A clock that stands until it is moved."""

    now = 1_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def values(tmp_path: Path) -> Settings:
    return Settings(first=10, capacity=50, state=str(tmp_path), fresh=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.cidalloc"


def holder(values: Settings, clock: Clock, **how: Any) -> RegistryHolder:
    return RegistryHolder(values, "m", clock, **how)


def away(holder: RegistryHolder, words: str) -> None:
    with pytest.raises(Unavailable, match=f"{words}.*; try again"):
        holder.registry()


def gone() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen(["sleep", "60"]) as process:
        number = process_id(process.pid)
        process.kill()
    return number


OTHER = """if True:
    import sys, time
    from cidalloc.manager.takeover import RegistryHolder
    from cidalloc.manager.settings import Settings
    values = Settings(first=10, capacity=50, state=sys.argv[1], fresh=True)
    holder = RegistryHolder(values, "m", lambda: 1_000)
    print("waits" if holder.waits else "has it", flush=True)
    while holder.waits:
        holder.poll()
        time.sleep(0.005)
    print(*holder.registry().acquire(1, 1_000), flush=True)
    sys.stdin.readline()
    holder.poll()
    print("waits" if holder.waits else "polled", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", OTHER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_the_boot_has_a_name() -> None:
    assert len(boot_id()) == 16 and boot_id() == boot_id() != bytes(16)


def test_a_registry_in_memory_needs_no_handover(clock: Clock) -> None:
    one = RegistryHolder(Settings(first=10, capacity=5, fresh=True), "m", clock)
    two = RegistryHolder(Settings(first=10, capacity=5, fresh=True), "m", clock)
    for each in (one, two):
        each.poll()
        assert not each.waits
        assert each.registry().acquire(1, 0).tolist() == [10]
    one.close()
    away(one, "this process has ended its work")


def test_the_file_is_named_by_the_manager(values: Settings, clock: Clock, path: Path) -> None:
    one = holder(values, clock)
    assert os.listdir(values.state) == ["m.cidalloc"]
    assert writer_of(path) == (os.getpid(), process_id(os.getppid()))
    one.poll()
    assert one.registry().acquire(1, 0).tolist() == [10], "nobody else wants it"
    one.close()
    assert writer_of(path)[0] == 0
    one.close()


def test_the_new_one_waits_and_gets_it_when_the_old_one_polls(
    values: Settings, clock: Clock
) -> None:
    old = holder(values, clock)
    held = old.registry().acquire(3, 1_000)
    new = holder(values, clock)
    assert new.waits
    new.poll()
    away(new, f"process {os.getpid()} writes")
    assert old.registry().pool.active == 3, "it serves until it looks"
    before = old.registry()
    old.poll()
    away(old, "a newer process has the registry")
    with pytest.raises(Unavailable, match="closed"):
        before.acquire(1, 1_000)
    away(new, "")
    new.poll()
    assert not new.waits
    assert set(held.tolist()) <= set(range(10, 60)) and new.registry().pool.active == 3
    old.poll()
    new.poll()
    assert new.registry().acquire(1, 1_000).tolist() == [13]
    away(old, "a newer process")


def test_of_two_that_wait_one_gets_it(values: Settings, clock: Clock) -> None:
    old, *waiting = (holder(values, clock) for _ in range(3))
    old.poll()
    for each in waiting:
        each.poll()
    assert [each.waits for each in waiting] == [False, True]
    waiting[1].poll()
    waiting[0].poll()
    away(waiting[0], "a newer process")
    waiting[1].poll()
    assert waiting[1].registry().pool.active == 0


def test_the_old_one_takes_it_back_if_nobody_came(values: Settings, clock: Clock) -> None:
    old, new = holder(values, clock), holder(values, clock)
    old.poll()
    new.close()
    clock.now += 2_999
    away(old, "a newer process has the registry")
    clock.now += 1
    assert old.registry().acquire(1, clock.now).tolist() == [10]
    old.poll()
    assert old.registry().pool.active == 1


def test_the_old_one_asks_again_and_again(values: Settings, clock: Clock) -> None:
    old, new = holder(values, clock), holder(values, clock)
    old.poll()
    new.poll()
    for _ in range(3):
        clock.now += 3_000
        away(old, f"process {os.getpid()} writes")
    new.close()
    clock.now += 2_999
    away(old, "writes")
    clock.now += 1
    assert old.registry().pool.active == 0


def test_one_that_has_ended_its_work_takes_nothing_back(values: Settings, clock: Clock) -> None:
    old, new = holder(values, clock), holder(values, clock)
    old.poll()
    old.close()
    new.close()
    clock.now += 10_000
    away(old, "this process has ended its work")
    away(new, "this process has ended its work")


def test_one_that_waits_no_more_is_no_reason_to_let_go(values: Settings, clock: Clock) -> None:
    old, new = holder(values, clock), holder(values, clock)
    assert new.waits
    new.close()
    old.poll()
    assert old.registry().pool.active == 0


def test_a_process_of_another_server_is_refused(values: Settings, clock: Clock) -> None:
    old = holder(values, clock)
    with pytest.raises(RegistryLocked, match=f"process {os.getpid()} writes .*state folder"):
        holder(values, clock, server=gone())
    assert old.registry().store.takeover_requested_by() == 0, "and leaves no wish behind"
    old.poll()
    assert old.registry().pool.active == 0


def test_a_process_of_a_dead_server_is_waited_for(values: Settings, clock: Clock) -> None:
    old = holder(values, clock)
    for server in (gone(), 0):
        old.registry().store.header[Word.SERVER] = server
        new = holder(values, clock, server=12345)
        assert new.waits
        new.close()


def test_a_strangers_wish_is_none_of_ours(values: Settings, clock: Clock, path: Path) -> None:
    old = holder(values, clock, server=gone())
    claim = TakeoverRequest(path)
    claim.make()
    old.poll()
    assert old.registry().pool.active == 0, "we still have our own server"
    claim.close()


def test_trouble_with_the_file_is_told(
    values: Settings, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    old = holder(values, clock)
    old.registry().acquire(1, 0)
    new = holder(values, clock)
    assert new.waits
    old.poll()
    path = Path(values.state) / "m.cidalloc"
    sound = path.read_bytes()
    session = GRANULE + 128
    path.write_bytes(sound[:session] + b"\xff" * 8 + sound[session + 8 :])
    for _ in range(3):
        new.poll()
        away(new, "session 1 is damaged")
    assert caplog.text.count("cannot take over") == 1, "once"
    assert not new.waits, "in vain"
    path.write_bytes(sound)
    clock.now += 3_000
    assert old.registry().pool.active == 1
    old.poll()
    assert old.registry().pool.active == 1, "nobody wants it any more"
    new.close()
    old.close()


def test_trouble_that_passes_ends_no_takeover(
    values: Settings, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **named: object) -> None:
        raise Unavailable("the disk fails")

    old = holder(values, clock)
    new = holder(values, clock)
    old.poll()
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "open", fails)
        new.poll()
    away(new, "the disk fails")
    assert new.waits
    new.poll()
    assert not new.waits and new.registry().pool.active == 0
    new.close()
    old.close()


def test_a_folder_that_is_not_there_is_made(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "not" / "there"
    RegistryHolder(Settings(state=str(folder), fresh=True), "m", clock).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == ["m.cidalloc"]


def test_a_folder_that_cannot_be_made(clock: Clock) -> None:
    folder = "/proc/cidalloc/state"
    words = f"state folder {folder}: .*'install -d -m 700 .*{folder}'.*model -o --state FOLDER"
    with pytest.raises(InvalidArgument, match=words):
        RegistryHolder(Settings(state=folder, fresh=True), "m", clock)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes namespaces")
HOLD = """
import sys, time
from cidalloc.manager.takeover import RegistryHolder
from cidalloc.manager.settings import Settings
values = Settings(first=10, capacity=50, state=sys.argv[1], fresh=True)
holder = RegistryHolder(values, "m", lambda: 1_000)
print("has it", flush=True)
sys.stdin.readline()
"""


@needs_root
@pytest.mark.parametrize("there", [False, True])
def test_a_file_system_that_is_read_only(tmp_path: Path, clock: Clock, there: bool) -> None:
    if there:
        RegistryHolder(
            Settings(first=10, capacity=50, state=str(tmp_path), fresh=True), "m", clock
        ).close()
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}"
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    command += [sys.executable, "-c", HOLD, str(tmp_path)]
    done = subprocess.run(command, input="", capture_output=True, text=True)
    (words,) = [line for line in done.stderr.splitlines() if "InvalidArgument" in line]
    assert "read-only; mount it for writing, or name a folder elsewhere" in words


def test_a_boot_that_cannot_be_told(
    values: Settings, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (tmp_path / "missing", tmp_path / "strange"):
        (tmp_path / "strange").write_text("not a boot")
        monkeypatch.setattr(handover, "_BOOT_ID", file)
        with pytest.raises(InvalidArgument, match=f"cannot read {file}.*--no-state"):
            RegistryHolder(values, "m", clock)


@needs_root
def test_a_holder_in_another_pid_namespace(values: Settings, clock: Clock) -> None:
    """As another container with the same volume: it is not of our server, and does not end."""
    command = ["unshare", "-pf", "--mount-proc", sys.executable, "-c", HOLD, values.state]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        assert said(other) == "has it"
        mine = holder(values, clock)
        for _ in range(3):
            mine.poll()
            away(mine, "writes")
            clock.now += 2_400
        with pytest.raises(RegistryLocked, match=r"is not visible from here.*another container"):
            mine.registry()
        assert other.stdin
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.wait(20) == 0
        mine.poll()
        assert mine.registry().acquire(1, clock.now).tolist() == [10]
        mine.close()


@pytest.mark.parametrize(
    ("arguments", "server"),
    [
        ("python\0-c\0code", "parent"),
        ("/b/triton_python_backend_stub\0model\0shm\0001\0001\0{parent}\0lib", "parent"),
        ("/b/triton_python_backend_stub\0model\0shm\0001\0{parent}\0001048576", "parent"),
        ("/b/triton_python_backend_stub\0model\0shm\0001\0001\0{ended}\0lib", "ended"),
        ("/b/triton_python_backend_stub\0model\0shm\0001\0001\0{alive}\0lib", "parent"),
        ("/b/triton_python_backend_stub\0model", "parent"),
    ],
)
def test_the_server_that_started_us(
    arguments: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have ended before we look, and our parent be another."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    pids = {"parent": os.getppid(), "ended": ended.pid, "alive": os.getpid()}
    said = arguments.format(**pids)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: said)
    monkeypatch.setattr(handover, "process_id", lambda pid: 0 if pid == ended.pid else 1)
    assert handover.server_pid() == pids[server]


def test_between_processes(
    values: Settings, clock: Clock, other: subprocess.Popen[str], path: Path
) -> None:
    assert (said(other), said(other)) == ("has it", "10")
    server = process_id(os.getpid())  # which is the parent of the other one, but not ours
    with pytest.raises(RegistryLocked, match=f"process {other.pid} writes"):
        holder(values, clock)
    mine = holder(values, clock, server=server)
    assert mine.waits
    away(mine, f"process {other.pid} writes")
    other.send_signal(signal.SIGKILL)
    other.wait()
    mine.poll()
    assert mine.registry().acquire(1, 1_000).tolist() == [11], "and what the dead one held is held"
    assert writer_of(path)[0] == os.getpid()


def test_one_that_died_while_it_waited_is_forgotten(
    values: Settings, clock: Clock, path: Path
) -> None:
    mine = holder(values, clock, server=process_id(os.getpid()))
    mine.registry().store.header[Word.SERVER] = process_id(os.getpid())
    command = [sys.executable, "-c", OTHER, values.state]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        assert said(other) == "waits"
        assert mine.registry().store.takeover_requested_by() == process_id(os.getpid())
        other.kill()
        other.wait()
    assert mine.registry().store.takeover_requested_by() == 0
    mine.poll()
    assert mine.registry().pool.active == 0


def test_a_process_that_waits_gets_it(values: Settings, clock: Clock) -> None:
    mine = holder(values, clock, server=process_id(os.getpid()))
    mine.registry().store.header[Word.SERVER] = process_id(os.getpid())
    mine.registry().acquire(2, 1_000)
    command = [sys.executable, "-c", OTHER, values.state]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as other:
        assert said(other) == "waits"
        mine.poll()
        away(mine, "a newer process")
        assert said(other) == "12"
        other.kill()
    clock.now += 3_000
    assert mine.registry().pool.active == 3, "it died, and we are still asked"


def test_a_process_that_has_ended_is_gone_also_before_anybody_looked() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_id(child.pid) == 0
    child.wait()
    assert process_id(child.pid) == 0
    assert process_id(os.getpid()) != 0


def test_a_wrong_setting_shows_before_the_old_one_lets_go(tmp_path: Path) -> None:
    values = Settings(first=1, capacity=100, fresh=True, state=str(tmp_path))
    old = RegistryHolder(values, "it", lambda: 0, server=7)
    old.registry().store.header[Word.SERVER] = 7
    wrong = Settings(first=1, capacity=200, fresh=True, state=str(tmp_path))
    with pytest.raises(RegistryMismatch, match="capacity=100"):
        RegistryHolder(wrong, "it", lambda: 0, server=7)
    old.poll()
    assert old.registry().acquire(1, 0).tolist() == [1], "it goes on"
    old.close()


def test_of_two_that_wait_the_first_comes_first_and_the_last_one_has_it(tmp_path: Path) -> None:
    values = Settings(first=1, capacity=100, fresh=True, state=str(tmp_path))
    server = process_id(os.getppid())
    first, second, third = (
        RegistryHolder(values, "it", lambda: 0, server=server) for _ in range(3)
    )
    assert second.waits and third.waits
    first.poll()
    third.poll()
    assert third.waits, "it is not its turn"
    for _ in range(3):
        for each in (second, third, first):
            each.poll()
    assert third.registry().pool.active == 0
    for other in (first, second):
        with pytest.raises(Unavailable):
            other.registry()
        assert not other.waits
    for each in (first, second, third):
        each.close()
