"""A sequence model for tests that answers with what it got, as JSON in the output SEEN."""

from __future__ import annotations

from pathlib import Path

CODE = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils

def plain(array):
    elements = array.reshape(-1).tolist()
    return [each.decode() if isinstance(each, bytes) else each for each in elements]

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        inputs = {
            each.name(): [str(each.as_numpy().dtype), list(each.shape()), plain(each.as_numpy())]
            for each in request.inputs()
        }
        seen = {
            "inputs": inputs,
            "cid": request.correlation_id(),
            "flags": request.flags(),
            "request_id": request.request_id(),
            "parameters": json.loads(request.parameters() or "{}"),
            "timeout": request.timeout(),
            "version": "VERSION",
        }
        outputs = {
            "SEEN": np.array([[json.dumps(seen).encode()]], object),
            "COUNT": np.array([[len(inputs)]], np.int32),
        }
        wanted = request.requested_output_names()
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array) for name, array in outputs.items() if name in wanted]
        )
"""

CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: {batch}
version_policy {{ all {{ }} }}
sequence_batching {{ max_sequence_idle_microseconds: 20000000
  oldest {{ max_candidate_sequences: 64 }} }}
input [ {{ name: "NUMBERS" data_type: {kind} dims: [ {size} ] }},
        {{ name: "MATRIX" data_type: TYPE_FP32 dims: [ -1, 3 ] optional: true }},
        {{ name: "TEXT" data_type: TYPE_STRING dims: [ -1 ] optional: true }},
        {{ name: "FLAG" data_type: TYPE_BOOL dims: [ 1 ] optional: true }},
        {{ name: "HALF" data_type: TYPE_FP16 dims: [ 1 ] optional: true }},
        {{ name: "BYTE" data_type: TYPE_UINT8 dims: [ 1 ] optional: true }} ]
output [ {{ name: "SEEN" data_type: TYPE_STRING dims: [ 1 ] }},
         {{ name: "COUNT" data_type: TYPE_INT32 dims: [ 1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""


def write(
    repository: Path, name: str = "echo", *, kind: str = "TYPE_INT32", size: int = 2, batch: int = 8
) -> None:
    """Write the model into a repository, in two versions.

    Args:
        repository: the folder.
        name: of the model.
        kind: the data type of NUMBERS.
        size: how many NUMBERS it takes.
        batch: ``max_batch_size``.
    """
    folder = repository / name
    for version in ("1", "2"):
        (folder / version).mkdir(parents=True, exist_ok=True)
        (folder / version / "model.py").write_text(CODE.replace("VERSION", version))
    config = CONFIG.format(name=name, kind=kind, size=size, batch=batch)
    (folder / "config.pbtxt").write_text(config)
