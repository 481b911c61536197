"""Two sequences on one gRPC stream to the model simple_sequence, without waiting for answers.

This is tritonclient's example of the same name, with managed IDs. Only the lines marked with
"# cidalloc" differ.

    python examples/simple_grpc_sequence_stream_client.py -u localhost:8001
"""

import argparse
import queue
import sys

import numpy as np
import tritonclient.grpc as grpcclient

from cidalloc.client import Client


def send(triton, value, request_id, flags):
    tensor = grpcclient.InferInput("INPUT", [1, 1], "INT32")
    tensor.set_data_from_numpy(np.array([[value]], np.int32))
    triton.async_stream_infer("simple_sequence", [tensor], request_id=request_id, **flags)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-u", "--url", default="localhost:8001")
    url = parser.parse_args().url
    values = [11, 7, 5, 3, 2, 0, 1]
    answers = queue.Queue()

    with (
        grpcclient.InferenceServerClient(url) as triton,
        Client(url) as cids,  # cidalloc
        cids.sequence("simple_sequence") as first,  # cidalloc
        cids.sequence("simple_sequence") as second,  # cidalloc
    ):
        triton.start_stream(lambda result, error: answers.put((result, error)))
        for step, value in enumerate(values):
            end = step == len(values) - 1
            send(triton, value, f"first {step}", first.infer_kwargs(end=end))  # cidalloc
            send(triton, -value, f"second {step}", second.infer_kwargs(end=end))  # cidalloc
        sums = {}
        for _ in range(2 * len(values)):
            result, error = answers.get(timeout=30)
            if error is not None:
                sys.exit(f"error: {error}")
            sums[result.get_response().id] = int(result.as_numpy("OUTPUT")[0, 0])
        triton.stop_stream()

    total = 0
    for step, value in enumerate(values):
        total += value
        print(f"[{step}] {sums[f'first {step}']} : {sums[f'second {step}']}")
        if (sums[f"first {step}"], sums[f"second {step}"]) != (total, -total):
            sys.exit(f"error: expected {total} : {-total}")
    print("PASS: sequence")


if __name__ == "__main__":
    main()
