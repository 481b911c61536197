"""Faults of a client: waiting calls, closing after exceptions, hosts that do not answer."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
import warnings
from typing import Any, ClassVar

import pytest
from fake_triton import FakeTriton
from simulation import World
from test_sequence_faults import SETTINGS, Model

from cidalloc.client import AsyncClient, Client
from cidalloc.client.asyncio.http import AsyncHttpTransport
from cidalloc.client.core.effects import Idle, Send
from cidalloc.client.core.lease import Acquired
from cidalloc.client.core.transport import parse_url
from cidalloc.client.sync.http import HttpTransport
from cidalloc.codes import Operation
from cidalloc.errors import CidError, Exhausted, SequenceLost
from cidalloc.manager.settings import Settings


def test_a_call_without_timeout_does_not_give_up_the_place_of_one_that_waits() -> None:
    world = World(Settings(first=1, capacity=1, max_sessions=10, fresh=True))
    other = world.session(seed=1, ahead=0)
    world.acquire(other)
    session = world.session(seed=2, ahead=0)
    world.run(session, session.status(world.now + 10))
    waits = session.acquire(1, None, world.now + 10, Acquired(), world.now + 30)
    effect = next(waits)
    while not (isinstance(effect, Send) and effect.request.operation is Operation.NEW):
        effect = waits.send(world.perform(effect))
    at_once = session.acquire(1, None, world.now + 10, Acquired())
    idle = next(at_once)  # while the first one's NEW is on its way
    assert isinstance(idle, Idle)
    effect = waits.send(world.perform(effect))  # exhausted: it has a place now
    assert isinstance(effect, Idle)
    world.sent.clear()
    try:
        found = at_once.send(world.perform(Idle(world.now)))
        while True:
            found = at_once.send(world.perform(found))
    except Exhausted:
        pass
    given_up = [each for each in world.sent if each.parameters.get("wait_ms") == 0]
    assert not given_up, f"the place of the waiting call was given up: {given_up}"


def test_exhausted_tells_when_while_others_wait() -> None:
    world = World(Settings(first=1, capacity=1, max_sessions=10, fresh=True))
    session = world.session(seed=2, ahead=0)
    (cid,) = world.acquire(session)
    world.release(session, cid, cooldown_ms=20_000)
    world.run(session, session.flush(world.now + 5))
    waits = session.acquire(1, None, world.now + 10, Acquired(), world.now + 30)
    effect = next(waits)
    while not isinstance(effect, Idle):
        effect = waits.send(world.perform(effect))
    with pytest.raises(Exhausted) as found:
        world.run(session, session.acquire(1, None, world.now + 10, Acquired()))
    assert found.value.due_s is not None, found.value


def test_closing_after_an_exception_takes_two_seconds_at_most() -> None:
    model = Model()
    with Client(transport=model) as cids:
        began = 0.0
        with pytest.raises(ZeroDivisionError):
            with cids.sequence("model", end_inputs=[]) as sequence:
                sequence.infer([])
                model.hold = True
                began = time.monotonic()
                raise ZeroDivisionError
        took = time.monotonic() - began
    assert took < 2.8, f"{took:.1f} s"


def test_a_loop_that_ends_with_a_request_on_its_way(caplog: pytest.LogCaptureFixture) -> None:
    futures: list[Any] = []

    async def main(url: str) -> None:
        cids = AsyncClient(url)
        sequence = await cids.sequence("model", check=False, cooldown=1.0)
        fake.delay_s = 1.0
        futures.append(sequence.async_infer([]))
        futures.extend((cids, sequence))
        await asyncio.sleep(0.2)

    with FakeTriton(SETTINGS) as fake, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        asyncio.run(main(fake.url))
        print(futures[0])
        gc.collect()
    said = [str(each.message) for each in seen if "unclosed" not in str(each.message)]
    said += [each.getMessage() for each in caplog.records if each.name == "asyncio"]
    assert not said, said
    assert futures[0].done()


def full(address: str, port: int = 0) -> tuple[socket.socket, list[socket.socket]]:
    listener = socket.socket()
    listener.bind((address, port))
    listener.listen(0)
    fill = []
    for _ in range(3):
        each = socket.socket()
        each.setblocking(False)
        each.connect_ex(listener.getsockname())
        fill.append(each)
    time.sleep(0.05)
    return listener, fill


def test_a_host_with_several_silent_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    first = full("127.0.0.1")
    port = first[0].getsockname()[1]
    others = [full(f"127.0.0.{last}", port) for last in (2, 3)]
    kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    found = [(*kind, (f"127.0.0.{last}", port)) for last in (1, 2, 3)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    transport = HttpTransport(parse_url(f"http://several:{port}"), None, {})
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        transport.infer(0.5, "model", [])
    took = time.monotonic() - began
    for listener, fill in (first, *others):
        for each in (listener, *fill):
            each.close()
    assert took < 1.0, f"{took:.1f} s instead of 0.5"


def test_conn_timeout_limits_connecting() -> None:
    listener, fill = full("127.0.0.1")

    async def ask() -> float:
        url = parse_url(f"http://127.0.0.1:{listener.getsockname()[1]}")
        transport = AsyncHttpTransport(url, None, {"conn_timeout": 0.3})
        began = time.monotonic()
        with pytest.raises(CidError):
            await transport.server_version(2.0)
        return time.monotonic() - began

    took = asyncio.run(ask())
    for each in (listener, *fill):
        each.close()
    assert took < 1.0, f"{took:.1f} s instead of 0.3"


def test_the_end_of_a_sequence_whose_id_was_released_never_meets_another() -> None:
    model = Model(Settings(first=1, capacity=10, max_sessions=10, fresh=True, cooldown_ms=1))
    with Client(transport=model) as cids:
        sequence = cids.sequence("model", end_inputs=[])
        sequence.infer([])
        cid = sequence.cid
        cids.release(cid, ended=True)  # a mistake of the application
        with pytest.raises(SequenceLost):
            sequence.infer([])
        time.sleep(0.01)
        others = [cids.sequence("model") for _ in range(3)]
        (other,) = (each for each in others if each.cid == cid)
        other.infer([])
        model.sent.clear()
        sequence.close()
        assert not model.sent, model.sent


def test_a_request_that_grpc_refuses_ends_at_once() -> None:
    async def main(url: str) -> tuple[str, float, str]:
        async with AsyncClient(url) as cids:
            async with cids.sequence("model", check=False, cooldown=1.0, timeout=2.0) as sequence:
                began = time.monotonic()
                try:
                    await sequence.infer([], headers={"a!b": "1"})  # gRPC allows no "!" in names
                    said = "answered"
                except Exception as error:
                    said = repr(error)
                took = time.monotonic() - began
                try:
                    await sequence.infer([])
                    then = "answered"
                except Exception as error:
                    then = repr(error)
                busy = [each.busy for each in cids._transport._sequences._usable]
                return said, took, f"{then}; requests on the connection: {busy}"

    with FakeTriton(SETTINGS) as fake:
        said, took, then = asyncio.run(main(fake.url))
    assert took < 1 and then == "answered; requests on the connection: [0]", (said, took, then)


def test_a_stream_for_the_end_is_closed_if_another_thread_closes_the_sequence() -> None:
    class Stream:
        over = ended = False

        def end(self) -> None:
            self.ended = True

        def cut(self) -> None:
            self.ended = True

        def send(self, *_: Any, **__: Any) -> None:
            pass

    class Streaming(Model):
        streams: ClassVar[list[Stream]] = []

        def open_stream(self, receive: Any, /) -> Any:
            self.streams.append(Stream())
            if len(self.streams) == 2:
                sequence._core.finish()  # what another thread's close() or the client's ends with
            return self.streams[-1]

    model = Streaming()
    with Client(transport=model) as cids:
        sequence = cids.sequence("model", streaming=True, end_inputs=[])
        sequence.async_infer([])
        sequence._core.state.lose()  # Triton has forgotten it,
        model.streams[0].over = True  # and the stream broke
        sequence.close()
    assert [each.ended for each in model.streams] == [True, True]


@pytest.mark.parametrize("hurries", [False, True])
def test_the_place_in_line_stays(hurries: bool) -> None:
    """What it costs that the place is given up: a client that came later gets the ID."""
    world = World(Settings(first=1, capacity=1, max_sessions=10, fresh=True, cooldown_ms=0))
    other = world.session(seed=1, ahead=0)
    (cid,) = world.acquire(other)
    mine, later = (world.session(seed=seed, ahead=0) for seed in (2, 3))
    for each in (mine, later):
        world.run(each, each.status(world.now + 10))

    def until_new(flow: Any, effect: Any) -> Any:
        while not (isinstance(effect, Send) and effect.request.operation is Operation.NEW):
            effect = flow.send(world.perform(effect))
        return effect

    taken, taken_later = Acquired(), Acquired()
    waits = mine.acquire(1, None, world.now + 10, taken, world.now + 30)
    asks = until_new(waits, next(waits))
    at_once = mine.acquire(1, None, world.now + 10, Acquired())
    if hurries:
        next(at_once)
    waits.send(world.perform(asks))
    waits_later = later.acquire(1, None, world.now + 10, taken_later, world.now + 30)
    waits_later.send(world.perform(until_new(waits_later, next(waits_later))))
    if hurries:
        with pytest.raises(Exhausted):
            effect = at_once.send(world.perform(Idle(world.now)))
            while True:
                effect = at_once.send(world.perform(effect))
    world.release(other, cid, cooldown_ms=0)
    world.run(other, other.flush(world.now + 5))
    world.now += 0.1
    for _ in range(4):  # both ask again, mine first
        for flow, _found in ((waits, taken), (waits_later, taken_later)):
            try:
                effect = Idle(world.now + 1.0)
                for _ in range(3):
                    effect = flow.send(world.perform(effect))
                    if isinstance(effect, Idle):
                        break
            except StopIteration:
                pass
            if taken or taken_later:
                break
        if taken or taken_later:
            break
    assert taken, f"the client that came later has ID {list(taken_later)}"
