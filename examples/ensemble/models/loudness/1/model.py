"""Counts the loud samples of each chunk."""

import numpy as np
import triton_python_backend_utils as pb_utils

LOUD = 1_000


class TritonPythonModel:
    """The model. It need not know of sequences."""

    def execute(self, requests):
        """Answer each request with a count."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        """Count the loud samples of one chunk."""
        samples = pb_utils.get_input_tensor_by_name(request, "SAMPLES").as_numpy()
        count = np.count_nonzero(np.abs(samples.astype(np.int32)) > LOUD)
        loud = pb_utils.Tensor("LOUD", np.array([[count]], np.int32))
        return pb_utils.InferenceResponse([loud])
