"""Drains: the word in the file, the manager's answer, its requests, and the command."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loopback import AsyncLoopback, Loopback
from rich.console import Console
from simulation import World

from cidalloc import errors
from cidalloc.cli import drain as command
from cidalloc.cli.registry import registry as registry_command
from cidalloc.cli.rules import Facts, examine
from cidalloc.cli.screen import status_view
from cidalloc.client import AsyncClient, Client
from cidalloc.client.core.lease import Acquired
from cidalloc.codes import Operation
from cidalloc.manager import takeover
from cidalloc.manager.inspection import look
from cidalloc.manager.service import Service, boottime_ms
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage import file
from cidalloc.manager.storage.drain import DrainSwitch, _name_of
from cidalloc.manager.storage.file_format import HEADER_BYTES, Word
from cidalloc.manager.takeover import boot_id
from cidalloc.protocol import DRAINING

TOKEN = "5" * 32


def values(folder: Path, **more: Any) -> Settings:
    given = {"first": 10, "capacity": 50, "cooldown_ms": 0, "unended_cooldown_ms": 0, **more}
    return Settings(state=str(folder), fresh=True, **given)


def ask(service: Service, operation: Operation, *ids: int, **parameters: Any) -> Any:
    """Return OUTPUT as a list, with the DETAIL if it is not empty; or the error's class."""
    found = service.answer(
        np.array([[operation]], np.int8), np.array([ids], np.uint64), json.dumps(parameters)
    )
    if isinstance(found, errors.CidError):
        return type(found)
    output, detail = found
    return (*output[0].tolist(), *([detail] if detail else []))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cidmgr.cidalloc"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(values(tmp_path))
    yield service
    service.close()


@pytest.fixture
def switch(service: Service, path: Path) -> Iterator[DrainSwitch]:
    switch = DrainSwitch(path)
    yield switch
    switch.close()


def test_a_manager_that_drains(service: Service, switch: DrainSwitch) -> None:
    assert switch.runs and switch.answered and not switch.on
    ask(service, Operation.OPEN, session=TOKEN, ttl_ms=60_000)
    assert ask(service, Operation.NEW, session=TOKEN, seq=1, count=3) == (10, 11, 12)
    assert ask(service, Operation.NEW) == (13,)
    switch.set(True)
    assert switch.on and not switch.answered
    service.poll()
    assert switch.answered
    assert ask(service, Operation.NEW) is errors.Draining
    assert ask(service, Operation.NEW, session=TOKEN, seq=2, wait_ms=100) is errors.Draining
    assert ask(service, Operation.OPEN, session="6" * 32, ttl_ms=60_000) is errors.Draining
    assert ask(service, Operation.RENEW, session=TOKEN)[-1] == DRAINING
    assert ask(service, Operation.NEW, session=TOKEN, seq=2) is errors.Repeated
    assert ask(service, Operation.DELETE, 11, session=TOKEN, seq=3) == (1, DRAINING)
    assert ask(service, Operation.HELD, session=TOKEN) == (10, 12, DRAINING)
    assert ask(service, Operation.DELETE, 13) == (1, DRAINING)
    assert ask(service, Operation.ACTIVE) == (2, DRAINING)
    (status,) = ask(service, Operation.STATUS)
    assert json.loads(status)["draining"] is True
    assert ask(service, Operation.CLOSE, session=TOKEN) == (2, DRAINING)
    switch.set(False)
    assert ask(service, Operation.NEW) == (11,), "as soon as the word is gone"
    assert not switch.answered
    service.poll()
    assert switch.answered and not switch.on


def test_a_refused_request_renews_the_lease(tmp_path: Path) -> None:
    now = [1_000]
    service = Service(values(tmp_path, grace_ms=0), lambda: now[0])
    ask(service, Operation.OPEN, session=TOKEN, ttl_ms=10_000)
    switch = DrainSwitch(tmp_path / "cidmgr.cidalloc")
    switch.set(True)
    for seq in (1, 2, 3):
        now[0] += 9_000
        assert ask(service, Operation.NEW, session=TOKEN, seq=seq) is errors.Draining
    now[0] += 20_000
    assert ask(service, Operation.NEW, session=TOKEN, seq=4) is errors.SessionUnknown
    switch.close()
    service.close()


def test_a_child_of_a_fork(service: Service) -> None:
    pid = os.fork()
    if not pid:
        try:
            refused = ask(service, Operation.NEW) is errors.Forked
            service.poll()
        except errors.Forked:
            os._exit(0 if refused else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0


class Drains(RuleBasedStateMachine):
    """Drains, reloads, new servers and reboots in any order, beside a model of one flag."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.boot, self.server = 1, 1
        self.draining, self.answered = False, True
        self.held: set[int] = set()
        self.patches = [
            patch.object(takeover, "boot_id", lambda: bytes([self.boot] * 16)),
            patch.object(file, "process_id", lambda pid: self.server << 22 | 7),
        ]
        for each in self.patches:
            each.start()
        self.service: Service | None = None
        self.load()
        self.switch = DrainSwitch(Path(self.folder.name) / "cidmgr.cidalloc")

    def load(self) -> None:
        self.service = Service(values(Path(self.folder.name), capacity=10_000))

    def stop(self, killed: bool) -> None:
        if self.service is not None:
            if killed:
                self.service._holder.registry().store._signed = False
            self.service.close()
            self.service = None

    @rule(on=st.booleans())
    def turn(self, on: bool) -> None:
        self.switch.set(on)
        if on != self.draining:
            self.draining, self.answered = on, False

    @precondition(lambda self: self.service)
    @rule()
    def poll(self) -> None:
        assert self.service
        self.service.poll()
        self.answered = True

    @rule(killed=st.booleans())
    def unload(self, killed: bool) -> None:
        self.stop(killed)

    @precondition(lambda self: not self.service)
    @rule()
    def reload(self) -> None:
        self.load()

    @rule(killed=st.booleans(), reboots=st.booleans())
    def another_server(self, killed: bool, reboots: bool) -> None:
        """Of another boot, also with the same number of its process."""
        self.stop(killed)
        if reboots:
            self.boot += 1
        else:
            self.server += 1
        self.load()
        if self.draining:  # the old word names another server
            self.draining, self.answered = False, False

    @precondition(lambda self: self.service)
    @rule()
    def acquire(self) -> None:
        assert self.service
        found = ask(self.service, Operation.NEW)
        assert (found is errors.Draining) == self.draining
        if not self.draining and found is not errors.Exhausted:  # they cool after a reboot
            self.held.add(found[0])

    @precondition(lambda self: self.service and self.held)
    @rule()
    def release(self) -> None:
        assert self.service
        answer = ask(self.service, Operation.DELETE, self.held.pop())
        assert answer == ((1, DRAINING) if self.draining else (1,))

    @invariant()
    def it_says_so(self) -> None:
        assert self.switch.on == self.draining
        assert self.switch.runs == (self.service is not None)
        assert self.switch.answered <= self.switch.runs
        if self.service:
            (status,) = ask(self.service, Operation.STATUS)
            assert json.loads(status)["draining"] == self.draining

    @invariant()
    def a_drain_that_was_answered_issues_nothing(self) -> None:
        if self.service and self.answered:
            assert self.switch.answered

    def teardown(self) -> None:
        self.switch.close()
        self.stop(killed=False)
        for each in self.patches:
            each.stop()
        self.folder.cleanup()


TestDrains = Drains.TestCase
TestDrains.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


# ---- Clients


def client_of(folder: Path, **more: Any) -> tuple[Client, Service, DrainSwitch]:
    loopback = Loopback(values(folder, **more))
    switch = DrainSwitch(folder / "cidmgr.cidalloc")
    return Client(transport=loopback, ttl=2.0), loopback.service, switch


def until(what: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_stops_and_begins_again(tmp_path: Path) -> None:
    client, service, switch = client_of(tmp_path)
    with client:
        kept = client.acquire_many(20)
        client.release_many(kept[:15], ended=True)
        assert service.figures()["held"] >= 20  # type: ignore[index]
        with client.sequence("model") as sequence:
            sequence.infer([])
            switch.set(True)
            began = time.monotonic()
            # Nobody asks it for anything: its heartbeat hears of it.
            until(lambda: service.figures()["held"] == 6)  # type: ignore[index]
            assert time.monotonic() - began < 0.35 * 2.0 + 0.5
            for call in (
                lambda: client.acquire(),
                lambda: client.acquire(timeout=60.0),
                lambda: client.acquire_many(7),
                lambda: client.sequence("model"),
                lambda: client.sequence("model", wait=60.0),
            ):
                began = time.monotonic()
                with pytest.raises(errors.Draining, match="running sequences continue"):
                    call()
                assert time.monotonic() - began < 1.0
            sequence.infer([])
            sequence.infer([], end=True)
        client.release_many(kept[15:], ended=True)
        until(lambda: service.figures()["held"] == 0, 1.0)  # type: ignore[index]
        switch.set(False)
        client.release(client.acquire(), ended=True)
        with client.sequence("model") as sequence:
            sequence.infer([], end=True)
    switch.close()


async def asyncio_client(folder: Path) -> None:
    loopback = AsyncLoopback(values(folder))
    switch = DrainSwitch(folder / "cidmgr.cidalloc")
    async with AsyncClient(transport=loopback, ttl=1.0) as client:
        await client.acquire_many(5)
        async with client.sequence("model") as sequence:
            switch.set(True)
            await asyncio.sleep(0.5)
            assert loopback.loopback.service.figures()["held"] == 6  # type: ignore[index]
            for call in (client.acquire(), client.acquire_many(2, timeout=60.0)):
                with pytest.raises(errors.Draining):
                    await call
            with pytest.raises(errors.Draining):
                await client.sequence("model", wait=60.0)
            await sequence.infer([], end=True)
        switch.set(False)
        await client.acquire()
    switch.close()


def test_an_asyncio_client(tmp_path: Path) -> None:
    asyncio.run(asyncio_client(tmp_path))


def test_ids_of_a_lost_answer_leave_in_a_drain(tmp_path: Path) -> None:
    """They are found when the client asks what it holds, which is after it heard of the drain."""
    world = World(values(tmp_path, cooldown_ms=5_000))
    switch = DrainSwitch(tmp_path / "cidmgr.cidalloc")
    session = world.session()
    used = world.acquire(session)
    taken = Acquired()
    call = session.acquire(2, None, world.now + 5.0, taken)
    world.fates = ["unanswered"]
    reply = world.perform(next(call))
    assert world.held() >= 3
    switch.set(True)
    with pytest.raises(errors.Draining):
        while True:
            reply = world.perform(call.send(reply))
    world.keep(session, world.now + 1.0)
    assert world.held() == len(used) == 1 and not taken
    world.release(session, *used)
    world.keep(session, world.now + 1.0)
    assert world.held() == 0
    assert not session.lease.cache.outgoing
    world.operations()
    world.keep(session, world.now + 100.0)
    assert set(world.operations()) == {"RENEW"}, "it asks for no IDs ahead"
    switch.set(False)
    assert len(world.acquire(session)) == 1
    switch.close()


def test_a_busy_client_hears_of_a_drain_without_a_heartbeat(tmp_path: Path) -> None:
    """Its releases renew the lease, so it sends no RENEW."""
    world = World(values(tmp_path))
    switch = DrainSwitch(tmp_path / "cidmgr.cidalloc")
    session = world.session()
    cids = world.acquire(session, 10)
    while not session.lease.cache.fresh:
        world.acquire(session)
    switch.set(True)
    world.operations()
    world.release(session, cids.pop(), cooldown_ms=0)
    world.keep(session, world.now + 1.0)
    assert world.operations() == ["DELETE", "DELETE"], "the second one is of unused IDs"
    assert session.lease.cache.draining and not session.lease.cache.fresh
    assert session.lease.take() == 0
    switch.close()


def test_a_new_client_of_a_drained_server(tmp_path: Path) -> None:
    client, _, switch = client_of(tmp_path)
    switch.set(True)
    with client:
        for _ in range(3):
            with pytest.raises(errors.Draining):
                client.acquire(timeout=5.0)
        switch.set(False)
        client.release(client.acquire())
    switch.close()


def test_no_random_id_gets_round_a_drain(tmp_path: Path) -> None:
    loopback = Loopback(values(tmp_path))
    switch = DrainSwitch(tmp_path / "cidmgr.cidalloc")
    switch.set(True)
    with (
        Client(transport=loopback, fallback="random") as client,
        pytest.raises(errors.Draining),
    ):
        client.sequence("model")
    switch.close()


def test_a_call_that_waits_hears_of_a_drain(tmp_path: Path) -> None:
    client, _, switch = client_of(tmp_path, capacity=3)
    with client:
        client.acquire_many(3)
        found: list[BaseException] = []

        def wait() -> None:
            try:
                client.acquire(timeout=60.0)
            except errors.CidError as error:
                found.append(error)

        calls = [threading.Thread(target=wait) for _ in range(3)]
        for each in calls:
            each.start()
        time.sleep(0.1)
        switch.set(True)
        for each in calls:
            each.join(10.0)
        assert [type(each) for each in found] == [errors.Draining] * 3
    switch.close()


# ---- The command


def run(*arguments: object) -> tuple[int, str]:
    """Return the exit status and the text; raises the command's errors."""
    done = CliRunner().invoke(command.drain, [str(each) for each in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


@pytest.fixture
def polled(service: Service) -> Service:
    service.start()
    return service


def test_drain_wait_and_undo(polled: Service, tmp_path: Path, path: Path) -> None:
    cid = ask(polled, Operation.NEW)[0]
    ask(polled, Operation.OPEN, session=TOKEN, ttl_ms=60_000, label="worker 7")
    ask(polled, Operation.NEW, session=TOKEN, seq=1, count=2)
    assert run(tmp_path) == (0, "The server is draining: its manager issues no more IDs.\n")
    status, text = run(path, "--wait", "0.3s")
    assert status == 3
    assert "time is over: 3 IDs are held: without a session 1, worker 7 2. The drain goes" in text
    assert ask(polled, Operation.NEW) is errors.Draining
    later = threading.Timer(0.3, lambda: ask(polled, Operation.DELETE, cid))
    last = threading.Timer(0.6, lambda: ask(polled, Operation.CLOSE, session=TOKEN))
    later.start()
    last.start()
    status, text = run(tmp_path, "--wait", "1m")
    assert not last.is_alive() and look(path, boottime_ms(), boot_id()).pool.active == 0
    assert status == 0 and text.endswith("No ID is held: all sequences have ended.\n")
    assert run(path, "--undo") == (0, "New sequences may begin again.\n")
    assert ask(polled, Operation.NEW)
    assert run(path, "--undo") == (0, "There was no drain.\n")


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_progress_on_a_terminal(polled: Service, path: Path, terminal: str) -> None:
    ask(polled, Operation.OPEN, session=TOKEN, ttl_ms=60_000, label="worker 7")
    ask(polled, Operation.NEW, session=TOKEN, seq=1, count=2)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cidalloc", "drain", str(path), "--wait", "1m"],
        env={**os.environ, "COLUMNS": "60", "TERM": terminal},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    shown = b""
    while b"worker 7 2" not in shown:
        shown += os.read(ours, 1 << 16)
    ask(polled, Operation.CLOSE, session=TOKEN)
    out, _ = process.communicate(timeout=30)
    shown += os.read(ours, 1 << 16)
    os.close(theirs)
    os.close(ours)
    assert process.returncode == 0 and out.endswith(b"No ID is held: all sequences have ended.\n")
    lines = shown.decode().split("\r")
    assert lines[1] == f"{'2 IDs are held: worker 7 2':<59}"
    assert lines[-2].strip() == lines[-1] == "", "nothing is left on the line"


def test_a_drain_that_is_undone_meanwhile(polled: Service, path: Path, switch: DrainSwitch) -> None:
    ask(polled, Operation.NEW)
    timer = threading.Timer(0.5, lambda: switch.set(False))
    timer.start()
    with pytest.raises(errors.Unavailable, match="was undone"):
        run(path, "--wait", "60")
    assert not timer.is_alive()


def test_without_a_manager(service: Service, path: Path) -> None:
    ask(service, Operation.NEW)
    service.close()
    with (
        patch.object(command, "_ANSWER_S", 0.3),
        pytest.raises(errors.Unavailable, match=r"no manager answers that has .* within 0.3 s"),
    ):
        run(path)
    assert not DrainSwitch(path).on, "a manager that comes back issues IDs"
    assert run(path, "--undo") == (0, "There was no drain.\n")


def test_a_manager_that_is_killed_meanwhile(polled: Service, tmp_path: Path, path: Path) -> None:
    ask(polled, Operation.NEW)
    assert run(path)[0] == 0
    polled._holder.registry().store._signed = False
    polled.close()
    status, text = run(path, "--undo")
    assert (status, text) == (0, "New sequences may begin again.\n")
    again = Service(values(tmp_path))
    again.start()
    assert run(path)[0] == 0
    again.close()
    assert DrainSwitch(path).on
    with pytest.raises(errors.Unavailable), patch.object(command, "_ANSWER_S", 0.3):
        run(path, "--wait", "0.3")
    again = Service(values(tmp_path))
    assert ask(again, Operation.NEW) is errors.Draining, "it is the same server"
    again.close()


def test_a_manager_that_stops_answering(service: Service, path: Path) -> None:
    """Its file is locked, but it does not poll."""
    with patch.object(command, "_ANSWER_S", 0.2):
        with pytest.raises(errors.Unavailable, match="no manager answers"):
            run(path)
        switch = DrainSwitch(path)
        assert not switch.on
        switch.set(True)
        service.poll()
        with pytest.raises(errors.Unavailable, match="does not answer"):
            run(path, "--undo")
        switch.close()


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="A registry in memory cannot be drained"):
        run(tmp_path)
    with pytest.raises(errors.InvalidArgument, match="tells the manager's file"):
        run("localhost:8001")
    for name, content in (("short", b"x"), ("other", os.urandom(1 << 16))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(errors.RegistryCorrupt):
            run(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    for name in ("a", "b"):
        (tmp_path / f"{name}.cidalloc").write_bytes(b"")
    with pytest.raises(errors.InvalidArgument, match=r"several .*a\.cidalloc, .*b\.cidalloc"):
        run(tmp_path)


def test_a_file_that_may_not_be_written(service: Service, path: Path) -> None:
    with (
        patch.object(os, "open", side_effect=PermissionError(13, "Permission denied")),
        patch.object(file.Storage, "look"),
        pytest.raises(errors.InvalidArgument, match="who may write the file may drain"),
    ):
        DrainSwitch(path)


@pytest.mark.parametrize("text", ["", "x", "-1", "1d", "5 m", "nan"])
def test_times_that_are_none(path: Path, text: str) -> None:
    status, words = run(path, "--wait", text)
    assert status == 2 and "is not a time such as" in words


def test_arguments_that_do_not_fit(path: Path) -> None:
    assert run(path, "--wait", "5", "--undo")[0] == 2


def test_it_is_shown(polled: Service, path: Path) -> None:
    def shown() -> str:
        (status,) = ask(polled, Operation.STATUS)
        console = Console(record=True, width=120, file=io.StringIO())
        console.print(status_view(json.loads(status)))
        found = CliRunner().invoke(registry_command, ["show", str(path)]).output
        rules = examine(Facts("cidmgr", status=json.loads(status)))
        return "\n".join([console.export_text(), found, *(each.what for each in rules)])

    assert "draining" not in shown() and "drained" not in shown()
    run(path)
    text = shown()
    assert "draining     the manager issues no more IDs\n" in text, "registry show"
    assert "cidalloc drain --undo FILE" in text, "status and top"
    assert "the server is being drained" in text, "doctor"
    polled.close()
    found = CliRunner().invoke(registry_command, ["show", "--json", str(path)]).output
    assert json.loads(found)["draining"] is False, "no manager runs"


@pytest.mark.parametrize("other", [Word.SERVER, Word.BOOT, Word.BOOT + 1])
def test_a_word_of_another_server(
    service: Service, path: Path, switch: DrainSwitch, other: int
) -> None:
    with path.open("r+b") as raw:
        header = memoryview(bytearray(raw.read(HEADER_BYTES))).cast("Q")
        header[other] ^= 1
        raw.seek(Word.DRAIN * 8)
        raw.write(struct.pack("=Q", _name_of(header)))
    assert not switch.on
    assert ask(service, Operation.NEW) == (10,)
