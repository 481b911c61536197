"""The documentation is true: its code runs, its commands work, its links lead somewhere."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from anonymous import Anonymous
from servers import Server

from cidalloc import errors
from cidalloc.client import Client
from cidalloc.client.sync.transport import connect
from cidalloc.codes import Code, Operation
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file_lock import writer_of
from cidalloc.manager.takeover import RegistryHolder
from cidalloc.triton_model import export

ROOT = Path(__file__).parent.parent.parent
NAMES = ("README", "CHANGELOG", "CODE_OF_CONDUCT", "CONTRIBUTING", "SECURITY")
PAGES = [*(ROOT / f"{name}.md" for name in NAMES), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


CURL = """
import sys, argparse, urllib.request
options = argparse.ArgumentParser()
options.add_argument("-s", action="store_true")
options.add_argument("-X", default=None)
options.add_argument("-H", action="append", default=[])
options.add_argument("-d", default=None)
options.add_argument("url")
options = options.parse_args()
url = options.url if "://" in options.url else "http://" + options.url
headers = dict(each.split(": ") for each in options.H)
body = None if options.d is None else options.d.encode()
request = urllib.request.Request(url, body, headers, method=options.X)
print(urllib.request.urlopen(request).read().decode())
"""
"""What the docs ask of curl, where there is none."""

NOTE = """
import os, sys
with open(os.environ["NOTES"], "a") as notes:
    print(os.path.basename(sys.argv[0]), *sys.argv[1:], file=notes)
"""
"""A command that is not run here, but noted."""


def run_shell(script: str, server: TritonServer, folder: Path, *noted: str) -> str:
    """Run a script of the docs and return what it prints."""
    commands = dict.fromkeys(noted, NOTE)
    if shutil.which("curl") is None:
        commands["curl"] = CURL
    for name, code in commands.items():
        (folder / name).write_text(f"#!{sys.executable}\n{code}")
        (folder / name).chmod(0o755)
    script = script.replace("localhost:8000", server.http_url)
    script = script.replace("localhost:8001", server.grpc_url)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "NOTES": str(folder / "notes"),
        },
    )
    assert done.returncode == 0, (script, done.stderr)
    return done.stdout


ASIDE = ("pip", "make", "tritonserver", "python3")
"""What blocks call that is not run here: see `test_what_is_not_run`."""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_shell(page: Path, triton: TritonServer, tmp_path: Path) -> None:
    """Every command of every page works, and prints what the comment behind it begins with."""
    file = tmp_path / "it.cidalloc"
    settings = Settings(first=1, capacity=9, state=str(tmp_path), fresh=True)
    for block in blocks(page, "sh"):
        if "repository/models" in block or "serve\n" in block:
            continue  # tests of their own
        RegistryHolder(settings, "it", lambda: 0).close()
        script = re.sub(r"/path/to/model_repository|/models\b(?!/)", f"{tmp_path}/models", block)
        script = script.replace("/var/lib/cidalloc", f"{tmp_path}/state")
        script = re.sub(r"\bFILE\b", str(file), script).replace("--capacity N", "--capacity 99")
        printed = run_shell(script, triton, tmp_path, *ASIDE)
        for said in re.findall(r"# (cidmgr answers): 0", block):
            assert re.match(rf"{said}: [\d,]+ held \(\d+ ms\)", printed)
        file.unlink()


def test_what_is_not_run(triton: TritonServer, tmp_path: Path) -> None:
    """The other commands are made of what is there: extras, targets, flags."""
    noted = [block for page in PAGES for block in blocks(page, "sh") if block.split()[0] in ASIDE]
    for block in noted:
        script = block.replace(". .venv/bin/activate", "true")
        script = re.sub("^cidalloc.*", "", script, flags=re.MULTILINE)
        run_shell(script, triton, tmp_path, *ASIDE)
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(r"^(\w+) = \[", project, re.MULTILINE)
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = set()
    for line in (tmp_path / "notes").read_text().splitlines():
        name, *arguments = line.split()
        seen.add(name)
        if name == "pip":
            assert arguments[0] == "install"
            (extra,) = re.findall(r"^\.\[(\w+)\]$", arguments[1])
            assert extra in extras
        elif name == "make":
            assert set(arguments) <= set(targets)
        elif name == "python3":
            assert arguments == ["-m", "venv", ".venv"]
    assert seen == set(ASIDE)


@pytest.mark.server
def test_the_flags_of_the_server_and_healing_the_manager_alone(tmp_path: Path) -> None:
    """A server with the flags of deployment.md, and what heals its manager when that dies."""
    (flags,) = [
        each
        for each in blocks(PAGES[0].parent / "docs" / "deployment.md", "sh")
        if each.startswith("tritonserver")
    ]
    arguments = flags.replace("\\\n", " ").split()[2:]
    assert "--model-control-mode=none" in arguments
    arguments += ["--model-control-mode=explicit", "--load-model=*"]  # the last one counts
    (heal,) = [each for each in blocks(ROOT / "docs" / "operations.md", "sh") if "/unload" in each]
    state = tmp_path / "state"
    export(tmp_path / "models", Settings(first=1, capacity=99, state=str(state), fresh=True))
    with Server(tmp_path / "models", arguments=arguments) as server:
        with Client(server.grpc_url, timeout=3) as cids:
            cid = cids.acquire()
            lease = cids._session.lease
            os.kill(writer_of(state / "cidmgr.cidalloc")[0], signal.SIGKILL)
            with pytest.raises(errors.CidError):
                cids.status()
            run_shell(heal, server, tmp_path)
            assert cids.acquire() != cid
            assert cids._session.lease is lease, "the session lives on"
            stranger = heal.replace("-H 'admin: SECRET' ", "").replace("curl -s", "curl -sf")
            with pytest.raises(AssertionError):
                run_shell(stranger, server, tmp_path)


def test_curl_of_the_readme(triton: TritonServer, tmp_path: Path) -> None:
    """It gets an ID and gives it back."""
    (script,) = [block for block in blocks(PAGES[0], "sh") if "curl" in block]
    with Client(triton.grpc_url) as client:
        held = client.active()
        answer = json.loads(run_shell(script, triton, tmp_path))
        assert answer["OUTPUT"] == 1
        assert client.active() == held


def test_curl_of_the_protocol(triton: TritonServer, tmp_path: Path) -> None:
    """The short form and the long one give back what they got, the long one one of three."""
    page = ROOT / "docs" / "protocol.md"
    stamp, drain, short, long = (
        each for each in blocks(page, "sh") if "curl" in each and "session" not in each
    )
    with Anonymous(connect(triton.grpc_url)) as client:
        before = client.active()
        assert json.loads(run_shell(short, triton, tmp_path))["OUTPUT"] == 1
        assert client.active() == before
        last = run_shell(long + 'echo "$answer"', triton, tmp_path)
        released, got = _objects(last)
        assert released["outputs"][0]["data"] == [1]
        ids = got["outputs"][0]["data"]
        assert len(ids) == 3 and client.active() == before + 2
        client.release_many(ids[1:])
    assert run_shell(drain, triton, tmp_path) == '"DETAIL":""\n'
    assert re.fullmatch(r'"DETAIL":"[0-9a-f]{32}"\n', run_shell(stamp, triton, tmp_path))


def test_a_session_with_curl(triton: TritonServer, tmp_path: Path) -> None:
    page = ROOT / "docs" / "protocol.md"
    script, dead = (block for block in blocks(page, "sh") if "session=" in block)
    printed = run_shell(script, triton, tmp_path)
    opened, issued, held, closed = (each["OUTPUT"] for each in _objects(printed))
    assert opened[0] == 1 and opened[2] == 60_000
    assert len(issued) == 3 and held == sorted(issued)
    assert closed == 3
    opened, renewed, named, closed = (
        each.get("OUTPUT", []) for each in _objects(run_shell(dead, triton, tmp_path))
    )
    assert len(opened) == 9 and renewed[1:] == [60_000, 0] and named == [] and closed == 0


def _objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects that stand one after the other in a text."""
    found, decoder, text = [], json.JSONDecoder(), text.strip()
    while text:
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].lstrip()
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python(page: Path, triton: TritonServer) -> None:
    for block in blocks(page, "python"):
        if ">>>" in block:
            continue
        code = block.replace("localhost:8001", triton.grpc_url)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, page.name, "exec"), {})
        if "print(" in block:
            assert printed.getvalue() == "[[22]]\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_doctests(page: Path) -> None:
    result = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    if page.name == "README.md":
        assert result.attempted > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target and not target.startswith("../../actions/"):  # pages of GitHub
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_index() -> None:
    docs = ROOT / "docs"
    linked = set(re.findall(r"\]\((\S+?\.md)\)", (docs / "index.md").read_text()))
    pages = {*docs.glob("*.md"), *docs.glob("api/*.md")} - {docs / "index.md"}
    assert linked == {str(page.relative_to(docs)) for page in pages}


def test_the_protocol_names_every_operation_and_code() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    for operation in Operation:
        assert re.search(rf"^\| {operation.value} \| {operation.name}\b", text, re.MULTILINE)
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \| \d{3}", text, re.MULTILINE)
    never_sent = {
        *(Code.OK, Code.REGISTRY_CORRUPT, Code.PROTOCOL),
        *(Code.SESSION_EXPIRED, Code.SEQUENCE_LOST, Code.FORKED),
    }
    named = {Code[name] for number, name in rows if Code[name].value == int(number)}
    assert named == set(Code) - never_sent
