"""Sequences in tasks of one group: if one of them fails, all are ended, and all IDs come back.

Start a server for it: ``cidalloc serve``. The example needs Python 3.11.
"""

import argparse
import asyncio

from cidalloc.client import AsyncClient


async def speak(cids, values):
    """Send values, one every 0.1 s, in a sequence of their own."""
    async with cids.sequence("simple_sequence", end_inputs={"INPUT": 0}) as sequence:
        for value in values:
            if value < 0:
                raise ValueError(f"{value} is not loud")
            await sequence.infer({"INPUT": value})
            await asyncio.sleep(0.1)


async def main(url):
    """Run three sequences, the second of which fails."""
    async with AsyncClient(url) as cids:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(speak(cids, values))
                    for values in (range(100), [1, 2, -3], range(100))
                ]
        except* ValueError as errors:
            print("failed:", *errors.exceptions)
        print("cancelled:", [task.cancelled() for task in tasks])
        print("IDs in use:", len(cids.held()))


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("-u", "--url", default="localhost:8001")
    asyncio.run(main(options.parse_args().url))
