"""END with end_inputs, on the real server: the model's state goes, and END comes once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import keeping_model
import pytest
from servers import Server

from cidalloc.client import AsyncClient, Client
from cidalloc.client.core.sequence_state import Phase
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import SequenceLost
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import export

pytestmark = pytest.mark.server

IDLE_S = 0.2
IDLED_S = IDLE_S + 0.4  # by then Triton has forgotten a sequence
WAYS = ["grpc", "stream", "http", "aio-grpc", "aio-stream", "aio-http"]
END = {"end_inputs": {"X": 1}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("models")
    export(folder, Settings(first=1, capacity=100_000, fresh=True))
    keeping_model.write(folder, "leaky", IDLE_S)
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Blocking:
    """The asyncio client with blocking calls, so that each test is written once."""

    def __init__(self, url: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.cids = AsyncClient(url)

    def sequence(self, *arguments: Any, **options: Any) -> Any:
        sequence: Any = self.run(self.cids.sequence(*arguments, **options).__aenter__())
        blocking = Blocking.__new__(Blocking)
        blocking.loop, blocking.sequence_ = self.loop, sequence
        return blocking

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def infer(self, *arguments: Any, **options: Any) -> Any:
        return self.run(self.sequence_.infer(*arguments, **options))

    def close(self) -> None:
        self.run(self.sequence_.close() if hasattr(self, "sequence_") else self.cids.close())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__.get("sequence_", self.__dict__.get("cids")), name)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cids(server: TritonServer, way: str) -> Iterator[Any]:
    url = server.http_url if "http" in way else server.grpc_url
    cids: Any = Blocking(url) if "aio" in way else Client(url)
    yield cids
    cids.close()
    if "aio" in way:
        cids.loop.close()


def counts(server: TritonServer) -> tuple[int, int]:
    """Return of how many sequences the model keeps state, and how many ENDs it got."""
    with Client(server.grpc_url) as cids, cids.sequence("leaky") as sequence:
        kept, _, ends = sequence.infer({"X": 0}, end=True)["Y"][0].tolist()
    return kept - 1, ends


def kept(server: TritonServer) -> int:
    return counts(server)[0]


def lost(sequence: Any) -> None:
    """Let Triton tell that it has forgotten the sequence."""
    sequence._core.state._forgotten_at = float("inf")  # as if the client could not know
    with pytest.raises(SequenceLost):
        sequence.infer({"X": 1})


def test_a_sequence_that_idled_out(server: TritonServer, cids: Any, way: str) -> None:
    before = kept(server)
    sequence = cids.sequence("leaky", streaming="stream" in way, **END)
    sequence.infer({"X": 5})
    time.sleep(IDLED_S + 0.6)
    assert kept(server) == before + 1, "the model was not told"
    sequence.close()
    assert kept(server) == before
    assert sequence.state == "closed, cooling", "its ID cools as one without END"
    sequence.close()


def test_a_sequence_that_triton_lost(server: TritonServer, cids: Any, way: str) -> None:
    before = kept(server)
    sequence = cids.sequence("leaky", streaming="stream" in way, **END)
    sequence.infer({"X": 5})
    time.sleep(IDLED_S)
    lost(sequence)
    assert sequence._core.state.phase is Phase.LOST
    sequence.close()
    assert kept(server) == before
    assert sequence.state == "closed, cooling"


def test_without_end_inputs_nothing_is_made_up(server: TritonServer, cids: Any, way: str) -> None:
    before = kept(server)
    sequence = cids.sequence("leaky", streaming="stream" in way)
    sequence.infer({"X": 5})
    time.sleep(IDLED_S)
    with contextlib.suppress(SequenceLost):
        sequence.infer({"X": 1})
    sequence.close()
    assert kept(server) == before + 1


def test_a_live_sequence_in_doubt_gets_its_end(server: TritonServer, cids: Any, way: str) -> None:
    """END alone comes first, so that the model can finish what it has."""
    before = kept(server)
    sequence = cids.sequence("leaky", streaming="stream" in way, **END)
    sequence.infer({"X": 5})
    with pytest.raises(Exception, match="the model broke"):
        sequence.infer({"X": -1})
    sequence.close()
    assert kept(server) == before
    assert sequence.state == "closed, cooling"


def test_a_sequence_in_doubt_that_triton_forgot(server: TritonServer, cids: Any, way: str) -> None:
    before = kept(server)
    sequence = cids.sequence("leaky", streaming="stream" in way, **END)
    sequence.infer({"X": 5})
    with pytest.raises(Exception, match="the model broke"):
        sequence.infer({"X": -1})
    time.sleep(IDLED_S)
    assert kept(server) == before + 1
    sequence.close()
    assert kept(server) == before
    assert sequence.state == "closed, cooling"


def test_never_after_the_lease_and_never_twice(server: TritonServer, cids: Any, way: str) -> None:
    before = kept(server)
    sequence = cids.sequence("leaky", streaming="stream" in way, **END)
    sequence.infer({"X": 5})
    time.sleep(IDLED_S)
    lease = sequence._core.plan.lease
    deadline, lease.deadline = lease.deadline, float("-inf")
    sequence.close()
    lease.deadline = deadline
    sequence.close()
    assert kept(server) == before + 1, "another client could have had the ID"


def test_an_end_that_fails_is_sent_and_said_once(
    server: TritonServer, cids: Any, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = counts(server)[1]
    sequence = cids.sequence("leaky", streaming="stream" in way, end_inputs={"X": -1})
    sequence.infer({"X": 5})
    sequence.close()
    warnings = [each for each in caplog.records if "END of" in each.message]
    assert len(warnings) == 1 and "the model broke" in warnings[0].message
    sequence.close()
    assert len([each for each in caplog.records if "END of" in each.message]) == 1
    assert counts(server)[1] == before + 1


def test_end_on_a_version(server: TritonServer, cids: Any, way: str) -> None:
    kept, ends = counts(server)
    sequence = cids.sequence("leaky", streaming="stream" in way, **END)
    sequence.infer({"X": 0}, model_version="1")
    sequence.close()
    assert counts(server) == (kept, ends + 1)
