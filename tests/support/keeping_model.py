"""A model for tests that keeps state by ID and deletes it at END only."""

from __future__ import annotations

from pathlib import Path

CODE = """
import numpy as np
import triton_python_backend_utils as pb_utils

START, END = 1, 2

class TritonPythonModel:
    def initialize(self, args):
        self.kept = {}
        self.ends = 0

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        number = int(pb_utils.get_input_tensor_by_name(request, "X").as_numpy()[0, 0])
        self.ends += bool(request.flags() & END) and number != 0
        if number < 0:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("the model broke"))
        cid = request.correlation_id()
        old = 0 if request.flags() & START else self.kept.get(cid, 0)
        self.kept[cid] = old + number
        answer = [len(self.kept), self.kept[cid], self.ends]
        if request.flags() & END:
            del self.kept[cid]
        tensor = pb_utils.Tensor("Y", np.array([answer], np.int32))
        return pb_utils.InferenceResponse([tensor])
"""

CONFIG = """
backend: "python"
max_batch_size: 8
sequence_batching {{ max_sequence_idle_microseconds: {idle_us}
  oldest {{ max_candidate_sequences: {slots} }} }}
input [ {{ name: "X" data_type: TYPE_INT32 dims: [ 1 ] }} ]
output [ {{ name: "Y" data_type: TYPE_INT32 dims: [ 3 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""


def write(folder: Path, name: str, idle_s: float, slots: int = 512) -> None:
    """Write the model into a repository.

    Its output Y: of how many sequences it keeps state, the sum of the sequence, and how many ENDs
    it got whose number was not 0.
    """
    (folder / name / "1").mkdir(parents=True)
    (folder / name / "1" / "model.py").write_text(CODE)
    config = CONFIG.format(idle_us=int(idle_s * 1e6), slots=slots)
    (folder / name / "config.pbtxt").write_text(config)
