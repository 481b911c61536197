"""The examples run as a stranger would run them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from servers import Server

from cidalloc.client import Client
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import export

FOLDER = Path(__file__).parent.parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def test_there_are_some() -> None:
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path, triton: TritonServer) -> None:
    with Client(triton.grpc_url) as cids:
        held = cids.active()
        command = [sys.executable, str(path), "-u", triton.grpc_url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("[6] 29 : -29\nPASS: sequence\n")
        assert cids.active() == held


@pytest.mark.server
def test_partial_results(tmp_path: Path) -> None:
    export(tmp_path, Settings(first=1, capacity=1000, fresh=True))
    shutil.copytree(FOLDER / "partial_results" / "model", tmp_path / "words")
    server = Server(tmp_path)
    server.start()
    try:
        command = [sys.executable, str(FOLDER / "partial_results" / "client.py"), "--words", "4"]
        done = subprocess.run(
            [*command, "-u", server.grpc_url],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines[:4]] == [
        "word1",
        "word1 word2",
        "word1 word2 word3",
        "word1 word2 word3 word4",
    ]
    assert lines[4] == "4 words; the sequence is closed, recycled"
