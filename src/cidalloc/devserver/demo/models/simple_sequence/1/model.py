"""The accumulator: START resets a sequence's sum to the value sent, END ends it."""

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"]).get("parameters", {})
        delay = parameters.get("execute_delay_ms", {}).get("string_value", "0")
        self.delay_s = float(delay) / 1000
        self.sums = {}

    def execute(self, requests):
        if self.delay_s:
            time.sleep(self.delay_s)
        return [self.add(request) for request in requests]

    def add(self, request):
        def read(name):
            return int(pb_utils.get_input_tensor_by_name(request, name).as_numpy().flat[0])

        total = 0
        if read("READY"):
            cid = read("CORRID")
            total = read("INPUT") + (0 if read("START") else self.sums.get(cid, 0))
            self.sums[cid] = total
            if read("END"):
                del self.sums[cid]
        output = pb_utils.Tensor("OUTPUT", np.array([[total]], np.int32))
        return pb_utils.InferenceResponse([output])
