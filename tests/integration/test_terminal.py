"""What the command does where it is read: locales, dumb terminals, pipes that end, full disks."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import run, run_all
from servers import Server

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
    with Server(folder / "models") as server:
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


WIDE = {"COLUMNS": "100"}


@pytest.mark.parametrize("place", PLACES)
def test_every_command_everywhere(commands: list[list[str]], place: str) -> None:
    ended = run_all(commands, {**WIDE, **PLACES[place]})
    for command, (status, shown, words) in zip(commands, ended, strict=True):
        assert status == 0, (command, words)
        assert shown and not words, (command, words)
        if place == "NO_COLOR":
            assert b"\x1b[3" not in shown, command
        if place == "Latin-1" and command[0] == "doctor" and len(command) == 2:
            assert b" -> " in shown or command[1] == "--help", shown


@pytest.mark.parametrize("place", PLACES)
def test_errors_that_a_terminal_cannot_show(place: str) -> None:
    commands = [["status", strange] for strange in ("127.0.0.1:1", "→", "\udcff")]
    for status, shown, words in run_all(commands, {**WIDE, **PLACES[place]}):
        assert (status, shown) == (1, b""), words
        assert words.startswith(b"error: ") and words.count(b"\n") == 1, words


def test_a_full_disk(commands: list[list[str]]) -> None:
    with open("/dev/full", "w") as full:
        ended = run_all(commands, WIDE, full.fileno())
    for command, (status, _, words) in zip(commands, ended, strict=True):
        assert status == 1, (command, words)
        expected = b"error: UNAVAILABLE: [Errno 28] No space left on device\n"
        assert words == expected, (command, words)


def test_a_pipe_that_ends(commands: list[list[str]]) -> None:
    """As into `head`, which does not read what is too much."""
    reading, writing = os.pipe()
    os.close(reading)
    ended = run_all(commands, WIDE, writing)
    os.close(writing)
    for command, (status, _, words) in zip(commands, ended, strict=True):
        assert words == b"", (command, words)
        assert status in (1, 120), command


@pytest.mark.parametrize("command", ["top", "status", "doctor"])
def test_a_dumb_terminal(url: str, command: str) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cidalloc", command, url],
        env={**os.environ, **WIDE, "TERM": "dumb"},
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    _, words = process.communicate(timeout=60)
    assert (process.returncode, words) == (0, b"")
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "held" in shown and "\x1b" not in shown


def test_the_model_of_a_pool_whose_numbers_are_too_long(tmp_path: Path) -> None:
    command = ["model", str(tmp_path), "--no-state", "--first", str(2**53), "--capacity"]
    for capacity, warned in (("1", False), ("2", True)):
        done = run(*command, capacity, "--reset")
        assert done.returncode == 0, done.stderr
        assert ("warning: the pool ends at 9007199254740993" in done.stderr) == warned
