"""What the registry costs: to open it again, a session, an ID. Prints a table in Markdown.

Times are the median of rounds, and stand beside what the same memory costs to read once, in the
same process. `make bench-registry` runs this; ARGS="--large" adds 100 million IDs (4 GiB of disk).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cidalloc.manager.registry import Registry
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file import Storage
from cidalloc.manager.storage.file_format import Part, Shape

BOOT = b"b" * 16
ROUNDS = 5


def settings(capacity: int) -> Settings:
    """Return settings without limits."""
    return Settings(
        first=1,
        capacity=capacity,
        fresh=True,
        max_held=2**38,
        max_count=10**6,
        max_sessions=1_000_000,
        max_ttl_ms=10**9,
    )


def median_ms(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median time of some rounds."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def token(n: int) -> bytes:
    """Return the n-th token."""
    return n.to_bytes(16, "little")


def fill(path: Path, ids: int) -> None:
    """Make a file in which one session holds so many IDs."""
    store = Storage.open(path, Shape(1, ids + 1000), boot=BOOT)
    registry = Registry(settings(ids + 1000), 0, store, BOOT)
    registry.open(token(1), 0, ttl_ms=10**6)
    for seq, start in enumerate(range(0, ids, 10**6), 1):
        registry.acquire(min(10**6, ids - start), 0, token=token(1), seq=seq)
    registry.close()


def reopening(folder: Path, ids: int) -> str:
    """Open a file again, and read the same memory."""
    path = folder / "it"
    fill(path, ids)

    def reopen() -> None:
        store = Storage.open(path, None, boot=BOOT)
        registry = Registry(settings(ids + 1000), 0, store, BOOT)
        assert registry.pool.active == ids
        registry.close()

    def scan() -> None:
        store = Storage.open(path, None, boot=BOOT)
        words = np.frombuffer(memoryview(store.records), np.uint64)
        words[: (ids + 2) * 4].max()
        store.close()

    opened, read = median_ms(reopen), median_ms(scan)
    disk = path.stat().st_blocks * 512
    path.unlink()
    return (
        f"| {ids:,} | {opened:,.1f} ms | {read:,.1f} ms | {opened / read:.1f} |"
        f" {disk / ids:.1f} bytes |"
    )


def sessions(folder: Path, count: int) -> list[str]:
    """Open, renew, and let expire so many sessions with an ID each."""
    registry = Registry.in_file(folder / "sessions", settings(2**24), 0, BOOT)
    names = [token(n) for n in range(count)]
    key = os.urandom(16)

    def timed(work: Callable[[bytes], object]) -> float:
        began = time.perf_counter()
        for name in names:
            work(name)
        return (time.perf_counter() - began) / count * 1e9

    before = resident()
    opened = timed(lambda name: registry.open(name, 0, ttl_ms=60_000))
    memory = (resident() - before) / count
    acquired = timed(lambda name: registry.acquire(1, 0, token=name, seq=1))
    renewed = timed(lambda name: registry.renew(name, 1))
    digest = timed(lambda name: hashlib.blake2b(name, digest_size=16, key=key).digest())
    began = time.perf_counter()
    registry.tick(10**6)
    expired = (time.perf_counter() - began) / count * 1e9
    assert registry.expired.count == count
    disk = (folder / "sessions").stat().st_blocks * 512
    rows = registry.store.granules(Part.ROWS) * 2**16
    registry.close()
    (folder / "sessions").unlink()
    return [
        f"| {count:,} | {opened:,.0f} | {acquired:,.0f} | {renewed:,.0f} |"
        f" {expired:,.0f} | {digest:,.0f} | {memory:,.0f} | {rows / count:,.0f} of"
        f" {disk / count:,.0f} |"
    ]


def resident() -> int:
    """Return the memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def expiry(folder: Path, held: int) -> str:
    """Let a session with so many IDs expire."""
    registry = Registry.in_file(folder / "expiry", settings(2**22), 0, BOOT)

    def once() -> float:
        now = registry.now
        registry.open(token(1), now, ttl_ms=60_000)
        registry.acquire(held, now, token=token(1), seq=1)
        began = time.perf_counter()
        registry.tick(now + 10**6)
        return (time.perf_counter() - began) * 1e3

    taken = statistics.median(once() for _ in range(ROUNDS))
    registry.close()
    (folder / "expiry").unlink()
    return f"| {held:,} | {taken:,.2f} ms | {taken / held * 1e6:,.0f} ns |"


def memories(folder: Path, held: int) -> str:
    """Give IDs back and take others, in a registry in a file and in one without, in turns."""
    both = [
        Registry.in_file(folder / "memory", settings(2**22), 0, BOOT),
        Registry(settings(2**22), 0),
    ]
    dice = np.random.default_rng(1)
    own = []
    for registry in both:
        registry.open(token(1), 0, ttl_ms=10**6)
        own.append(registry.acquire(held, 0, token=token(1), seq=1))
    seq = 1

    def swap(which: int, places: list[int]) -> float:
        registry, ids, at = both[which], own[which], seq
        began = time.perf_counter()
        for place in places:
            at += 2
            registry.release(ids[place : place + 1], 0, token=token(1), seq=at, cooldown_ms=0)
            ids[place] = registry.acquire(1, 0, token=token(1), seq=at + 1)[0]
        return time.perf_counter() - began

    ratios = []
    for turn in range(-1, 31):  # the first one warms up
        places = dice.integers(0, held, 2_000).tolist()
        times = {which: swap(which, places) for which in ((0, 1) if turn % 2 else (1, 0))}
        seq += 2 * len(places)
        if turn >= 0:
            ratios.append(times[0] / times[1])
    for registry in both:
        registry.close()
    (folder / "memory").unlink()
    return f"| {held:,} | {statistics.median(ratios):.2f} |"


def main() -> None:
    """Measure everything."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--large", action="store_true")
    options.add_argument("--folder", type=Path, help="where the files are, instead of TMPDIR")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        print("| held IDs | open again | read the memory | ratio | disk per ID |")
        print("|---|---|---|---|---|")
        sizes = [10**6, 10**8] if given.large else [10**6]
        for ids in sizes:
            print(reopening(folder, ids), flush=True)
        print("\nNanoseconds per session with one ID; bytes per session.\n")
        print(
            "| sessions | open | acquire | renew | expire | digest alone |",
            end="",
        )
        print(" memory | disk: rows of all |\n|---|---|---|---|---|---|---|---|")
        for count in (1_000, 30_000, 1_000_000):
            print(*sessions(folder, count), sep="\n", flush=True)
        print("\n| IDs of a session that expires | in all | per ID |\n|---|---|---|")
        for held in (1, 1_000, 1_000_000):
            print(expiry(folder, held), flush=True)
        print("\n| held IDs | DELETE and NEW: in a file / in memory |\n|---|---|")
        for held in (1_000, 1_000_000):
            print(memories(folder, held), flush=True)


if __name__ == "__main__":
    main()
