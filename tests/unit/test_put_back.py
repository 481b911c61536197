"""An older content of a registry's file that was put back: what clients have seen proves it."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash_model import adopted
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Loopback
from sparse import content

from cidalloc.cli.rules import Facts, examine
from cidalloc.client import Client
from cidalloc.codes import Code, Operation
from cidalloc.errors import CidError, Exhausted, SequenceLost
from cidalloc.manager import takeover
from cidalloc.manager.registry import Registry
from cidalloc.manager.service import Service
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.drain import DrainSwitch
from cidalloc.manager.storage.file_format import Word
from cidalloc.protocol import DRAINING, MODEL, STAMP_DIGITS

NEXT_BOOT = b"2" * 16
SETTINGS = Settings(first=1, capacity=2**24, cooldown_ms=0, max_ttl_ms=600_000, grace_ms=1_000)
WAIT_MS = SETTINGS.max_ttl_ms + SETTINGS.grace_ms
TTL_MS = 10_000


class Clock:
    """A clock that stands until it is moved."""

    now = 1_000

    def __call__(self) -> int:
        return self.now


class Manager:
    """A manager with a file, and what may happen to the file while the manager is stopped."""

    def __init__(self, folder: Path) -> None:
        self.path, self.clock = folder / f"{MODEL}.cidalloc", Clock()
        self.settings = replace(SETTINGS, state=str(folder))
        self.start()

    def start(self) -> None:
        self.service = Service(self.settings, self.clock)

    def restart(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.service.close()
        meanwhile()
        self.start()

    @property
    def registry(self) -> Registry:
        return self.service._holder.registry()

    @property
    def uuid(self) -> str:
        return str(self.registry.uuid)

    def ask(self, code: Operation, ids: Any = (), **parameters: Any) -> tuple[Any, str]:
        """Return OUTPUT as a list, or the error's code, and DETAIL."""
        answer = self.service.answer(
            np.array([[code]], np.int8), np.array([ids], np.uint64), json.dumps(parameters)
        )
        if isinstance(answer, CidError):
            return answer.code, ""
        return answer[0][0].tolist(), answer[1]

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ask(Operation.STATUS)[1])
        return found


class Session:
    """A client that sends back the latest stamp."""

    def __init__(self, manager: Manager, number: int = 0) -> None:
        self.manager, self.token, self.seen, self.seq = manager, f"{number:032x}", "", 0
        self.ids: list[int] = []
        # So long a cooldown that NEW has not to raise it, which would be another change.
        self.ask(Operation.OPEN, ttl_ms=TTL_MS, cooldown_ms=SETTINGS.unended_cooldown_ms)
        self.registry = manager.uuid

    def ask(self, code: Operation, ids: Any = (), **what: Any) -> Any:
        if code is not Operation.OPEN:
            what["registry"] = self.registry
        output, detail = self.manager.ask(code, ids, session=self.token, seen=self.seen, **what)
        if not isinstance(output, Code):
            assert len(detail) == STAMP_DIGITS
            self.seen = max(self.seen, detail)
        return output

    def new(self) -> Any:
        self.seq += 1
        found = self.ask(Operation.NEW, seq=self.seq)
        self.ids += found if isinstance(found, list) else []
        return found


def test_only_the_key_signs() -> None:
    """Two registries in memory have all else in common."""
    one, two = (Registry(replace(SETTINGS, fresh=True), 0).stamps for _ in range(2))
    later = one._signed(2**40)
    assert one.unknown(later) == 2**40
    assert two.unknown(later) == 0
    assert one.unknown("") == one.unknown(later[:-1]) == one.unknown(one.latest) == 0


@pytest.fixture
def manager(tmp_path: Path) -> Manager:
    return Manager(tmp_path)


def in_place(manager: Manager) -> Callable[[], object]:
    """Remember the content, and return what puts it back into the same file."""
    number, before = manager.path.stat().st_ino, content(manager.path)

    def put() -> None:
        before.put(manager.path)
        assert manager.path.stat().st_ino == number

    return put


def by_rename(manager: Manager) -> Callable[[], object]:
    """Copy the file, and return what moves the copy to its place."""
    copy = manager.path.with_name("backup")
    subprocess.run(["cp", "-p", manager.path, copy], check=True)
    return lambda: copy.rename(manager.path)


def check_noticed(manager: Manager, before: str) -> None:
    """Check that it is another registry, which waits, and says so."""
    assert manager.uuid != before
    found = manager.status()
    assert found["restored"] and found["sessions_total"] == 0
    assert found["issues_in_s"] * 1000 == WAIT_MS
    assert Session(manager, 99).new() is Code.EXHAUSTED


@pytest.mark.parametrize("back", [in_place, by_rename])
def test_a_session_that_the_content_knows(manager: Manager, back: Any) -> None:
    client = Session(manager)
    put, before = back(manager), manager.uuid
    assert client.new() == [manager.registry.store.shape.ids(np.array([1], np.uint64))[0]]
    manager.restart(put)
    assert client.ask(Operation.RENEW) is Code.REGISTRY_MISMATCH
    check_noticed(manager, before)


@pytest.mark.parametrize("back", [in_place, by_rename])
def test_a_session_that_the_content_does_not_know(manager: Manager, back: Any) -> None:
    put, before = back(manager), manager.uuid
    client = Session(manager)
    manager.restart(put)
    assert client.new() is Code.REGISTRY_MISMATCH
    check_noticed(manager, before)


def test_a_client_that_has_only_seen_what_others_did(manager: Manager) -> None:
    client, other = Session(manager, 1), Session(manager, 2)
    put, before = in_place(manager), manager.uuid
    other.new()
    manager.ask(Operation.NEW)  # without a session
    client.ask(Operation.RENEW)
    manager.restart(put)
    client.ask(Operation.RENEW)
    check_noticed(manager, before)


def test_a_longer_cooldown_is_a_change(manager: Manager) -> None:
    client = Session(manager)
    put, before = in_place(manager), manager.uuid
    client.ask(Operation.RENEW, cooldown_ms=SETTINGS.unended_cooldown_ms + 1)
    manager.restart(put)
    client.ask(Operation.RENEW)
    assert manager.uuid != before


def test_it_issues_again_after_the_wait_and_is_then_believed(manager: Manager) -> None:
    client = Session(manager)
    put = in_place(manager)
    client.new()
    manager.restart(put)
    old = client.seen
    client.ask(Operation.RENEW)
    manager.clock.now += WAIT_MS
    after = Session(manager, 1)
    assert isinstance(after.new(), list)
    manager.restart()
    assert after.ask(Operation.RENEW)[1] == TTL_MS
    before = manager.uuid
    assert manager.ask(Operation.ACTIVE, seen=old)[0] == [1]
    assert manager.uuid == before, "the old stamp proves nothing any more"


def test_a_content_that_is_put_back_twice(manager: Manager) -> None:
    client = Session(manager)
    put, seen = in_place(manager), [manager.uuid]
    client.new()
    for n in range(1, 3):
        manager.restart(put)
        client.ask(Operation.RENEW)
        seen.append(manager.uuid)
        manager.clock.now += WAIT_MS
        client = Session(manager, n)
    assert len(set(seen)) == 3


def test_a_content_from_before_restarts_of_the_machine(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stamp is a proof, and what others have seen is not a second one."""
    put = in_place(manager)
    for boot in (b"2" * 16, b"3" * 16):
        monkeypatch.setattr(takeover, "boot_id", lambda boot=boot: boot)
        manager.restart()
    first, second, before = Session(manager, 1), Session(manager, 2), manager.uuid
    manager.restart(put)
    assert first.ask(Operation.RENEW) is Code.REGISTRY_MISMATCH
    after = manager.uuid
    assert after != before
    assert second.ask(Operation.RENEW) is Code.REGISTRY_MISMATCH
    assert manager.uuid == after


def test_a_kill_after_the_proof(manager: Manager) -> None:
    """The next process knows it for a copy without another proof."""
    client = Session(manager)
    put = in_place(manager)
    client.new()
    manager.restart(put)
    manager.registry.store.disown(int(client.seen[:16], 16))
    manager.restart()
    assert manager.status()["issues_in_s"] * 1000 == WAIT_MS
    before = manager.uuid
    assert client.ask(Operation.RENEW) is Code.REGISTRY_MISMATCH
    assert manager.uuid == before


@pytest.mark.parametrize("boot", [False, True])
def test_a_restart_is_no_proof(
    manager: Manager, boot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the file may lack its last stores."""
    client, put = Session(manager), in_place(manager)
    client.new()
    before = manager.uuid
    if boot:
        monkeypatch.setattr(takeover, "boot_id", lambda: NEXT_BOOT)
        manager.restart(put)
        assert client.ask(Operation.RENEW) is Code.SESSION_UNKNOWN
    else:
        manager.restart()
        assert client.ask(Operation.RENEW)[1] == TTL_MS
    assert manager.uuid == before and not manager.status()["restored"]


@pytest.mark.parametrize(
    "stamp", ["", "f" * 32, "f" * 16, "F" * 32, "x", "1" * 31 + "\n", "\u0660" * 32]
)
def test_a_stamp_that_nobody_signed_proves_nothing(manager: Manager, stamp: str) -> None:
    client = Session(manager)
    before = manager.uuid
    higher = f"{int(client.seen[:16], 16) + 1:016x}{client.seen[16:]}"
    for seen in (stamp, higher):
        assert isinstance(manager.ask(Operation.RENEW, session=client.token, seen=seen)[0], list)
    assert manager.uuid == before


def test_a_stamp_of_another_registry_proves_nothing(manager: Manager, tmp_path: Path) -> None:
    """A copy at another server signs otherwise, although it has the same secret."""
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / manager.path.name
    subprocess.run(["cp", manager.path, copy], check=True)
    other = Manager(copy.parent)
    other.clock.now += WAIT_MS
    stranger = Session(other)
    stranger.new()
    before = manager.uuid
    assert isinstance(
        manager.ask(Operation.OPEN, session="1" * 32, ttl_ms=TTL_MS, seen=stranger.seen)[0], list
    )
    assert manager.uuid == before
    other.service.close()


def test_a_copy_of_a_whole_disk(manager: Manager, tmp_path: Path) -> None:
    """Its file passes for the original, until a request for one of them reaches the other."""
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / manager.path.name
    subprocess.run(["cp", manager.path, copy], check=True)
    other = Manager(adopted(copy).parent)
    other.registry.store.header[Word.FILE] = manager.registry.store.header[Word.FILE]
    client, before = Session(manager), manager.uuid
    given = {"session": client.token, "registry": client.registry, "seen": client.seen}
    assert other.ask(Operation.RENEW, **given)[0] is Code.REGISTRY_MISMATCH
    assert other.status()["restored"] and manager.uuid == before
    other.service.close()


def test_a_registry_in_memory(manager: Manager) -> None:
    """Its process goes back in time with a snapshot of its machine."""
    manager.settings = SETTINGS
    manager.start()
    client = Session(manager)
    changes, before = manager.registry.stamps.latest, manager.uuid
    client.new()
    assert client.seen > changes
    store = manager.registry.store
    store.write(Word.CHANGES, store.read(Word.CHANGES) - 1)
    assert client.ask(Operation.RENEW) is Code.REGISTRY_MISMATCH
    assert manager.uuid != before


def test_a_disk_that_fails_while_it_begins_anew(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Session(manager)
    put = in_place(manager)
    client.new()
    manager.restart(put)
    with monkeypatch.context() as patched:
        patched.setattr(Registry, "in_file", _fails)
        assert client.ask(Operation.RENEW) is Code.UNAVAILABLE
        assert client.ask(Operation.NEW, seq=9) is Code.UNAVAILABLE
    manager.clock.now += 3_000
    assert client.ask(Operation.RENEW) is Code.REGISTRY_MISMATCH
    assert manager.status()["restored"]


def _fails(*_: object) -> None:
    raise takeover.Unavailable("the disk fails")


def test_detail_has_both_words_in_a_drain(manager: Manager) -> None:
    client = Session(manager)
    drain = DrainSwitch(manager.path)
    drain.set(True)
    drain.close()
    given = {"session": client.token, "registry": client.registry}
    assert manager.ask(Operation.RENEW, **given)[1] == DRAINING
    words = manager.ask(Operation.RENEW, seen="", **given)[1].split()
    assert words == [DRAINING, client.seen]


def test_it_is_told(manager: Manager, caplog: pytest.LogCaptureFixture) -> None:
    client = Session(manager)
    put, before = in_place(manager), manager.uuid
    client.new()
    manager.restart(put)
    with caplog.at_level(logging.WARNING, "cidalloc.manager"):
        client.ask(Operation.RENEW)
    (line,) = caplog.messages
    assert str(manager.path) in line and before in line and "an older content was put back" in line
    findings = examine(Facts(MODEL, status=manager.status()))
    assert [each.level for each in findings if "was restored" in each.what] == ["warn"]


def test_a_client_of_this_package(manager: Manager) -> None:
    transport = Loopback(SETTINGS)
    transport.service, transport.clock = manager.service, manager.clock
    with Client(transport=transport, ttl=10) as cids:
        sequence = cids.sequence("model")
        put, before = in_place(manager), manager.uuid
        sequence.infer([])
        cids.acquire_many(40)
        manager.restart(put)
        transport.service = manager.service
        with pytest.raises(Exhausted, match="new or restored"):
            cids.acquire_many(40)
        assert manager.uuid != before
        with pytest.raises(SequenceLost):
            sequence.infer([])


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["new", "renew", "open"])), max_size=12),
    st.data(),
)
def test_it_is_noticed_if_a_client_has_seen_a_later_change(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[int, str]], data: st.DataObject
) -> None:
    """Any client that was answered after a change after the copy proves it; no other one does."""
    manager, clients = Manager(tmp_path_factory.mktemp("put")), {}
    clients[0] = Session(manager, 0)
    at = data.draw(st.integers(0, len(acts)))
    changes = copied = 0
    seen = {0: 0}
    put = None
    for n, (who, what) in enumerate([*acts, (0, "end")]):
        if n == at:
            put, copied = in_place(manager), changes
        if what == "open" and who not in clients:
            changes += 1
            clients[who] = Session(manager, who)
        elif what == "new" and who in clients:
            changes += 1
            assert len(clients[who].new()) == 1
        elif what == "renew" and who in clients:
            clients[who].ask(Operation.RENEW)
        else:
            continue
        seen[who] = changes
    assert put is not None
    before = manager.uuid
    manager.restart(put)
    for who in data.draw(st.permutations(list(clients))):
        noticed = manager.uuid != before
        clients[who].ask(Operation.HELD)
        assert (manager.uuid != before) == (noticed or seen[who] > copied)
    manager.service.close()
