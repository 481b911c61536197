"""A stand-in for a recognizer: a word is a stretch of loud frames between quiet ones."""

import numpy as np
import triton_python_backend_utils as pb_utils

FRAME, RATE, LOUD = 160, 16_000, 1_000.0  # samples, samples a second, mean absolute value


def value(request, name):
    """Return an input tensor as a flat array."""
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)


class TritonPythonModel:
    """The model; Triton gives each chunk of a sequence to it in order."""

    def initialize(self, args):
        """Keep the state of each sequence by its correlation ID."""
        self.states = {}

    def execute(self, requests):
        """Send a partial result for each word of a chunk, then the final response."""
        for request in requests:
            cid, sender = int(value(request, "CORRID")[0]), request.get_response_sender()
            words, speaking, frames = self.states.get(cid, ([], False, 0))
            if value(request, "START")[0]:
                words, speaking, frames = [], False, 0
            samples = value(request, "SAMPLES")
            for frame in samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME):
                loud = np.abs(frame.astype(np.float32)).mean() > LOUD
                frames += 1
                if loud and not speaking:
                    words.append(f"word{len(words) + 1}")
                    sender.send(self.partial(words, frames))
                speaking = loud
            self.states[cid] = words, speaking, frames
            if value(request, "END")[0]:
                del self.states[cid]
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def partial(self, words, frames):
        """Return the text so far, and when its last word began."""
        text = np.array([[" ".join(words)]], dtype=object)
        seconds = np.array([[frames * FRAME / RATE]], np.float32)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("TEXT", text), pb_utils.Tensor("SECONDS", seconds)]
        )
