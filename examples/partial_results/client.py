"""Stream audio to a decoupled model, and print its partial results while they come.

Start a server for it: ``cidalloc serve --repository examples/partial_results/models``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cidalloc.client import Client

RATE = 16_000
Samples = npt.NDArray[np.int16]


def chunks(words: int) -> Iterator[Samples]:
    """Yield so many words of noise, each between pauses, in chunks of 0.1 s."""
    noise = np.random.default_rng(1)
    pause = np.zeros(RATE // 5, np.int16)
    parts = [pause]
    for _ in range(words):
        parts += [noise.integers(-9_000, 9_000, RATE // 4).astype(np.int16), pause]
    audio = np.concatenate(parts)
    for start in range(0, len(audio), RATE // 10):
        yield audio[start : start + RATE // 10]


def main() -> None:
    """Recognize some words."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("-u", "--url", default="localhost:8001")
    options.add_argument("--words", type=int, default=3)
    given = options.parse_args()
    text = ""
    with Client(given.url) as cids, cids.sequence("words") as sequence:
        for chunk in [*chunks(given.words), np.zeros(0, np.int16)]:
            for result in sequence.stream({"SAMPLES": chunk[None, :]}, end=len(chunk) == 0):
                text = result["TEXT"][0, 0].decode()
                print(f"{result['SECONDS'][0, 0]:5.2f} s  {text}")
    print(f"{len(text.split())} words; the sequence is {sequence.state}")


if __name__ == "__main__":
    main()
