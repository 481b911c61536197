"""What the tests share: one real Triton server, and clients that reach a manager in every way."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from anonymous import Anonymous
from loopback import Loopback
from servers import Server

from cidalloc.client import Client
from cidalloc.client.sync.transport import connect
from cidalloc.devserver import demo
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import export

SMALL = Settings(
    first=1000, capacity=8, cooldown_ms=0, unended_cooldown_ms=0, max_count=100, fresh=True
)
"""A pool small enough to run out, without a cooldown."""


QUICK = Settings(
    first=2000,
    capacity=1000,
    cooldown_ms=500,
    unended_cooldown_ms=4_000,
    grace_ms=1_000,
    fresh=True,
)
"""A manager that does not wait for long."""

PAIR = Settings(first=3000, capacity=2, cooldown_ms=200, unended_cooldown_ms=200, fresh=True)
"""A manager with two IDs, for which clients wait."""


IMPOSTOR = """
import numpy
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        output = pb_utils.Tensor("OUTPUT", numpy.zeros([1, 1], numpy.float32))
        return [pb_utils.InferenceResponse([output]) for request in requests]
"""
"""A model with the tensors of a manager that is none."""

ENSEMBLE = """
name: "ensemble"
platform: "ensemble"
max_batch_size: 1
input [ { name: "INPUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "OUTPUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
ensemble_scheduling {
  step [
    { model_name: "narrow_sequence" model_version: -1
      input_map { key: "INPUT" value: "INPUT" } output_map { key: "OUTPUT" value: "OUTPUT" } }
  ]
}
"""
"""A model of one step, which keeps sequences."""


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A script that runs the tests in the background lets them, and what they start, ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what failed once and then passed: each is a fault, of the package or of its tests."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.section(f"failed once: {report.nodeid}", sep="-")
        terminalreporter.line(report.longreprtext)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the real server, for environments that cannot have it."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        in_several_ways = fixtures & {"small", "way"} and "loopback" not in item.name
        if fixtures & {"triton", "real"} or in_several_ways:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository: the manager, small ones for tests of their own, and target models."""
    folder = tmp_path_factory.mktemp("models")
    demo.write_repository(folder, Settings())
    for name in ("small_grpc", "small_http", "small_raw"):
        export(folder, SMALL, name=name)
    export(folder, PAIR, name="pair")
    export(folder, Settings(first=2**40), name="wide")
    for name in ("quick", "quick_too"):  # a test may leave the whole pool cooling
        export(folder, QUICK, name=name)
    impostor = export(folder, name="impostor")
    (impostor / "1" / "model.py").write_text(IMPOSTOR)
    config = (impostor / "config.pbtxt").read_text()
    (impostor / "config.pbtxt").write_text(
        config.replace('"OUTPUT" data_type: TYPE_UINT64', '"OUTPUT" data_type: TYPE_FP32')
    )
    accumulator = folder / demo.MODEL
    for name, old, new in (
        ("narrow_sequence", "TYPE_UINT64", "TYPE_INT32"),
        ("idle_sequence", "idle_microseconds: 5000000", "idle_microseconds: 200000"),
        ("patient_sequence", "idle_microseconds: 5000000", "idle_microseconds: 60000000"),
        ("one_slot_sequence", "max_batch_size: 128", "max_batch_size: 1"),
    ):
        shutil.copytree(accumulator, folder / name)
        config = folder / name / "config.pbtxt"
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new).replace(demo.MODEL, name))
    (folder / "ensemble" / "1").mkdir(parents=True)
    (folder / "ensemble" / "config.pbtxt").write_text(ENSEMBLE)
    return folder


@pytest.fixture(scope="session")
def few(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of few models, for tests that need a server of their own: it starts sooner."""
    folder = tmp_path_factory.mktemp("few")
    for name in ("cidmgr", demo.MODEL, "patient_sequence"):
        shutil.copytree(
            repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


@pytest.fixture(scope="session")
def triton(repository: Path) -> Iterator[TritonServer]:
    """The real server. Without it these tests fail; they are never skipped."""
    server = Server(repository)
    try:
        server.start(timeout=110)  # it loads many models, maybe on a busy machine
        yield server
    finally:
        server.stop()


@pytest.fixture(params=["loopback", "grpc", "http"])
def small(request: pytest.FixtureRequest) -> Iterator[Anonymous]:
    """A client without a session of a manager with the small pool, none of which is held."""
    if request.param == "loopback":
        client = Anonymous(Loopback(SMALL))
    else:
        server = request.getfixturevalue("triton")
        url = server.grpc_url if request.param == "grpc" else server.http_url
        client = Anonymous(connect(url), f"small_{request.param}")
    with client:
        assert client.active() == 0, "a test before this one left IDs held"
        yield client


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, triton: TritonServer) -> Iterator[Client]:
    """A client of the manager on the real server."""
    with Client(triton.grpc_url if request.param == "grpc" else triton.http_url) as client:
        yield client
