"""A sequence on an ensemble, one step of which keeps state.

Start a server for it: ``cidalloc serve --repository examples/ensemble/models``.
"""

import argparse

import numpy as np

from cidalloc.client import Client


def main():
    options = argparse.ArgumentParser()
    options.add_argument("-u", "--url", default="localhost:8001")
    url = options.parse_args().url

    noise = np.random.default_rng(1).integers(-2_000, 2_000, [5, 1, 1_600]).astype(np.int16)
    with Client(url) as cids, cids.sequence("loud_so_far") as sequence:
        for place, chunk in enumerate(noise):
            result = sequence.infer({"SAMPLES": chunk}, end=place == len(noise) - 1)
            print("loud so far:", result["COUNT"][0, 0])
    print("expected:", np.count_nonzero(np.abs(noise) > 1_000))


if __name__ == "__main__":
    main()
