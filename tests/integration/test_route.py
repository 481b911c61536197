"""Behind the real nginx and HAProxy: each sequence on the server of its slice, or an error."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from based import BASE, BasedServer, send
from proxies import DEPLOY, RealProxy, has, router, routing

from cidalloc.client import AsyncClient, Client
from cidalloc.devserver import demo
from cidalloc.errors import (
    CidError,
    InvalidArgument,
    ProtocolError,
    RegistryMismatch,
    SequenceLost,
    Unavailable,
)

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not DEPLOY.is_dir(), reason="a source distribution has no deploy/"),
]

MODEL = demo.MODEL
PROXIES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not has(name), reason=f"{name} is not installed: apt-get install it"
        ),
    )
    for name in ("nginx", "haproxy")
]
NGINX = pytest.mark.skipif(not has("nginx"), reason="nginx is not installed: apt-get install it")
KINDS = ["http", "grpc"]
REQUESTS, SECONDS = map(int, os.environ.get("CIDALLOC_ROUTE", "3000x15").split("x"))


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[BasedServer]]:
    """Server k has slice k of 4. They start before any client."""
    with ExitStack() as stack:
        found = []
        for number in range(3):
            base, folder = (number + 1) * BASE, tmp_path_factory.mktemp("server")
            # With their files, so that they begin at once when they are started again.
            each = BasedServer(folder, base, capacity=2**18, slice=f"{number}/4")
            stack.callback(each.stop)
            found.append(each)
        yield found


def ports_of(routed: list[BasedServer]) -> list[tuple[int, int]]:
    return [(each.ports[0], each.ports[1]) for each in routed]


@pytest.fixture(params=PROXIES)
def proxy(
    request: pytest.FixtureRequest, routed: list[BasedServer], tmp_path: Path
) -> Iterator[RealProxy]:
    found = router(request.param, ports_of(routed), tmp_path)
    yield found
    found.close()


@pytest.fixture(params=["http", "grpc", "stream"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def url(proxy: RealProxy, way: str) -> str:
    return proxy.url("http" if way == "http" else "grpc")


def one(client: Client, way: str) -> int:
    """Run a sequence, check its sums, and return what they begin with."""
    with client.sequence(MODEL, streaming=way == "stream") as sequence:
        base = send(sequence, 3) - 3
        assert send(sequence, 4) == base + 7
        assert send(sequence, 5, end=True) == base + 12
    return base


def slice_of(client: Client) -> int:
    """Return the slice of a client's session, which its server is found by."""
    number = client._session.lease.slice
    assert number is not None
    return number


# ---- What carries the header


def edited(
    name: str, routed: list[BasedServer], folder: Path, *pairs: tuple[str, str]
) -> RealProxy:
    """Run a proxy with the configuration of `deploy/` after these substitutions."""
    text, ports = routing(name, ports_of(routed), folder)
    for old, new in pairs:
        text, count = re.subn(old, new, text)
        assert count, old
    return RealProxy(name, text, ports, folder)


@NGINX
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_carries_the_header(
    routed: list[BasedServer], tmp_path: Path, kind: str, asynchronous: bool
) -> None:
    """OPEN and what is sent before it do not, and all that follows does."""
    log = tmp_path / "access.log"
    form = "log_format route '$uri \"$http_cid_slice\"'; "
    proxy = edited("nginx", routed, tmp_path, ("access_log off", f"{form} access_log {log} route"))
    tidy = {MODEL: {"INPUT": 0}} if kind == "grpc" else None
    ways = ("grpc", "stream") if kind == "grpc" else ("http",)

    async def use_async() -> int | None:
        async with AsyncClient(proxy.url(kind), tidy=tidy) as cids:
            for way in ways:
                async with cids.sequence(MODEL, streaming=way == "stream") as sequence:
                    await sequence.infer(
                        {"INPUT": [[1]]}, **({} if way == "stream" else {"headers": {}})
                    )
                    await sequence.infer({"INPUT": [[1]]}, end=True)
                    assert sequence.headers == {"cid-slice": str(cids._session.lease.slice)}
            await cids.status()
            await asyncio.sleep(0.5)
            return cids._session.lease.slice

    def use() -> int | None:
        with Client(proxy.url(kind), tidy=tidy) as cids:
            for way in ways:
                one(cids, way)
            cids.status()
            time.sleep(0.5)  # for a round of the tidier
            return slice_of(cids)

    try:
        number = asyncio.run(use_async()) if asynchronous else use()
    finally:
        proxy.close()
    lines = [line.rsplit(" ", 1) for line in log.read_text().splitlines()]
    without = [path for path, value in lines if value == '"-"']
    routed_paths = [path for path, value in lines if value == f'"{number}"']
    assert len(without) + len(routed_paths) == len(lines) >= 8, lines
    infer, config = ("cidmgr/infer", "/config") if kind == "http" else ("ModelInfer", "ModelConfig")
    assert sum(path.endswith(infer) for path in without) == 1, "OPEN alone"
    assert all(path.endswith((infer, config)) for path in without), without
    if kind == "grpc":
        streams = sum(path.endswith("ModelStreamInfer") for path in routed_paths)
        assert streams == 2, "of a sequence, and of a round of END for the dead"


def test_the_header_is_the_clients() -> None:
    with pytest.raises(InvalidArgument, match="CID-Slice is set by the client"):
        Client("localhost:1", headers={"CID-Slice": "3"})


# ---- Where requests go


def test_sequences_stay(proxy: RealProxy, way: str) -> None:
    """Clients come to all servers, and all sequences of a client are on one."""
    seen: Counter[int] = Counter()
    for _ in range(12):
        with Client(url(proxy, way)) as client:
            bases = {one(client, way) for _ in range(4)}
            assert bases == {(slice_of(client) + 1) * BASE}
            seen[slice_of(client)] += 1
    assert len(seen) == 3, seen


def test_a_slice_that_the_proxy_does_not_know(proxy: RealProxy, way: str) -> None:
    with Client(url(proxy, way), timeout=0.5) as client:
        one(client, way)
        client._transport.route = lambda: 3
        words = "knows no server for cid-slice 3: add it to"
        with client.sequence(MODEL, streaming=way == "stream") as sequence:
            # HAProxy resets a stream after its own answer, and gRPC then drops the words.
            reset = way == "stream" and proxy.name == "haproxy"
            with pytest.raises(Unavailable, match=f"{words}|RST_STREAM" if reset else words):
                send(sequence, 1)
        with pytest.raises(Unavailable, match=words):
            client.status()
        client._transport.route = client._session.route


def test_a_server_that_dies_and_comes_back(
    proxy: RealProxy, routed: list[BasedServer], way: str
) -> None:
    """Its sequences end with errors that say so; after the TTL the client has another server."""
    with Client(url(proxy, way), ttl=2.0, timeout=0.5) as client:
        base = one(client, way)
        dead = slice_of(client)
        with client.sequence(MODEL, streaming=way == "stream") as sequence:
            send(sequence, 1)
            routed[dead].stop()
            words = "stream to .* broke" if way == "stream" else "cannot reach|went away"
            with pytest.raises(Unavailable, match=words):
                send(sequence, 1)
            assert sequence.state == "doubtful"
        texts = set()
        until = time.monotonic() + 10
        while True:
            assert time.monotonic() < until
            try:
                other = one(client, way)
                break
            except CidError as error:
                texts.add(str(error))
        assert other != base and slice_of(client) != dead
        assert any("cannot reach" in text or "went away" in text for text in texts), texts
        routed[dead].start()
        assert one(client, way) == other


# ---- Proxies that do something else


@NGINX
@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_that_drops_the_header(
    routed: list[BasedServer], tmp_path: Path, kind: str
) -> None:
    """Another manager refuses the session, and no sequence begins there."""
    to_any = (r"(\"\d\"|default) +(slice_\d|unknown);", r"\1 any;")
    proxy = edited("nginx", routed, tmp_path, to_any)
    try:
        with Client(proxy.url(kind), timeout=0.5, ahead=0) as client:
            with pytest.raises(RegistryMismatch, match="a proxy that drops the header cid-slice"):
                for _ in range(10):
                    one(client, kind)
    finally:
        proxy.close()


@NGINX
def test_a_proxy_that_drops_the_header_of_inferences(
    routed: list[BasedServer], tmp_path: Path
) -> None:
    """Another server refuses a step of a sequence that began elsewhere, and adds nothing."""
    rule = f"location /v2/models/{MODEL}/infer {{ proxy_pass http://any_http; }}"
    proxy = edited("nginx", routed, tmp_path, ("(listen .*;)(?! *http2)", rf"\1 {rule}"))
    wrong, lost = 0, []
    try:
        with Client(proxy.url("http")) as client:
            for _ in range(20):
                try:
                    with client.sequence(MODEL, end_inputs={"INPUT": 0}) as sequence:
                        base = send(sequence, 1) - 1
                        for total in range(2, 6):
                            wrong += send(sequence, 1) != base + total
                except SequenceLost as error:
                    lost.append(str(error))
    finally:
        proxy.close()
    assert wrong == 0 and len(lost) == 20, "each second request goes elsewhere"
    assert all("another server got the request" in text for text in lost)


@NGINX
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [200, 404, 502, 503])
def test_a_proxy_that_answers_with_a_page(
    routed: list[BasedServer], tmp_path: Path, kind: str, status: int
) -> None:
    """For example of an error, or to log in. The error shows its words or its status, no tags."""
    page = "<html><body><h1>Log in</h1></body></html>"
    answer = f"location / {{ default_type text/html; return {status} '{page}'; #"
    proxy = edited("nginx", routed, tmp_path, (r"error_page .*", ""), (r"location / \{", answer))
    try:
        with Client(proxy.url(kind), timeout=0.5) as client:
            for call in (client.acquire, lambda: client.sequence(MODEL)):
                with pytest.raises((Unavailable, ProtocolError)) as caught:
                    call()
                text = str(caught.value)
                assert "<" not in text and proxy.url(kind) in text, text
                # gRPC tells nothing of a page but the status.
                assert re.search("Log in|http2 header with status|Stream removed", text), text
    finally:
        proxy.close()


@pytest.mark.skipif(not (has("nginx") and has("haproxy")), reason="nginx or haproxy is missing")
@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_that_retries(routed: list[BasedServer], tmp_path: Path, kind: str) -> None:
    """It sends a step to another server when one hangs, and that one refuses it."""
    spare = [f"127.0.0.1:{routed[(n + 1) % 3].ports[kind == 'grpc']}" for n in range(3)]
    if kind == "http":  # nginx sends a request of gRPC only once
        proxy = edited(
            *("nginx", routed, tmp_path),
            *(
                (
                    rf"(slice_{n}_http \{{ server \S+) max_fails=0;",
                    rf"\1; server {spare[n]} backup;",
                )
                for n in range(3)
            ),
            (r"_next_upstream off", "_next_upstream error timeout non_idempotent"),
            (r"_read_timeout \w+", "_read_timeout 3s"),
        )
    else:
        proxy = edited(
            *("haproxy", routed, tmp_path),
            *(
                (
                    rf"(backend slice_{n}_grpc .*\n.* h2)",
                    rf"\1 check port {routed[n].ports[0]} check-proto h1 inter 200 fall 2 rise 1\n"
                    rf"    server spare {spare[n]} proto h2 backup",
                )
                for n in range(3)
            ),
            ("retries 0", "retries 2"),
            ("retry-on none", "retry-on all-retryable-errors"),
            ("no option redispatch", "option redispatch 1"),
            # Later than the checks notice it. HAProxy cancels the request then, and Triton 2.51 may
            # die of that, or answer nothing: so no request may take as long but the one that hangs.
            ("timeout server 1h", "timeout server 8s"),
        )
    try:
        with Client(proxy.url(kind), timeout=3.0) as client:
            one(client, kind)
            hung = routed[slice_of(client)]
            with client.sequence(MODEL, timeout=30.0) as sequence:
                send(sequence, 1)
                os.killpg(hung.pid, signal.SIGSTOP)
                try:
                    with pytest.raises(SequenceLost, match="another server got the request"):
                        send(sequence, 1)
                finally:
                    os.killpg(hung.pid, signal.SIGCONT)
            # Triton 2.51 may die of requests that a proxy gave up, or answer without outputs.
            hung.stop()
            hung.start()
            one(client, kind)
    finally:
        proxy.close()


# ---- Servers come and go


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not (has("nginx") and has("haproxy")), reason="nginx or haproxy is missing")
def test_servers_come_and_go(routed: list[BasedServer], tmp_path: Path) -> None:
    """Clients of all kinds behind both proxies, while servers are killed and started again."""
    script = Path(__file__).parent.parent / "support" / "route_client.py"
    with ExitStack() as stack:
        clients = {}
        for name in ("nginx", "haproxy"):
            (folder := tmp_path / name).mkdir()
            proxy = router(name, ports_of(routed), folder)
            stack.callback(proxy.close)
            command = [sys.executable, str(script), MODEL, str(REQUESTS // 2), str(SECONDS)]
            clients[name] = subprocess.Popen(
                [*command, *map(proxy.url, KINDS)], stdout=subprocess.PIPE, text=True
            )
            stack.callback(clients[name].wait)
            stack.callback(clients[name].kill)
        kills, rng = 0, random.Random(19)
        while any(client.poll() is None for client in clients.values()):
            victim = rng.choice(routed)
            time.sleep(rng.uniform(1.0, 3.0))
            victim.stop()
            time.sleep(rng.uniform(0.0, 2.0))
            victim.start()
            kills += 1
        found = {name: json.loads(client.communicate()[0]) for name, client in clients.items()}
    print(f"{kills} kills")
    for name, each in found.items():
        kinds = Counter[str]()
        for text, count in each["errors"].items():
            kinds[text.partition(":")[0]] += count
        print(name, each["sent"], "sent,", each["right"], "right,", dict(kinds))
    assert kills >= 2
    for each in found.values():
        assert not each["wrong"]
        assert len(each["homes"]) == len(set(each["homes"].values())) == 3
        assert each["right"] >= each["sent"] * 0.8
        for text in each["errors"]:
            assert re.match(_EXPECTED, text), text


_EXPECTED = (
    r"Unavailable: (no answer|the stream to .* broke)"
    r"|SequenceLost: Triton has forgotten .*the server was restarted"
    r"|SequenceLost: ID \d+ was lost: "
    r"|SessionExpired: no heartbeat was answered"
)
"""What clients see of servers that are killed."""
