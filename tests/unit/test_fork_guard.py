"""A client belongs to one process and one event loop, and is not copied: each misuse says so."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import time
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from loopback import AsyncLoopback, Loopback

from cidalloc.client import AsyncClient, AsyncSequence, Client, Fleet
from cidalloc.errors import CidError, Forked, InvalidArgument
from cidalloc.manager.settings import Settings

SETTINGS = Settings(first=1, capacity=1000, fresh=True)


def uses(cids: Any, sequence: Any) -> list[Callable[[], Any]]:
    """Return every use of a client and of its sequence; those of asyncio are to be awaited."""
    cid = sequence.cid
    return [
        cids.acquire,
        lambda: cids.acquire_many(3),
        lambda: cids.release(cid),
        lambda: cids.release(cid, ended=True),
        lambda: cids.release_many([cid]),
        cids.active,
        cids.inactive,
        cids.peak,
        cids.status,
        lambda: cids.sequence("model"),
        cids.close,
        lambda: sequence.infer([]),
        lambda: sequence.async_infer([]),
        sequence.flags,
        sequence.close,
    ]


def refusals(calls: list[Callable[[], Any]], kind: type[CidError]) -> int:
    """Return how many of the calls raise an error of this kind."""
    return sum(_refuses(call, kind) for call in calls)


def _refuses(call: Callable[[], Any], kind: type[CidError]) -> bool:
    try:
        result = call()
        if isinstance(result, AsyncSequence):
            result = result.__aenter__()
        if isinstance(result, Coroutine):
            result.send(None)
    except kind as error:  # and it is not the manager's, which runs in this process here
        return kind is not Forked or str(error).startswith("<cidalloc ")
    return False


def in_a_child(calls: list[Callable[[], Any]]) -> int:
    """Fork, and return how many of the calls say in the child that this is not their process."""
    child = os.fork()
    if not child:
        found = 255
        try:
            found = refusals(calls, Forked)
        finally:
            os._exit(found)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of Python 3.12
def test_a_child_process() -> None:
    with Client(transport=Loopback(SETTINGS)) as cids, cids.sequence("model") as sequence:
        sequence.infer([])
        cids.acquire()
        while not cids._session.lease.cache.fresh:  # which the child could take
            time.sleep(0.01)
        calls = [*uses(cids, sequence), cids.__enter__, cids.held]
        held, state = cids.held().tolist(), sequence.state
        assert in_a_child(calls) == len(calls)
        assert (cids.held().tolist(), sequence.state) == (held, state)
        assert cids.acquire() not in held
        sequence.infer([], end=True)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_process_of_asyncio() -> None:
    async def main() -> None:
        async with AsyncClient(transport=AsyncLoopback(SETTINGS)) as cids:
            async with cids.sequence("model") as sequence:
                await sequence.infer([])
                await cids.acquire()
                while not cids._session.lease.cache.fresh:
                    await asyncio.sleep(0.01)
                calls = [*uses(cids, sequence), cids.__aenter__, sequence.__aenter__, cids.held]
                held = cids.held().tolist()
                assert in_a_child(calls) == len(calls)
                assert cids.held().tolist() == held
                await sequence.infer([], end=True)

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_a_child_collects_as_garbage_is_its_parents() -> None:
    """So the child neither ends it nor warns of it."""
    gc.collect()  # what other tests left: gRPC would wait for ever for its threads in the child
    cids = Client(transport=Loopback(SETTINGS))
    sequence = cids.sequence("model")
    child = os.fork()
    if not child:
        found = 255
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                session = cids._session
                del sequence, cids
                gc.collect()
            found = len(seen) + 2 * session.abandoned
        finally:
            os._exit(found)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    sequence.infer([], end=True)
    cids.close()


def test_another_event_loop() -> None:
    async def begin() -> tuple[AsyncClient, AsyncSequence]:
        cids = AsyncClient(transport=AsyncLoopback(SETTINGS))
        sequence = await cids.sequence("model")
        await sequence.infer([])
        await cids.acquire()
        return cids, sequence

    async def misuse(cids: AsyncClient, sequence: AsyncSequence) -> None:
        calls = [*uses(cids, sequence), cids.__aenter__, sequence.__aenter__]
        for call in calls:
            assert _refuses(call, InvalidArgument), call
        with pytest.raises(InvalidArgument, match="used in another event loop: make one in each"):
            await cids.acquire()

    loop = asyncio.new_event_loop()
    cids, sequence = loop.run_until_complete(begin())
    asyncio.run(misuse(cids, sequence))
    loop.run_until_complete(sequence.infer([], end=True))
    loop.run_until_complete(cids.close())
    loop.close()


def test_without_an_event_loop() -> None:
    cids = AsyncClient(transport=AsyncLoopback(SETTINGS))
    with pytest.raises(InvalidArgument, match="no event loop runs here"):
        cids.acquire().send(None)


@pytest.mark.parametrize(
    "how", [pickle.dumps, copy.copy, copy.deepcopy, lambda thing: pickle.dumps([thing], 2)]
)
def test_a_copy(how: Callable[[Any], Any]) -> None:
    async def main() -> None:
        cids = AsyncClient(transport=AsyncLoopback(SETTINGS))
        async with cids, cids.sequence("model") as sequence:
            _refuse_copy(how, cids)
            _refuse_copy(how, sequence)

    with Client(transport=Loopback(SETTINGS)) as cids, cids.sequence("model") as sequence:
        _refuse_copy(how, cids)
        _refuse_copy(how, sequence)
    asyncio.run(main())


def _refuse_copy(how: Callable[[Any], Any], thing: Any) -> None:
    with pytest.raises(InvalidArgument, match="cannot be copied or pickled"):
        how(thing)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fleet_in_a_child_process() -> None:
    with Fleet(["localhost:1"]) as fleet:
        assert in_a_child([lambda: fleet.sequence("model")]) == 1
