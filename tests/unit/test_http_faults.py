"""HTTP under faults: a body without end, a server that hangs up, answers that cannot be read."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from loopback import Loopback
from test_every_line import SETTINGS
from tritonclient.utils import InferenceServerException

from cidalloc.client import Client
from cidalloc.client.asyncio.http import AsyncHttpTransport
from cidalloc.client.core.http_calls import HttpAnswer
from cidalloc.client.core.transport import boottime, parse_url, read_answer
from cidalloc.client.sync.http import HttpTransport, _Connection
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


ENDLESS = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
found = listener.accept()[0]
found.recv(2**16)
found.sendall(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n")
chunk = (b"1000\\r\\n" + b" " * 4096 + b"\\r\\n") * 64
until = time.monotonic() + 4
while time.monotonic() < until:
    found.sendall(chunk)
"""


def test_a_body_that_keeps_coming_ends_in_time() -> None:
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE) as sender:
        assert sender.stdout is not None
        url = f"http://127.0.0.1:{int(sender.stdout.readline())}"
        transport = HttpTransport(parse_url(url), None, {})
        began = time.monotonic()
        with contextlib.suppress(Exception):
            transport.infer(0.5, "model", [])
        took = time.monotonic() - began
        transport.close()
        sender.terminate()
    assert took < 1.5, f"{took:.1f} s instead of 0.5"


def test_a_connection_that_always_has_something_to_read_ends_in_time() -> None:
    class Always:  # what a fast sender looks like: never a pause of a millisecond
        since = time.monotonic()
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

        def settimeout(self, seconds: float) -> None:
            pass

        def sendall(self, data: bytes) -> None:
            pass

        def recv(self, size: int) -> bytes:
            time.sleep(0.0005)
            assert time.monotonic() - self.since < 1.5, "still reading after 1.5 s instead of 0.3 s"
            head, self.head = self.head, b""
            return head or b"1\r\n \r\n"

    connection = _Connection.__new__(_Connection)
    connection.socket = Always()  # type: ignore[assignment]
    with pytest.raises(TimeoutError):
        connection.exchange(b"", HttpAnswer(), boottime() + 0.3)


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
            await transport.close()
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
        with Client(url, timeout=0.5) as cids, pytest.raises(CidError):
            cids.acquire()


def test_a_sequence_gets_an_error_of_ours_for_an_answer_that_is_not_tritons() -> None:
    with server(answering(b"200 OK", b"hello")) as url:
        transport = HttpTransport(parse_url(url), None, {})
        cids = Client(transport=Loopback(SETTINGS))
        cids._runner.transport.infer = transport.infer
        with cids, cids.sequence("model") as sequence:
            with pytest.raises((CidError, InferenceServerException)):
                sequence.infer([])
        transport.close()


def test_no_ids_in_an_answer_that_an_earlier_tritonclient_reads() -> None:
    """Over HTTP, tritonclient 2.51 reads an empty tensor of any type as one of float64."""

    class Earlier:
        def as_numpy(self, name: str) -> Any:
            return np.empty((1, 0)) if name == "OUTPUT" else np.array([[b""]], object)

    ids, detail = read_answer(Earlier(), "cidmgr", "http://localhost:1")
    assert (ids.dtype, ids.size, detail) == (np.uint64, 0, "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_connection_that_is_given_up_while_it_is_made_is_closed(host: str) -> None:
    """At whichever moment: the task is cancelled after more and more turns of the event loop."""

    async def give_up(listener: socket.socket, turns: int) -> bool:
        transport = AsyncHttpTransport(
            parse_url(f"http://{host}:{listener.getsockname()[1]}"), None, {}
        )
        connecting = asyncio.ensure_future(transport._connect())
        for _ in range(turns):
            await asyncio.sleep(0)
            if turns > 40:
                await asyncio.sleep(0.0001)  # DNS takes its time
        connecting.cancel()
        (found,) = await asyncio.gather(connecting, return_exceptions=True)
        await transport.close()
        if isinstance(found, BaseException):
            return True
        found.close()
        return False

    gc.collect()
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
        for turns in range(60):
            if not asyncio.run(give_up(listener, turns)):
                break
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            gc.collect()
    assert turns > 2
    assert [str(each.message) for each in seen] == []
