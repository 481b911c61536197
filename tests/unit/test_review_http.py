"""HTTP under faults: a body without an end, a server that hangs up, an answer that cannot be read."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cidalloc.client.asyncio.http import AsyncHttpTransport
from cidalloc.client import Client
from cidalloc.client.core.transport import parse_url
from cidalloc.client.sync.http import HttpTransport
from cidalloc.errors import CidError


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))

    def one(found: socket.socket) -> None:
        with contextlib.suppress(OSError), found:
            answer(found)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def endless(found: socket.socket) -> None:
    found.recv(2**16)
    found.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    until = time.monotonic() + 5
    while time.monotonic() < until:
        found.sendall(chunk * 16)


def test_a_body_that_keeps_coming_ends_in_time() -> None:
    with server(endless) as url:
        transport = HttpTransport(parse_url(url), None, {})
        began = time.monotonic()
        with contextlib.suppress(Exception):
            transport.infer(0.5, "model", [])
        assert time.monotonic() - began < 1.5


def test_a_server_that_hangs_up_at_once_is_noticed_at_once() -> None:
    def hang_up(found: socket.socket) -> None:
        pass

    async def ask(url: str) -> list[float]:
        took = []
        for _ in range(5):
            transport = AsyncHttpTransport(parse_url(url), None, {})
            began = time.monotonic()
            with contextlib.suppress(Exception):
                await transport.server_version(3.0)
            took.append(round(time.monotonic() - began, 2))
            if took[-1] > 1:
                break
        return took

    with server(hang_up) as url:
        took = asyncio.run(ask(url))
    assert max(took) < 1, took


def answering(head: bytes, body: bytes) -> Callable[[socket.socket], None]:
    def answer(found: socket.socket) -> None:
        found.recv(2**16)
        found.sendall(b"HTTP/1.1 " + head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    return answer


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"200 OK\r\nContent-Encoding: deflate", b"not zlib"),
        (b"200 OK\r\nContent-Encoding: gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x4b"),
        (b"101 Switching\r\nUpgrade: h2c\r\nConnection: Upgrade", b""),
        (b"200 OK", b"[" * 100_000),
    ],
)
def test_an_answer_that_cannot_be_read_is_an_error_of_ours(head: bytes, body: bytes) -> None:
    with server(answering(head, body)) as url:
        cids = Client(url, timeout=0.5)
        with pytest.raises(CidError):
            cids.acquire()
