"""Inputs in shared memory: for large chunks, if the client runs on the machine of the server.

Start a server for it: ``cidalloc serve``. ``-u http://localhost:8000`` uses HTTP.
"""

import argparse
import os

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import shared_memory

from cidalloc.client import Client

NAME = f"chunk-{os.getpid()}"  # of the region at the server: unique on this machine
BYTES = 4


def main():
    options = argparse.ArgumentParser()
    options.add_argument("-u", "--url", default="localhost:8001")
    url = options.parse_args().url
    kind = tritonclient.http if url.startswith("http") else tritonclient.grpc

    region = shared_memory.create_shared_memory_region(NAME, f"/{NAME}", BYTES)
    triton = kind.InferenceServerClient(url.removeprefix("http://"))
    try:
        triton.register_system_shared_memory(NAME, f"/{NAME}", BYTES)
        chunk = kind.InferInput("INPUT", [1, 1], "INT32")
        chunk.set_shared_memory(NAME, BYTES)
        with Client(url) as cids, cids.sequence("simple_sequence") as sequence:
            for value in (1, 2, 3, 4):
                # Write only after the answer to the request before: Triton reads this memory.
                shared_memory.set_shared_memory_region(region, [np.array([[value]], np.int32)])
                result = sequence.infer([chunk], end=value == 4)
                print("sum:", result["OUTPUT"][0, 0])
    finally:
        triton.unregister_system_shared_memory(NAME)
        triton.close()
        shared_memory.destroy_shared_memory_region(region)


if __name__ == "__main__":
    main()
