"""A fleet and its time: servers that hang, and servers without the model."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from fake_triton import FakeTriton

from cidalloc.client import AsyncFleet, Fleet
from cidalloc.errors import Unavailable
from cidalloc.manager.settings import Settings

SETTINGS = Settings(first=1, capacity=1000, max_sessions=100, fresh=True)
MODEL: dict[str, Any] = {"model": "m", "check": False, "cooldown": 1.0}


class Without(FakeTriton):
    """It serves another model."""

    looks = 0

    def ModelConfig(self, request: Any, context: Any) -> Any:
        if self.lacks:
            self.looks += 1
            words = f"Request for unknown model: '{request.name}' is not found"
            context.abort(grpc.StatusCode.NOT_FOUND, words)
        return super().ModelConfig(request, context)

    lacks = True


def test_a_server_without_the_model_is_left_alone_for_a_while() -> None:
    """Its manager answers each heartbeat, which says nothing about the model."""
    with FakeTriton(SETTINGS) as fake, Without(SETTINGS) as without:
        with Fleet([fake.url, without.url]) as fleet:
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                with fleet.sequence("m") as sequence:
                    assert fake.url in sequence.server
                time.sleep(0.005)
            assert 1 <= without.looks <= 6, without.looks
            without.lacks = False
            until = time.monotonic() + 5.0
            while time.monotonic() < until:
                with fleet.sequence("m") as sequence:
                    if without.url in sequence.server:
                        return
            pytest.fail("it was never tried again")


@contextmanager
def hanging(count: int) -> Iterator[list[str]]:
    """Servers that take a connection and never answer."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    yield [f"127.0.0.1:{each.getsockname()[1]}" for each in listeners]
    for each in listeners:
        each.close()


ONE = Settings(first=1, capacity=1, cooldown_ms=0, max_sessions=100, fresh=True)


def test_servers_that_hang_do_not_add_to_wait() -> None:
    """Only the last try may take `connect` longer."""
    with FakeTriton(ONE) as fake, hanging(6) as urls:
        with Fleet([fake.url, *urls], connect=0.4) as fleet, fleet.sequence(**MODEL):
            with pytest.raises(Unavailable, match=r"Exhausted|in use|held"):
                fleet.sequence(**MODEL)  # all have failed once
            began = time.monotonic()
            with pytest.raises(Unavailable):
                fleet.sequence(**MODEL, wait=1.0)
            took = time.monotonic() - began
    assert took < 1.0 + 0.4 + 0.5, f"{took:.1f} s"


def test_servers_that_hang_do_not_add_to_wait_in_asyncio() -> None:
    async def main(url: str, urls: list[str]) -> float:
        async with AsyncFleet([url, *urls], connect=0.4) as fleet, fleet.sequence(**MODEL):
            with pytest.raises(Unavailable):
                await fleet.sequence(**MODEL)
            began = time.monotonic()
            with pytest.raises(Unavailable):
                await fleet.sequence(**MODEL, wait=1.0)
            return time.monotonic() - began

    with FakeTriton(ONE) as fake, hanging(6) as urls:
        took = asyncio.run(main(fake.url, urls))
    assert took < 1.0 + 0.4 + 0.5, f"{took:.1f} s"


def test_an_id_comes_although_others_hang() -> None:
    with FakeTriton(ONE) as fake, hanging(3) as urls:
        with Fleet([fake.url, *urls], connect=0.4) as fleet:
            held = fleet.sequence(**MODEL)
            with pytest.raises(Unavailable):
                fleet.sequence(**MODEL)
            held.close()  # nothing was sent with its ID
            began = time.monotonic()
            fleet.sequence(**MODEL, wait=3.0).close()
            assert time.monotonic() - began < 3.0
