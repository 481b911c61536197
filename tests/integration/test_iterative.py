"""Iterative models on the real server: a request is a whole sequence, whatever its caller says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.http
from servers import Server
from tritonclient.utils import InferenceServerException

from cidalloc import errors
from cidalloc.client import AsyncClient, Client
from cidalloc.devserver.demo.sequences import number
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import export

pytestmark = pytest.mark.server

CODE = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)
        self.counts = {}

    def execute(self, requests):
        answers = [self.answer(request) for request in requests]
        return None if self.decoupled else answers

    def answer(self, request):
        cid = request.correlation_id()
        wanted = int(pb_utils.get_input_tensor_by_name(request, "INPUT").as_numpy()[0, 0])
        if wanted < 0:
            error = pb_utils.TritonError("a bad number", pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        start = request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
        count = 1 if start else self.counts[cid] + 1
        self.counts[cid] = count
        output = pb_utils.Tensor("OUTPUT", np.array([[count]], np.int32))
        answer = pb_utils.InferenceResponse([output])
        done = count == wanted
        if self.decoupled:
            request.get_response_sender().send(answer)
        if not done:
            request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
        elif self.decoupled:
            final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            request.get_response_sender().send(flags=final)
        return answer if done else None
"""
"""Iterates as often as INPUT says, and answers with the count: at the end, or each time."""

CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 8
model_transaction_policy {{ decoupled: {decoupled} }}
sequence_batching {{
  iterative_sequence: true
  max_sequence_idle_microseconds: 5000000
  oldest {{ max_candidate_sequences: 64 }}
}}
input [ {{ name: "INPUT" data_type: TYPE_INT32 dims: [ 1 ] }} ]
output [ {{ name: "OUTPUT" data_type: TYPE_INT32 dims: [ 1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""

ENSEMBLE = """
name: "ensemble"
platform: "ensemble"
max_batch_size: 1
input [ { name: "INPUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "OUTPUT" data_type: TYPE_INT32 dims: [ 1 ] } ]
ensemble_scheduling {
  step [
    { model_name: "counts" model_version: -1
      input_map { key: "INPUT" value: "INPUT" } output_map { key: "OUTPUT" value: "OUTPUT" } }
  ]
}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("models")
    export(folder, Settings(fresh=True))
    for name, decoupled in (("counts", "false"), ("counts_up", "true")):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.py").write_text(CODE)
        (folder / name / "config.pbtxt").write_text(CONFIG.format(name=name, decoupled=decoupled))
    (folder / "ensemble" / "1").mkdir(parents=True)
    (folder / "ensemble" / "config.pbtxt").write_text(ENSEMBLE)
    with Server(folder) as server:
        yield server


def count(result: Any) -> int:
    return int(result.as_numpy("OUTPUT")[0, 0])


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("way", ["grpc", "stream", "http"])
@pytest.mark.parametrize("model", ["counts", "ensemble"])
def test_a_request_is_a_sequence(server: TritonServer, model: str, way: str, end: bool) -> None:
    module = tritonclient.http if way == "http" else tritonclient.grpc
    with Client(server.http_url if way == "http" else server.grpc_url) as cids:
        with cids.sequence(model, streaming=way == "stream", timeout=10) as sequence:
            assert count(sequence.infer(number(5, module), end=end)) == 5
            assert sequence.state == "ended"
            with pytest.raises(errors.InvalidArgument, match="open a new one"):
                sequence.infer(number(5, module))
        # Triton forgets it a little after the answer.
        assert sequence.state == "closed, cooling"


def test_every_answer_of_a_decoupled_model(server: TritonServer) -> None:
    with Client(server.grpc_url) as cids, cids.sequence("counts_up", timeout=10) as sequence:
        assert [count(each) for each in sequence.stream(number(4))] == [1, 2, 3, 4]
    assert sequence.state == "closed, cooling"


def test_many_at_once(server: TritonServer) -> None:
    """Triton batches their iterations, and each has its own state."""

    async def whole(cids: AsyncClient, wanted: int) -> int:
        async with cids.sequence("counts", timeout=10) as sequence:
            return count(await sequence.infer(number(wanted)))

    async def each(cids: AsyncClient, wanted: int) -> list[int]:
        async with cids.sequence("counts_up", timeout=10) as sequence:
            return [count(result) async for result in sequence.stream(number(wanted))]

    async def run() -> None:
        async with AsyncClient(server.grpc_url) as cids:
            wholes = await asyncio.gather(*(whole(cids, n) for n in range(1, 20)))
            assert wholes == list(range(1, 20))
            counts = await asyncio.gather(*(each(cids, n) for n in range(1, 20)))
            assert counts == [list(range(1, n + 1)) for n in range(1, 20)]
            assert not len(cids.held())

    asyncio.run(run())


def test_ones_own_client_sends_no_end_either(server: TritonServer) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as own:
        with Client(server.grpc_url) as cids, cids.sequence("counts") as sequence:
            given = sequence.infer_kwargs(end=True)
            assert (given["sequence_start"], given["sequence_end"]) == (True, False)
            assert count(own.infer("counts", number(3), client_timeout=10, **given)) == 3
            with pytest.raises(errors.InvalidArgument):
                sequence.infer_kwargs()
        assert count(own.infer("counts", number(3), client_timeout=10)) == 3, "Triton numbers it"


def test_there_is_no_end_to_send(server: TritonServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cidalloc.client"), Client(server.grpc_url) as cids:
        with cids.sequence("counts", end_inputs=number(1), timeout=10) as sequence:
            with pytest.raises(InferenceServerException, match="a bad number"):
                sequence.infer(number(-1))
            # Triton 2.51 may lose what follows an error at once: it still ends the iteration.
            time.sleep(0.2)
            assert count(sequence.infer(number(2))) == 2, "it can be tried again"
        with cids.sequence("counts", end_inputs=number(1), timeout=10) as sequence:
            with pytest.raises(InferenceServerException):
                sequence.infer(number(-1))
    assert not caplog.records
