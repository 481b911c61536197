"""The examples run as a stranger would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cidalloc.client import Client
from cidalloc.devserver.triton_server import TritonServer

EXAMPLES = sorted((Path(__file__).parent.parent.parent / "examples").glob("*.py"))


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
