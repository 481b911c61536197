"""END with end_inputs, on the real server: once, and on the version of the sequence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import Server

from cidalloc.client import Client
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import export

pytestmark = pytest.mark.server

CODE = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.ends = 0

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        number = int(pb_utils.get_input_tensor_by_name(request, "X").as_numpy()[0, 0])
        self.ends += bool(request.flags() & 2) and number
        if number == 1000:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("no space to store it"))
        if number == -2:
            time.sleep(0.5)
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("the model broke"))
        return pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([[self.ends]], np.int32))])
"""
CONFIG = """
backend: "python"
max_batch_size: 8
sequence_batching { max_sequence_idle_microseconds: 20000000
  oldest { max_candidate_sequences: 64 } }
input [ { name: "X" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "Y" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("models")
    export(folder, Settings(first=1, capacity=100_000, fresh=True))
    (folder / "counter" / "1").mkdir(parents=True)
    (folder / "counter" / "1" / "model.py").write_text(CODE)
    (folder / "counter" / "config.pbtxt").write_text(CONFIG)
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def ends(cids: Client) -> int:
    with cids.sequence("counter") as sequence:
        return int(sequence.infer({"X": 0}, end=True)["Y"][0, 0])


@pytest.fixture
def cids(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url) as cids:
        yield cids


def test_end_on_a_version(cids: Client) -> None:
    before = ends(cids)
    with cids.sequence("counter", end_inputs={"X": 1}) as sequence:
        sequence.infer({"X": 0}, model_version="1")
    assert ends(cids) == before + 1


def test_an_end_that_the_model_itself_refuses_is_sent_once(cids: Client) -> None:
    before = ends(cids)
    with cids.sequence("counter", end_inputs={"X": 1000}) as sequence:
        sequence.infer({"X": 0})
    assert ends(cids) == before + 1000
