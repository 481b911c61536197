"""Generates a Collatz sequence, one number in each iteration, as a language model does tokens."""

import numpy as np
import triton_python_backend_utils as pb_utils

START = pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
AGAIN = pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """The model. Between iterations the state is kept by correlation ID."""

    def initialize(self, args):
        """Begin without requests."""
        self.numbers = {}

    def execute(self, requests):
        """Run one iteration of each request."""
        for request in requests:
            cid, sender = request.correlation_id(), request.get_response_sender()
            if request.flags() & START:
                tensor = pb_utils.get_input_tensor_by_name(request, "NUMBER")
                self.numbers[cid] = int(tensor.as_numpy()[0, 0])
            number = self.numbers[cid]
            number = number // 2 if number % 2 == 0 else 3 * number + 1
            self.numbers[cid] = number
            output = pb_utils.Tensor("NEXT", np.array([[number]], np.int64))
            sender.send(pb_utils.InferenceResponse([output]))
            if number == 1:
                del self.numbers[cid]
                sender.send(flags=FINAL)
            else:
                request.set_release_flags(AGAIN)
