"""END for sequences of clients that died, on the real server: by clients and by the command."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keeping_model
import partials
import pytest
from anonymous import Anonymous
from command import run
from proxy import Proxy
from servers import Server
from test_unended import IDLE_S, kept

from cidalloc.client import AsyncClient, Client
from cidalloc.client.core import lease, tidy
from cidalloc.client.core.model_info import ModelInfo
from cidalloc.client.sync.transport import connect
from cidalloc.codes import Operation
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import InvalidArgument
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import export

pytestmark = pytest.mark.server

TTL_S, GRACE_S, COOLDOWN_S = 1.0, 0.2, 0.6  # IDs are named 1.8 s after the last request
NAMED_S = TTL_S + GRACE_S + COOLDOWN_S


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("models")
    values = Settings(
        first=1, capacity=100_000, cooldown_ms=200, grace_ms=int(GRACE_S * 1000), fresh=True
    )
    export(folder, values)
    partials.write(folder)
    for name in ("leaky", "other"):
        keeping_model.write(folder, name, IDLE_S)
    keeping_model.write(folder, "full", 60.0, slots=1)
    server = Server(folder, arguments=["--model-control-mode=explicit", "--load-model=*"])
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidy, "_ROUND_S", (0.2, 0.3))


class Dead:
    """A client that sends nothing more after it has begun sequences."""

    def __init__(self, server: TritonServer, count: int, *models: str, announced: str = "") -> None:
        session = {"session": f"{time.monotonic_ns():032x}"}
        with Anonymous(connect(server.grpc_url)) as manager:
            ttl = int(TTL_S * 1000)
            manager.call(Operation.OPEN, ttl_ms=ttl, cooldown_ms=int(COOLDOWN_S * 1000), **session)
            more = {"count": count, "seq": 1, "cooldown_ms": int(COOLDOWN_S * 1000)}
            self.cids = manager.call(Operation.NEW, **more, **session).tolist()
            for model in models:
                info = ModelInfo.from_config(manager.transport.model_config(model, 5.0))
                inputs = info.tensors({"X": 1}, manager.transport.library)
                for cid in self.cids:
                    options = {"sequence_id": cid, "sequence_start": True}
                    manager.transport.infer(5.0, model, inputs, **options)
            names = announced or json.dumps(models)
            manager.call(Operation.RENEW, models=names, **session)
        self.at = time.monotonic()


def soon(found: Callable[[], bool], seconds: float = NAMED_S + 10.0) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until
        time.sleep(0.05)


def ended(client: Any, model: str, count: int) -> bool:
    """Whether a client has ended so many sequences. IDs of earlier tests come again."""
    return bool(client._runner.tidier.ended[model] >= count)


def failed(client: Any) -> dict[str, int]:
    return dict(client._runner.tidier.failed)


def test_a_client_tidies(server: TritonServer) -> None:
    with Client(server.grpc_url, tidy={"leaky": {"X": 1}}) as cids:
        before = kept(server)
        cids.release(cids.acquire())
        dead = Dead(server, 3, "leaky")
        assert kept(server) == before + 3
        soon(lambda: ended(cids, "leaky", 3))
        assert time.monotonic() - dead.at >= NAMED_S
        assert kept(server) == before
        time.sleep(0.6)
        assert cids._runner.tidier.ended["leaky"] == 3, "each once"


def test_an_asyncio_client_tidies(server: TritonServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.grpc_url, tidy={"leaky": {"X": 1}}) as cids:
            await cids.release(await cids.acquire())
            Dead(server, 3, "leaky")
            until = time.monotonic() + NAMED_S + 3.0
            while not ended(cids, "leaky", 3):
                assert time.monotonic() < until
                await asyncio.sleep(0.05)

    before = kept(server)
    asyncio.run(main())
    assert kept(server) == before


def test_the_command_tidies(server: TritonServer, tmp_path: Path) -> None:
    (tmp_path / "end.json").write_text('{"X": [[1]]}')
    command = [sys.executable, "-m", "cidalloc", "tidy", server.grpc_url]
    command += ["--target", "leaky", str(tmp_path / "end.json")]
    before = kept(server)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout and process.stderr
            assert process.stdout.readline() == f"Tidying leaky at {server.grpc_url}.\n"
            Dead(server, 2, "leaky")
            assert process.stdout.readline() == "END was sent for 2 on leaky\n"
            assert kept(server) == before
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            assert process.stdout.read() == "END was sent for 2 IDs; 0 failed.\n"
            assert not process.stderr.read()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        ("leaky", '{"Y": 1}', "has no input 'Y'"),
        ("leaky", '{"X": "a"}', "input X, INT32"),
        ("leaky", "{}", "needs the input X"),
        ("leaky", "[1", "is not JSON"),
        ("leaky", "[1]", "is not a JSON object"),
        ("leaky", "[" * 100_000, "is not JSON"),
        ("nonesuch", '{"X": 1}', "serves no model nonesuch"),
        ("cidmgr", '{"X": 1}', "has no sequence_batching"),
    ],
)
def test_a_command_that_cannot_work(
    server: TritonServer, tmp_path: Path, model: str, inputs: str, words: str
) -> None:
    (tmp_path / "end.json").write_text(inputs)
    done = run("tidy", server.grpc_url, "--target", model, str(tmp_path / "end.json"))
    assert done.returncode == 1 and words in done.stderr
    assert not done.stdout and done.stderr.count("\n") == 1


def test_http_has_no_streams(server: TritonServer) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidArgument, match="tidy needs gRPC"):
            kind(server.http_url, tidy={"leaky": {"X": 1}})


def test_its_own_sequences_get_end(server: TritonServer) -> None:
    before = kept(server)
    with Client(server.grpc_url, tidy={"leaky": {"X": 1}}) as cids:
        with cids.sequence("leaky") as sequence:
            sequence.infer({"X": 1})
        assert kept(server) == before
        with cids.sequence("other") as sequence:
            sequence.infer({"X": 1})


def test_only_models_that_the_user_named(server: TritonServer) -> None:
    """Also if a stranger announces others."""
    with Client(server.grpc_url, tidy={"leaky": {"X": 1}}) as cids:
        cids.release(cids.acquire())
        before = kept(server)
        Dead(server, 2, "other", "leaky", announced='["leaky", "cidmgr", "nonesuch", "other"]')
        Dead(server, 2, announced='["leaky"]')  # it never sent anything there
        soon(lambda: ended(cids, "leaky", 4))
        assert kept(server) == before
        time.sleep(0.6)
        assert cids._runner.tidier.ended.keys() == {"leaky"} and not failed(cids)


def test_a_decoupled_model(server: TritonServer) -> None:
    """The END is over with its final response."""
    with Client(server.grpc_url, tidy={"partials": {"INPUT": 3}}) as cids:
        with Anonymous(connect(server.grpc_url)) as manager:
            session = {"session": "d" * 32}
            manager.call(Operation.OPEN, ttl_ms=1_000, cooldown_ms=200, **session)
            manager.call(Operation.NEW, seq=1, cooldown_ms=200, **session)
            manager.call(Operation.RENEW, models='["partials"]', **session)
        cids.release(cids.acquire())
        soon(lambda: ended(cids, "partials", 1))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == tidy._log.name]


def test_a_model_that_refuses_end_is_left_alone(
    server: TritonServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tidying = {"leaky": {"X": -1}, "other": {"X": 1}}  # the model fails
        with Client(server.grpc_url, tidy=tidying) as cids:
            cids.release(cids.acquire())
            Dead(server, 3, "leaky", "other")
            soon(lambda: ended(cids, "other", 3))
            soon(lambda: failed(cids) == {"leaky": 1})
            time.sleep(0.6)
            assert failed(cids) == {"leaky": 1}, "once a minute"
    assert len(warnings(caplog)) == 1 and "the model broke" in warnings(caplog)[0]
    assert "sequences of dead clients are not ended" in warnings(caplog)[0]


def load(server: TritonServer, what: str, body: Any = None) -> None:
    url = f"{server.http_url}/v2/repository/models/other/{what}"
    text = json.dumps(body or {}).encode()
    urllib.request.urlopen(urllib.request.Request(url, text), timeout=60).close()


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_model_that_is_not_as_it_was(
    server: TritonServer, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Nothing is sent, with a warning, and the other models are tidied."""
    with caplog.at_level(logging.WARNING):
        tidying = {"other": {"X": 1}, "leaky": {"X": 1}}
        with Client(server.grpc_url, tidy=tidying) as cids:
            cids.release(cids.acquire())
            Dead(server, 2, "other", "leaky")
            if how == "gone":
                load(server, "unload")
            else:
                url = f"{server.http_url}/v2/models/other/config"
                config = json.loads(urllib.request.urlopen(url).read())
                config["input"][0] |= {"data_type": "TYPE_FP64", "dims": ["7"]}
                load(server, "load", {"parameters": {"config": json.dumps(config)}})
            try:
                soon(lambda: ended(cids, "leaky", 2))
                soon(lambda: bool(warnings(caplog)))
                assert not failed(cids)
            finally:
                load(server, "unload")
                load(server, "load")
    words = "serves no model other" if how == "gone" else "input X, FP64 of shape"
    assert words in warnings(caplog)[0]


def test_live_sequences_come_first(server: TritonServer) -> None:
    """END waits a second for a slot, and comes again with the next share."""
    with Client(server.grpc_url, tidy={"full": {"X": 1}}) as cids:
        Dead(server, 2, announced='["full"]')
        with cids.sequence("full") as sequence:
            sequence.infer({"X": 1})
            soon(lambda: failed(cids) == {"full": 1}, NAMED_S + 5.0)
            began = time.monotonic()
            sequence.infer({"X": 1})
            assert time.monotonic() - began < 0.5
            assert not ended(cids, "full", 1)


def test_a_manager_that_does_not_know_it(
    server: TritonServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier manager answers as this one to an operation that it does not have."""
    monkeypatch.setattr(
        lease, "Operation", SimpleNamespace(**{**Operation.__members__, "DEAD": 99})
    )
    caplog.set_level(logging.WARNING)
    with Client(server.grpc_url, tidy={"leaky": {"X": 1}}) as cids:
        cids.release(cids.acquire())
        soon(lambda: bool(warnings(caplog)))
        time.sleep(0.6)
        assert len(warnings(caplog)) == 1 and "99 is no operation" in warnings(caplog)[0]
        cids.release(cids.acquire())


def test_the_server_refuses_what_comes_too_late(server: TritonServer) -> None:
    """The deadline of a stream holds at the server, whatever happens to the client."""
    proxy = Proxy(int(server.grpc_url.rpartition(":")[2]))
    transport = connect(proxy.url)
    answers: list[Any] = []
    before = kept(server)
    try:
        info = ModelInfo.from_config(transport.model_config("leaky", 5.0))
        inputs = info.tensors({"X": 1}, transport.library)
        start = {"sequence_start": True, "timeout": 1_000_000}
        for cid, delay, arrives in ((91, 0.2, True), (92, 1.5, False)):
            stream = transport.open_stream(lambda *answer: answers.append(answer), 1.0)
            stream.send("leaky", inputs, sequence_id=90, sequence_end=True, **start)
            soon(lambda: bool(answers))
            proxy.delay = delay
            stream.send("leaky", inputs, sequence_id=cid, **start)
            time.sleep(delay + 0.5)
            proxy.mend()
            assert kept(server) == before + 1
            assert stream.over or arrives
            stream.end()
            answers.clear()
    finally:
        transport.close()
        proxy.close()
