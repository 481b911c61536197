"""Sequences on decoupled models: all answers of a request, none of another, and no hang."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import partials
import pytest
import slow_models
import tritonclient.grpc
from servers import Server
from slow_models import count_up, total
from tritonclient.utils import InferenceServerException

from cidalloc.client import AsyncClient, Client
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import InvalidArgument, SequenceLost, Unavailable
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import export

pytestmark = pytest.mark.server

SETTINGS = Settings(first=1, capacity=100_000, cooldown_ms=0, fresh=True)
BROKEN, NEVER_FINAL, LAST_WITH_DATA, SLOW = -1, -2, -3, -10


def repository(folder: Path) -> Path:
    export(folder, SETTINGS)
    partials.write(folder)
    slow_models.write(folder, "single")
    return folder


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server to be killed. It starts before any client: a fork beside gRPC's threads may fail."""
    server = Server(repository(tmp_path_factory.mktemp("doomed")))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(
    doomed: TritonServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    server = Server(repository(tmp_path_factory.mktemp("models")))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def cids(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url) as cids:
        yield cids


def asked(number: int) -> list[Any]:
    return count_up(tritonclient.grpc, number)


def totals(sequence: Any, number: int, **options: Any) -> list[int]:
    return [total(each) for each in sequence.stream(asked(number), **options)]


async def totals_of(sequence: Any, number: int, **options: Any) -> list[int]:
    return [total(each) async for each in sequence.stream(asked(number), **options)]


def reused(cids: Any) -> bool:
    """Whether no ID is in use or has to leave: END counted."""
    cache = cids._session.lease.cache
    return not cache.used and not cache.outgoing


# ---- All answers


def test_none_one_and_many(cids: Client) -> None:
    with cids.sequence("partials") as sequence:
        assert totals(sequence, 3) == [1, 2, 3]
        assert totals(sequence, 0) == []
        assert totals(sequence, 1) == [4]
        assert totals(sequence, LAST_WITH_DATA) == [1, 2]
        assert totals(sequence, 100) == list(range(5, 105))
        assert totals(sequence, 2, end=True) == [105, 106]
        assert sequence.state == "closed, recycled"
    assert reused(cids)


def test_the_same_for_asyncio(server: TritonServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.grpc_url) as cids:
            async with cids.sequence("partials") as sequence:
                assert await totals_of(sequence, 3) == [1, 2, 3]
                assert await totals_of(sequence, 0) == []
                assert await totals_of(sequence, LAST_WITH_DATA) == [1, 2]
                assert await totals_of(sequence, 2, end=True) == [4, 5]
            assert reused(cids)

    asyncio.run(main())


def test_end_without_answers_counts(cids: Client) -> None:
    with cids.sequence("partials") as sequence:
        assert totals(sequence, 0, end=True) == []
    assert reused(cids)


def test_requests_on_their_way_together(cids: Client) -> None:
    with cids.sequence("partials") as sequence:
        several = [sequence.stream(asked(number)) for number in (2, 0, 3)]
        last = sequence.stream(asked(1), end=True)
        assert [total(each) for each in last] == [6]
        assert [[total(each) for each in one] for one in several] == [[1, 2], [], [3, 4, 5]]
    assert reused(cids)


def test_sequences_in_threads(cids: Client) -> None:
    wrong: list[object] = []

    def work() -> None:
        with cids.sequence("partials") as sequence:
            for turn in range(5):
                found = totals(sequence, 4)
                if found != [4 * turn + n for n in (1, 2, 3, 4)]:
                    wrong.append(found)
            if totals(sequence, 0, end=True):
                wrong.append("END")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
    assert reused(cids)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_model_that_answers_once(cids: Client, streaming: bool) -> None:
    with cids.sequence("single", streaming=streaming) as sequence:
        assert totals(sequence, 3) == [3]
        assert total(sequence.infer(asked(2))) == 5
        assert totals(sequence, 1, end=True) == [6]
    assert reused(cids)


def test_a_model_that_answers_once_over_http(server: TritonServer) -> None:
    import tritonclient.http

    with Client(server.http_url) as cids, cids.sequence("single") as sequence:
        answers = sequence.stream(count_up(tritonclient.http, 3), end=True)
        assert [total(each) for each in answers] == [3]


def test_end_inputs(cids: Client) -> None:
    with cids.sequence("partials", end_inputs=asked(5)) as sequence:
        assert totals(sequence, 1) == [1]
    assert reused(cids)


def test_an_iterator_that_has_ended_stays_so(cids: Client) -> None:
    with cids.sequence("partials") as sequence:
        answers = sequence.stream(asked(1), end=True)
        assert [total(each) for each in answers] == [1]
        assert list(answers) == []
        with pytest.raises(StopIteration):
            next(answers)


# ---- What is refused


@pytest.mark.parametrize("method", ["infer", "async_infer"])
def test_one_answer_of_a_decoupled_model(cids: Client, method: str) -> None:
    with cids.sequence("partials") as sequence:
        with pytest.raises(InvalidArgument, match=r"is decoupled.*Use stream\(\)"):
            getattr(sequence, method)(asked(1))
        assert totals(sequence, 1, end=True) == [1], "nothing was sent"
    assert reused(cids)


def test_an_unread_model_that_is_decoupled(cids: Client) -> None:
    with cids.sequence("partials", check=False, cooldown=30.0, streaming=True) as sequence:
        assert totals(sequence, 2) == [1, 2]
        with pytest.raises(InvalidArgument, match=r"Use stream\(\)"):
            sequence.infer(asked(2))


def test_http(server: TritonServer) -> None:
    with Client(server.http_url) as cids:
        with pytest.raises(InvalidArgument, match=r"partials is decoupled.*gRPC"):
            cids.sequence("partials")
        assert reused(cids)


def test_wrong_arguments(cids: Client) -> None:
    with cids.sequence("partials") as sequence:
        for inputs, options in (([5], {}), (None, {}), (asked(1), {"sequence_id": 5})):
            with pytest.raises(InvalidArgument):
                sequence.stream(inputs, **options)
        assert totals(sequence, 1, end=True) == [1]
    with pytest.raises(InvalidArgument):
        sequence.stream(asked(1))


# ---- Faults


def test_an_error_after_some_answers(cids: Client) -> None:
    with cids.sequence("partials") as sequence:
        found = []
        with pytest.raises(InferenceServerException, match="the model broke"):
            for each in sequence.stream(asked(BROKEN)):
                found.append(total(each))
        assert found == [1, 2]
        assert totals(sequence, 1, end=True) == [1]
    assert not reused(cids), "it is in doubt"


def test_a_loop_that_is_left_early(cids: Client) -> None:
    with cids.sequence("partials") as sequence:
        for each in sequence.stream(asked(SLOW - 5)):
            assert total(each) == 1
            break
        gc.collect()
        assert totals(sequence, 2) == [1, 2], "no late answer of the request before"
        began = time.monotonic()
    assert time.monotonic() - began < 3.0
    assert not reused(cids), "END was not sent"


def test_a_loop_that_is_left_early_and_ends_in_time(cids: Client) -> None:
    with cids.sequence("partials") as sequence:
        for _ in sequence.stream(asked(SLOW - 2), end=True):
            break
    assert reused(cids), "the final response of END came while it was closed"


def test_a_model_without_a_final_response(cids: Client) -> None:
    with cids.sequence("partials", timeout=1.0) as sequence:
        found = []
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"no answer .* within 1 s"):
            for each in sequence.stream(asked(NEVER_FINAL)):
                found.append(total(each))
        assert found == [1]
        assert 0.9 < time.monotonic() - began < 3.0
        assert totals(sequence, 2) == [1, 2], "the next request goes on"
    assert not reused(cids)


def test_the_limit_is_for_each_answer(cids: Client) -> None:
    with cids.sequence("partials", timeout=1.0) as sequence:
        assert totals(sequence, SLOW - 10, end=True) == list(range(1, 11)), "two seconds in all"
    assert reused(cids)


def test_a_task_that_is_cancelled(server: TritonServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.grpc_url) as cids:
            async with cids.sequence("partials") as sequence:
                task = asyncio.ensure_future(totals_of(sequence, SLOW - 20))
                await asyncio.sleep(0.3)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                del task
                assert await totals_of(sequence, 2) == [1, 2]
                began = time.monotonic()
            assert time.monotonic() - began < 3.0
            assert not reused(cids)

    asyncio.run(main())


def test_a_sequence_that_is_closed_meanwhile(cids: Client) -> None:
    sequence = cids.sequence("partials", timeout=5.0)
    answers = sequence.stream(asked(NEVER_FINAL))
    assert total(next(answers)) == 1
    threading.Timer(0.2, lambda: sequence._close(0.1)).start()
    with pytest.raises(SequenceLost, match="was closed before"):
        next(answers)


def test_a_server_that_dies(doomed: TritonServer) -> None:
    with Client(doomed.grpc_url, timeout=2.0) as cids:
        sequence = cids.sequence("partials")
        answers = sequence.stream(asked(SLOW - 50))
        assert total(next(answers)) == 1
        os.kill(doomed.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(Unavailable):
            for _ in answers:
                pass
        with pytest.raises(Unavailable):
            list(sequence.stream(asked(1)))
        sequence.close()
        assert time.monotonic() - began < 5.0
