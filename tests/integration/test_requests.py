"""Requests on their way: none waits behind another sequence, none is cancelled, all end in time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import slow_models
import tritonclient.grpc
import tritonclient.http
from fake_triton import FakeTriton
from proxy import Proxy
from servers import Server
from slow_models import count_up, total

from cidalloc import errors
from cidalloc.client import AsyncClient, Client
from cidalloc.client.core.grpc_connections import Connections
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import export

WAYS = ["grpc", "http"]
IN_TIME_S = 0.5  # a request ends by its timeout and at most that; some more for a busy machine
BUSY_S = 1.0
CANCEL_S = 0.1  # within so many seconds the server has seen that a request was cancelled
SETTINGS = Settings(first=1, capacity=100_000, max_sessions=1000, fresh=True)
SUPPORT = Path(slow_models.__file__).parent


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "noted"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, log: Path) -> Iterator[TritonServer]:
    """A server with models that take their time, and a small pool."""
    folder = tmp_path_factory.mktemp("slow")
    export(folder)
    for way in WAYS:
        export(folder, Settings(first=1, capacity=100, fresh=True), name=f"hundred_{way}")
    slow_models.write(folder, "four_slots", slots=4, delay_s=0.005)
    slow_models.write(folder, "slow", slots=16, delay_s=0.2, log=log)
    slow_models.write(folder, "stuck", slots=8, delay_s=3.0)
    slow_models.write(folder, "quick", slots=256)
    slow_models.write(folder, "decoupled", decoupled=True)
    with Server(folder) as server:
        yield server


def url_of(server: TritonServer, way: str) -> str:
    return server.http_url if way == "http" else server.grpc_url


def one(way: str, number: int = 1) -> list[Any]:
    return count_up(tritonclient.http if way == "http" else tritonclient.grpc, number)


def wait_for(what: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


# ---- No request waits behind another sequence's


@pytest.mark.server
@pytest.mark.parametrize("way", WAYS)
def test_who_waits_for_a_slot_keeps_no_holder_waiting(server: TritonServer, way: str) -> None:
    def work(cids: Client) -> int:
        with cids.sequence("four_slots", timeout=60) as sequence:
            for _ in range(2):
                sequence.infer(one(way))
                time.sleep(0.02)
            return total(sequence.infer(one(way), end=True))

    with Client(url_of(server, way)) as cids, ThreadPoolExecutor(120) as pool:
        sums = [pool.submit(work, cids) for _ in range(120)]
        wait_for(lambda: any(each.done() for each in sums))
        began = time.monotonic()
        assert len(cids.acquire_many(3000)) == 3000, "nor the manager's requests"
        assert time.monotonic() - began < 5
        assert [each.result(60) for each in sums] == [3] * 120


@pytest.mark.server
@pytest.mark.parametrize("way", WAYS)
def test_tasks_that_wait_for_a_slot_keep_no_holder_waiting(server: TritonServer, way: str) -> None:
    async def work(cids: AsyncClient) -> int:
        async with cids.sequence("four_slots", timeout=60) as sequence:
            for _ in range(2):
                await sequence.infer(one(way))
                await asyncio.sleep(0.02)
            return total(await sequence.infer(one(way), end=True))

    async def main() -> None:
        async with AsyncClient(url_of(server, way)) as cids:
            tasks = [asyncio.create_task(work(cids)) for _ in range(150)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert len(await asyncio.wait_for(cids.acquire_many(3000), 5)) == 3000
            assert await asyncio.gather(*tasks) == [3] * 150

    asyncio.run(main())


@pytest.mark.server
def test_a_server_that_hangs_delays_no_other_ones_client(server: TritonServer) -> None:
    proxy = Proxy(server.http_port)
    try:
        with Client(f"http://{proxy.url}", timeout=2) as hung, Client(server.http_url) as cids:
            sequences = [hung.sequence("quick", timeout=2) for _ in range(40)]
            proxy.delay = 60.0
            futures = [each.async_infer(one("http")) for each in sequences]
            began = time.monotonic()
            with cids.sequence("quick") as sequence:
                assert total(sequence.infer(one("http"), end=True)) == 1
            assert time.monotonic() - began < 1.5
            assert all(isinstance(each.exception(5), errors.Unavailable) for each in futures)
    finally:
        proxy.close()


def test_connections() -> None:
    """A hundred requests on each; one is closed when it is no more used and nothing is on it."""
    made: list[SimpleNamespace] = []
    shut: list[Any] = []

    def make() -> Any:
        method = lambda *args, **options: None  # noqa: E731
        kinds = {f"{kind}_{way}": method for kind in ("unary", "stream") for way in WAYS}
        made.append(
            SimpleNamespace(
                **kinds,
                unary_unary=method,
                stream_stream=method,
                unary_stream=method,
                stream_unary=method,
            )
        )
        return made[-1]

    connections = Connections(make, shut.append, lambda channel: True)
    taken = [connections.take() for _ in range(250)]
    assert len(made) == 3
    assert [each.busy for each in dict.fromkeys(taken)] == [100, 100, 50]
    first, last = taken[0], taken[-1]
    connections.retire(first)
    connections.retire(first)
    for _ in range(100):
        assert not shut
        connections.release(first)
    assert shut == [first.channel]
    for _ in range(50):
        connections.release(last)
    assert shut == [first.channel], "a connection that nobody uses stays"
    connections.close()
    assert shut == [first.channel, last.channel]
    for each in taken[100:200]:
        assert len(shut) == 2
        connections.release(each)
    assert len(shut) == 3
    with pytest.raises(errors.InvalidArgument, match="closed"):
        connections.take()


# ---- Whatever is cancelled, END is sent and the ID comes back


async def cancel(task: asyncio.Task[Any], times: int, gap: float) -> None:
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(gap)
        if task.done():
            break


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
@pytest.mark.parametrize(("times", "gap"), [(1, 0.0), (2, 0.0), (3, 0.05), (100, 0.01)])
@pytest.mark.parametrize("within", ["a pause", "a request"])
def test_a_cancelled_sequence(
    server: TritonServer, log: Path, way: str, times: int, gap: float, within: str
) -> None:
    """A hundred times is how the scopes of anyio cancel."""

    async def main() -> None:
        async with AsyncClient(url_of(server, way)) as cids:
            seen: list[int] = []
            begin = slow_models.lines(log)

            async def work() -> None:
                streaming, farewell = way == "stream", one(way, 7)
                async with cids.sequence("slow", streaming=streaming, end_inputs=farewell) as it:
                    seen.append(it.cid)
                    await it.infer(one(way))
                    if within == "a request":
                        await it.infer(one(way))
                    await asyncio.sleep(30)

            task = asyncio.create_task(work())
            while not seen:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)  # the second request is at the model
            await cancel(task, times, gap)
            await asyncio.wait({task}, timeout=10)
            assert task.cancelled(), "the cancellation arrives, too"
            ends = [each for each in slow_models.seen(log, seen[0], begin) if each.end]
            assert [each.number for each in ends] == [7]
            assert seen[0] not in cids.held().tolist()
        assert [each.get_name() for each in asyncio.all_tasks() - {asyncio.current_task()}] == []

    asyncio.run(main())


@pytest.mark.server
def test_a_time_limit_around_a_sequence(server: TritonServer, log: Path) -> None:
    async def main() -> None:
        cids, seen = AsyncClient(server.grpc_url), []
        begin = slow_models.lines(log)

        async def work() -> None:
            async with cids, cids.sequence("slow", end_inputs=one("grpc", 7)) as sequence:
                seen.append(sequence.cid)
                while True:
                    await sequence.infer(one("grpc"))

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(work(), 1.0)
        ends = [each.number for each in slow_models.seen(log, seen[0], begin) if each.end]
        assert ends == [7]
        assert "closed" in repr(cids)

    asyncio.run(main())


# ---- Every request ends by its limit


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
def test_every_future_ends_in_time(server: TritonServer, way: str) -> None:
    """The model takes longer than the sequence allows; those in the queue have the same limit."""
    with Client(url_of(server, way)) as cids:
        sequence = cids.sequence("stuck", streaming=way == "stream", timeout=1.0)
        began = time.monotonic()
        futures = [sequence.async_infer(one(way)) for _ in range(3)]
        with pytest.raises(errors.Unavailable):
            sequence.infer(one(way))
        for future in futures:
            assert isinstance(future.exception(5), errors.Unavailable)
        assert 1.0 <= time.monotonic() - began < 1.0 + IN_TIME_S + BUSY_S
        began = time.monotonic()
        sequence.close()
        assert time.monotonic() - began < 1.0 + IN_TIME_S + BUSY_S


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
def test_every_awaited_future_ends_in_time(server: TritonServer, way: str) -> None:
    async def main() -> None:
        async with AsyncClient(url_of(server, way)) as cids:
            async with cids.sequence("stuck", streaming=way == "stream", timeout=1.0) as sequence:
                began = time.monotonic()
                futures = [sequence.async_infer(one(way)) for _ in range(3)]
                with pytest.raises(errors.Unavailable):
                    await sequence.infer(one(way))
                for failed in await asyncio.gather(*futures, return_exceptions=True):
                    assert isinstance(failed, errors.Unavailable)
                assert 1.0 <= time.monotonic() - began < 1.0 + IN_TIME_S + BUSY_S

    asyncio.run(main())


# ---- Small pools


@pytest.mark.server
@pytest.mark.parametrize("way", WAYS)
def test_a_hundred_clients_of_a_hundred_ids(server: TritonServer, way: str) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            cids = stack.enter_context(Client(url_of(server, way), model=f"hundred_{way}", ahead=0))
            sequence = stack.enter_context(cids.sequence("quick"))
            assert total(sequence.infer(one(way))) == 1
        with pytest.raises(errors.Exhausted):
            cids.acquire()
        for each in range(3):
            sequence.infer(one(way), end=each == 2)


# ---- Sequences that nobody closes


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
def test_an_answered_end_gives_the_id_back(server: TritonServer, way: str) -> None:
    with Client(url_of(server, way)) as cids:
        sequences = [cids.sequence("quick", streaming=way == "stream") for _ in range(5)]
        for each in sequences:
            each.infer(one(way))
            each.infer(one(way), end=True)
        assert cids.held().tolist() == []
        assert {each.state for each in sequences} == {"closed, recycled"}


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
def test_a_sequence_that_nobody_has(server: TritonServer, way: str) -> None:
    with Client(url_of(server, way)) as cids:
        with cids.sequence("quick") as first:
            first.infer(one(way), end=True)
        threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
        future = None
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for number in range(10):
                sequence = cids.sequence("quick", streaming=way == "stream")
                sequence.infer(one(way))
                if number == 9:
                    future = sequence.async_infer(one(way))
            del sequence
            gc.collect()
        assert len(seen) == 10
        assert all(each.category is ResourceWarning for each in seen)
        assert f"unclosed sequence {first.cid} " not in str(seen[0].message)
        assert f"on quick, opened at {__file__}:" in str(seen[0].message)
        assert future is not None and total(future.result(5)) == 2
        wait_for(lambda: not len(cids.held()))
        wait_for(lambda: threading.active_count() <= threads)
        wait_for(lambda: len(os.listdir("/proc/self/fd")) <= files + 2)


@pytest.mark.server
@pytest.mark.parametrize("streaming", [False, True])
def test_an_awaited_sequence_that_nobody_has(server: TritonServer, streaming: bool) -> None:
    async def main() -> None:
        async with AsyncClient(server.grpc_url) as cids:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                sequence = await cids.sequence("quick", streaming=streaming)
                await sequence.infer(one("grpc"))
                del sequence
                gc.collect()
            assert [each.category for each in seen] == [ResourceWarning]
            deadline = time.monotonic() + 10
            while cids.held().tolist():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)

    asyncio.run(main())


# ---- Decoupled models, without a look at the configuration


@pytest.mark.server
@pytest.mark.parametrize("answers", [0, 2])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_decoupled_model_is_refused(server: TritonServer, answers: int, kind: Any) -> None:
    """None, and more than one answer to a request; one would be as with any model."""
    options: Any = {"streaming": True, "check": False, "cooldown": 1.0, "timeout": 5.0}

    async def main() -> None:
        async with AsyncClient(server.grpc_url) as cids:
            async with cids.sequence("decoupled", **options) as sequence:
                with pytest.raises(errors.InvalidArgument, match="is decoupled"):
                    await sequence.infer(one("grpc", answers))

    began = time.monotonic()
    if kind is AsyncClient:
        asyncio.run(main())
    else:
        with Client(server.grpc_url) as cids, cids.sequence("decoupled", **options) as sequence:
            with pytest.raises(errors.InvalidArgument, match="is decoupled"):
                sequence.infer(one("grpc", answers))
    assert time.monotonic() - began < 4


# ---- One sequence, many threads


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
def test_threads_of_one_sequence_take_turns(server: TritonServer, way: str) -> None:
    with Client(url_of(server, way)) as cids, ThreadPoolExecutor(8) as pool:
        with cids.sequence("quick", streaming=way == "stream") as sequence:
            sums = list(pool.map(lambda _: total(sequence.infer(one(way))), range(80)))
            assert sorted(sums) == list(range(1, 81))
            assert total(sequence.infer(one(way), end=True)) == 81


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
def test_64_threads_of_one_client(server: TritonServer, way: str) -> None:
    """Each with sequences of its own: no sum is another one's, and all IDs come back."""
    with Client(url_of(server, way)) as cids, ThreadPoolExecutor(64) as pool:

        def work(number: int) -> list[int]:
            with cids.sequence("quick", streaming=way == "stream") as sequence:
                sums = [total(sequence.infer(one(way, number))) for _ in range(3)]
                return [*sums, total(sequence.infer(one(way, number), end=True))]

        for number, sums in enumerate(pool.map(work, range(192))):
            assert sums == [number, 2 * number, 3 * number, 4 * number]
        assert len(cids.held()) == 0


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
def test_64_tasks_of_one_client(server: TritonServer, way: str) -> None:
    async def work(cids: AsyncClient, number: int) -> list[int]:
        async with cids.sequence("quick", streaming=way == "stream") as sequence:
            sums = [total(await sequence.infer(one(way, number))) for _ in range(3)]
            return [*sums, total(await sequence.infer(one(way, number), end=True))]

    async def main() -> None:
        async with AsyncClient(url_of(server, way)) as cids:
            found = await asyncio.gather(*(work(cids, number) for number in range(64)))
            for number, sums in enumerate(found):
                assert sums == [number, 2 * number, 3 * number, 4 * number]
            assert len(cids.held()) == 0

    asyncio.run(main())


@pytest.mark.server
@pytest.mark.parametrize("way", WAYS)
def test_the_last_one_in_the_queue_is_sent(server: TritonServer, way: str) -> None:
    with Client(url_of(server, way)) as cids, ThreadPoolExecutor(1) as pool:
        with cids.sequence("slow", timeout=5) as sequence:
            first = pool.submit(sequence.infer, one(way))
            time.sleep(0.1)
            assert total(sequence.infer(one(way))) == 2
            assert total(first.result()) == 1


# ---- Nothing on its way is cancelled


def settled(fake: FakeTriton) -> bool:
    return fake.begun == fake.answered


def test_many_closers_cancel_nothing() -> None:
    with FakeTriton(SETTINGS) as fake:
        for number in range(30):
            cids = Client(fake.url, timeout=2)
            cids.acquire()
            fake.delay_s = 0.003 * (number % 5)
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda cids: cids.close(), [cids] * 8))
            fake.delay_s = 0.0
        wait_for(lambda: settled(fake))
        assert fake.cancelled == 0
        assert fake.service.figures()["sessions_total"] == 0  # type: ignore[index]


@pytest.mark.parametrize("streaming", [False, True])
def test_closing_a_client_cancels_no_request_of_another_thread(streaming: bool) -> None:
    """A request that blocks a thread ends with its answer; a future at once, with an error."""
    with FakeTriton(SETTINGS) as fake, ThreadPoolExecutor(2) as pool:
        cids = Client(fake.url)
        first, second = cids.sequence("model"), cids.sequence("model", streaming=streaming)
        fake.delay_s = 0.5
        blocked = pool.submit(first.infer, one("grpc"))
        future = second.async_infer(one("grpc"))
        wait_for(lambda: fake.inferences == 2)
        fake.delay_s = 0.0
        cids.close()
        assert isinstance(future.exception(0), errors.SequenceLost)
        assert total(blocked.result(5)) == 1
        wait_for(lambda: settled(fake))
        assert fake.cancelled == 0


@pytest.mark.parametrize("what", ["acquire", "infer", "sequence"])
def test_a_cancelled_task_cancels_no_request(what: str) -> None:
    async def main(fake: FakeTriton) -> None:
        async with AsyncClient(fake.url) as cids:
            sequence = await cids.sequence("model")
            await sequence.infer(one("grpc"))
            fake.delay_s = 0.3
            for _ in range(5):
                if what == "acquire":
                    work: Any = cids.acquire_many(2000)
                elif what == "infer":
                    work = sequence.infer(one("grpc"))
                else:
                    work = cids.sequence(f"model{time.monotonic()}").__aenter__()
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(work, 0.05)
            fake.delay_s = 0.0
            await sequence.close()

    with FakeTriton(SETTINGS) as fake:
        asyncio.run(main(fake))
        wait_for(lambda: settled(fake))
        assert fake.cancelled == 0


@pytest.mark.parametrize("timeout", [0.05, 0.3])
def test_a_short_limit_cancels_no_request(timeout: float) -> None:
    """Who waits gives up, and the request ends by itself."""
    with FakeTriton(SETTINGS) as fake, Client(fake.url, timeout=timeout) as cids:
        cids.acquire()
        fake.delay_s = 5.0
        began = time.monotonic()
        with pytest.raises(errors.Unavailable):
            cids.acquire_many(2000)
        assert time.monotonic() - began < timeout + BUSY_S
        fake.delay_s = 0.0
        time.sleep(CANCEL_S)
        fake.answer_now()
        wait_for(lambda: settled(fake))
        assert fake.cancelled == 0


class Alarm(Exception):
    """Raised by a signal handler."""


@contextlib.contextmanager
def alarm(when: Callable[[], bool], error: type[BaseException]) -> Iterator[None]:
    """Raise an error out of a signal handler of the main thread as soon as something is true."""

    def ring(*_: object) -> None:
        raise error

    def watch() -> None:
        wait_for(when)
        time.sleep(0.05)  # the call waits for its answer
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, ring)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        watcher.join()
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("error", [Alarm, TimeoutError, KeyboardInterrupt])
@pytest.mark.parametrize("what", ["acquire", "infer", "close"])
def test_an_exception_out_of_a_handler(what: str, error: type[BaseException]) -> None:
    """It arrives as it is, nothing is lost, and the manager's request ends by itself."""
    with FakeTriton(SETTINGS) as fake, Client(fake.url) as cids:
        sequence = cids.sequence("model")
        sequence.infer(one("grpc"))
        fake.delay_s, begun = 5.0, fake.begun
        with pytest.raises(error), alarm(lambda: fake.begun > begun, error):
            if what == "acquire":
                cids.acquire_many(2000)
            elif what == "infer":
                sequence.infer(one("grpc"))
            else:
                cids.close()
        fake.delay_s = 0.0
        if what == "infer":  # gRPC itself cancels the call that blocks the main thread
            wait_for(lambda: fake.cancelled == 1)
        else:
            time.sleep(CANCEL_S)
        fake.answer_now()
        gc.collect()
        if what != "close":
            assert len(cids.acquire_many(3000)) == 3000
            sequence.infer(one("grpc"), end=True)
            sequence.close()
            assert sequence.state == "closed, recycled" if what == "acquire" else "closed, cooling"
        wait_for(lambda: settled(fake))
        assert fake.cancelled == (1 if what == "infer" else 0)


# ---- Connections that go silent, or end


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_connection_that_goes_silent(server: TritonServer, way: str, kind: Any) -> None:
    """New connections work; so does the client after a time-out, and its session lives on."""
    proxy = Proxy(server.http_port if way == "http" else server.grpc_port)
    url, streaming = f"{'http' if way == 'http' else 'grpc'}://{proxy.url}", way == "stream"

    def blocking() -> None:
        with Client(url, ttl=20, timeout=1) as cids:
            with cids.sequence("quick", streaming=streaming, timeout=1) as sequence:
                sequence.infer(one(way), end=True)
            lease = cids._session.lease
            proxy.silence()
            while True:
                with contextlib.suppress(errors.Unavailable):
                    with cids.sequence("quick", streaming=streaming, timeout=1) as sequence:
                        sequence.infer(one(way), end=True)
                        break
            assert len(cids.acquire_many(2000)) == 2000
            assert cids._session.lease is lease, "the session was lost"

    async def awaiting() -> None:
        async with AsyncClient(url, ttl=20, timeout=1) as cids:
            async with cids.sequence("quick", streaming=streaming, timeout=1) as sequence:
                await sequence.infer(one(way), end=True)
            lease = cids._session.lease
            proxy.silence()
            while True:
                with contextlib.suppress(errors.Unavailable):
                    async with cids.sequence("quick", streaming=streaming, timeout=1) as sequence:
                        await sequence.infer(one(way), end=True)
                        break
            assert len(await cids.acquire_many(2000)) == 2000
            assert cids._session.lease is lease, "the session was lost"

    began = time.monotonic()
    try:
        if kind is Client:
            blocking()
        else:
            asyncio.run(awaiting())
    finally:
        proxy.close()
    assert time.monotonic() - began < 15


def test_a_stream_whose_connection_ends_by_age() -> None:
    """As proxies and servers let connections end; the error is ours."""
    age = (("grpc.max_connection_age_ms", 300), ("grpc.max_connection_age_grace_ms", 100))
    with FakeTriton(SETTINGS, *age) as fake, Client(fake.url) as cids:
        sequence = cids.sequence("model", streaming=True)
        sequence.infer(one("grpc"))
        fake.delay_s = 5.0
        with pytest.raises(errors.Unavailable, match=r"stream to .* broke"):
            sequence.infer(one("grpc"))
        fake.delay_s = 0.0
        fake.answer_now()
        sequence.close()
        with cids.sequence("model", streaming=True) as another:
            another.infer(one("grpc"), end=True)


# ---- Threads that the system refuses


def refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Let the system refuse the next thread of a name; return what it has refused."""
    start, refused = threading.Thread.start, []

    def refusing(self: threading.Thread) -> None:
        if name in self.name and not refused:
            refused.append(self.name)
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refusing)
    return refused


@pytest.mark.server
@pytest.mark.parametrize("way", WAYS)
def test_a_refused_keeper(server: TritonServer, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = refuse(monkeypatch, "cidalloc-client")
    with Client(url_of(server, way), ttl=1.0) as cids:
        with pytest.raises(errors.Unavailable, match="can't start new thread"):
            cids.acquire()
        assert cids.held().tolist() == []
        with cids.sequence("quick") as sequence:
            lease = cids._session.lease
            for _ in range(4):
                sequence.infer(one(way))
                time.sleep(0.5)
        assert cids._session.lease is lease
    assert len(refused) == 1


@pytest.mark.server
@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("grpc", "cidalloc-watch"),
        ("http", "cidalloc-watch"),
        ("http", "cidalloc-request"),
        ("stream", "cidalloc-stream"),
        ("stream", "cidalloc-watch"),
        ("stream", "Thread-"),  # gRPC's own
        ("grpc", "Thread-"),
    ],
)
def test_other_refused_threads(
    server: TritonServer, way: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is ours, nothing stays held, and the next try works."""
    with Client(url_of(server, way)) as cids:
        cids.acquire()
        held = cids.held().tolist()
        refused, worked = refuse(monkeypatch, name), False
        for _ in range(2):
            # The first time; whether at all depends on whether the thread runs already.
            with contextlib.suppress(errors.Unavailable):
                with cids.sequence("quick", streaming=way == "stream", timeout=5) as sequence:
                    assert total(sequence.async_infer(one(way), end=True).result(10)) == 1
                    worked = bool(refused)
        assert worked
        assert len(refused) == 1
        assert cids.held().tolist() == held


# ---- Closing at awkward moments


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
def test_a_client_that_is_closed_while_a_request_runs(server: TritonServer, way: str) -> None:
    async def main() -> None:
        cids = AsyncClient(url_of(server, way))
        sequence = await cids.sequence("stuck", streaming=way == "stream", timeout=20)
        request = asyncio.create_task(sequence.infer(one(way)))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        await cids.close()
        with pytest.raises(errors.SequenceLost, match="closed before"):
            await request
        assert time.monotonic() - began < 2 + 2 + BUSY_S
        await sequence.close()

    asyncio.run(main())


@pytest.mark.server
@pytest.mark.parametrize("way", WAYS)
def test_two_closers(server: TritonServer, way: str) -> None:
    async def main() -> None:
        cids = AsyncClient(url_of(server, way), label="twice")
        await cids.acquire()
        assert await asyncio.gather(cids.close(), cids.close()) == [None, None]
        async with AsyncClient(url_of(server, way)) as other:
            labels = [each["label"] for each in (await other.status())["sessions"]]
            assert "twice" not in labels

    asyncio.run(main())


def script(code: str, *arguments: str, wanted: str) -> None:
    """Run a program, which must end by itself."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=SUPPORT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [wanted], done
    assert "Error" not in done.stderr


IMPORTS = """
import atexit, sys, threading, time
import tritonclient.grpc, tritonclient.http
from slow_models import count_up
from cidalloc import errors
from cidalloc.client import Client
module = tritonclient.http if "http" in sys.argv[1] else tritonclient.grpc
"""


@pytest.mark.server
@pytest.mark.parametrize("way", WAYS)
def test_threads_that_outlive_the_main_thread(server: TritonServer, way: str) -> None:
    code = """
def work():
    with Client(sys.argv[1]) as cids, cids.sequence("quick") as sequence:
        for step in range(4):
            sequence.infer(count_up(module), end=step == 3)
            time.sleep(0.2)
        with cids.sequence("quick") as another:
            another.async_infer(count_up(module), end=True).result()
    print("done")

threading.Thread(target=work).start()
time.sleep(0.1)
"""
    script(IMPORTS + code, url_of(server, way), wanted="done")


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
@pytest.mark.parametrize("when", ["never", "atexit", "__del__"])
def test_a_program_that_ends_with_a_sequence_open(
    server: TritonServer, way: str, when: str
) -> None:
    code = """
cids = Client(sys.argv[1], label=sys.argv[3])
sequence = cids.sequence("quick", streaming=sys.argv[2] == "stream")
sequence.infer(count_up(module))

class Late:
    def __del__(self):
        try:  # the client was closed when the program ended
            sequence.infer(count_up(module))
        except errors.InvalidArgument as error:
            assert "the client of this sequence is closed" in str(error)
        sequence.close()
        cids.close()

def end():
    sequence.infer(count_up(module), end=True)
    cids.close()

late = Late() if sys.argv[4] == "__del__" else None
if sys.argv[4] == "atexit":
    atexit.register(end)
print("end of script")
"""
    label = f"ends {way} {when}"
    script(IMPORTS + code, url_of(server, way), way, label, when, wanted="end of script")
    with Client(server.grpc_url) as cids:
        assert label not in [each["label"] for each in cids.status()["sessions"]]


INTERRUPTED = """
import sys
import tritonclient.grpc, tritonclient.http
from slow_models import count_up
from cidalloc.client import Client
module = tritonclient.http if "http" in sys.argv[1] else tritonclient.grpc
with Client(sys.argv[1]) as cids:
    print("up", flush=True)
    while True:
        streaming = sys.argv[2] == "stream"
        end = count_up(module, 0)
        with cids.sequence("quick", streaming=streaming, end_inputs=end) as sequence:
            for _ in range(5):
                sequence.infer(count_up(module))
"""


@pytest.mark.server
@pytest.mark.parametrize("way", ["grpc", "http", "stream"])
def test_an_interrupted_program_ends(server: TritonServer, way: str, tmp_path: Path) -> None:
    """`INTERRUPTS=100 pytest -k interrupted` is the long form."""
    count = int(os.environ.get("INTERRUPTS", "12" if way == "stream" else "4"))
    command = [sys.executable, "-c", INTERRUPTED, url_of(server, way), way]
    for start in range(0, count, 4):
        said = [tmp_path / f"said{start + number}" for number in range(4)]
        processes = []
        for file in said:
            with file.open("w") as words:
                processes.append(
                    subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, cwd=SUPPORT)
                )
        try:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == b"up\n"
            for number, process in enumerate(processes):
                time.sleep((start * 7 + number * 11) % 23 / 100)
                process.send_signal(signal.SIGINT)
            for process, file in zip(processes, said, strict=True):
                try:
                    status = process.wait(10)
                except subprocess.TimeoutExpired:
                    # It came while a destructor ran, and Python drops what is raised there.
                    assert "Exception ignored in" in file.read_text()
                    process.send_signal(signal.SIGINT)
                    status = process.wait(10)
                assert status in (1, -signal.SIGINT)
        finally:
            for process in processes:
                process.kill()
                process.communicate()
