"""The commands that ask a manager, against one on a real server."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import run
from servers import Server

from cidalloc.client import Client
from cidalloc.devserver import demo
from cidalloc.devserver.demo import write_repository
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """One with an open door, as a doctor would find it."""
    folder = tmp_path_factory.mktemp("live")
    state = folder / "state"
    state.mkdir()
    write_repository(
        folder / "models", Settings(first=1000, capacity=100, fresh=True, state=str(state))
    )
    options = ["--model-control-mode=explicit", "--load-model=*"]
    with Server(folder / "models", arguments=options) as server:
        yield server


@pytest.fixture(params=["grpc", "http"])
def url(server: TritonServer, request: pytest.FixtureRequest) -> str:
    return server.grpc_url if request.param == "grpc" else server.http_url


def lines(text: str) -> dict[str, str]:
    """Return what a table says, by the first word of its lines."""
    return dict(each.split(maxsplit=1) for each in text.splitlines() if len(each.split()) > 1)


@pytest.mark.server
def test_acquire_and_release(triton: TritonServer) -> None:
    for url in (triton.grpc_url, triton.http_url):
        done = run("acquire", url, "--count", "3")
        assert done.returncode == 0, done.stderr
        ids = done.stdout.split()
        assert len(set(ids)) == 3
        assert run("release", url, *ids, "--ended").returncode == 0
        again = run("release", url, ids[0])
        assert again.returncode == 1
        assert again.stderr.startswith(f"error: NOT_HELD: ID {ids[0]} is not held")
        both = run("release", url, ids[0], "--ended", "--cooldown", "1")
        assert both.stderr.startswith("error: INVALID_ARGUMENT: ")


@pytest.mark.server
def test_status(triton: TritonServer) -> None:
    with Client(triton.grpc_url, label="one [red]that shouts") as cids:
        cids.acquire_many(7)
        text = run("status", triton.http_url).stdout
        assert "one [red]that shouts" in text
        assert lines(text)["pool"].startswith("1073741824 to 2147483647, 1,073,741,824 IDs")
        found = json.loads(run("status", triton.grpc_url, "--json").stdout)
        (mine,) = (each for each in found["sessions"] if each["label"].startswith("one "))
        assert mine["held"] >= 7
        assert found["acquired"] - sum(found["released"].values()) == found["held"]


@pytest.mark.server
def test_probe(triton: TritonServer) -> None:
    done = run("probe", triton.http_url)
    assert done.returncode == 0
    assert done.stdout.startswith("cidmgr answers: ")
    wrong = run("probe", triton.grpc_url, "--model", "simple_sequence")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ")
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["status", "top", "acquire", "probe"])
def test_nobody_there(command: str) -> None:
    done = run(command, "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: UNAVAILABLE: no answer from ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.server
def test_doctor(server: TritonServer, url: str) -> None:
    done = run("doctor", url, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, found
    text = {each["what"]: each for each in found}
    by_level = {level: " ".join(w for w in text if text[w]["level"] == level) for level in LEVELS}
    assert "cidmgr 0" in by_level["ok"]
    assert "cidmgr.cidalloc" in by_level["ok"], "the file"
    assert "simple_sequence: the pool fits" in by_level["ok"]
    assert "can load models" in by_level["warn"]
    assert all(each["todo"] for each in found if each["level"] in ("warn", "FAIL"))
    words = run("doctor", url).stdout
    assert all(each["what"] in words and each["todo"] in words for each in found[1:])


LEVELS = ("ok", "note", "warn", "FAIL")


@pytest.mark.server
def test_doctor_finds_a_pool_that_does_not_fit(triton: TritonServer) -> None:
    done = run("doctor", triton.grpc_url, "--model", "wide", "--target", "narrow_sequence")
    assert done.returncode == 1
    assert "FAIL  narrow_sequence takes IDs up to 2147483647" in done.stdout
    none = run("doctor", triton.grpc_url, "--target", "nonesuch")
    assert "configuration of nonesuch cannot be read" in none.stdout


@pytest.mark.server
def test_doctor_without_a_manager(triton: TritonServer) -> None:
    done = run("doctor", triton.http_url, "--model", "nonesuch")
    assert done.returncode == 1
    assert done.stdout.startswith("FAIL  nonesuch does not answer: UNAVAILABLE: ")
    away = run("doctor", "127.0.0.1:1")
    assert away.returncode == 1
    assert away.stdout.startswith("FAIL  UNAVAILABLE: no answer from ")


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.text = ""
        self._fd, end = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cidalloc", *arguments],
            stdin=end,
            stdout=end,
            stderr=end,
            env={**os.environ, "TERM": "xterm-256color"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(end)
        self.resize(24, 80)

    def resize(self, height: int, width: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self._process.send_signal(signal.SIGWINCH)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def until(self, words: str, seconds: float = 30.0) -> None:
        """Read until it said some words from now on."""
        self.text, deadline = "", time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self._fd], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self._fd, 65536).decode(errors="replace")
                except OSError:
                    pytest.fail(f"the command has ended: {self.text}")

    def close(self) -> None:
        """End it, if it still runs."""
        self._process.kill()
        self._process.wait(10)
        os.close(self._fd)

    def status(self) -> int:
        """Wait for its end, and return the exit status."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self._fd, 65536).decode(errors="replace")
                except OSError:  # its end of the terminal is closed
                    break
        return self._process.wait(10)


Opened = Callable[..., Terminal]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """What opens terminals that are closed at the end."""
    with contextlib.ExitStack() as stack:

        def open_one(*arguments: str) -> Terminal:
            terminal = Terminal(*arguments)
            stack.callback(terminal.close)
            return terminal

        yield open_one


@pytest.mark.server
@pytest.mark.parametrize("key", ["q", "\x03"])
def test_top_in_a_terminal(opened: Opened, triton: TritonServer, key: str) -> None:
    with Client(triton.grpc_url, label="the watched one") as cids:
        cids.acquire()
        terminal = opened("top", triton.grpc_url, "--interval", "0.2")
        terminal.until("the watched one")
        cids.acquire_many(100)
        terminal.until("requests/s")
        terminal.resize(20, 60)
        terminal.until("the watched")
        terminal.type(key)
        assert terminal.status() == 0
        assert "\x1b[?1049l" in terminal.text, "the screen of before is back"
        assert "Traceback" not in terminal.text


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_top_that_is_ended_leaves_the_terminal_as_it_was(
    opened: Opened, triton: TritonServer, number: int
) -> None:
    terminal = opened("top", triton.grpc_url)
    terminal.until("Quit")
    terminal.signal(number)
    assert terminal.status() == 128 + number
    assert "\x1b[?1049l" in terminal.text
    assert "Traceback" not in terminal.text


@pytest.mark.server
def test_top_outlives_the_server(opened: Opened, few: Path) -> None:
    with Server(few) as server:
        terminal = opened("top", server.grpc_url, "--interval", "0.2", "--timeout", "1")
        terminal.until("ok")
        terminal.type("\t\r")  # unfolds the server
        terminal.until("a restart forgets")
    terminal.until("no answer")
    terminal.type("q")
    assert terminal.status() == 0


@pytest.mark.server
def test_top_where_there_is_no_terminal(triton: TritonServer) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cidalloc", "top", triton.grpc_url],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "\x1b" not in done.stdout
    assert "pool" in lines(done.stdout)


@pytest.mark.server
def test_serve_takes_more_models_and_flags(opened: Opened, tmp_path: Path) -> None:
    folder = tmp_path / "more" / "other"
    shutil.copytree(Path(demo.__file__).parent / "models" / demo.MODEL, folder)
    config = folder / "config.pbtxt"
    config.write_text(config.read_text().replace(demo.MODEL, "other"))
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    more = ["--repository", str(folder.parent), "--state", str(tmp_path)]
    terminal = opened("serve", *ports, *more, "--", "--exit-on-error=true")
    terminal.until("Ctrl-C stops it.", 60)
    (url,) = re.findall(r"http://[\d.]+:\d+(?!\d*/metrics)", terminal.text)
    done = run("doctor", url)
    assert "other: the pool fits" in done.stdout
    assert str(tmp_path / "cidmgr.cidalloc") in done.stdout
    terminal.type("\x03")
    assert terminal.status() == 0


@pytest.mark.server
def test_serve_says_why_triton_would_not(tmp_path: Path) -> None:
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    done = run("serve", *ports, "--", "--no-such-flag")
    assert done.returncode == 1
    (line,) = (each for each in done.stderr.splitlines() if each.startswith("error: "))
    assert line.startswith("error: UNAVAILABLE: Triton did not become ready: ")
