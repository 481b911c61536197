"""The documentation is true: its code runs, its commands work, its links lead somewhere."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from anonymous import Anonymous

from cidalloc.client import Client
from cidalloc.client._transport import connect
from cidalloc.codes import Code, Operation
from cidalloc.server import TritonServer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE_ID = "1073741824"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def run_shell(script: str, triton: TritonServer, tmp_path: Path) -> str:
    """Run a script of the docs; without curl, with a stand-in that does what they ask of it."""
    path = os.environ["PATH"]
    if shutil.which("curl") is None:
        stand_in = tmp_path / "curl"
        stand_in.write_text(
            f"#!{sys.executable}\n"
            "import sys, urllib.request\n"
            "silent, url, flag, body = sys.argv[1:]\n"
            "assert (silent, flag) == ('-s', '-d')\n"
            "url = url if '://' in url else 'http://' + url\n"
            "print(urllib.request.urlopen(url, body.encode()).read().decode())\n"
        )
        stand_in.chmod(0o755)
        path = f"{tmp_path}:{path}"
    script = script.replace("localhost:8000", triton.http_url)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env={**os.environ, "PATH": path},
    )
    return done.stdout


def test_curl_of_the_readme(triton: TritonServer, tmp_path: Path) -> None:
    """It gets an ID and gives it back."""
    (script,) = [block for block in blocks(PAGES[0], "sh") if "curl" in block]
    with Client(triton.grpc_url) as client:
        held = client.active()
        answer = json.loads(run_shell(script, triton, tmp_path))
        assert answer["OUTPUT"] == 1
        assert client.active() == held


def test_curl_of_the_protocol(triton: TritonServer, tmp_path: Path) -> None:
    """Every command in turn; what NEW gave goes back with the DELETE that follows it."""
    page = ROOT / "docs" / "protocol.md"
    commands = [block for block in blocks(page, "sh") if "curl" in block]
    commands = [command for command in commands if "session" not in command]
    assert len(commands) == 4
    with Anonymous(connect(triton.grpc_url)) as client:
        before = client.active()
        ids: list[int] = []
        for command in commands:
            script = command.replace(EXAMPLE_ID, str(ids[0])) if ids else command
            answer = json.loads(run_shell(script, triton, tmp_path))
            output = answer["outputs"][0]["data"] if "outputs" in answer else answer["OUTPUT"]
            output = output if isinstance(output, list) else [output]
            if '"CODE": 1' in command or '"data": [1]' in command:
                assert output == [1], command
                ids.pop(0)
            else:
                ids += output
        assert client.active() == before + len(ids)
        client.release_many(ids)


def test_a_session_with_curl(triton: TritonServer, tmp_path: Path) -> None:
    page = ROOT / "docs" / "protocol.md"
    (script,) = [block for block in blocks(page, "sh") if "session=" in block]
    printed = run_shell(script, triton, tmp_path)
    opened, issued, held, closed = (each["OUTPUT"] for each in _objects(printed))
    assert opened[0] == 1 and opened[2] == 60_000
    assert len(issued) == 3 and held == sorted(issued)
    assert closed == 3


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
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    linked = set(re.findall(r"\]\((\S+?\.md)\)", index))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_the_protocol_names_every_operation_and_code() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    for operation in Operation:
        assert re.search(rf"^\| {operation.value} \| {operation.name}\b", text, re.MULTILINE)
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \| \d{3}", text, re.MULTILINE)
    never_sent = {
        *(Code.OK, Code.REGISTRY_LOCKED, Code.REGISTRY_CORRUPT, Code.PROTOCOL),
        *(Code.SESSION_EXPIRED, Code.SEQUENCE_LOST, Code.FORKED),
    }
    named = {Code[name] for number, name in rows if Code[name].value == int(number)}
    assert named == set(Code) - never_sent
