"""Fleets of real servers: each sequence on one server, whatever happens to the others."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from anonymous import Anonymous
from proxy import Proxy
from servers import Server
from test_unended import Blocking

from cidalloc.client import AsyncFleet, Client, Fleet
from cidalloc.client.core.model_info import ModelInfo
from cidalloc.client.sync.transport import connect
from cidalloc.devserver import demo
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import (
    CidError,
    Exhausted,
    InvalidArgument,
    RegistryMismatch,
    SequenceLost,
    Unavailable,
)
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.drain import DrainSwitch

pytestmark = pytest.mark.server

MODEL = demo.MODEL
KINDS = ["grpc", "http"]
SETTINGS = {"first": 1, "capacity": 3000, "cooldown_ms": 200, "grace_ms": 500, "fresh": True}


class Place:
    """A server with a file, and a proxy for each protocol: its address, which can move."""

    def __init__(self, folder: Path) -> None:
        values = Settings(state=str(folder / "state"), **SETTINGS)  # type: ignore[arg-type]
        demo.write_repository(folder / "models", values)
        self.folder = folder
        self.start()
        self.proxies = {kind: Proxy(self.port(kind)) for kind in KINDS}

    def start(self) -> None:
        self.server = Server(self.folder / "models")
        self.server.start()
        self.runs = True

    def stop(self) -> None:
        """End the server; its address refuses from now on."""
        self.server.stop()
        self.runs = False
        for proxy in getattr(self, "proxies", {}).values():
            proxy.cut_all()
        time.sleep(0.05)  # gRPC sees some milliseconds later that a connection was closed

    def port(self, kind: str) -> int:
        url = self.server.grpc_url if kind == "grpc" else self.server.http_url
        return int(url.rpartition(":")[2])

    def url(self, kind: str) -> str:
        return f"{kind}://{self.proxies[kind].url}"

    def move(self, target: Place) -> None:
        """Let the address lead to another server; all connections break."""
        for kind, proxy in self.proxies.items():
            proxy.target = target.port(kind)
            proxy.cut_all()
        time.sleep(0.05)
        for proxy in self.proxies.values():
            proxy.mend()

    def restart(self, forget: bool = False) -> None:
        self.stop()
        if forget:
            (self.folder / "state" / "cidmgr.cidalloc").unlink()
        self.start()
        self.move(self)

    def close(self) -> None:
        for proxy in self.proxies.values():
            proxy.close()
        self.server.stop()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[TritonServer]]:
    """Two servers with six IDs each."""
    with ExitStack() as stack:
        found: list[TritonServer] = []
        for _ in range(2):
            folder = tmp_path_factory.mktemp("tiny")
            demo.write_repository(folder, Settings(**{**SETTINGS, "capacity": 6}))  # type: ignore[arg-type]
            server = Server(folder)
            server.start()
            stack.callback(server.stop)
            found.append(server)
        yield found


@pytest.fixture(scope="module")
def places(
    tiny: list[TritonServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Place]]:
    """Three servers, which start before any client, as do the others."""
    with ExitStack() as stack:
        found = []
        for _ in range(3):
            place = Place(tmp_path_factory.mktemp("server"))
            stack.callback(place.close)
            found.append(place)
        yield found


@pytest.fixture(autouse=True)
def healed(places: list[Place]) -> Iterator[None]:
    """After each test the servers are there again, each at its own address."""
    yield
    for place in places:
        if not place.runs:
            place.restart()
        place.move(place)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fleet(places: list[Place], kind: str) -> Iterator[Fleet]:
    with Fleet([place.url(kind) for place in places], ttl=10.0) as fleet:
        yield fleet


def one(fleet: Fleet) -> str:
    """Run a sequence, check its sums, and return its server."""
    with fleet.sequence(MODEL) as sequence:
        total = 0
        for number in (3, 4, 5):
            total += number
            result = sequence.infer({"INPUT": [[number]]}, end=number == 5)
            assert result["OUTPUT"][0, 0] == total
        return sequence.server


def spread(fleet: Fleet, count: int = 30) -> Counter[str]:
    return Counter(one(fleet) for _ in range(count))


def test_sequences_go_to_all_and_stay(fleet: Fleet, places: list[Place], kind: str) -> None:
    urls = [place.url(kind) for place in places]
    assert spread(fleet).keys() == set(urls)
    with ExitStack() as stack:
        open_ = [stack.enter_context(fleet.sequence(MODEL)) for _ in range(30)]
        assert max(Counter(each.server for each in open_).values()) <= 16
        assert {each.url: each.sequences for each in fleet.servers} == Counter(
            each.server for each in open_
        )
        for number, sequence in enumerate(open_):
            sequence.infer({"INPUT": [[number]]})
        for number, sequence in enumerate(open_):
            result = sequence.infer({"INPUT": [[1]]}, end=True)
            assert result["OUTPUT"][0, 0] == number + 1
    found = fleet.status()
    assert set(found) == set(urls)
    assert len({found[url]["registry"] for url in urls}) == 3  # type: ignore[index]


def test_streams(places: list[Place]) -> None:
    """A sequence over a stream, with END by ``end_inputs``, on each of the servers."""
    with Fleet([place.url("grpc") for place in places]) as fleet, ExitStack() as stack:
        open_ = [
            stack.enter_context(
                fleet.sequence(MODEL, streaming=True, end_inputs={"INPUT": [[0]]}, timeout=5.0)
            )
            for _ in range(12)
        ]
        assert len({each.server for each in open_}) == 3
        futures = [each.async_infer({"INPUT": [[n]]}) for n, each in enumerate(open_)]
        futures += [each.async_infer({"INPUT": [[1]]}) for each in open_]
        found = [each.result(10)["OUTPUT"][0, 0] for each in futures]
        assert found == [*range(12), *range(1, 13)]
        stack.close()
        assert all(each.state == "closed, recycled" for each in open_)


def test_a_server_that_died(fleet: Fleet, places: list[Place], kind: str) -> None:
    spread(fleet)
    places[0].stop()
    slow = []
    for _ in range(40):
        began = time.monotonic()
        assert one(fleet) != places[0].url(kind)
        slow.append(time.monotonic() - began)
    assert sorted(slow)[-2] < 0.3 and max(slow) < 1.0, "no time-out"
    assert isinstance(fleet.servers[0].trouble, Unavailable)
    places[0].restart()
    soon(lambda: one(fleet) == places[0].url(kind), 15.0)


def soon(found: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_server_that_hangs(places: list[Place], kind: str) -> None:
    """It costs the limit for connecting, once, and comes back without a further wait."""
    urls = [place.url(kind) for place in places]
    with Fleet(urls, ttl=30.0, connect=0.5) as fleet:
        spread(fleet)
        time.sleep(0.2)
        os.kill(places[1].server.pid, signal.SIGSTOP)
        try:
            slow = []
            for _ in range(40):
                began = time.monotonic()
                assert one(fleet) != urls[1]
                slow.append(time.monotonic() - began)
                time.sleep(0.02)
            assert max(slow) < 1.0
            assert sum(each > 0.4 for each in slow) == 1
        finally:
            os.kill(places[1].server.pid, signal.SIGCONT)
        soon(lambda: one(fleet) == urls[1], 10.0)


def test_a_server_that_is_drained(fleet: Fleet, places: list[Place], kind: str) -> None:
    spread(fleet)
    switch = DrainSwitch(places[2].folder / "state" / "cidmgr.cidalloc")
    with ExitStack() as stack:
        stack.callback(switch.close)
        running = []
        while {each.server for each in running} != {place.url(kind) for place in places}:
            running.append(stack.enter_context(fleet.sequence(MODEL)))
            running[-1].infer({"INPUT": [[1]]})
        switch.set(True)
        soon(lambda: switch.answered, 5.0)
        soon(lambda: places[2].url(kind) not in spread(fleet, 20), 8.0)
        assert places[2].url(kind) not in spread(fleet)
        for sequence in running:
            assert sequence.infer({"INPUT": [[1]]}, end=True)["OUTPUT"][0, 0] == 2
        switch.set(False)
        soon(lambda: one(fleet) == places[2].url(kind), 8.0)


@pytest.mark.parametrize("forget", [False, True], ids=["with its file", "without its file"])
def test_a_server_that_is_restarted(
    fleet: Fleet, places: list[Place], kind: str, forget: bool
) -> None:
    """Its sequences are lost, with words and its name; all others go on."""
    spread(fleet)
    with ExitStack() as stack:
        running = []
        while len({each.server for each in running}) < 3:
            running.append(stack.enter_context(fleet.sequence(MODEL)))
            running[-1].infer({"INPUT": [[1]]})
        with ThreadPoolExecutor() as pool:
            restarted = pool.submit(places[0].restart, forget)
            while not restarted.done():  # it may take longer than the model's idle time
                for sequence in running:
                    if sequence.server != places[0].url(kind):
                        sequence.infer({"INPUT": [[1]]})
                time.sleep(0.2)
            restarted.result()
        lost = 0
        for sequence in running:
            if sequence.server != places[0].url(kind):
                sequence.infer({"INPUT": [[1]]}, end=True)
                continue
            with pytest.raises((SequenceLost, Unavailable)) as failure:
                for _ in range(50):
                    try:
                        sequence.infer({"INPUT": [[1]]}, timeout=2.0)
                    except Unavailable:
                        time.sleep(0.1)
                raise AssertionError("the state is gone")
            assert isinstance(failure.value, SequenceLost)
            lost += 1
        assert lost
    soon(lambda: one(fleet) == places[0].url(kind), 15.0)


def test_addresses_that_are_swapped(fleet: Fleet, places: list[Place], kind: str) -> None:
    """Both registries issue the same small numbers: no request may reach a stranger's state."""
    a, b = places[:2]
    with Client(a.server.grpc_url) as other:
        strangers = [other.sequence(MODEL) for _ in range(20)]
        for each in strangers:
            each.infer({"INPUT": [[1000]]})
        running = []
        for _ in range(12):
            running.append(fleet.sequence(MODEL))
            running[-1].infer({"INPUT": [[1]]})
        swap(a, b)
        for sequence in running:
            try:
                result = sequence.infer({"INPUT": [[1]]}, end=True, timeout=3.0)
            except (SequenceLost, CidError):
                assert sequence.server in (a.url(kind), b.url(kind))
            else:
                assert result["OUTPUT"][0, 0] == 2, "the state of another"
                assert sequence.server == places[2].url(kind)
            sequence.close()
        for each in strangers:
            assert each.infer({"INPUT": [[1]]}, end=True)["OUTPUT"][0, 0] == 1001
        soon(lambda: len(spread(fleet, 20)) == 3, 15.0)


@pytest.mark.parametrize("way", ["grpc", "http", "aio-grpc", "aio-http"])
def test_the_address_of_one_client_moves(places: list[Place], way: str) -> None:
    """The next request of a sequence waits until the client knows who is there."""
    a, b = places[:2]
    url = a.url(way.removeprefix("aio-"))
    cids: Any = Blocking(url) if "aio" in way else Client(url)
    with Client(a.server.grpc_url) as watch, Anonymous(connect(b.server.grpc_url)) as plain:
        sequence = cids.sequence(MODEL)
        sequence.infer({"INPUT": [[1]]})
        before = watch.status()["operations"]["RENEW"]
        a.move(a)  # all connections break, and the same server is there
        notice(cids)
        for number in (2, 3):
            assert sequence.infer({"INPUT": [[1]]})["OUTPUT"][0, 0] == number
        assert watch.status()["operations"]["RENEW"] == before + 1
        # A stranger uses this ID on the other server.
        transport: Any = plain.transport
        model = ModelInfo.from_config(transport.model_config(MODEL, 5.0))
        thousand = model.tensors({"INPUT": [[1000]]}, transport.library)
        stranger = {"sequence_id": sequence.cid}
        transport.infer(5.0, MODEL, thousand, sequence_start=True, **stranger)
        a.move(b)
        notice(cids)
        with pytest.raises(SequenceLost):
            sequence.infer({"INPUT": [[1]]}, timeout=5.0)
        sequence.close()
        found = transport.infer(5.0, MODEL, thousand, sequence_end=True, **stranger)
        assert found["OUTPUT"][0, 0] == 2000
        new = cids.sequence(MODEL)
        assert new.infer({"INPUT": [[7]]}, end=True)["OUTPUT"][0, 0] == 7
        new.close()
    shut(cids)


def shut(cids: Any) -> None:
    cids.close()
    if isinstance(cids, Blocking):
        cids.loop.close()


def notice(cids: Any) -> None:
    """Let the event loop of an asyncio client run, as it always does in a program."""
    if isinstance(cids, Blocking):
        cids.run(asyncio.sleep(0.05))


@pytest.mark.parametrize("way", ["grpc", "http", "aio-grpc", "aio-http"])
def test_nobody_is_at_the_address(places: list[Place], way: str) -> None:
    """The request fails at once, and the sequence goes on when the server is back."""
    place = places[0]
    url = place.url(way.removeprefix("aio-"))
    cids: Any = Blocking(url) if "aio" in way else Client(url)
    sequence = cids.sequence(MODEL)
    sequence.infer({"INPUT": [[1]]})
    for proxy in place.proxies.values():
        proxy.cut_all()
    time.sleep(0.1)
    began = time.monotonic()
    with pytest.raises(Unavailable):
        sequence.infer({"INPUT": [[1]]}, timeout=30.0)
    assert time.monotonic() - began < 15.0
    place.move(place)
    # It was not sent, so it did not count.
    assert sequence.infer({"INPUT": [[1]]}, end=True)["OUTPUT"][0, 0] == 2
    sequence.close()
    shut(cids)


def swap(a: Place, b: Place) -> None:
    for kind in KINDS:
        a.proxies[kind].target, b.proxies[kind].target = b.port(kind), a.port(kind)
    for each in (a, b):
        for proxy in each.proxies.values():
            proxy.cut_all()
    time.sleep(0.05)
    for each in (a, b):
        for proxy in each.proxies.values():
            proxy.mend()


def test_all_down_and_back(places: list[Place], kind: str) -> None:
    urls = [place.url(kind) for place in places]
    with Fleet(urls, ttl=5.0, connect=0.5) as fleet:
        spread(fleet)
        for place in places:
            place.stop()
        with pytest.raises(Unavailable, match="no server of the fleet takes") as failure:
            one(fleet)
        assert all(url in str(failure.value) for url in urls)
        for place in places:
            place.restart()
        soon(lambda: works(fleet), 15.0)
        soon(lambda: len(spread(fleet, 20)) == 3, 15.0)


def works(fleet: Fleet) -> bool:
    try:
        one(fleet)
    except CidError:
        return False
    return True


def test_a_name_that_is_resolved_anew(
    places: list[Place], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New sequences go to the new servers, and running ones end where they are."""
    first = Proxy(places[0].port(kind), "127.0.0.2")
    second = Proxy(places[1].port(kind), "127.0.0.3", first.port)
    hosts = ["127.0.0.2"]
    asked = []

    def resolve(host: str, port: int, *more: Any, **options: Any) -> list[Any]:
        if not str(host).endswith(".test"):
            return real(host, port, *more, **options)
        asked.append(host)
        time.sleep(0.01)
        if not hosts:
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in hosts]

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    try:
        with Fleet(f"dns:{kind}://triton.test:{first.port}", ttl=5.0) as fleet:
            now = fleet.now()
            fleet.now = lambda: now
            running = fleet.sequence(MODEL)
            running.infer({"INPUT": [[1]]})
            assert running.server == f"{kind}://127.0.0.2:{first.port}"
            hosts[:] = ["127.0.0.3"]
            assert one(fleet) == running.server, "within 30 s"
            now += 30.0
            assert one(fleet) == f"{kind}://127.0.0.3:{first.port}", "at once, if that is quick"
            assert running.infer({"INPUT": [[1]]}, end=True)["OUTPUT"][0, 0] == 2
            running.close()
            left = fleet._leaving[0].client
            one(fleet)
            assert not left._session.closed, "a sequence might just begin there"
            now += 30.0
            one(fleet)
            soon(lambda: left._session.closed, 5.0)
            hosts.clear()
            now += 30.0
            for _ in range(5):
                assert one(fleet) == f"{kind}://127.0.0.3:{first.port}", "the old ones stay"
        with Fleet(f"dns:{kind}://triton.test:{first.port}") as empty:
            with pytest.raises(Unavailable, match=r"triton\.test:\d+ cannot be resolved"):
                one(empty)
            hosts[:] = ["127.0.0.2", "127.0.0.3"]
            soon(lambda: works(empty), 5.0)
    finally:
        first.close()
        second.close()
    assert asked


def test_exhausted_servers(tiny: list[TritonServer], kind: str) -> None:
    a, b = urls = [each.grpc_url if kind == "grpc" else each.http_url for each in tiny]
    with Client(a, ahead=0) as first, Client(b, ahead=0) as second, Fleet(urls, ahead=0) as fleet:
        soon(lambda: first.status()["free"] == second.status()["free"] == 6, 5.0)
        held = [first.acquire_many(6), second.acquire_many(5)]
        with fleet.sequence(MODEL) as sequence:
            assert sequence.server == f"{kind}://{b.removeprefix('http://')}"
            with pytest.raises(Exhausted, match="no server of the fleet takes a new sequence: "):
                one(fleet)
            began = time.monotonic()
            with pytest.raises(Exhausted, match="no server"):
                fleet.sequence(MODEL, wait=0.5)
            assert 0.4 < time.monotonic() - began < 3.0
            first.release_many(held[0][:1], cooldown=0.5)
            with fleet.sequence(MODEL, wait=9.0) as waited:
                assert waited.server == f"{kind}://{a.removeprefix('http://')}"
        first.release_many(held[0][1:], ended=True)
        second.release_many(held[1], ended=True)


def test_choose(places: list[Place], kind: str) -> None:
    urls = [place.url(kind) for place in places]
    with Fleet(urls, choose=lambda servers: min(servers, key=lambda each: each.url)) as fleet:
        assert spread(fleet, 6).keys() == {min(urls)}
    with Fleet(urls, choose=lambda servers: None) as fleet:  # type: ignore[arg-type, return-value]
        with pytest.raises(InvalidArgument, match=r"choose\(\) returned None"):
            one(fleet)
    with Fleet(urls, subset=1, label="a") as fleet:
        assert len(spread(fleet, 6)) == len(fleet.servers) == 1
    chosen = Counter(Fleet(urls, subset=1, label=f"c{n}").servers[0].url for n in range(99))
    assert min(chosen.values()) > 15


@pytest.mark.parametrize(
    ("servers", "words"),
    [
        ([], "one server at least"),
        (["a:1", "b:1", "grpc://a:1"], "'grpc://a:1' is there twice"),
        (["a:1", "http://b:1"], "some servers are HTTP and some gRPC"),
        (["a b"], "is not a URL"),
        ("a:1", "neither a list of URLs nor 'dns:'"),
        ("dns:a b:1", "is not a URL"),
    ],
)
def test_servers_that_are_none(servers: Any, words: str) -> None:
    for kind in (Fleet, AsyncFleet):
        with pytest.raises(InvalidArgument, match=words):
            kind(servers)


def test_wrong_options_are_an_error_at_once() -> None:
    for options in ({"ttl": -1}, {"connect": 0}, {"subset": 0}, {"nonesuch": 1}, {"transport": 1}):
        with pytest.raises(InvalidArgument):
            Fleet(["a:1"], **options)  # type: ignore[arg-type]


def test_one_server_under_two_names(places: list[Place], kind: str) -> None:
    place = places[0]
    urls = [place.url(kind), place.url(kind).replace("127.0.0.1", "localhost")]
    with Fleet(urls) as fleet, pytest.raises(RegistryMismatch, match="answer with one registry"):
        spread(fleet)


def test_a_server_without_a_manager(places: list[Place], tmp_path: Path, kind: str) -> None:
    demo.write_repository(tmp_path, Settings(fresh=True))
    (tmp_path / "cidmgr").rename(tmp_path.parent / f"{tmp_path.name}-cidmgr")
    with Server(tmp_path) as bare:
        url = bare.grpc_url if kind == "grpc" else bare.http_url
        with Fleet([url, places[0].url(kind)]) as fleet:
            assert spread(fleet, 10).keys() == {places[0].url(kind)}
        with Fleet([url]) as fleet, pytest.raises(Unavailable, match="serves no model cidmgr"):
            one(fleet)


def test_a_fleet_that_is_closed(fleet: Fleet) -> None:
    spread(fleet, 6)
    fleet.close()
    fleet.close()
    with pytest.raises(InvalidArgument, match="this fleet is closed"):
        fleet.sequence(MODEL)


def test_asyncio(places: list[Place], kind: str) -> None:
    async def main() -> None:
        urls = [place.url(kind) for place in places]
        async with AsyncFleet(urls, ttl=5.0) as fleet:

            async def run() -> str:
                async with fleet.sequence(MODEL) as sequence:
                    await sequence.infer({"INPUT": [[1]]})
                    result = await sequence.infer({"INPUT": [[1]]}, end=True)
                    assert result["OUTPUT"][0, 0] == 2
                    return sequence.server

            assert set(await asyncio.gather(*(run() for _ in range(20)))) == set(urls)
            await asyncio.to_thread(places[0].stop)
            assert set(await asyncio.gather(*(run() for _ in range(20)))) == set(urls[1:])
            found = await fleet.status()
            assert isinstance(found[urls[0]], Unavailable)
            assert isinstance(found[urls[1]], dict)
            sequence = await fleet.sequence(MODEL)
            await sequence.close()
        with pytest.raises(InvalidArgument, match="this fleet is closed"):
            fleet.sequence(MODEL)

    asyncio.run(main())
