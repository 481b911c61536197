"""The command: what it says when it is used wrongly, and what it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cidalloc import __version__


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cidalloc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_version() -> None:
    assert run("--version").stdout == f"cidalloc {__version__}\n"


@pytest.mark.parametrize("command", [[], ["demo"], ["stress"], ["model"], ["serve"]])
def test_help(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Usage: " in done.stdout


@pytest.mark.parametrize("arguments", [["nonesuch"], ["demo", "--nonesuch"], ["model"]])
def test_usage_errors(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["demo", "--url", "127.0.0.1:1"], "error: UNAVAILABLE: no answer from "),
        (["demo", "--url", "x:y"], "error: INVALID_ARGUMENT: "),
        (["demo", "--collide", "--url", "localhost:1"], "error: INVALID_ARGUMENT: "),
        (["demo", "--collide", "--url", "http://127.0.0.1:1"], "error: UNAVAILABLE: "),
        (["stress", "-p", "0"], "error: INVALID_ARGUMENT: "),
        (["model", "DIR", "-n", "a/b"], "error: INVALID_ARGUMENT: "),
        (["model", "DIR", "-m", "0"], "error: INVALID_ARGUMENT: "),
    ],
)
def test_an_error_is_one_line(arguments: list[str], start: str, tmp_path: Path) -> None:
    done = run(*[str(tmp_path / "models") if each == "DIR" else each for each in arguments])
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(start)
    assert len(done.stderr.splitlines()) == 1


def test_model(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    done = run("model", str(folder), "-n", "ids", "-m", "3")
    assert done.returncode == 0, done.stderr
    assert "Next: " in done.stdout
    assert sorted(path.name for path in (folder / "ids").rglob("*")) == [
        "3",
        "config.pbtxt",
        "model.py",
    ]
    assert 'name: "ids"' in (folder / "ids" / "config.pbtxt").read_text()
    again = run("model", str(folder), "-n", "ids")
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert run("model", str(folder), "-n", "ids", "-o").returncode == 0


def test_without_its_libraries_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['click'] = None\nimport cidalloc.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: UNAVAILABLE: click is missing: the cidalloc command needs pip install"
        " 'cidalloc[client]'\n"
    )
