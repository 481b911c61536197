"""The command: what it says when it is used wrongly, and what it writes."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from command import run, run_process
from servers import Server

from cidalloc import __version__
from cidalloc.errors import Unavailable
from cidalloc.manager.settings import Settings
from cidalloc.triton_model.config import settings_from

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


def test_version() -> None:
    assert run("--version").stdout == f"cidalloc {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--version"], 0), (["--nonesuch"], 2), (["stress", "-p", "0"], 1)]
)
def test_a_process_says_the_same(arguments: list[str], status: int) -> None:
    """What the other tests run within this process, run as a person runs it."""
    here, there = run(*arguments), run_process(*arguments)
    assert (there.returncode, there.stdout, there.stderr.splitlines()[-1:]) == (
        status,
        here.stdout,
        here.stderr.splitlines()[-1:],
    )
    assert here.returncode == status


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
        (["serve", "--grpc-port", "8000"], "error: INVALID_ARGUMENT: the ports "),
        (["stress", "-p", "0"], "error: INVALID_ARGUMENT: "),
        (["model", "DIR", "-n", "a/b"], "error: INVALID_ARGUMENT: "),
        (["model", "DIR", "-m", "0"], "error: INVALID_ARGUMENT: "),
        (["model", "/dev/null/models", "--no-state"], "error: INVALID_ARGUMENT: [Errno 20] "),
        (["model", "DIR", "--state", "DIR/state"], "error: INVALID_ARGUMENT: --state "),
        (["model", "DIR", "--state", "DIR", "--no-state"], "error: INVALID_ARGUMENT: --state "),
    ],
)
def test_an_error_is_one_line(arguments: list[str], start: str, tmp_path: Path) -> None:
    done = run(*[each.replace("DIR", str(tmp_path / "models")) for each in arguments])
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


def test_what_is_chosen_stands_in_the_configuration(tmp_path: Path) -> None:
    options = "--no-state --first 10 --capacity 500 --max-ttl 5m --grace 1.5s --cooldown 750ms"
    options += " --max-count 7 --anonymous-age 2h --fresh --batch-size 32"
    done = run("model", str(tmp_path), *options.split())
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "cidmgr" / "config.pbtxt").read_text()
    assert "max_batch_size: 32\n" in text
    found = dict(re.findall(r'key: "(\w+)" value { string_value: "(.*?)" }', text))
    chosen = {"first": "10", "capacity": "500", "max_ttl_ms": "300000", "grace_ms": "1500"}
    chosen |= {"cooldown_ms": "750", "max_count": "7", "anonymous_age_ms": "7200000"}
    assert found == found | chosen | {"fresh": "true", "state": ""}
    parameters = {name: {"string_value": value} for name, value in found.items()}
    config = {"max_batch_size": 32, "parameters": parameters}
    assert settings_from(config) == Settings(
        first=10,
        capacity=500,
        max_ttl_ms=300_000,
        grace_ms=1500,
        cooldown_ms=750,
        max_count=7,
        anonymous_age_ms=7_200_000,
        fresh=True,
    )


def chosen(place: Path) -> dict[str, str]:
    text = (place / "config.pbtxt").read_text()
    found = dict(re.findall(r'key: "(\w+)" value { string_value: "(.*?)" }', text))
    return found | dict(re.findall(r"(max_batch_size): (\d+)", text))


def test_what_is_not_said_again_keeps_its_value(tmp_path: Path) -> None:
    state, place = tmp_path / "state", tmp_path / "models" / "cidmgr"
    options = f"--state {state} --first 10 --capacity 500 --max-ttl 5m --fresh --batch-size 32 -m 3"
    assert run("model", str(place.parent), *options.split()).returncode == 0
    with (place / "config.pbtxt").open("a") as file:
        file.write('parameters { key: "EXECUTION_ENV_PATH" value { string_value: "a\\"b" } }\n')
    before = chosen(place)
    for more, changed in [
        ([], {}),
        (["--unended-cooldown", "1h"], {"unended_cooldown_ms": "3600000"}),
        (["--no-fresh", "--state", "/else"], {"fresh": "false", "state": "/else"}),
        (["--batch-size", "256", "--no-state"], {"max_batch_size": "256", "state": ""}),
    ]:
        done = run("model", str(place.parent), "-o", *more)
        assert done.returncode == 0, done.stderr
        assert "Kept settings: first=10, capacity=500" in done.stdout.replace("fresh=True, ", "")
        assert chosen(place) == (before := before | changed)
        assert sorted(path.name for path in place.iterdir()) == ["3", "config.pbtxt"]
    assert run("model", str(place.parent), "--reset", "--no-state").returncode == 0
    assert (chosen(place)["first"], chosen(place)["max_batch_size"]) == (str(2**30), "256")
    assert "EXECUTION_ENV_PATH" not in chosen(place)


def test_what_was_chosen_before_must_be_readable(tmp_path: Path) -> None:
    config = tmp_path / "cidmgr" / "config.pbtxt"
    assert run("model", str(tmp_path), "--no-state").returncode == 0
    sound = config.read_text()
    for damaged in (sound + "{", sound + 'parameters { key: "frist" value { } }', "\0"):
        config.write_text(damaged)
        done = run("model", str(tmp_path), "-o", "--first", "5")
        assert done.returncode == 1
        assert done.stderr.startswith("error: INVALID_ARGUMENT: cannot read the existing settings")
        assert "--reset" in done.stderr
        assert config.read_text() == damaged
    assert run("model", str(tmp_path), "--reset", "--no-state").returncode == 0
    assert config.read_text() == sound


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--cooldown", "soon"], 2, "'soon' is not a time"),
        (["--capacity", "0"], 1, "error: INVALID_ARGUMENT: capacity=0 is not"),
        (["--min-ttl", "1h"], 1, "min_ttl_ms=3600000 is more than max_ttl_ms"),
        (["--cooldown", "2m", "--max-cooldown", "1m"], 1, "cooldown_ms=120000 is more than"),
        (["--batch-size", "0"], 1, "batch_size=0"),
        (["--python", "3.10"], 1, "--python and --wheels need --vendor"),
        (["--vendor", "--python", "2.7"], 1, "'2.7' is not a version of Python 3"),
    ],
)
def test_what_cannot_be_chosen(tmp_path: Path, options: list[str], status: int, words: str) -> None:
    done = run("model", str(tmp_path), "--no-state", *options)
    assert done.returncode == status
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_python_of_a_model_that_is_vendored(tmp_path: Path) -> None:
    """A model that was vendored before stays so, and its copy is for the Python that is named."""
    copy = tmp_path / "cidmgr" / "1" / "cidalloc"
    assert run("model", str(tmp_path), "--no-state", "--vendor").returncode == 0
    done = run("model", str(tmp_path), "-o", "--python", HERE)
    assert (done.returncode, done.stderr) == (0, "")
    assert copy.is_dir()
    other = run("model", str(tmp_path), "-o", "--python", "2.7")
    assert other.returncode == 1
    assert "'2.7' is not a version of Python 3" in other.stderr
    for more in ("--no-vendor", "--reset"):
        refused = run("model", str(tmp_path), "-o", more, "--python", HERE)
        assert refused.returncode == 1
        assert "--python and --wheels need --vendor" in refused.stderr
    assert copy.is_dir()


@pytest.mark.server
def test_a_server_whose_python_lacks_the_package(
    tmp_path: Path,
) -> None:
    """A stock Triton: numpy is there, and cidalloc only within the model."""
    bare = tmp_path / "bare"
    venv.create(bare, symlinks=True)
    (packages,) = bare.glob("lib/python*/site-packages")
    numpy = Path(np.__file__).parent
    for each in (numpy, numpy.parent / "numpy.libs"):
        if each.exists():
            (packages / each.name).symlink_to(each)
    models = tmp_path / "models"

    def export(*options: str) -> None:
        done = run("model", str(models), *options)
        assert done.returncode == 0, done.stderr

    export("--no-state")
    with (models / "cidmgr" / "config.pbtxt").open("a") as config:
        value = f'value {{ string_value: "{bare}" }}'
        config.write(f'parameters {{ key: "EXECUTION_ENV_PATH" {value} }}\n')
    with pytest.raises(Unavailable, match="does not have cidalloc: install it there, or put a"):
        with Server(models):
            pass
    export("-o", "--vendor")
    for option in ("--first=7", "--vendor"):  # that it is vendored stays
        with Server(models) as server:
            assert run("probe", server.grpc_url).returncode == 0
        export("-o", option)
    copy = models / "cidmgr" / "1" / "cidalloc"
    (module,) = copy.glob("_alloc.cpython-*.so")
    module.rename(copy / re.sub("cpython-3[0-9]+", "cpython-399", module.name))
    words = f"for Python 3.99, but this server has {HERE}: run .* --python {HERE} DIR'"
    with pytest.raises(Unavailable, match=words):
        with Server(models):
            pass
    export("-o", "--no-vendor")
    left = {each.name for each in (models / "cidmgr" / "1").iterdir()}
    assert left - {"__pycache__"} == {"model.py"}


def test_without_its_libraries_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['click'] = None\nimport cidalloc.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: UNAVAILABLE: click is missing: the cidalloc command needs pip install"
        " 'cidalloc[client]'\n"
    )
