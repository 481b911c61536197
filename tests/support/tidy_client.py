"""A client process of the drill of END for dead clients: see test_tidy_drill.py.

It runs sequences in three ways until its standard input ends. What it counts is in a file that it
shares with the drill, so that it outlives the process.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton

from cidalloc.client import AsyncClient

WAYS = ("random", "managed", "tidied")
"""The models: IDs are random ones with plain tritonclient, or the manager's; or END comes, too."""

OPEN, ANSWERS, WRONG = range(3)
"""What is counted: sequences of which START was answered and END not sent, answers, wrong sums."""

TTL_S, IDLE_S, TIMEOUT_S = 3.0, 3.0, 2.0


def counts(file: Path, processes: int) -> Any:
    """Return the counts of each process and way, which are shared through the file."""
    mode: Any = "r+" if file.exists() else "w+"
    return np.memmap(file, np.int64, mode, shape=(processes, len(WAYS), 3))


class Plain:
    """A sequence with a random ID."""

    def __init__(self, client: Any) -> None:
        self.client, self.cid, self.started = client, secrets.randbits(63), False

    async def __aenter__(self) -> Plain:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def infer(self, inputs: dict[str, Any], end: bool) -> Any:
        tensor = triton.InferInput("X", [1, 1], "INT32")
        tensor.set_data_from_numpy(np.array(inputs["X"], np.int32))
        start, self.started = not self.started, True
        options = {"sequence_id": self.cid, "sequence_start": start, "sequence_end": end}
        return await self.client.infer(WAYS[0], [tensor], **options)


async def work(begin: Callable[[], Any], row: Any, stop: asyncio.Event, pause: float) -> None:
    """Run one sequence after the other. The model adds up what it gets."""
    while not stop.is_set():
        async with begin() as sequence:
            first = random.randrange(10**6)
            await ask(sequence, first, first, row)
            row[OPEN] += 1
            expected, last = first, first + random.randint(4, 19)
            while expected < last and not stop.is_set():
                await asyncio.sleep(random.uniform(0, 2 * pause))
                expected += 1
                await ask(sequence, 1, expected, row)
            row[OPEN] -= 1
            await ask(sequence, 1, expected + 1, row, end=True)


async def ask(sequence: Any, value: int, expected: int, row: Any, end: bool = False) -> None:
    result = await sequence.infer({"X": [[value]]}, end=end)
    row[ANSWERS] += 1
    row[WRONG] += int(result.as_numpy("Y")[0, 1]) != expected


async def main(url: str, rows: Any, sequences: int, pause: float, tidies: bool) -> None:
    """Run so many sequences at once in each way."""
    stop = asyncio.Event()
    tidy = {WAYS[2]: {"X": [[0]]}} if tidies else None
    options: dict[str, Any] = {"ttl": TTL_S, "timeout": 20.0}
    async with (
        triton.InferenceServerClient(url) as plain,
        AsyncClient(url, model=f"cidmgr_{WAYS[1]}", **options) as managed,
        AsyncClient(url, model=f"cidmgr_{WAYS[2]}", tidy=tidy, **options) as tidied,
    ):
        ways: list[Callable[[], Any]] = [
            lambda: Plain(plain),
            lambda: managed.sequence(WAYS[1], timeout=TIMEOUT_S),
            lambda: tidied.sequence(WAYS[2], timeout=TIMEOUT_S),
        ]
        tasks = [
            asyncio.create_task(work(begin, row, stop, pause))
            for begin, row in zip(ways, rows, strict=True)
            for _ in range(sequences)
        ]
        ends = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        ends.add_done_callback(lambda _: stop.set())
        await asyncio.gather(*tasks)


if __name__ == "__main__":
    url, file, processes, number, sequences, pause, tidies = sys.argv[1:]
    rows = counts(Path(file), int(processes))[int(number)]
    asyncio.run(main(url, rows, int(sequences), float(pause), tidies == "tidies"))
