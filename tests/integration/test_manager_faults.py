"""The manager on a real server, and what befalls it: killed processes, reloads, a second server."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from servers import Server

from cidalloc import protocol
from cidalloc.client import Client
from cidalloc.client.sync.transport import connect
from cidalloc.codes import Operation
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import CidError, InternalError, Unavailable
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file_lock import writer_of
from cidalloc.triton_model import export

pytestmark = pytest.mark.server


class Place:
    """A model repository with a manager that has a file, and servers on it."""

    def __init__(self, folder: Path) -> None:
        self.repository, state = folder / "models", folder / "state"
        state.mkdir()
        self.file = state / "cidmgr.cidalloc"
        self.settings = Settings(
            first=2**20, capacity=2**20, fresh=True, cooldown_ms=1, state=str(state)
        )
        export(self.repository, self.settings)

    def server(self) -> TritonServer:
        arguments = ["--model-control-mode=explicit", "--load-model=cidmgr"]
        return Server(self.repository, arguments=arguments)

    def stub(self) -> int:
        """Return the process that has the file."""
        return writer_of(self.file)[0]

    def touch(self) -> None:
        """Change the model, so that the next load is a real one."""
        code = self.repository / "cidmgr" / "1" / "model.py"
        code.write_text(code.read_text() + "# changed\n")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def server(place: Place) -> Iterator[TritonServer]:
    with place.server() as server:
        yield server


class User:
    """A client with a session that remembers what it holds and does nothing else by itself."""

    def __init__(self, server: TritonServer) -> None:
        self.transport = connect(server.grpc_url)
        self.token = os.urandom(16).hex()
        self.seq = 0
        self.held: list[int] = []
        self.opened = self.ask(Operation.OPEN, ttl_ms=60_000).tolist()

    def ask(self, operation: Operation, ids: Any = (), **parameters: Any) -> protocol.IDs:
        request = protocol.Request(
            operation, protocol.as_ids(ids), {"session": self.token, **parameters}
        )
        return self.transport.call("cidmgr", request, 5.0)[0]

    def change(self, operation: Operation, ids: Any = (), **parameters: Any) -> protocol.IDs:
        self.seq += 1
        return self.ask(operation, ids, seq=self.seq, **parameters)

    def acquire(self, count: int) -> None:
        self.held += self.change(Operation.NEW, count=count).tolist()

    def release(self, count: int) -> None:
        some = self.held[:count]
        self.change(Operation.DELETE, some, ended=True)
        del self.held[:count]

    def check(self) -> None:
        assert self.ask(Operation.HELD).tolist() == sorted(self.held)
        assert self.ask(Operation.OPEN, ttl_ms=60_000).tolist() == self.opened


def until_served(user: User, within: float = 10.0) -> float:
    """Wait until the manager answers again; return for how many seconds it did not."""
    began = time.monotonic()
    while True:
        try:
            user.ask(Operation.RENEW)
            return time.monotonic() - began
        except (Unavailable, InternalError) as error:
            if time.monotonic() - began > within:
                raise AssertionError("the manager did not come back") from error
            time.sleep(0.002)


def load(server: TritonServer, *, unload: bool = False) -> None:
    triton = tritonclient.http.InferenceServerClient(server.http_url.removeprefix("http://"))
    if unload:
        triton.unload_model("cidmgr")
        deadline = time.monotonic() + 10
        while triton.is_model_ready("cidmgr") and time.monotonic() < deadline:
            time.sleep(0.02)
    triton.load_model("cidmgr")
    triton.close()


class Crowd:
    """Users that take and give as fast as they can; every refusal but UNAVAILABLE is a fault."""

    def __init__(self, server: TritonServer, size: int) -> None:
        self.users = [User(server) for _ in range(size)]
        self.faults: list[str] = []
        self.done = 0
        self.gap = 0.0  # the longest time for which nobody was served, in seconds
        self._last = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(user,)) for user in self.users]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, user: User) -> None:
        try:
            while not self._stop.is_set():
                step = user.release if len(user.held) > 20 else user.acquire
                try:
                    step(3)
                except Unavailable as error:
                    # It carries our token, so nothing was done, and the same may be tried again.
                    if "try again" not in str(error):
                        raise
                    time.sleep(0.002)
                    continue
                with self._lock:
                    now = time.monotonic()
                    self.gap, self._last = max(self.gap, now - self._last), now
                    self.done += 1
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {error}")

    def check(self) -> None:
        assert not self.faults, self.faults
        for user in self.users:
            user.check()
        every = [cid for user in self.users for cid in user.held]
        assert len(every) == len(set(every)), "an ID has two holders"


@pytest.mark.parametrize("stream", [False, True], ids=["", "idle stream"])
def test_reload_under_load(place: Place, server: TritonServer, stream: bool) -> None:
    triton = tritonclient.grpc.InferenceServerClient(server.grpc_url)
    if stream:  # it has inferred once, and pins the process that it did so with
        answered = threading.Event()
        triton.start_stream(lambda result, error: answered.set())
        code = tritonclient.grpc.InferInput("CODE", [1, 1], "INT8")
        code.set_data_from_numpy(np.array([[2]], np.int8))
        triton.async_stream_infer("cidmgr", [code])
        assert answered.wait(10)
    with Crowd(server, 4) as crowd:
        pids = {place.stub()}
        for _ in range(3):
            time.sleep(0.3)
            place.touch()
            load(server)
            until_served(crowd.users[0])
            pids.add(place.stub())
        time.sleep(0.3)
    crowd.check()
    assert len(pids) == 4, "each reload was one"
    print(f"{crowd.done} changes; nobody was served for at most {crowd.gap * 1000:.0f} ms")
    if stream:
        triton.stop_stream(cancel_requests=True)
    triton.close()


def test_clients_carry_on_by_themselves(place: Place, server: TritonServer) -> None:
    """Reloads, and a manager that is killed and loaded again: no client is told anything."""
    stop, lock = threading.Event(), threading.Lock()
    in_use: set[int] = set()
    faults: list[str] = []
    rounds = [0, 0, 0]

    def work(number: int) -> None:
        try:
            with Client(server.grpc_url, timeout=30.0) as cids:
                kept = cids.acquire_many(7).tolist()
                while not stop.is_set():
                    # More than a stock has, so that most are asked for.
                    taken = cids.acquire_many(200 + rounds[number] % 300).tolist()
                    with lock:
                        twice = in_use.intersection(taken)
                        in_use.update(taken)
                    assert not twice, f"{twice} have two holders"
                    with lock:
                        in_use.difference_update(taken)
                    cids.release_many(taken, cooldown=0)
                    rounds[number] += 1
                assert set(kept) <= set(cids.held())
                cids.release_many(kept, ended=True)
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for fault in ("reload", "kill", "reload"):
        time.sleep(0.5)
        place.touch()
        if fault == "kill":
            os.kill(place.stub(), signal.SIGKILL)
            time.sleep(0.5)
        load(server, unload=fault == "kill")
    time.sleep(2.0)
    before = list(rounds)
    time.sleep(2.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults, faults
    assert all(after > was for after, was in zip(rounds, before, strict=True)), "all go on"


def test_the_manager_is_killed(place: Place, server: TritonServer) -> None:
    users = [User(server) for _ in range(3)]
    for user in users:
        user.acquire(50)
        user.release(7)
    os.kill(place.stub(), signal.SIGKILL)
    with pytest.raises(CidError):
        users[0].ask(Operation.RENEW)
    load(server, unload=True)
    until_served(users[0])
    for user in users:
        user.check()
        user.acquire(50)
        user.release(50)
        user.check()
    every = [cid for user in users for cid in user.held]
    assert len(every) == len(set(every)) == 129


def test_the_server_is_killed(place: Place) -> None:
    """The next one starts at once, while the old manager is not gone yet."""
    with place.server() as server:
        user = User(server)
        user.acquire(1_000)
        user.release(10)
        os.kill(server.pid, signal.SIGKILL)
        old = place.stub()
        with place.server() as server:
            user.transport.close()
            user.transport = connect(server.grpc_url)
            waited = until_served(user)
            assert place.stub() != old
            user.check()
            user.acquire(10)
            user.check()
            print(f"served {waited:.1f} s after the new server was ready")


def test_another_server_is_refused(place: Place, server: TritonServer) -> None:
    user = User(server)
    user.acquire(5)
    with pytest.raises(Unavailable) as caught, place.server():
        pass
    assert re.search(rf"REGISTRY_LOCKED|process {place.stub()} writes", str(caught.value))
    user.check()
    user.acquire(5)


SERVE = """
import sys
from pathlib import Path
from cidalloc.devserver.triton_server import TritonServer
with TritonServer(Path(sys.argv[1])):
    pass
"""


def processes(word: str, path: Path) -> list[int]:
    """Return the processes in whose command both stand."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = place.read_text()
            if word in command.partition("\0")[0] and str(path) in command:
                found.append(int(place.parent.name))
    return found


def wait_for(what: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


def test_a_server_that_is_killed_while_the_manager_starts(tmp_path: Path) -> None:
    """And whose parent does not look: Triton's own process does not notice then."""
    place = Place(tmp_path)
    code = place.repository / "cidmgr" / "1" / "model.py"
    sound = code.read_text()
    begun = tmp_path / "begun"
    code.write_text(
        f"{sound}\n"
        "import pathlib, time\n"
        "initialize = TritonPythonModel.initialize\n"
        "def slowly(self, arguments):\n"
        f"    pathlib.Path({str(begun)!r}).touch()\n"
        "    time.sleep(1)\n"
        "    initialize(self, arguments)\n"
        f"    pathlib.Path({str(begun)!r}).unlink()\n"
        "TritonPythonModel.initialize = slowly\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", SERVE, str(place.repository)])
    try:
        wait_for(begun.exists)
        (triton,) = processes("tritonserver", place.repository)
        starter.send_signal(signal.SIGSTOP)
        os.kill(triton, signal.SIGKILL)
        wait_for(lambda: not processes("python_backend_stub", place.repository), 10)
    finally:
        starter.kill()
        starter.wait()
    code.write_text(sound)
    with place.server() as server:
        assert User(server).opened
