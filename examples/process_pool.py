"""A pool of processes, each of which has a client of its own.

Start a server for it: ``cidalloc serve``.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from cidalloc.client import Client


def connect(url):
    """Create the client of this worker. It is closed when the worker exits."""
    global cids
    cids = Client(url, label="process_pool.py")


def total(values):
    """Send one sequence, and return its last sum."""
    with cids.sequence("simple_sequence") as sequence:
        for place, value in enumerate(values):
            result = sequence.infer({"INPUT": value}, end=place == len(values) - 1)
    return int(result["OUTPUT"][0, 0])


def main():
    options = argparse.ArgumentParser()
    options.add_argument("-u", "--url", default="localhost:8001")
    url = options.parse_args().url

    jobs = [range(n, n + 10) for n in range(20)]
    spawn = multiprocessing.get_context("spawn")  # fork is not safe beside threads of gRPC
    with ProcessPoolExecutor(4, spawn, initializer=connect, initargs=[url]) as pool:
        totals = list(pool.map(total, jobs))
    print("sums:", *totals)
    assert totals == [sum(job) for job in jobs]


if __name__ == "__main__":
    main()
