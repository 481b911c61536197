"""Each request and each answer of a client is spoilt in turn: some of them, or all (`make faults`).

`in_turn` says what must hold. A line of the table in docs/testing.md is a flow.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator

import h2.connection
import h2.events
import pytest
from flows_in_turn import FLOWS, WAYS, Way
from in_turn import SETTINGS, Turn, all_turns, run, run_all
from pages import TESTING, fill, markdown
from server_front import Front, Network
from spoilt import FAULTS

from cidalloc.client.core import tidy
from cidalloc.conformance import recorder
from cidalloc.manager.registry import Registry

ALL = os.environ.get("CIDALLOC_FAULTS") == "all"
EACH = 1 if ALL else 71  # no multiple of the number of faults

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200 if ALL else 300)]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    network = Network()
    with recorder.watched(Registry):
        yield network
    network.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidy, "_ROUND_S", (0.2, 0.3))
    # What is logged with an exception would keep gRPC's connections open, since pytest keeps it.
    monkeypatch.setattr(logging.getLogger("grpc"), "disabled", True)
    monkeypatch.setattr(logging.getLogger("grpc._common"), "disabled", True)


counts: Counter[tuple[str, str]] = Counter()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_faults_in_turn(way: Way, network: Network) -> None:
    every, start = all_turns(network, [way]), WAYS.index(way)
    turns = [each for n, each in enumerate(every) if (n - start) % EACH == 0 or found_by(each)]
    found = run_all(network, turns)
    wrong = {str(turn): [*each.wrong, *each.slow] for turn, each in found.items()}
    wrong = {turn: each for turn, each in wrong.items() if each}
    met = [turn for turn, each in found.items() if each.met]
    print(f"{way}: {len(turns)} cases, of which {len(met)} met their fault")
    assert not wrong, wrong
    assert len(met) >= 0.9 * len(turns)  # what a heartbeat sends may come once less
    counts.update((turn.flow, _group(turn)) for turn in every)


FOUND = {
    ("IDs", "NEW", "junk in a frame"),  # the call never ended
    ("sequence", "END", "junk in a frame"),  # it counted as answered
    ("sequence", "END", "JSON 200"),
    ("sequence", "END", "page 200"),
    ("no END", "DELETE", "page 413"),  # the heartbeat ended
    ("IDs", "NEW", "page 413 after"),  # IDs were forgotten
    ("IDs", "CLOSE", "RESOURCE_EXHAUSTED"),  # a connection stayed open
    ("tidy", "DEAD", "request lost"),
    ("close", "DELETE", "last answer of a connection"),  # over which CLOSE was sent
}


def found_by(turn: Turn) -> bool:
    """Whether this case has found a fault of the client."""
    return (turn.flow, turn.target[0], turn.fault.name) in FOUND


@pytest.mark.parametrize(
    ("way", "fault", "kind", "words"),
    [
        (
            0,
            "text 503",
            "Unavailable",
            "another server than Triton answers: upstream connect error",
        ),
        (1, "page 503, Retry-After", "Unavailable", "another server than Triton answers: 503"),
        (0, "page 413", "InferenceServerException", "another server than Triton answers: 413"),
        (1, "JSON 200", "ProtocolError", "answers unlike Triton"),
        (0, "junk in a frame", "ProtocolError", "answers unlike Triton"),
        (2, "RESOURCE_EXHAUSTED", "Unavailable", "upstream connect error"),
        (3, "RESOURCE_EXHAUSTED", "Unavailable", "upstream connect error"),
        (3, "junk in a frame", "ProtocolError", "answers unlike Triton"),
        (4, "page 200", "Unavailable", "broke"),
        (5, "junk in a frame", "ProtocolError", "answers unlike Triton"),
    ],
)
def test_errors_of_a_step(way: int, fault: str, kind: str, words: str, network: Network) -> None:
    found = run(network, WAYS[way], "sequence", ("step", 1), FAULTS[fault])
    assert found.errors[0].startswith(f"infer: {kind}") and words in found.errors[0], found.errors
    assert "<" not in found.errors[0]


def test_the_front_takes_a_call_that_ends_at_once(network: Network) -> None:
    """A call whose limit passes on a busy machine may come together with its end."""
    front = Front(network, SETTINGS, {})
    client = h2.connection.H2Connection()
    client.initiate_connection()
    path = (":path", "/inference.GRPCInferenceService/ServerMetadata")
    for stream in (1, 3):
        headers = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), path]
        client.send_headers(stream, headers)
        client.send_data(stream, b"\0" * 5, end_stream=True)
        if stream == 1:
            client.reset_stream(stream)
    host, _, port = front.target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as wire:
        wire.sendall(client.data_to_send())
        ended: set[int] = set()
        while 3 not in ended:
            data = wire.recv(65536)
            assert data, "the front closed the connection"
            events = client.receive_data(data)
            ended |= {e.stream_id for e in events if isinstance(e, h2.events.StreamEnded)}
    front.close()
    assert front.asked == ["version", "version"]


def _group(turn: Turn) -> str:
    """Return the column of the table for the fault of a case."""
    does = turn.fault.does
    return next(name for name, several in GROUPS.items() if does in several)


GROUPS = {
    "lost or late": ("silence", "answer", "twice"),
    "broken or cut": ("close", "reset", "cut", "cut_and_reset", "last"),
    "of a proxy": ("page", "json", "text", "trailers"),
    "unreadable": ("garbage", "junk"),
    "HTTP/2": ("goaway", "goaway_before", "refuse", "reset_stream"),
}


@pytest.mark.skipif(not ALL, reason="only all cases fill the table")
def test_the_table() -> None:
    rows = [["flow", *GROUPS, "all"]]
    for flow in (*FLOWS, "all"):
        row = [
            sum(n for (f, g), n in counts.items() if flow in (f, "all") and g == each)
            for each in GROUPS
        ]
        rows.append([flow, *(f"{n:,}" for n in (*row, sum(row)))])
    fill(TESTING, "faults", markdown(rows))
