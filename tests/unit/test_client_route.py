"""Which slice a client's requests are for, from OPEN to the end of a lease."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from loopback import Loopback

from cidalloc import protocol
from cidalloc.client import Client
from cidalloc.codes import Operation
from cidalloc.errors import SequenceLost, SessionExpired, Unavailable
from cidalloc.manager.settings import Settings

SLICES = [Settings(capacity=64, slice=f"{number}/4", fresh=True) for number in range(4)]


class Gateway(Loopback):
    """A proxy before several managers, of which some may be away; it notes each route."""

    def __init__(self, *settings: Settings) -> None:
        super().__init__(settings[0])
        self.managers = [Loopback(each) for each in settings]
        self.any = 0  # which one answers OPEN
        self.away: set[int] = set()
        self.routes: list[tuple[str, int | None]] = []
        self.route: Any = lambda: None

    def call(self, model: str, request: protocol.Request, timeout: float) -> tuple[Any, str]:
        number = None if request.operation is Operation.OPEN else self.route()
        self.routes.append((request.operation.name, number))
        place = self.any if number is None else number
        if place in self.away:
            raise Unavailable(f"the proxy cannot reach the server of {place}")
        return self.managers[place].call(model, request, timeout)

    def model_config(self, model: str, timeout: float) -> Mapping[str, Any]:
        if self.route() in self.away:
            raise Unavailable(f"the proxy cannot reach the server of {self.route()}")
        return super().model_config(model, timeout)


def test_all_but_open_are_routed() -> None:
    gateway = Gateway(*SLICES)
    gateway.any = 3
    with Client(transport=gateway) as client:
        assert gateway.route() is None
        cid = client.acquire()
        with client.sequence("model") as sequence:
            assert sequence.headers == {"cid-slice": "3"}
        client.release(cid)
        client.status()
    opened, *others = gateway.routes
    assert opened == ("OPEN", None) and {number for _, number in others} == {3}
    assert {name for name, _ in others} >= {"NEW", "STATUS", "CLOSE"}


@pytest.mark.parametrize("number", [0, 3])
def test_slice_0_is_a_slice(number: int) -> None:
    gateway = Gateway(*SLICES)
    gateway.any = number
    with Client(transport=gateway) as client:
        client.acquire()
        assert gateway.route() == number


def test_a_manager_without_a_slice() -> None:
    gateway = Gateway(Settings(fresh=True))
    with Client(transport=gateway) as client, client.sequence("model") as sequence:
        assert gateway.route() is None and sequence.headers == {}


def test_an_earlier_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers OPEN with fewer numbers."""
    gateway = Gateway(SLICES[1])
    inner = gateway.managers[0].call

    def call(model: str, request: protocol.Request, timeout: float) -> tuple[Any, str]:
        output, detail = inner(model, request, timeout)
        return (output[:7] if request.operation is Operation.OPEN else output), detail

    monkeypatch.setattr(gateway.managers[0], "call", call)
    with Client(transport=gateway) as client:
        client.acquire()
        assert gateway.route() is None


def test_a_manager_that_tells_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Loopback(SLICES[1])
    inner = manager.call

    def call(model: str, request: protocol.Request, timeout: float) -> tuple[Any, str]:
        output, detail = inner(model, request, timeout)
        return (output[:5] if request.operation is Operation.OPEN else output), detail

    monkeypatch.setattr(manager, "call", call)
    with Client(transport=manager) as client:
        client.acquire()
        lease = client._session.lease
        assert lease.cache.cooldown == 5.0 and lease.default_ms == 120_000


def test_a_lease_that_ran_out_moves() -> None:
    """Its server does not answer: the next session is at another, and its IDs are lost."""
    gateway = Gateway(*SLICES)
    with Client(transport=gateway, ttl=1.0, timeout=0.2) as client:
        with client.sequence("model") as sequence:
            sequence.infer([])
            gateway.away.add(0)
            with pytest.raises(SessionExpired):  # no other server answers either
                expire(client)
            assert gateway.route() == 0, "it may come back"
            gateway.any = 2
            gateway.routes.clear()
            cid = expire(client)
            assert [name for name, _ in gateway.routes].count("OPEN") == 1
            assert gateway.route() == 2 and cid in range(2**30 + 32, 2**30 + 48)
            with pytest.raises(SequenceLost, match="cannot reach the server of 0; a new session"):
                sequence.infer([])
        gateway.away.clear()
    assert gateway.routes[-1] == ("CLOSE", 2)


def test_a_sequence_after_the_lease_ran_out_moves() -> None:
    """It reads the model's configuration there, too."""
    gateway = Gateway(*SLICES)
    with Client(transport=gateway, ttl=1.0, timeout=0.2) as client:
        client.acquire()
        gateway.away.add(0)
        gateway.any = 2
        run_out(client)
        with client.sequence("model") as sequence:
            assert sequence.cid in range(2**30 + 32, 2**30 + 48)


def test_a_lease_that_ran_out_stays_if_its_server_answers() -> None:
    gateway = Gateway(*SLICES)
    with Client(transport=gateway, ttl=1.0, timeout=0.2) as client:
        cid = client.acquire()
        gateway.away.add(0)
        with pytest.raises(SessionExpired):
            expire(client)
        gateway.away.clear()
        gateway.any = 2
        client.acquire()
        assert gateway.route() == 0 and cid in client.held()


def run_out(client: Client) -> None:
    """Let the lease run out."""
    lease = client._session.lease
    while time.clock_gettime(time.CLOCK_BOOTTIME) < lease.deadline:
        time.sleep(0.01)


def expire(client: Client) -> int:
    """Let the lease run out, and acquire an ID."""
    run_out(client)
    return client.acquire()
