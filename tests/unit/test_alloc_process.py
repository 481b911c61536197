"""Tests the allocator core amid threads, forks, copies and lack of memory."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cidalloc import Allocator, errors


def test_no_copies() -> None:
    pool = Allocator()
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="pickled or copied"):
            attempt(pool)


FORKED_CALLS: dict[str, Callable[[Allocator], object]] = {
    "acquire": lambda p: p.acquire(),
    "acquire_many": lambda p: p.acquire_many(1),
    "release": lambda p: p.release(1),
    "release_many": lambda p: p.release_many([1]),
    "release_owner": lambda p: p.release_owner(0),
    "owner_of": lambda p: p.owner_of(1),
    "held": lambda p: p.held(),
    "held_by": lambda p: p.held_by(0),
    "held_count": lambda p: p.held_count(0),
    "acquire_wait": lambda p: p.acquire_wait(),
    "acquire_async": lambda p: asyncio.run(p.acquire_async()),
    "take": lambda p: p._take(0),
    "set_queued": lambda p: p._set_queued(False),
    "resize": lambda p: p.resize(2**30),
    "snapshot": lambda p: p.snapshot(),
    "lease": lambda p: p.lease().__enter__(),
    "clear": lambda p: p.clear(),
    "reserve": lambda p: p.reserve([5]),
    "_check": lambda p: p._check(),
    "contains": lambda p: 1 in p,
    "iter": iter,
    "len": len,
    "repr": repr,
    **{
        name: lambda p, name=name: getattr(p, name)  # type: ignore[misc]
        for name in (
            "capacity",
            "first",
            "block",
            "active",
            "inactive",
            "cooling",
            "free",
            "pinned",
            "peak",
            "high_water",
            "next_due",
            "opened",
            "ready",
        )
    },
}


def test_a_copy_in_a_forked_child_refuses_everything() -> None:
    named = {name.strip("_") for name in vars(Allocator)} - {
        "doc",
        "line",
        "restore",
        "new",
        "reduce",
        "pyx_vtable",
        "buffer_size",
        "sealed_blocks",
    }
    assert {name.strip("_") for name in FORKED_CALLS} == named
    pool = Allocator()
    pool.acquire()
    child = os.fork()
    if child == 0:
        status = 0
        try:
            for call in FORKED_CALLS.values():
                try:
                    call(pool)
                    status += 1
                except errors.Forked:
                    pass
            status += Allocator().acquire() != 1
            del pool
        except BaseException:
            status = 99
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.acquire() == 2, "the parent goes on"


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0])


def test_memory_goes_back() -> None:
    Allocator()
    before = _address_space()
    for _ in range(20):
        pool = Allocator()
        pool.acquire_many(1000)
        with pytest.raises(errors.InvalidArgument):
            Allocator(10, ready=11)
        del pool
    assert _address_space() - before < 10_000, "in pages; one pool has more than 200,000"


def test_without_address_space_there_is_no_pool_and_no_leak() -> None:
    script = """if True:
        import resource
        from cidalloc import Allocator
        size = lambda: int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (size() + (700 << 20),) * 2)
        before = size()
        for _ in range(3):
            try:
                Allocator()
            except MemoryError as error:
                print(error)
        assert size() - before < 100 << 20
        assert Allocator(1000).acquire() == 1
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.count("smaller capacity") == 3
