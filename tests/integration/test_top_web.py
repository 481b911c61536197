"""`cidalloc top --web`: the page in a real browser, who may open it, and that its processes end."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from cidalloc.client import Client
from cidalloc.devserver.triton_server import TritonServer

pytest.importorskip("textual_serve", reason="the extra 'top' is not installed")

NOWHERE = "127.0.0.1:1"


class Web:
    """`cidalloc top --web` on a free port."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cidalloc", "top", *arguments, "--web=127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        self.words = self.process.stdout.readline()
        found = re.match(r"http://127.0.0.1:\d+", self.words)
        assert found, self.words + self.process.stdout.read()
        self.url = found[0]

    def pages(self) -> list[int]:
        """Return the processes of its pages."""
        file = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(each) for each in file.read_text().split()]

    def connect(self) -> contextlib.AbstractContextManager[ClientConnection]:
        return connect(f"{self.url.replace('http', 'ws')}/ws?width=80&height=24")

    def stop(self, number: int = signal.SIGTERM) -> str:
        """Stop it, and return what it has said since."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=30)[0]

    def __enter__(self) -> Web:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


def gone(pid: int, seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if ") Z " not in Path(f"/proc/{pid}/stat").read_text():
                time.sleep(0.05)
                continue
        return True
    return False


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with Web(NOWHERE, "--timeout", "1") as web:
        yield web


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
def test_the_page_in_a_browser(triton: TritonServer, tmp_path: Path) -> None:
    with (
        Client(triton.grpc_url, label="seen in a browser") as cids,
        Web(triton.grpc_url, "--interval", "0.2", "--header", "authorization: SECRET") as web,
        Page(web.url, tmp_path / "browser") as page,
    ):
        cids.acquire_many(20)
        page.until_received(b"seen in a browser")
        page.until("document.fonts.status === 'loaded'")
        page.press("/")
        for key in "nothing like this":
            page.press(key)
        page.until_received(b"like this")
        assert page.screenshot().startswith(b"\x89PNG")
        page.call("Input.dispatchKeyEvent", type="keyDown", key="Escape", windowsVirtualKeyCode=27)
        page.until_received(b"seen in a browser")
        assert len(page.requested) >= 4
        for url in page.requested:
            assert url.startswith(f"{web.url}/"), "nothing comes from elsewhere"
        page.press("q")
        page.until("document.body.classList.contains('-closed')")
        assert "SECRET" not in web.words + web.stop()


def test_what_is_exposed_is_said(web: Web) -> None:
    assert "labels" in web.words and "no tokens" in web.words
    assert "every user of this machine" in web.words


@pytest.mark.parametrize("path", ["/", "/ws", "/static/js/textual.js"])
@pytest.mark.parametrize("header", [("Origin", "http://evil.example"), ("Host", "evil.example")])
def test_other_sites_are_refused(web: Web, path: str, header: tuple[str, str]) -> None:
    """As a page elsewhere sends, or a name elsewhere that leads to this address."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(web.url + path, headers=dict([header])))
    assert caught.value.code == 403
    caught.value.close()


def test_the_page_itself(web: Web) -> None:
    for name in ("127.0.0.1", "localhost"):
        request = urllib.request.Request(web.url.replace("127.0.0.1", name))
        request.add_header("Origin", web.url.replace("127.0.0.1", name))
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
            assert b"cidalloc top" in answer.read()


def test_pages_are_limited(web: Web) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(web.connect())
        with pytest.raises(InvalidStatus, match="503"), web.connect():
            pass
    deadline = time.monotonic() + 60
    while web.pages():
        assert time.monotonic() < deadline, "closed pages have no process"
        time.sleep(0.1)
    with web.connect() as page:
        assert page.recv(30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_pages_end_with_the_server(number: int) -> None:
    with Web(NOWHERE, "--timeout", "1", "--interval", "0.1") as web, web.connect() as page:
        seen = b""
        while b"no answer" not in seen:
            received = page.recv(30)
            seen += received if isinstance(received, bytes) else b""
        (pid,) = web.pages()
        assert web.stop(number) == ""
        assert web.process.returncode == (-9 if number == signal.SIGKILL else 0)
        assert gone(pid)
