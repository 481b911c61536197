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
from pathlib import Path

import pytest

from cidalloc.client import Client
from cidalloc.codes import Code, Operation
from cidalloc.server import TritonServer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE_ID = "1073741824"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def curl_commands(path: Path) -> list[str]:
    found = []
    for block in blocks(path, "sh"):
        if "curl" in block:
            found += re.findall(r"^curl .*?'$", block, re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "protocol.md"])
def test_curl(page: Path, triton: TritonServer) -> None:
    """Every command in turn; what NEW gave goes back with the DELETE that follows it."""
    if shutil.which("curl") is None:
        if os.environ.get("CI"):
            pytest.fail("curl is missing")
        pytest.skip("curl is missing")
    with Client(triton.grpc_url) as client:
        before = client.active()
        ids: list[int] = []
        commands = curl_commands(page)
        for command in commands:
            if ids:
                command = command.replace(EXAMPLE_ID, str(ids[0]))
            command = command.replace("localhost:8000", triton.http_url)
            done = subprocess.run(
                ["bash", "-c", command], capture_output=True, text=True, timeout=30, check=True
            )
            answer = json.loads(done.stdout)
            output = answer["outputs"][0]["data"] if "outputs" in answer else answer["OUTPUT"]
            output = output if isinstance(output, list) else [output]
            if '"CODE": 1' in command or '"data": [1]' in command:
                assert output == [1], command
                ids.pop(0)
            else:
                ids += output
        assert len(commands) >= 2
        assert client.active() == before + len(ids)
        if ids:
            client.release_many(ids)


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


def test_the_protocol_names_every_operation_and_code() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    for operation in Operation:
        assert re.search(rf"^\| {operation.value} \| {operation.name}\b", text, re.MULTILINE)
    for number, name in re.findall(r"^\| (\d+) \| ([A-Z_]+) \| \d{3}", text, re.MULTILINE):
        assert Code[name].value == int(number)
