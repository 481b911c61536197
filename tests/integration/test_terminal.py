"""What the command does where it is read: locales, dumb terminals, pipes that end, full disks."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import export

pytestmark = pytest.mark.server

PLACES = {
    "UTF-8": {"PYTHONUTF8": "1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "Latin-1": {"PYTHONIOENCODING": "latin-1"},
    "NO_COLOR": {"NO_COLOR": "1", "FORCE_COLOR": "1"},
    "dumb": {"TERM": "dumb"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("terminal")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    export(folder / "models", Settings(first=1, capacity=999, fresh=True))
    with TritonServer(folder / "models") as server:
        yield server.grpc_url


@pytest.fixture(scope="module")
def commands(url: str, folder: Path) -> list[list[str]]:
    """Every command that ends by itself."""
    export(folder / "others", Settings(first=1, capacity=9, fresh=True))
    file = f"{folder}/it.cidalloc"
    made = "from cidalloc.manager.settings import Settings\n"
    made += "from cidalloc.manager.takeover import RegistryHolder\n"
    made += "values = Settings(first=1, capacity=9, state=%r, fresh=True)\n"
    made += "RegistryHolder(values, 'it', lambda: 0).close()"
    subprocess.run([sys.executable, "-c", made % str(folder)], check=True)
    return [
        ["--help"],
        ["doctor", "--help"],
        ["status", url],
        ["status", url, "--json"],
        ["top", url],
        ["probe", url],
        ["acquire", url],
        ["doctor", url],
        ["doctor", url, "--json"],
        ["model", str(folder / "others"), "-o"],
        ["registry", "show", file],
        ["registry", "check", file],
    ]


def start(command: list[str], more: dict[str, str], **how: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "COLUMNS": "100", **more}
    return subprocess.Popen(
        [sys.executable, "-m", "cidalloc", *command], env=environment, stderr=subprocess.PIPE, **how
    )


@pytest.mark.parametrize("place", PLACES)
def test_every_command_everywhere(commands: list[list[str]], place: str) -> None:
    running = [(each, start(each, PLACES[place], stdout=subprocess.PIPE)) for each in commands]
    for command, process in running:
        shown, words = process.communicate(timeout=60)
        assert process.returncode == 0, (command, words)
        assert shown and not words, (command, words)
        if place == "NO_COLOR":
            assert b"\x1b[3" not in shown, command
        if place == "Latin-1" and command[0] == "doctor" and len(command) == 2:
            assert b" -> " in shown or command[1] == "--help", shown


@pytest.mark.parametrize("strange", ["127.0.0.1:1", "→", "\udcff"])
def test_errors_that_a_terminal_cannot_show(strange: str) -> None:
    for more in PLACES.values():
        process = start(["status", strange], more, stdout=subprocess.PIPE)
        shown, words = process.communicate(timeout=60)
        assert (process.returncode, shown) == (1, b""), words
        assert words.startswith(b"error: ") and words.count(b"\n") == 1, words


def test_a_full_disk(commands: list[list[str]]) -> None:
    with open("/dev/full", "w") as full:
        running = [(each, start(each, {}, stdout=full.fileno())) for each in commands]
        for command, process in running:
            _, words = process.communicate(timeout=60)
            assert process.returncode == 1, (command, words)
            expected = b"error: UNAVAILABLE: [Errno 28] No space left on device\n"
            assert words == expected, (command, words)


def test_a_pipe_that_ends(commands: list[list[str]]) -> None:
    """As into `head`, which does not read what is too much."""
    for command in commands:
        reading, writing = os.pipe()
        os.close(reading)
        process = start(command, {}, stdout=writing)
        os.close(writing)
        _, words = process.communicate(timeout=60)
        assert words == b"", (command, words)
        assert process.returncode in (1, 120), command


@pytest.mark.parametrize("command", ["top", "status", "doctor"])
def test_a_dumb_terminal(url: str, command: str) -> None:
    ours, theirs = pty.openpty()
    process = start([command, url], {"TERM": "dumb"}, stdout=theirs, stdin=theirs)
    os.close(theirs)
    _, words = process.communicate(timeout=60)
    assert (process.returncode, words) == (0, b"")
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "held" in shown and "\x1b" not in shown


def test_the_model_of_a_pool_whose_numbers_are_too_long(tmp_path: Path) -> None:
    command = ["model", str(tmp_path), "--no-state", "--first", str(2**53), "--capacity"]
    for capacity, warned in (("1", False), ("2", True)):
        process = start([*command, capacity, "--reset"], {}, stdout=subprocess.PIPE)
        _, words = process.communicate(timeout=60)
        assert process.returncode == 0, words
        assert (b"warning: the pool ends at 9007199254740993" in words) == warned
