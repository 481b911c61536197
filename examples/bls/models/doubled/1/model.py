"""Changes the input, and passes it on within the sequence that the client opened."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The model. The sequence's state is that of the inner model."""

    def execute(self, requests):
        """Answer each request with the answer of the inner model."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        """Double the input; pass on the ID, START and END, and the client's timeout."""
        value = pb_utils.get_input_tensor_by_name(request, "INPUT").as_numpy()
        result = pb_utils.InferenceRequest(
            model_name="simple_sequence",
            inputs=[pb_utils.Tensor("INPUT", 2 * value)],
            requested_output_names=["OUTPUT"],
            correlation_id=request.correlation_id(),
            flags=request.flags(),
            timeout=request.timeout(),
        ).exec()
        if result.has_error():
            return pb_utils.InferenceResponse(error=result.error())
        return pb_utils.InferenceResponse(result.output_tensors())
