"""Opens a sequence on another model for each request, and sends the recording piece by piece."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils

from cidalloc.client import CidError, Client


class TritonPythonModel:
    """The model. It keeps nothing from one request to the next."""

    def initialize(self, args):
        """Create the client. It connects when it is first used; the server is not up yet."""
        parameters = json.loads(args["model_config"])["parameters"]
        url = parameters["url"]["string_value"]
        self.cids = Client(url, timeout=2, label=args["model_instance_name"])

    def execute(self, requests):
        """Answer each request with the last sum of its sequence."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        """Answer one request. An error is an answer, too: an exception would fail all requests."""
        samples = pb_utils.get_input_tensor_by_name(request, "SAMPLES").as_numpy()
        total = np.zeros([1, 1], np.int32)
        try:
            with self.cids.sequence("simple_sequence", timeout=5) as sequence:
                for place, sample in enumerate(samples):
                    call = pb_utils.InferenceRequest(
                        model_name="simple_sequence",
                        inputs=[pb_utils.Tensor("INPUT", np.array([[sample]], np.int32))],
                        requested_output_names=["OUTPUT"],
                        **sequence.bls_kwargs(end=place == len(samples) - 1),
                    )
                    result = call.exec()
                    if result.has_error():
                        return pb_utils.InferenceResponse(error=result.error())
                    total = pb_utils.get_output_tensor_by_name(result, "OUTPUT").as_numpy()
        except CidError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse([pb_utils.Tensor("TOTAL", total.reshape(1))])

    def finalize(self):
        """Close the session, so that no ID waits for the end of its lease."""
        self.cids.close()
