"""The examples run as a stranger would run them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from servers import Server
from tritonclient.utils import InferenceServerException
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from cidalloc import errors
from cidalloc.client import Client
from cidalloc.devserver import demo
from cidalloc.devserver.demo.sequences import number
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings

pytestmark = pytest.mark.server

FOLDER = Path(__file__).parent.parent.parent / "examples"

PRINTED = {
    "bls/client.py": "recording: 10\ndoubled: 20\n",
    "ensemble/client.py": r"(loud so far: \d+\n)*loud so far: (\d{4})\nexpected: \2\n",
    "iterative/client.py": r"6 3 10 5 16 8 4 2 1\n7 22 11 34 17 52 26 13 40 20 10 5 16 8 4 2 1\n",
    "partial_results/client.py": r".*s  word1\n.*s  word1 word2\n.*s  word1 word2 word3\n"
    "3 words; the sequence is closed, recycled\n",
    "process_pool.py": f"sums: {' '.join(str(n) for n in range(45, 245, 10))}\n",
    "shared_memory.py": "sum: 1\nsum: 3\nsum: 6\nsum: 10\n",
    "simple_grpc_sequence_client.py": r"(?s:.*)\n\[6\] 29 : -29\nPASS: sequence\n",
    "simple_grpc_sequence_stream_client.py": r"(?s:.*)\n\[6\] 29 : -29\nPASS: sequence\n",
    "task_group.py": r"failed: -3 is not loud\ncancelled: \[True, False, True\]\nIDs in use: 0\n",
}
"""What each example prints, as a regular expression."""


RUNS = [*((name, "grpc") for name in PRINTED), ("shared_memory.py", "http")]


def variant(folder: Path, model: str, name: str, *changes: tuple[str, str]) -> None:
    """Copy a model, with changes of its text; the old text is a regular expression."""
    shutil.copytree(folder / model, folder / name)
    files = [folder / name / "config.pbtxt", folder / name / "1" / "model.py"]
    text = "\0".join(file.read_text() for file in files)
    for old, new in ((f'name: "{model}"', f'name: "{name}"'), *changes):
        text, count = re.subn(old, new, text, flags=re.DOTALL)
        assert count, f"{model} has no {old}"
    for file, changed in zip(files, text.split("\0"), strict=True):
        file.write_text(changed)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server with all models of the examples."""
    folder = tmp_path_factory.mktemp("models")
    demo.write_repository(folder, Settings(fresh=True))
    for model in FOLDER.glob("*/models/*"):
        shutil.copytree(model, folder / model.name)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        http, grpc, metrics = (each.getsockname()[1] for each in sockets)
    config = folder / "recording" / "config.pbtxt"
    config.write_text(config.read_text().replace("localhost:8001", f"127.0.0.1:{grpc}"))
    variant(folder, "doubled", "doubled_plain", (r"sequence_batching \{.*?\n\}\n", ""))
    variant(folder, demo.MODEL, "one_slot", ("max_batch_size: 128", "max_batch_size: 1"))
    variant(folder, "recording", "no_slot", (demo.MODEL, "one_slot"), ("timeout=5", "timeout=1"))
    flags = ["--model-control-mode=explicit", "--load-model=*"]
    with Server(folder, ports=(http, grpc, metrics), arguments=flags) as server:
        yield server


@pytest.fixture
def triton_client(server: TritonServer) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        yield client


def labels(status: dict[str, Any]) -> set[str]:
    return {each["label"] for each in status["sessions"]}


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < until:
        time.sleep(0.05)
    return met


def test_every_example_is_run() -> None:
    scripts = {
        str(path.relative_to(FOLDER))
        for path in FOLDER.rglob("*.py")
        if "models" not in path.relative_to(FOLDER).parts
    }
    # test_conformance.py runs the last one.
    assert scripts == {*PRINTED, "fastapi_websocket.py", "conformance/python_client.py"}


def test_the_recipes_quote_the_examples() -> None:
    def lines(text: str) -> str:
        return "".join(f"\n{line.strip()}" for line in text.splitlines()) + "\n"

    page = (FOLDER.parent / "docs" / "recipes.md").read_text()
    quoted = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    sources = [lines(path.read_text()) for path in FOLDER.rglob("*.py")]
    assert len(quoted) > 5
    for quote in quoted:
        assert any(lines(quote) in source for source in sources), quote


@pytest.mark.parametrize(("name", "protocol"), RUNS)
def test_examples(name: str, protocol: str, server: TritonServer) -> None:
    if name == "task_group.py" and sys.version_info < (3, 11):
        pytest.skip("asyncio.TaskGroup needs Python 3.11")
    with Client(server.grpc_url) as cids:
        before = cids.status()
        done = subprocess.run(
            [sys.executable, str(FOLDER / name), "-u", getattr(server, f"{protocol}_url")],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        after = cids.status()
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(PRINTED[name], done.stdout), done.stdout
    assert not done.stderr
    assert after["acquired"] > before["acquired"]
    assert after["sessions_expired"] == before["sessions_expired"]
    left = labels(after) - labels(before)
    # A model keeps its session; processes, and those of a pool, do not.
    assert all(label.startswith("recording") for label in left)


# ---- BLS


def samples(*values: int) -> list[tritonclient.grpc.InferInput]:
    tensor = tritonclient.grpc.InferInput("SAMPLES", [len(values)], "INT32")
    return [tensor.set_data_from_numpy(np.array(values, np.int32))]


def value(number: int) -> dict[str, np.ndarray]:
    return {"INPUT": np.array([[number]], np.int32)}


def test_bls_without_a_slot_ends_at_the_timeout(
    server: TritonServer, triton_client: tritonclient.grpc.InferenceServerClient
) -> None:
    with Client(server.grpc_url) as cids, cids.sequence("one_slot") as sequence:
        sequence.infer(value(1))
        began = time.monotonic()
        with pytest.raises(InferenceServerException, match="timeout of the corresponding sequence"):
            triton_client.infer("no_slot", samples(1, 2))
        assert 0.9 < time.monotonic() - began < 5
        sequence.infer(value(1), end=True)
    assert triton_client.infer("no_slot", samples(1, 2)).as_numpy("TOTAL").tolist() == [3]


def test_bls_from_a_model_without_sequence_batching(server: TritonServer) -> None:
    with Client(server.grpc_url) as cids:
        with pytest.raises(errors.InvalidArgument, match="sequence_batching"):
            cids.sequence("doubled_plain")
        with cids.sequence("doubled_plain", check=False, cooldown=5) as sequence:
            sequence.infer(value(1))
            assert sequence.infer(value(2), end=True)["OUTPUT"].tolist() == [[6]]
        assert sequence.state == "closed, recycled"


def test_a_sequence_that_the_inner_model_has_forgotten(
    server: TritonServer, triton_client: tritonclient.grpc.InferenceServerClient
) -> None:
    with Client(server.grpc_url) as cids, cids.sequence("doubled") as sequence:
        sequence.infer(value(1))
        triton_client.infer(  # what nobody should do
            demo.MODEL, number(0), sequence_id=sequence.cid, sequence_end=True
        )
        with pytest.raises(errors.SequenceLost):
            sequence.infer(value(2))


def test_a_model_that_is_unloaded_closes_its_session(
    server: TritonServer, triton_client: tritonclient.grpc.InferenceServerClient
) -> None:
    def sessions() -> int:
        with Client(server.grpc_url) as cids:
            return sum(label.startswith("no_slot") for label in labels(cids.status()))

    triton_client.infer("no_slot", samples(1))
    assert sessions() > 0
    triton_client.unload_model("no_slot")
    assert eventually(lambda: sessions() == 0, 20)
    triton_client.load_model("no_slot")


# ---- WebSockets


@contextlib.contextmanager
def uvicorn(triton: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the app beside a server; give its URL and its process."""
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(FOLDER), "--port", "0"]
    with subprocess.Popen(
        [*command, "fastapi_websocket:app"],
        env={**os.environ, "CIDALLOC_URL": triton},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            seen = []
            for line in process.stderr:
                seen.append(line)
                if found := re.search(r"running on http://([\d.:]+)", line):
                    yield f"ws://{found[1]}/sum", process
                    break
            else:
                pytest.fail("".join(seen))
        finally:
            process.kill()


def say(connection: ClientConnection, text: str) -> str:
    connection.send(text)
    return str(connection.recv(timeout=20))


def test_websockets(
    server: TritonServer, triton_client: tritonclient.grpc.InferenceServerClient
) -> None:
    def requests() -> int:
        statistics = triton_client.get_inference_statistics(demo.MODEL)
        return int(statistics.model_stats[0].inference_count)

    with uvicorn(server.grpc_url) as (url, process), Client(server.grpc_url) as cids:
        with contextlib.ExitStack() as stack:
            ends, hangs_up, is_cut_off = (
                stack.enter_context(connect(url, proxy=None)) for _ in range(3)
            )
            assert say(ends, "1") == "1"
            assert say(hangs_up, "10") == "10"
            assert say(is_cut_off, "100") == "100"
            assert say(ends, "2") == "3"
            assert say(hangs_up, "20") == "30"
            assert say(ends, "end") == "3"
            with pytest.raises(ConnectionClosed):
                ends.recv(timeout=20)
            before = requests()
            hangs_up.close()
            is_cut_off.socket.shutdown(socket.SHUT_RDWR)
            # Triton itself would forget them after 5 s, and tell the model nothing.
            assert eventually(lambda: requests() == before + 2, 4), "no END with the end_inputs"
        own = f":{process.pid}"
        assert any(label.endswith(own) for label in labels(cids.status()))
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert not any(label.endswith(own) for label in labels(cids.status()))


def test_a_websocket_while_triton_is_down() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # nobody listens
        with uvicorn(f"127.0.0.1:{sock.getsockname()[1]}") as (url, _):
            with connect(url, proxy=None) as connection, pytest.raises(ConnectionClosed) as closed:
                connection.recv(timeout=20)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1013, "UNAVAILABLE")
