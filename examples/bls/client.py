"""Sequences behind a model that calls another model (BLS): who opens them?

Start a server for it: ``cidalloc serve --repository examples/bls/models``.

The model "recording" opens a sequence itself, so its clients send ordinary requests. The model
"doubled" passes on the sequences of its clients.
"""

import argparse

import numpy as np
import tritonclient.grpc

from cidalloc.client import Client


def main():
    options = argparse.ArgumentParser()
    options.add_argument("-u", "--url", default="localhost:8001")
    url = options.parse_args().url

    samples = tritonclient.grpc.InferInput("SAMPLES", [4], "INT32")
    samples.set_data_from_numpy(np.array([1, 2, 3, 4], np.int32))
    with tritonclient.grpc.InferenceServerClient(url) as triton:
        result = triton.infer("recording", [samples])
        print("recording:", result.as_numpy("TOTAL")[0])

    with Client(url) as cids, cids.sequence("doubled") as sequence:
        for value in (1, 2, 3, 4):
            result = sequence.infer({"INPUT": value}, end=value == 4)
        print("doubled:", result["OUTPUT"][0, 0])


if __name__ == "__main__":
    main()
