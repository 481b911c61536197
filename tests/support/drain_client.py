"""A client process of the drill of a drain: see test_drain_live.py.

It begins at once and runs until its standard input ends. Then it prints as JSON when each of its
sequences began and ended, when it was refused, and every error. Times are of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from typing import Any

from cidalloc.client import Client
from cidalloc.devserver.demo import MODEL
from cidalloc.errors import Draining

TTL_S = 6.0


class Worker:
    """Begins one sequence after the other until that is refused."""

    def __init__(self, cids: Client, pause: float) -> None:
        self.cids, self.pause = cids, pause
        self.sequences: list[tuple[float, float]] = []
        self.refused_at: float | None = None
        self.errors: list[str] = []

    def run(self) -> None:
        try:
            while True:
                self.one(random.randint(2, 10))
        except Draining:
            self.refused_at = time.monotonic()
        except Exception as error:
            self.errors.append(repr(error))

    def one(self, length: int) -> None:
        with self.cids.sequence(MODEL) as sequence:
            began, expected = time.monotonic(), 0
            for step in range(length):
                value = random.randint(-1000, 1000)
                expected += value
                result = sequence.infer({"INPUT": [[value]]}, end=step == length - 1)
                if int(result["OUTPUT"][0, 0]) != expected:
                    self.errors.append(f"a wrong sum of {sequence.key}")
                time.sleep(random.uniform(0, 2 * self.pause))
        self.sequences.append((began, time.monotonic()))


def main(url: str, sequences: int, pause: float, idle: float) -> None:
    """Run so many sequences at once, after holding only cached IDs for ``idle`` seconds."""
    with Client(url, ttl=TTL_S, timeout=20.0, label=f"drill {sequences}") as cids:
        if idle:
            cids.release_many(cids.acquire_many(20), ended=True)
        print("ready", flush=True)
        time.sleep(idle)
        workers = [Worker(cids, pause) for _ in range(sequences)]
        threads = [threading.Thread(target=each.run) for each in workers]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        print("refused", flush=True)
        sys.stdin.read()
        seen: dict[str, Any] = {
            "sequences": [span for each in workers for span in each.sequences],
            "refused": [each.refused_at for each in workers],
            "errors": [words for each in workers for words in each.errors],
        }
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
