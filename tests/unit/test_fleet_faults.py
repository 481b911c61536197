"""Fleets under faults: names that change, servers that move, calls at the same time."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_triton import FakeTriton

from cidalloc.client import AsyncFleet, Fleet
from cidalloc.client.core.fleet import FleetServer, ServerUrl
from cidalloc.errors import Exhausted, InvalidArgument, RegistryMismatch, Unavailable
from cidalloc.manager.service import Service
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage import drain
from cidalloc.manager.storage.file_format import Word

SETTINGS = Settings(first=1, capacity=1000, max_sessions=100, fresh=True)
MODEL: dict[str, Any] = {"model": "m", "check": False, "cooldown": 1.0}


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    with FakeTriton(SETTINGS) as fake:
        yield fake


@pytest.fixture
def other() -> Iterator[FakeTriton]:
    with FakeTriton(SETTINGS) as fake:
        yield fake


def port(fake: FakeTriton) -> str:
    return fake.url.rpartition(":")[2]


def first(servers: list[FleetServer]) -> FleetServer:
    return min(servers, key=lambda each: each.url)


def test_calls_that_come_during_the_first_look_up(
    fake: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, asked = socket.getaddrinfo, threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        asked.set()
        time.sleep(0.3)
        return looks(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with Fleet(f"dns:127.0.0.1:{port(fake)}") as fleet, ThreadPoolExecutor(1) as pool:
        one = pool.submit(lambda: fleet.sequence(**MODEL).close())
        assert asked.wait(5.0)
        fleet.sequence(**MODEL).close()
        one.result(5.0)


def test_tasks_that_come_during_the_first_look_up(fake: FakeTriton) -> None:
    async def main() -> None:
        async with AsyncFleet(f"dns:127.0.0.1:{port(fake)}") as fleet:

            async def one() -> None:
                async with fleet.sequence(**MODEL):
                    pass

            await asyncio.gather(*(one() for _ in range(3)))

    asyncio.run(main())


def test_a_server_that_leaves_and_comes_back(fake: FakeTriton, other: FakeTriton) -> None:
    """As a pod does that is not ready for a moment; its sequences go on."""
    with Fleet(f"dns:127.0.0.1:{port(fake)}") as fleet:
        with fleet.sequence(**MODEL) as running:
            running.infer([])
            (server,) = fleet.servers
            fleet._set([ServerUrl(f"grpc://{other.url}")])
            fleet._set([ServerUrl(f"grpc://{fake.url}")])
            with fleet.sequence(**MODEL) as new:
                new.infer([])
            assert fleet.servers == [server] and server not in fleet._leaving


def test_a_server_that_leaves_while_a_sequence_begins_there(
    fake: FakeTriton, other: FakeTriton
) -> None:
    def choose(servers: list[FleetServer]) -> FleetServer:
        if leaves:  # in another thread
            fleet._set([ServerUrl(f"grpc://{other.url}")])
            for client in fleet._left():
                client.close()
        return servers[0]

    leaves = False
    with Fleet(f"dns:127.0.0.1:{port(fake)}", choose=choose) as fleet:
        fleet.sequence(**MODEL).close()
        leaves = True
        with fleet.sequence(**MODEL) as sequence:
            sequence.infer([])


def test_a_client_that_was_closed_since_its_server_left(
    fake: FakeTriton, other: FakeTriton
) -> None:
    with Fleet([fake.url, other.url], choose=first) as fleet:
        fleet.sequence(**MODEL).close()
        first(fleet.servers).client.close()
        with fleet.sequence(**MODEL) as sequence:
            sequence.infer([])


def test_a_server_that_moves_with_its_file(
    fake: FakeTriton, other: FakeTriton, tmp_path: Path
) -> None:
    settings = Settings(first=1, capacity=1000, fresh=True, state=str(tmp_path))
    fake.service = Service(settings)
    with Fleet([fake.url, other.url], choose=lambda servers: servers[0]) as fleet:
        fleet._choose = lambda servers: next(each for each in servers if fake.url in each.url)
        running = fleet.sequence(**MODEL)
        fake.service.close()
        fake.close()
        other.service = Service(settings)
        fleet._choose = lambda servers: next(each for each in servers if other.url in each.url)
        for _ in range(3):
            with fleet.sequence(**MODEL) as sequence:
                assert other.url in sequence.server
                sequence.infer([])
        running.close()
    other.service.close()


def test_a_task_that_is_cancelled_during_the_last_check(fake: FakeTriton) -> None:
    async def main() -> None:
        async with AsyncFleet([fake.url]) as fleet:
            reached = asyncio.Event()

            async def check(*_: Any) -> None:
                reached.set()
                await asyncio.sleep(60)

            fleet._check_twin = check  # type: ignore[method-assign]
            task = asyncio.ensure_future(fleet.sequence(**MODEL).__aenter__())
            await reached.wait()
            task.cancel()
            await asyncio.wait({task})
            assert fleet.servers[0].sequences == 0, "its ID would stay held"

    asyncio.run(main())


@pytest.mark.parametrize("kind", [Fleet, AsyncFleet])
def test_no_random_ids_on_servers_that_do_not_answer(kind: Any) -> None:
    with pytest.raises(InvalidArgument, match="fallback"):
        kind(["a:1"], fallback="random")


def test_options_of_http_with_a_name() -> None:
    Fleet("dns:https://triton.test", concurrency=2).close()

    async def main() -> None:
        await AsyncFleet("dns:http://triton.test", conn_limit=2).close()

    asyncio.run(main())
    with pytest.raises(InvalidArgument, match="conn_limit"):
        Fleet("dns:triton.test", conn_limit=2)


@pytest.mark.parametrize("name", ["dns:unix:/tmp/triton", "dns:vsock:1:2"])
def test_a_name_without_a_host(name: str) -> None:
    with pytest.raises(InvalidArgument, match="host:port"):
        Fleet(name)


def test_a_name_that_dns_cannot_have() -> None:
    with Fleet(f"dns:{'a' * 70}.test:1") as fleet, pytest.raises(Unavailable, match="resolved"):
        fleet.sequence(**MODEL)


def test_a_name_that_could_not_be_looked_up_is_looked_up_soon() -> None:
    with Fleet("dns:triton.test:1") as fleet:
        now = 1000.0
        fleet.now = lambda: now
        assert fleet._resolves() and not fleet._resolves()
        fleet._unresolved(Unavailable("no answer"))
        now += 0.1
        assert not fleet._resolves()
        now += 0.2
        assert fleet._resolves()
        now += 29.0
        assert not fleet._resolves()
        now += 1.1
        assert fleet._resolves()


def test_each_client_has_another_subset() -> None:
    urls = [f"triton-{number}:8001" for number in range(100)]
    found = []
    for label in ("one", "two", "one"):
        with Fleet(urls, subset=5, label=label) as fleet:
            found.append({each.url for each in fleet.servers})
    assert found[0] == found[2] and len(found[0] | found[1]) > 5


def test_a_server_that_left_stays_open_while_a_sequence_runs(
    fake: FakeTriton, other: FakeTriton
) -> None:
    with Fleet([fake.url]) as fleet:
        now = fleet.now()
        fleet.now = lambda: now
        running = fleet.sequence(**MODEL)
        (server,) = fleet.servers
        fleet._set([ServerUrl(f"grpc://{other.url}")])
        now += 60.0
        assert not fleet._left()
        running.close()
        now -= 31.0
        assert not fleet._left(), "a sequence may just begin there"
        now += 31.0
        assert fleet._left() == [server.client] and not fleet._left()
        server.client.close()


def test_only_a_server_without_an_answer_gets_a_heartbeat_at_once(fake: FakeTriton) -> None:
    with Fleet([fake.url], ahead=0) as fleet:  # no refill, which renews the lease
        with fleet.sequence(**MODEL):
            (server,) = fleet.servers
            lease = server.client._session.lease
            while lease.to_renew:  # the heartbeat announces the model
                time.sleep(0.01)
            with server.client._runner.lock:
                due = lease.renew_at
            server.fails(Exhausted("none"), fleet.now(), fleet._rng)
            assert lease.renew_at == due
            server.fails(Unavailable("no answer"), fleet.now(), fleet._rng)
            assert lease.renew_at != due


@pytest.mark.parametrize("kind", [Fleet, AsyncFleet])
def test_warnings_name_the_line_of_the_application(kind: Any) -> None:
    assert kind(["a:1"])._opened_at[0] == __file__


def test_a_warning_of_a_sequence_names_the_line_of_the_application(fake: FakeTriton) -> None:
    with Fleet([fake.url]) as fleet, fleet.sequence(**MODEL) as sequence:
        assert sequence._opened_at[0] == __file__


def test_no_client_is_made_after_the_fleet_was_closed(fake: FakeTriton) -> None:
    def choose(servers: list[FleetServer]) -> FleetServer:
        fleet.close()  # in another thread
        return servers[0]

    fleet = Fleet([fake.url], choose=choose)
    with pytest.raises(InvalidArgument, match="this fleet is closed"):
        fleet.sequence(**MODEL)
    assert fleet.servers[0].client is None


def test_two_servers_with_one_slice() -> None:
    """Each issues IDs of the other, and proxies could not tell them apart."""
    values = Settings(first=1, capacity=1024, max_sessions=100, fresh=True, slice="1/2")
    with FakeTriton(values) as fake, FakeTriton(values) as other:
        with Fleet([fake.url, other.url], choose=first) as fleet:
            held = [fleet.sequence(**MODEL)]
            fleet._choose = lambda servers: max(servers, key=lambda each: each.url)
            with pytest.raises(
                RegistryMismatch, match="have one slice, 1: give each manager"
            ) as error:
                fleet.sequence(**MODEL)
            assert fake.url in str(error.value) and other.url in str(error.value)
            held[0].close()


@pytest.mark.parametrize("option", ["end_inputs", "farewell"])
def test_a_sequence_of_a_fleet_has_the_options_of_a_client(fake: FakeTriton, option: str) -> None:
    """Its former names and the defaults of its client, too."""
    given = {option: {"X": np.zeros((1, 1), np.int32)}}

    async def main() -> None:
        async with AsyncFleet([fake.url]) as fleet, fleet.sequence(**MODEL, **given) as sequence:
            assert sequence._begun.end_inputs

    asyncio.run(main())
    with Fleet([fake.url]) as fleet, fleet.sequence(**MODEL, **given) as sequence:
        assert sequence._begun.end_inputs


def test_a_server_that_is_drained_gets_no_sequence(fake: FakeTriton, other: FakeTriton) -> None:
    with Fleet([fake.url, other.url], choose=first) as fleet:
        drained = first(fleet.servers)
        with fleet.sequence(**MODEL):
            assert drained.sequences == 1
        server = fake if drained.url == fake.url else other
        header = server.service._holder.registry().store.header
        header[Word.DRAIN] = drain._name_of(header)
        drained.client._session.lease.cache.drain(True)  # as its next answer will tell it
        with fleet.sequence(**MODEL):
            assert drained.sequences == 0
