"""Some of the faults in turn with the real Triton behind a proxy: the front behaves like it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from flows_in_turn import ERRORS, LIMIT_S, WAYS, Case, Way
from in_turn import run, works_again
from proxy import Proxy
from server_front import Network
from spoilt import FAULTS

from cidalloc.client import Client
from cidalloc.conformance import recorder
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.registry import Registry

DELAY_S = 0.15
LABEL = "in turn, live"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    network = Network()
    with recorder.watched(Registry):
        yield network
    network.close()


def reset_after(proxy: Proxy) -> None:
    """Break the connection when the request has arrived, and the answer is on its way."""

    def cut() -> None:
        proxy.cut_all()
        proxy.mend()

    proxy.delay = DELAY_S
    threading.Timer(1.5 * DELAY_S, cut).start()


def late(proxy: Proxy) -> None:
    """Let the answer come after the limit; the next request finds a good network."""
    proxy.delay = LIMIT_S
    threading.Timer(3 * LIMIT_S, proxy.mend).start()


SPOIL: dict[str, Callable[[Proxy], None]] = {
    "request lost": Proxy.silence,
    "reset after": reset_after,
    "answer late": late,
}


SOME = [
    (fault, way) for fault in SPOIL for way in WAYS if fault == "reset after" or way in WAYS[::3]
]


@pytest.mark.parametrize(("fault", "way"), SOME, ids=str)
def test_triton_and_the_front_are_alike(
    fault: str, way: Way, triton: TritonServer, network: Network
) -> None:
    url = triton.http_url if way.scheme == "http" else triton.grpc_url
    proxy = Proxy(int(url.rpartition(":")[2]))
    case = Case(way, Any, {}, {"label": LABEL}, model="patient_sequence")  # type: ignore[arg-type]
    case.front = SimpleNamespace(target=proxy.url)  # type: ignore[assignment]
    try:
        asyncio.run(_spoil(case, proxy, SPOIL[fault]))
    finally:
        proxy.close()
    assert not case.wrong and not case.slow, (case.wrong, case.slow)
    with Client(triton.grpc_url) as cids:
        assert LABEL not in [each["label"] for each in cids.status()["sessions"]]
    front = run(network, way, "sequence", ("step", 1), FAULTS[fault])
    assert _kinds(case.errors) == _kinds(front.errors) == ["infer: Unavailable"]


async def _spoil(case: Case, proxy: Proxy, spoil: Callable[[Proxy], None]) -> None:
    case.connect()
    sequence = await case.begin()
    await case.infer(sequence, 1)
    spoil(proxy)
    with contextlib.suppress(*ERRORS):
        await case.infer(sequence, 2)
    await case.close_sequence(sequence)
    errors = list(case.errors)
    await works_again(case)
    case.errors = errors
    await case.close()


def _kinds(errors: list[str]) -> list[str]:
    return [": ".join(each.split(": ")[:2]) for each in errors]
