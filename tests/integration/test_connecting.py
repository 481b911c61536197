"""How a client is connected: its name, its URL, its options, what it imports, what it shows."""

from __future__ import annotations

import asyncio
import http.client
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc
import tritonclient.http
from loopback import Loopback
from tritonclient.grpc import KeepAliveOptions

from cidalloc.client import AsyncClient, Client
from cidalloc.client.sync.grpc import GrpcTransport
from cidalloc.client.sync.transport import connect
from cidalloc.devserver.demo.sequences import number
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import InvalidArgument
from cidalloc.manager.settings import Settings

MODEL = "simple_sequence"
SETTINGS = Settings(first=1, capacity=1000, fresh=True)


def one(url: str) -> list[Any]:
    return number(1, tritonclient.http if url.lower().startswith("http") else tritonclient.grpc)


async def converse(url: str, **options: Any) -> None:
    """Run a sequence with each client."""
    with Client(url, **options) as cids:
        with cids.sequence(MODEL) as sequence:
            sequence.infer(one(url))
            sequence.infer(one(url), end=True)
        cids.status()
    async with AsyncClient(url, **options) as cids:
        async with cids.sequence(MODEL) as sequence:
            await sequence.infer(one(url))
            await sequence.infer(one(url), end=True)
        await cids.status()


# ---- Names


@pytest.mark.parametrize(
    "node", ["h" * 300, "ä" * 40, "a\udcff\udcfeb", "tab\tnul\0", "\u202eright", ""]
)
def test_hosts_with_any_name(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: node)
    transport = Loopback(SETTINGS)
    with Client(transport=transport) as cids:
        cids.acquire()
        (session,) = cids.status()["sessions"]
        label = session["label"]
        assert label.isprintable() and len(label.encode()) <= 64
        assert label == cids._session.lease.label
    cids = AsyncClient(transport=transport)  # type: ignore[arg-type]
    assert cids._session.lease.label == label


# ---- Paths


@contextmanager
def ingress(port: int, path: str) -> Iterator[str]:
    """Serve a Triton under a path, as an ingress does; yield the URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if not self.path.startswith(f"{path}/v2/"):
                self.send_error(404, "no such path")
                return
            triton = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            triton.request(self.command, self.path[len(path) :], body, dict(self.headers))
            answer = triton.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() != "content-length":
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            triton.close()

        do_GET = do_POST = forward

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_base_path(triton: TritonServer) -> None:
    with ingress(triton.http_port, "/serve/triton") as url:
        asyncio.run(converse(f"{url}/serve/triton"))
        asyncio.run(converse(f"{url.upper().replace('HTTP', 'Http')}/serve/triton/"))


# ---- Options


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("name", ["root_certificates", "private_key", "certificate_chain"])
def test_a_missing_file_of_grpc(kind: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=rf"{name}: .*missing"):
        kind("grpcs://127.0.0.1:1", **{name: str(tmp_path / "missing")})


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("name", ["ca_certs", "certfile"])
def test_a_missing_file_of_http(kind: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="TLS: "):
        kind("https://127.0.0.1:1", ssl_options={name: str(tmp_path / "missing")})


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("url", ["grpc://127.0.0.1:1", "http://127.0.0.1:1"])
def test_an_option_that_is_none(kind: Any, url: str) -> None:
    with pytest.raises(InvalidArgument, match="color"):
        kind(url, color="red")


def arguments(**options: Any) -> dict[str, Any]:
    transport = connect("grpc://127.0.0.1:1", None, options)
    assert isinstance(transport, GrpcTransport)
    return dict(transport._calls.arguments)


def test_keepalive_is_within_what_servers_tolerate() -> None:
    """They refuse pings more often than each 5 minutes, https://grpc.io/docs/guides/keepalive/."""
    found = arguments()
    assert found["grpc.keepalive_time_ms"] > 300_000
    assert found["grpc.keepalive_timeout_ms"] <= 20_000
    own = arguments(keepalive_options=KeepAliveOptions(keepalive_time_ms=60_000))
    assert own["grpc.keepalive_time_ms"] == 60_000
    bare = arguments(channel_args=[("grpc.max_send_message_length", 99)])
    assert bare["grpc.max_send_message_length"] == 99 and "grpc.keepalive_time_ms" not in bare
    assert arguments(creds=grpc.local_channel_credentials())["grpc.keepalive_time_ms"] > 300_000


# ---- What is shown


@pytest.mark.parametrize("way", ["grpc", "http"])
def test_verbose_shows_no_token(
    triton: TritonServer, way: str, capfd: pytest.CaptureFixture[str]
) -> None:
    url = triton.http_url if way == "http" else triton.grpc_url
    tokens = []

    async def main() -> None:
        with Client(url, verbose=True) as cids, cids.sequence(MODEL) as sequence:
            sequence.infer(one(url), end=True)
            tokens.append(cids._session.lease.token)
        async with AsyncClient(url, verbose=True) as cids:
            async with cids.sequence(MODEL) as sequence:
                await sequence.infer(one(url), end=True)
            tokens.append(cids._session.lease.token)

    asyncio.run(main())
    shown = "".join(capfd.readouterr())
    assert shown.count(MODEL) >= 2, "the requests of sequences are shown"
    for token in tokens:
        assert len(token) == 32 and token not in shown


# ---- What is imported


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("pass", "aiohttp gevent grpc tritonclient.grpc tritonclient.http"),
        ("Client('grpc://h:1')", "aiohttp gevent tritonclient.http"),
        ("AsyncClient('grpc://h:1')", "aiohttp gevent tritonclient.http"),
        ("Client('http://h:1')", "aiohttp grpc"),
        ("AsyncClient('http://h:1')", "grpc"),
    ],
)
def test_nothing_is_imported_that_is_not_used(code: str, missing: str) -> None:
    script = f"""
import sys
from cidalloc.client import AsyncClient, Client
{code}
print(*[name for name in "{missing}".split() if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done
