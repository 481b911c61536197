"""A decoupled sequence model for tests: it answers a request any number of times."""

from __future__ import annotations

from pathlib import Path

CODE = """
import threading, time
import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

def value(request, name):
    return int(pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)[0])

def answer(total):
    return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", np.array([[total]], np.int32))])

class TritonPythonModel:
    def initialize(self, args):
        self.totals, self.kept = {}, []

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            if value(request, "READY"):
                cid, number = value(request, "CORRID"), value(request, "INPUT")
                total = 0 if value(request, "START") else self.totals.get(cid, -1_000_000)
                self.totals[cid] = total + max(number, 0)
                if value(request, "END"):
                    del self.totals[cid]
                self.send(sender, total, number)
            else:
                sender.send(flags=FINAL)
        return None

    def send(self, sender, total, number):
        if number >= 0:         # so many answers
            for n in range(number):
                sender.send(answer(total + n + 1))
            sender.send(flags=FINAL)
        elif number == -1:      # two answers and an error
            sender.send(answer(1))
            sender.send(answer(2))
            error = pb_utils.TritonError("the model broke")
            sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
        elif number == -2:      # one answer, and never the final response
            sender.send(answer(1))
            self.kept.append(sender)
        elif number == -3:      # the last answer is the final response
            sender.send(answer(1))
            sender.send(answer(2), flags=FINAL)
        else:                   # -10 and below: so many answers less 10, slowly
            threading.Thread(target=self.slowly, args=(sender, -number - 10), daemon=True).start()

    def slowly(self, sender, count):
        for n in range(count):
            sender.send(answer(n + 1))
            time.sleep(0.2)
        sender.send(flags=FINAL)
"""

CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 8
model_transaction_policy {{ decoupled: true }}
sequence_batching {{
  max_sequence_idle_microseconds: 20000000
  oldest {{ max_candidate_sequences: 64 }}
  control_input [
    {{ name: "START" control [ {{ kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] }} ] }},
    {{ name: "END" control [ {{ kind: CONTROL_SEQUENCE_END int32_false_true: [0, 1] }} ] }},
    {{ name: "READY" control [ {{ kind: CONTROL_SEQUENCE_READY int32_false_true: [0, 1] }} ] }},
    {{ name: "CORRID" control [ {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }} ] }}
  ]
}}
input [ {{ name: "INPUT" data_type: TYPE_INT32 dims: [ 1 ] }} ]
output [ {{ name: "OUTPUT" data_type: TYPE_INT32 dims: [ 1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""


def write(repository: Path, name: str = "partials") -> None:
    """Write the model into a repository. INPUT says how it answers; see `send` above."""
    folder = repository / name
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "1" / "model.py").write_text(CODE)
    (folder / "config.pbtxt").write_text(CONFIG.format(name=name))
