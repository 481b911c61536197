"""Models for tests: each adds up what a sequence sends, takes its time, and notes what it got."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CODE = """
import json, time
import numpy as np
import triton_python_backend_utils as pb_utils

def value(request, name):
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)[0]

class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.delay = float(config["parameters"]["delay"]["string_value"])
        self.log = config["parameters"]["log"]["string_value"]
        self.decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)
        self.sums = {}

    def answer(self, request):
        cid, start, end = (int(value(request, name)) for name in ("CORRID", "START", "END"))
        number = int(value(request, "INPUT"))
        if not value(request, "READY"):
            return 0
        time.sleep(self.delay)
        total = (0 if start else self.sums.get(cid, -1_000_000)) + number
        self.sums[cid] = total
        if end:
            del self.sums[cid]
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{cid} {start} {end} {number}\\n")
        return total

    def execute(self, requests):
        answers = []
        for request in requests:
            total = self.answer(request)
            answer = pb_utils.InferenceResponse(
                [pb_utils.Tensor("OUTPUT", np.array([[total]], np.int32))]
            )
            if not self.decoupled:
                answers.append(answer)
                continue
            sender = request.get_response_sender()
            if value(request, "READY"):  # else it is an empty place of the batch
                for _ in range(int(value(request, "INPUT"))):
                    sender.send(answer)
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None if self.decoupled else answers
"""

CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: {slots}
sequence_batching {{
  max_sequence_idle_microseconds: {idle}
  direct {{ }}
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
parameters {{ key: "delay" value {{ string_value: "{delay}" }} }}
parameters {{ key: "log" value {{ string_value: "{log}" }} }}
{more}
"""


def write(
    repository: Path,
    name: str,
    *,
    slots: int = 64,
    idle_s: float = 60.0,
    delay_s: float = 0.0,
    log: Path | str = "",
    decoupled: bool = False,
) -> None:
    """Write a model into a repository, or another configuration of it.

    Args:
        repository: the folder.
        name: of the model.
        slots: how many sequences it can have at once.
        idle_s: after so many seconds it forgets a sequence.
        delay_s: so many seconds each request takes; one at a time.
        log: a file for what it gets: ID, START, END and the number, a line each.
        decoupled: answer as often as the number says.
    """
    folder = repository / name
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "1" / "model.py").write_text(CODE)
    more = "model_transaction_policy { decoupled: true }" if decoupled else ""
    values = {"name": name, "slots": slots, "delay": delay_s, "log": log, "more": more}
    (folder / "config.pbtxt").write_text(CONFIG.format(idle=int(idle_s * 1e6), **values))


class Seen(NamedTuple):
    """A request as a model has noted it."""

    cid: int
    start: bool
    end: bool
    number: int


def seen(log: Path, cid: int, begin: int = 0) -> list[Seen]:
    """Return what a model has noted of one sequence, from line ``begin`` of its log."""
    lines = log.read_text().splitlines()[begin:] if log.exists() else []
    found = [[int(field) for field in line.split()] for line in lines]
    return [Seen(a, bool(b), bool(c), d) for a, b, c, d in found if a == cid]


def lines(log: Path) -> int:
    """Return how much a model has noted."""
    return len(log.read_text().splitlines()) if log.exists() else 0


def total(result: Any) -> int:
    return int(result.as_numpy("OUTPUT")[0, 0])


def count_up(tensors: Any, number: int = 1) -> list[Any]:
    """Return the inputs that add a number, for one of tritonclient's modules."""
    tensor = tensors.InferInput("INPUT", [1, 1], "INT32")
    return [tensor.set_data_from_numpy(np.array([[number]], np.int32))]
