"""Two sequences side by side on the model simple_sequence, request by request, over gRPC.

This is tritonclient's example of the same name, with managed IDs. Only the lines marked with
"# cidalloc" differ.

    python examples/simple_grpc_sequence_client.py -u localhost:8001
"""

import argparse
import sys

import numpy as np
import tritonclient.grpc as grpcclient

from cidalloc.client import Client


def send(triton, value, flags):
    tensor = grpcclient.InferInput("INPUT", [1, 1], "INT32")
    tensor.set_data_from_numpy(np.array([[value]], np.int32))
    result = triton.infer("simple_sequence", [tensor], **flags)
    return int(result.as_numpy("OUTPUT")[0, 0])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-u", "--url", default="localhost:8001")
    url = parser.parse_args().url
    values = [11, 7, 5, 3, 2, 0, 1]
    sums = {"first": [], "second": []}

    with (
        grpcclient.InferenceServerClient(url) as triton,
        Client(url) as cids,  # cidalloc
        cids.sequence("simple_sequence") as first,  # cidalloc
        cids.sequence("simple_sequence") as second,  # cidalloc
    ):
        for step, value in enumerate(values):
            end = step == len(values) - 1
            sums["first"].append(send(triton, value, first.infer_kwargs(end=end)))  # cidalloc
            sums["second"].append(send(triton, -value, second.infer_kwargs(end=end)))  # cidalloc

    total = 0
    for step, value in enumerate(values):
        total += value
        print(f"[{step}] {sums['first'][step]} : {sums['second'][step]}")
        if (sums["first"][step], sums["second"][step]) != (total, -total):
            sys.exit(f"error: expected {total} : {-total}")
    print("PASS: sequence")


if __name__ == "__main__":
    main()
