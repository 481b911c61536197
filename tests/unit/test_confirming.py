"""After a broken connection: which requests wait until it is known which server is there."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from concurrent.futures import wait
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from loopback import Loopback
from simulation import World
from test_http_faults import server
from test_sequence_faults import SETTINGS, Model

from cidalloc.client import Client
from cidalloc.client.asyncio.http import AsyncHttpTransport
from cidalloc.client.core.effects import Idle, Reply, Send
from cidalloc.client.core.grpc_calls import Connections
from cidalloc.client.core.transport import boottime, parse_url
from cidalloc.client.sync import grpc as sync_grpc
from cidalloc.client.sync.http import HttpTransport, _Connection
from cidalloc.codes import Operation
from cidalloc.errors import Unavailable
from cidalloc.manager.settings import Settings
from cidalloc.protocol import parse_error


class Breaking(Model):
    """Its connections break when a test says so, and its manager can go away."""

    def __init__(self, settings: Settings = SETTINGS) -> None:
        super().__init__(settings)
        self.is_broken = self.away = self.taking_over = False
        self.notes: list[str] = []  # what arrives

    def broke(self) -> bool:
        broken, self.is_broken = self.is_broken, False
        return broken

    def call(self, model: str, request: Any, timeout: float) -> Any:
        self.notes.append(request.operation.name)
        if self.away:
            raise Unavailable("serves no model cidmgr")
        if self.taking_over:
            error = parse_error("[CIDALLOC 14 UNAVAILABLE] another process is taking over")
            assert error is not None
            raise error
        return super().call(model, request, timeout)

    def submit(
        self, limit: float, model: str, inputs: list[Any], done: Any, /, **options: Any
    ) -> None:
        self.notes.append("infer")
        super().submit(limit, model, inputs, done, **options)

    def answer(self) -> None:
        self.held.pop(0)(SimpleNamespace(get_response=dict), None)


def test_a_request_that_waits_for_its_turn_when_a_connection_breaks() -> None:
    """It must not reach another server either."""
    model = Breaking()
    with Client(transport=model) as cids, cids.sequence("model", timeout=5) as sequence:
        sequence.infer([])
        cids._runner.run(cids._session.lease.renew(cids._deadline()))  # its model is announced
        model.hold = True
        first, second = sequence.async_infer([]), sequence.async_infer([])
        model.notes.clear()
        model.hold, model.is_broken = False, True
        model.held.pop(0)(None, ConnectionError("reset"))
        assert isinstance(first.exception(1.0), Unavailable)
        second.result(3.0)
        assert "RENEW" in model.notes[: model.notes.index("infer")], "it was sent at once"


def test_a_failure_counts_for_the_requests_that_waited_for_it() -> None:
    """The manager is back when the turn of a later one comes."""
    model = Breaking()
    with Client(transport=model) as cids, cids.sequence("model", timeout=5) as long:
        with cids.sequence("model", timeout=5) as sequence:
            long.infer([])
            sequence.infer([])
            model.hold = True
            busy, later = long.async_infer([]), long.async_infer([])
            model.is_broken = model.away = True
            with pytest.raises(Unavailable, match="serves no model"):
                sequence.infer([])
            model.hold = model.away = False
            model.answer()
            wait([busy, later], 3.0)
            assert later.exception(0) is None


def test_all_that_wait_fail_together() -> None:
    model = Breaking()
    with Client(transport=model) as cids, cids.sequence("model", timeout=5) as sequence:
        sequence.infer([])
        model.is_broken = model.away = True
        model.notes.clear()
        several = [sequence.async_infer([]) for _ in range(3)]
        assert all(isinstance(each.exception(2.0), Unavailable) for each in several)
        model.away = False
        sequence.infer([], end=True)
        assert "infer" not in model.notes[:-1]


def test_requests_wait_while_a_process_of_the_manager_takes_over() -> None:
    """The manager says so: it was reloaded just when a connection broke."""
    model = Breaking()
    with Client(transport=model) as cids, cids.sequence("model", timeout=5) as sequence:
        sequence.infer([])
        model.is_broken = model.taking_over = True
        model.notes.clear()
        future = sequence.async_infer([])
        time.sleep(0.6)
        assert not future.done(), future.exception()
        assert 2 <= len(model.notes) <= 20, model.notes  # with pauses, which grow
        model.taking_over = False
        future.result(2.0)
        assert model.notes[-1] == "infer"


def test_requests_wait_for_a_takeover_no_longer_than_their_own_time() -> None:
    model = Breaking()
    with Client(transport=model) as cids, cids.sequence("model", timeout=0.3) as sequence:
        sequence.infer([])
        model.is_broken = model.taking_over = True
        with pytest.raises(Unavailable):
            sequence.async_infer([]).result(1.5)
        model.taking_over = False
        sequence.async_infer([]).result(3.0)


@pytest.mark.parametrize("away", [False, True])
def test_a_new_stream_for_the_end(away: bool) -> None:
    """The first one broke: START and END must not reach a sequence of another server."""

    class Stream:
        over = False

        def __init__(self, receive: Any) -> None:
            self._receive = receive

        def send(self, _: str, __: Any, /, request_id: str = "", **options: Any) -> None:
            model.sent.append(options)
            found = SimpleNamespace(id=request_id, model_version="1")
            self._receive(request_id, True, SimpleNamespace(get_response=lambda: found), None)

        def end(self) -> None:
            self.over = True

        cut = end

    class Streaming(Breaking):
        def open_stream(self, receive: Any, /) -> Any:
            self.notes.append("stream")
            self.streams.append(Stream(receive))
            return self.streams[-1]

    model = Streaming()
    model.streams = []  # type: ignore[attr-defined]
    with Client(transport=model) as cids:
        sequence = cids.sequence("model", streaming=True, timeout=5, end_inputs=[])
        sequence.infer([])
        cids._runner.run(cids._session.lease.renew(cids._deadline()))  # its model is announced
        sequence._core.state.lose()  # Triton has forgotten it
        model.streams[0].over = True  # type: ignore[attr-defined]
        model.is_broken, model.away = True, away
        model.notes.clear()
        model.sent.clear()
        sequence.close()
        assert len(model.sent) == (not away)
        found = model.notes
        assert "RENEW" in found[: found.index("stream")] if not away else "stream" not in found
        model.away = False


def test_a_random_id_needs_no_manager() -> None:
    model = Breaking()
    with Client(transport=model, fallback="random", timeout=0.2) as cids:
        with cids.sequence("model", timeout=5) as managed:
            managed.infer([])
            model.away = True
            cids._session.lease.deadline = 0.0
            cids._session.link.away_until = float("inf")
            with cids.sequence("model", timeout=5) as sequence:
                assert sequence.cid >= 2**62
                sequence.infer([])
                model.is_broken = True
                sequence.infer([])


def test_a_fallback_comes_within_a_second_or_so() -> None:
    """Also while the lease lasts, and with an ID that nobody could confirm."""
    model = Breaking()
    with Client(transport=model, fallback="random", timeout=5.0) as cids:
        with cids.sequence("model", timeout=5) as managed:
            managed.infer([])
            model.is_broken = model.away = True
            began = time.monotonic()
            with cids.sequence("model", timeout=5) as sequence:
                assert time.monotonic() - began < 2.5
                sequence.infer([])
                sequence.infer([], end=True)
            model.away = False


def test_what_fails_after_the_renewal_is_no_doubt() -> None:
    world = World(SETTINGS)
    session = world.session()
    world.acquire(session)
    session.models.to_check["model"] = 60.0
    world.idle["model"] = 500.0  # which has to be announced
    assert session.unsure(True)
    heartbeat = session.heartbeat()
    effect = next(heartbeat)
    assert isinstance(effect, Send) and effect.request.operation is Operation.RENEW
    effect = heartbeat.send(world.perform(effect))
    assert not session.confirming
    while not isinstance(effect, Send):
        effect = heartbeat.send(world.perform(effect))
    assert effect.request.parameters["cooldown_ms"] > 0
    session.unsure(True)  # again, meanwhile
    effect = heartbeat.send(Reply(error=Unavailable("no answer")))
    assert session.trouble is None and session.confirming
    while isinstance(effect, Idle):
        effect = heartbeat.send(world.perform(effect))
    heartbeat.send(world.perform(effect))
    assert not session.confirming and not session.suspected
    heartbeat.close()


def test_a_broken_connection_is_no_time_for_a_pause() -> None:
    world = World(SETTINGS)
    session = world.session()
    world.acquire(session)
    session.lease.put_off(10)
    heartbeat = session.heartbeat()
    assert isinstance(next(heartbeat), Idle)
    heartbeat.close()
    assert session.unsure(True)
    effect = next(session.heartbeat())
    assert isinstance(effect, Send) and effect.request.operation is Operation.RENEW


@pytest.mark.parametrize("heartbeat", [False, True])
def test_a_connection_that_breaks_during_the_renewal(heartbeat: bool) -> None:
    """Another server may have the address since then."""
    world = World(SETTINGS)
    session = world.session()
    world.acquire(session)
    session.unsure(True)
    flow = session.heartbeat() if heartbeat else session.confirm(world.now + 5.0, True)
    effect = next(flow)
    session.suspect(True)
    with contextlib.suppress(StopIteration):
        flow.send(world.perform(effect))  # type: ignore[arg-type]
    assert session.suspected
    flow.close()


def test_a_channel_that_another_thread_has_just_closed() -> None:
    channel = grpc.insecure_channel("127.0.0.1:1")
    connections = Connections(lambda: channel, lambda closed: closed.close(), sync_grpc._is_ready)
    connections.release(connections.take())
    channel.close()  # as `retire` and `release` do in the middle of `broke`
    assert connections.broke()


def test_a_request_ends_while_another_one_makes_its_channel() -> None:
    """Garbage may be collected in the middle of that: an old channel, which waits for its calls."""
    made: list[Any] = []
    busy: list[Any] = []

    def make() -> Any:
        if made:  # a second channel, as there are too many requests for the first one
            ends = threading.Thread(target=connections.release, args=[busy[0]], daemon=True)
            ends.start()
            ends.join(5)
            assert not ends.is_alive()
        made.append(grpc.insecure_channel("127.0.0.1:1"))
        return made[-1]

    connections = Connections(make, lambda channel: channel.close(), sync_grpc._is_ready)
    for _ in range(101):
        busy.append(connections.take())
    assert len(made) == 2
    connections.close()
    for each in made:
        each.close()


def test_a_name_that_no_model_can_have_does_not_end_the_session() -> None:
    with Client(transport=Loopback(SETTINGS), ttl=1.0) as cids:
        cids.sequence("m" * 300, check=False, cooldown=1.0).close()
        cids.sequence("", check=False, cooldown=1.0).close()
        time.sleep(0.7)
        cids._runner.run(cids._session.lease.renew(cids._deadline()))


def keep_alive(found: socket.socket) -> None:
    """Answer until a request says to close the connection a while later."""
    while data := found.recv(2**16):
        found.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        if b"/last/" in data:
            return


def test_a_closed_connection_is_noticed_once() -> None:
    """And not again with each request while another connection is in use."""
    with server(keep_alive) as url:
        transport = HttpTransport(parse_url(url), None, {})
        first, second = transport._connect(boottime() + 5), transport._connect(boottime() + 5)
        for each in (first, second):
            transport._give_back(_Connection(each), True)
        second.sendall(b"GET /last/ HTTP/1.1\r\n\r\n")
        second.recv(2**16)
        assert second.recv(1, socket.MSG_PEEK) == b"", "the server has closed it"
        assert transport.broke()
        assert not transport.broke()
        transport.server_version(5.0)
        assert not transport.broke()
        transport.close()


def test_a_request_that_finds_its_connection_closed_tells_the_next_one() -> None:
    """It goes over a new connection, which may lead to another server."""

    def blocking(url: str) -> None:
        transport = HttpTransport(parse_url(url), None, {})
        connected = transport._connect(boottime() + 5)
        transport._give_back(_Connection(connected), True)
        connected.sendall(b"GET /last/ HTTP/1.1\r\n\r\n")
        connected.recv(2**16)
        assert connected.recv(1, socket.MSG_PEEK) == b"", "the server has closed it"
        time.sleep(0.02)  # it was used a moment ago
        transport.server_version(5.0)
        assert transport.broke()
        transport.close()

    async def awaiting(url: str) -> None:
        transport = AsyncHttpTransport(parse_url(url), None, {})
        connected = await transport._connect()
        connected.idle_since = boottime()
        transport._idle.append(connected)
        await connected.exchange(b"GET /last/ HTTP/1.1\r\n\r\n", 5.0)
        while not connected.over:
            await asyncio.sleep(0.01)
        await transport.server_version(5.0)
        assert transport.broke()
        await transport.close()

    with server(keep_alive) as url:
        blocking(url)
        asyncio.run(awaiting(url))


def test_a_closed_connection_is_noticed_once_in_asyncio() -> None:
    async def main(url: str) -> None:
        transport = AsyncHttpTransport(parse_url(url), None, {})
        both = [await transport._connect() for _ in range(2)]
        for each in both:
            each.idle_since = boottime()
        transport._idle += both
        await both[0].exchange(b"GET /last/ HTTP/1.1\r\n\r\n", 5.0)
        while not both[0].over:
            await asyncio.sleep(0.01)
        assert transport.broke()
        assert not transport.broke()
        await transport.server_version(5.0)
        assert not transport.broke()
        await transport.close()

    with server(keep_alive) as url:
        asyncio.run(main(url))


def test_a_connection_that_breaks_while_others_are_looked_at() -> None:
    """Looking releases the interpreter's lock, so another thread's request may fail just then."""

    class Meanwhile(HttpTransport):
        def _closed_by_server(self) -> bool:
            if self._idle:
                self._idle.clear()
                self._broke = True
            return False

    transport = Meanwhile(parse_url("http://127.0.0.1:1"), None, {})
    transport._idle.append(None)  # type: ignore[arg-type]
    assert transport.broke() or transport.broke()
