"""IDs from one manager, sequences on other servers behind a plain load balancer (`servers=`)."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from based import BASE, BasedServer, send
from proxies import RealProxy, free_ports, has
from tls import make_certificate, terminated

from cidalloc.client import AsyncClient, Client
from cidalloc.devserver.demo import MODEL
from cidalloc.errors import (
    Draining,
    InvalidArgument,
    SequenceLost,
    SessionExpired,
    Unavailable,
)
from cidalloc.manager.storage.drain import DrainSwitch

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not has("haproxy"), reason="haproxy is not installed: apt-get install it"),
]

LINES = """
defaults
    mode tcp
    retries 0
    timeout connect 2s
    timeout client 1h
    timeout server 1h
"""
"""A load balancer that knows connections, and nothing of what they carry."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[BasedServer]]:
    """A manager and two servers with the model, which start before any client."""
    with ExitStack() as stack:
        found = []
        for number in range(3):
            folder = tmp_path_factory.mktemp("server")
            place = BasedServer(folder, number * BASE, manager=number == 0)
            stack.callback(place.stop)
            found.append(place)
        yield found


@pytest.fixture
def manager(places: list[BasedServer]) -> BasedServer:
    return places[0]


@pytest.fixture
def balancer(places: list[BasedServer], tmp_path: Path) -> Iterator[RealProxy]:
    """HAProxy in TCP mode before the servers with the model: each connection goes to the next."""
    ports, text = free_ports(2), LINES
    for number, name in enumerate(("http", "grpc")):
        servers = [f"server s{place.base} 127.0.0.1:{place.ports[number]}" for place in places[1:]]
        text += f"listen {name}\n bind 127.0.0.1:{ports[number]}\n"
        text += "".join(f" {line}\n" for line in servers)
    found = RealProxy("haproxy", text, ports, tmp_path)
    yield found
    found.close()


def soon(found: Callable[[], bool]) -> None:
    until = time.monotonic() + 5.0
    while not found():
        assert time.monotonic() < until
        time.sleep(0.01)


def run(client: Client, streaming: bool = True) -> int:
    """Run a sequence, check its sums, and return what they begin with."""
    with client.sequence(MODEL, streaming=streaming) as sequence:
        base = send(sequence, 3) - 3
        assert send(sequence, 4) == base + 7
        assert send(sequence, 5, end=True) == base + 12
    return base


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_ids_from_one_manager(manager: BasedServer, balancer: RealProxy, kind: str) -> None:
    bases = set()
    for _ in range(4):
        with Client(manager.url(kind), servers=balancer.url("grpc")) as client:
            with client.sequence(MODEL, streaming=True) as sequence:
                assert sequence.server == balancer.url("grpc") and not sequence.headers
                assert sequence.cid in client.held() and client.active() >= 1
            found = {run(client) for _ in range(5)}
            assert len(found) == 1, "one connection"
            assert client.status()["operations"]["NEW"] > 0
        bases |= found
        # Each client has two connections there, one of them for configurations. With a third one
        # the next client's streams come to the other server.
        socket.create_connection(("127.0.0.1", balancer.ports[1])).close()
    assert bases == {BASE, 2 * BASE}


def test_ids_from_one_manager_in_asyncio(manager: BasedServer, balancer: RealProxy) -> None:
    async def work() -> None:
        async with AsyncClient(manager.url("grpc"), servers=balancer.url("grpc")) as client:
            async with client.sequence(MODEL, streaming=True) as sequence:
                base = int((await sequence.infer({"INPUT": [[3]]}))["OUTPUT"][0, 0]) - 3
                answer = await sequence.infer({"INPUT": [[4]]}, end=True)
                assert base in (BASE, 2 * BASE) and answer["OUTPUT"][0, 0] == base + 7
            assert sequence.state == "closed, recycled"

    asyncio.run(work())


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_a_restart_of_the_manager_costs_no_sequence(
    manager: BasedServer, balancer: RealProxy, kind: str
) -> None:
    with Client(manager.url(kind), servers=balancer.url("grpc"), ttl=30.0) as client:
        with ExitStack() as stack:
            sequences = [
                stack.enter_context(client.sequence(MODEL, streaming=True)) for _ in range(10)
            ]
            first = [send(sequence, 1) for sequence in sequences]
            registry = client.status()["registry"]
            manager.stop()
            for total in range(1, 4):
                client._session.lease.renew_at = 0  # heartbeats fail meanwhile
                client._runner.wake()
                time.sleep(0.2)
                assert [send(sequence, 1) - total for sequence in sequences] == first
            with ThreadPoolExecutor() as pool:  # it may take longer than the model's idle time
                started = pool.submit(manager.start)
                while not started.done():
                    total += 1
                    assert [send(sequence, 1) - total for sequence in sequences] == first
                    time.sleep(0.2)
                started.result()
            for sequence, begun in zip(sequences, first, strict=True):
                assert send(sequence, 1, end=True) == begun + total + 1
        assert client.status()["registry"] == registry
        assert all(sequence.state == "closed, recycled" for sequence in sequences)


def test_the_lease_still_counts(manager: BasedServer, balancer: RealProxy) -> None:
    """Without heartbeats other clients may get the ID, also if its server answers."""
    with Client(manager.url("grpc"), servers=balancer.url("grpc"), ttl=1.0, timeout=0.5) as client:
        with client.sequence(MODEL, streaming=True) as sequence:
            send(sequence, 1)
            manager.stop()
            try:
                time.sleep(1.1)
                with pytest.raises(SessionExpired):
                    send(sequence, 1)
            finally:
                manager.start()


def test_a_server_that_dies(
    manager: BasedServer, places: list[BasedServer], balancer: RealProxy
) -> None:
    """Its sequences break, and the next ones are on the other; the manager need not confirm it."""
    with Client(manager.url("grpc"), servers=balancer.url("grpc"), timeout=2.0) as client:
        with client.sequence(MODEL, streaming=True) as sequence:
            dead = send(sequence, 0)
            place = next(place for place in places if place.base == dead)
            renewed = client.status()["operations"].get("RENEW", 0)
            place.stop()
            try:
                with pytest.raises(Unavailable, match=r"stream to .* broke"):
                    send(sequence, 1)
                others = set()
                for _ in range(6):
                    try:
                        others.add(run(client))
                    except Unavailable:  # the balancer has no health checks
                        time.sleep(0.2)
                assert others == {3 * BASE - dead}
                assert client.status()["operations"].get("RENEW", 0) <= renewed + 1
            finally:
                place.start()


def test_without_streams_requests_part(manager: BasedServer, balancer: RealProxy) -> None:
    """Over HTTP each connection may lead elsewhere: the error says so, and no sum is wrong."""
    lost = []
    with Client(manager.url("grpc"), servers=balancer.url("http")) as client:
        for _ in range(4):
            with client.sequence(MODEL) as sequence, client.sequence(MODEL) as other:
                try:
                    futures = [each.async_infer({"INPUT": [[2]]}) for each in (sequence, other)]
                    first = [int(each.result()["OUTPUT"][0, 0]) for each in futures]
                    assert {each - 2 for each in first} <= {BASE, 2 * BASE}
                    for each, begun in ((other, first[1]), (sequence, first[0])):
                        assert send(each, 2) == begun + 2
                except SequenceLost as error:
                    lost.append(str(error))
    assert lost and all("another server got the request" in text for text in lost)


def test_a_drain_of_the_manager(manager: BasedServer, balancer: RealProxy) -> None:
    """No sequence begins, and those that run go on."""
    switch = DrainSwitch(manager.state / "cidmgr.cidalloc")
    with Client(manager.url("grpc"), servers=balancer.url("grpc"), ahead=0) as client:
        with client.sequence(MODEL, streaming=True) as sequence:
            begun = send(sequence, 1)
            switch.set(True)
            try:
                soon(lambda: switch.answered)
                with pytest.raises(Draining):
                    client.sequence(MODEL, streaming=True)
                assert send(sequence, 1, end=True) == begun + 1
            finally:
                switch.set(False)
                switch.close()


def test_tls_and_headers_for_both(
    manager: BasedServer, balancer: RealProxy, tmp_path: Path
) -> None:
    certificate = make_certificate(tmp_path, "server")
    with ExitStack() as stack:
        ports = [
            stack.enter_context(terminated(port, certificate))
            for port in (manager.ports[1], balancer.ports[1])
        ]
        urls = [f"grpcs://localhost:{port}" for port in ports]
        options = {"root_certificates": str(certificate.cert), "headers": {"x-user": "me"}}
        with Client(urls[0], servers=urls[1], **options) as client:  # type: ignore[arg-type]
            assert run(client) in (BASE, 2 * BASE)
            for transport in client._runner.transports:
                assert transport._calls.metadata == (("x-user", "me"),)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_tidy_is_refused(kind: type) -> None:
    with pytest.raises(InvalidArgument, match="tidy goes without servers="):
        kind("localhost:1", servers="localhost:2", tidy={MODEL: {"INPUT": 0}})
