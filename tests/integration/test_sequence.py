"""Sequences on the real server: their flags, sums, ends, and what becomes of their IDs."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from servers import Server
from tritonclient.utils import InferenceServerException

from cidalloc import errors
from cidalloc.client import Client, Sequence
from cidalloc.client.core.id_cache import ENDED, need_ms
from cidalloc.devserver.demo.sequences import number
from cidalloc.devserver.triton_server import TritonServer

MODEL = "simple_sequence"


@pytest.fixture(params=["grpc", "stream", "http"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cids(kind: str, triton: TritonServer) -> Any:
    with Client(triton.http_url if kind == "http" else triton.grpc_url) as client:
        yield client
        assert client.held().tolist() == [], "a sequence kept its ID"


def send(kind: str, value: int) -> list[Any]:
    return number(value, tritonclient.http if kind == "http" else tritonclient.grpc)


def total(result: Any) -> int:
    return int(result.as_numpy("OUTPUT")[0, 0])


def test_sums_without_waiting(cids: Client, kind: str) -> None:
    with cids.sequence(MODEL, streaming=kind == "stream") as sequence:
        futures = [sequence.async_infer(send(kind, value)) for value in range(20)]
        last = sequence.async_infer(send(kind, 100), end=True)
        assert [total(each.result(30)) for each in futures] == np.cumsum(range(20)).tolist()
        assert total(last.result(30)) == 290


def cooldown_of(sequence: Sequence, monkeypatch: pytest.MonkeyPatch) -> int:
    """Close a sequence and return for how many milliseconds its ID cools, or ENDED."""
    seen: list[int] = []
    lease = sequence._begun.runner.session.lease
    release, ask = lease.release_from, lease.release_unended

    def spy(cid: int, cooldown_ms: int) -> None:
        assert cid == sequence.cid
        seen.append(cooldown_ms)
        release(cid, cooldown_ms)

    def spy_too(cid: int, model: str, idle: float, timeout: float) -> None:
        assert (cid, model) == (sequence.cid, sequence.model)
        seen.append(need_ms(idle, timeout))
        ask(cid, model, idle, timeout)

    if sequence.state == "closed, recycled":  # by the answer to END
        return ENDED
    monkeypatch.setattr(lease, "release_from", spy)
    monkeypatch.setattr(lease, "release_unended", spy_too)
    sequence.close()
    sequence.close()
    assert len(seen) == 1
    return seen[0]


def test_an_answered_end_frees_the_id(
    cids: Client, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = cids.sequence(MODEL, streaming=kind == "stream")
    sequence.infer(send(kind, 1))
    sequence.infer(send(kind, 1), end=True)
    assert cooldown_of(sequence, monkeypatch) == ENDED


def test_an_end_sent_without_waiting_frees_the_id(
    cids: Client, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = cids.sequence(MODEL, streaming=kind == "stream")
    sequence.async_infer(send(kind, 1))
    sequence.async_infer(send(kind, 1), end=True)
    assert cooldown_of(sequence, monkeypatch) == ENDED


def test_an_unused_id_was_never_known_to_triton(
    cids: Client, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = cids.sequence(MODEL, streaming=kind == "stream")
    assert cooldown_of(sequence, monkeypatch) == ENDED


def test_without_end_the_id_cools_for_idle_time_and_timeout(
    cids: Client, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = cids.sequence(MODEL, streaming=kind == "stream", timeout=3.0)
    sequence.infer(send(kind, 1))
    assert cooldown_of(sequence, monkeypatch) == 5_000 + 3_000


def test_after_an_error_the_id_cools(
    cids: Client, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = cids.sequence(MODEL, streaming=kind == "stream")
    with pytest.raises(InferenceServerException):
        sequence.infer(bad_input(kind))
    # START was not spent on it.
    assert total(sequence.infer(send(kind, 4))) == 4
    sequence.infer(send(kind, 1), end=True)
    assert cooldown_of(sequence, monkeypatch) != ENDED


def test_inputs_that_tritonclient_cannot_send(
    cids: Client, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises, the sequence goes on and its ID does not come back too soon."""
    sequence = cids.sequence(MODEL, streaming=kind == "stream")
    other = tritonclient.grpc if kind == "http" else tritonclient.http
    for wrong in (["no input"], np.zeros([1, 1], np.int32), None, number(1, other), "INPUT"):
        with pytest.raises(errors.InvalidArgument, match="InferInput"):
            sequence.infer(wrong)  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidArgument, match="InferInput"):
            sequence.async_infer(wrong)  # type: ignore[arg-type]
    assert sequence.state == "fresh"
    assert total(sequence.infer(tuple(send(kind, 4)))) == 4  # type: ignore[arg-type]
    assert cooldown_of(sequence, monkeypatch) != ENDED
    with pytest.raises(errors.InvalidArgument, match="InferInput"):
        cids.sequence(MODEL, end_inputs=["no input"])


def test_flags_for_ones_own_client(
    cids: Client, kind: str, triton: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = cids.sequence(MODEL, streaming=kind == "stream")
    module = tritonclient.http if kind == "http" else tritonclient.grpc
    port = triton.http_port if kind == "http" else triton.grpc_port
    own = module.InferenceServerClient(f"127.0.0.1:{port}")
    assert total(own.infer(MODEL, send(kind, 2), **sequence.infer_kwargs())) == 2
    assert total(own.infer(MODEL, send(kind, 2), **sequence.infer_kwargs())) == 4
    assert total(own.infer(MODEL, send(kind, 2), **sequence.infer_kwargs(end=True))) == 6
    own.close()
    assert cooldown_of(sequence, monkeypatch) != ENDED
    with pytest.raises(errors.InvalidArgument, match="no more"):
        sequence.infer_kwargs()


def test_arguments_of_bls(cids: Client, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton makes of them is tested with the examples, in a model."""
    start, end = 1, 2
    sequence = cids.sequence(MODEL, streaming=kind == "stream", timeout=2.5)
    for ending, flags in ((False, start), (False, 0), (True, end)):
        given = sequence.bls_kwargs(end=ending)
        assert given == {"correlation_id": sequence.cid, "flags": flags, "timeout": 2_500_000}
    with cids.sequence(MODEL) as other:
        assert other.bls_kwargs(end=True)["flags"] == start | end
    assert cooldown_of(sequence, monkeypatch) != ENDED


def bad_input(kind: str) -> list[Any]:
    module = tritonclient.http if kind == "http" else tritonclient.grpc
    tensor = module.InferInput("INPUT", [1, 1], "FP32")
    return [tensor.set_data_from_numpy(np.zeros([1, 1], np.float32))]


def test_an_end_that_failed_may_be_sent_again(cids: Client, kind: str) -> None:
    with cids.sequence(MODEL, streaming=kind == "stream") as sequence:
        sequence.infer(send(kind, 1))
        with pytest.raises(InferenceServerException):
            sequence.infer(bad_input(kind), end=True)
        assert total(sequence.infer(send(kind, 1), end=True)) == 2


def test_nothing_after_the_end(cids: Client, kind: str) -> None:
    with cids.sequence(MODEL, streaming=kind == "stream") as sequence:
        sequence.infer(send(kind, 1), end=True)
        with pytest.raises(errors.InvalidArgument, match="no more"):
            sequence.infer(send(kind, 1))
    with pytest.raises(errors.InvalidArgument, match="no more"):
        sequence.infer(send(kind, 1))
    sequence.close()


@pytest.mark.parametrize(
    "name", ["sequence_id", "sequence_start", "sequence_end", "client_timeout", "tell_final"]
)
def test_what_the_sequence_sets_itself(cids: Client, kind: str, name: str) -> None:
    with cids.sequence(MODEL, streaming=kind == "stream") as sequence:
        with pytest.raises(errors.InvalidArgument, match=name):
            sequence.infer(send(kind, 1), **{name: 1})


def test_another_version_needs_another_sequence(cids: Client, kind: str) -> None:
    with cids.sequence(MODEL, streaming=kind == "stream") as sequence:
        assert total(sequence.infer(send(kind, 1), model_version="1")) == 1
        for version in ({}, {"model_version": "2"}):
            for call in (sequence.infer, sequence.async_infer):
                with pytest.raises(errors.InvalidArgument, match=r"is on version '1'.* a new seq"):
                    call(send(kind, 1), **version)
        assert total(sequence.infer(send(kind, 1), end=True, model_version="1")) == 2


def test_an_exception_in_the_block_gives_the_id_back(cids: Client, kind: str) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        cids.sequence(MODEL, streaming=kind == "stream") as sequence,
    ):
        sequence.infer(send(kind, 1))
        raise ZeroDivisionError
    with pytest.raises(errors.NotHeld):
        cids.release(sequence.cid)


def test_waiting_for_a_slot_ends(cids: Client, kind: str) -> None:
    """Without the request's timeout Triton would let the second sequence wait for ever."""
    streaming, model = kind == "stream", "one_slot_sequence"
    with (
        cids.sequence(model, streaming=streaming) as first,
        cids.sequence(model, streaming=streaming, timeout=0.5) as second,
    ):
        first.infer(send(kind, 1))
        with pytest.raises(errors.Unavailable, match="all slots of the model are taken"):
            second.infer(send(kind, 1))
        first.infer(send(kind, 1), end=True)


def test_a_narrow_corrid_is_refused(triton: TritonServer) -> None:
    """The pool reaches beyond 31 bits, and the model's CORRID control does not."""
    with Client(triton.grpc_url, model="wide") as cids:
        with pytest.raises(errors.InvalidArgument, match="2147483647"):
            cids.sequence("narrow_sequence")
        assert cids.held().tolist() == []
        with cids.sequence(MODEL) as sequence:
            sequence.infer(number(1), end=True)


def test_a_narrow_corrid_fits_the_default_pool(cids: Client, kind: str) -> None:
    with cids.sequence("narrow_sequence", streaming=kind == "stream") as sequence:
        assert total(sequence.infer(send(kind, 9), end=True)) == 9


def test_a_model_without_sequences_is_refused(cids: Client) -> None:
    with pytest.raises(errors.InvalidArgument, match="sequence_batching"):
        cids.sequence("cidmgr")


def test_an_unknown_model(cids: Client) -> None:
    with pytest.raises(errors.Unavailable, match="nonesuch"):
        cids.sequence("nonesuch")


def test_streaming_needs_grpc(triton: TritonServer) -> None:
    with Client(triton.http_url) as cids:
        with pytest.raises(errors.InvalidArgument, match="gRPC"):
            cids.sequence(MODEL, streaming=True)
        assert cids.held().tolist() == []


def test_repr(cids: Client, kind: str) -> None:
    with cids.sequence(MODEL, streaming=kind == "stream") as sequence:
        assert repr(sequence) == f"<cidalloc Sequence {sequence.cid} on {MODEL}, fresh>"
        sequence.infer(send(kind, 1), end=True)
        assert repr(sequence).endswith(", closed, recycled>")
    assert repr(sequence).endswith(", closed, recycled>")


def test_triton_forgets_and_says_a_riddle(cids: Client, kind: str) -> None:
    """Between when it may and when it must have forgotten, Triton is asked."""
    with cids.sequence("idle_sequence", streaming=kind == "stream") as sequence:
        sequence.infer(send(kind, 1))
        time.sleep(0.6)
        with pytest.raises(errors.SequenceLost, match=r"idle time, 0\.2 s"):
            sequence.infer(send(kind, 1))
        with pytest.raises(errors.SequenceLost, match="open a new sequence"):
            sequence.infer(send(kind, 1))
        assert sequence.state == "lost"


def test_what_must_be_forgotten_is_not_sent(
    cids: Client, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cids.sequence("idle_sequence", streaming=kind == "stream") as sequence:
        sequence.infer(send(kind, 1))
        time.sleep(0.8)
        core = sequence._begun
        with pytest.raises(errors.SequenceLost, match=r"idle time, 0\.2 s"):
            core.enter(core.request(send(kind, 1), False, {}))
        assert not core.on_way


def test_somebody_elses_end(cids: Client, kind: str, triton: TritonServer) -> None:
    with cids.sequence(MODEL, streaming=kind == "stream") as sequence:
        sequence.infer(send(kind, 1))
        own = tritonclient.grpc.InferenceServerClient(triton.grpc_url)
        own.infer(MODEL, number(1), sequence_id=sequence.cid, sequence_end=True)
        own.close()
        with pytest.raises(errors.SequenceLost, match="or something else used this ID"):
            sequence.infer(send(kind, 1))


def test_the_former_names(cids: Client, kind: str) -> None:
    streaming = kind == "stream"
    with cids.sequence(MODEL, streaming=streaming, farewell=send(kind, 5)) as sequence:
        sequence.infer(send(kind, 1))
    assert sequence.state == "closed, recycled"
    with cids.sequence(MODEL) as sequence:
        assert sequence.flags(end=True)["sequence_end"]


def test_no_farewell_without_need(cids: Client, kind: str) -> None:
    farewell = send(kind, 5)
    with cids.sequence(MODEL, streaming=kind == "stream", end_inputs=farewell) as sequence:
        pass
    assert sequence.state == "closed, recycled"
    with cids.sequence(MODEL, streaming=kind == "stream", end_inputs=farewell) as sequence:
        assert total(sequence.infer(send(kind, 1), end=True)) == 1
    assert sequence.state == "closed, recycled"
    with cids.sequence(MODEL, streaming=kind == "stream", end_inputs=bad_input(kind)) as sequence:
        sequence.infer(send(kind, 1))
    assert sequence.state == "closed, cooling"


def test_ensembles(cids: Client, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with cids.sequence("ensemble", streaming=kind == "stream") as sequence:
        assert total(sequence.infer(send(kind, 3))) == 3
        assert total(sequence.infer(send(kind, 4), end=True)) == 7
        assert sequence._core.plan.target.highest_cid == 2**31 - 1
        assert sequence._core.plan.target.idle_s == 5.0
    assert sequence.state == "closed, recycled"


def test_without_a_look_at_the_configuration(
    cids: Client, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.InvalidArgument, match="cooldown="):
        cids.sequence("nonesuch", check=False)
    sequence = cids.sequence(MODEL, check=False, cooldown=9.0, timeout=2.0, streaming=False)
    sequence.infer(send("http" if kind == "http" else "grpc", 1))
    assert cooldown_of(sequence, monkeypatch) == 9_000 + 2_000


def test_a_cooldown_of_ones_own_is_never_shorter(
    cids: Client, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for own, expected in ((1.0, 5_000), (30.0, 30_000)):
        sequence = cids.sequence(MODEL, cooldown=own, timeout=2.0)
        sequence.infer_kwargs()
        assert cooldown_of(sequence, monkeypatch) == expected + 2_000
        monkeypatch.undo()


def test_random_ids_when_the_manager_is_away(triton: TritonServer) -> None:
    with Client(triton.grpc_url, model="nonesuch", fallback="random") as cids:
        with cids.sequence(MODEL) as one, cids.sequence(MODEL) as two:
            assert one.cid != two.cid
            assert min(one.cid, two.cid) >= 2**62
            assert total(one.infer(number(3))) == 3
            assert total(two.infer(number(4), end=True)) == 4
            assert total(one.infer(number(3), end=True)) == 6
        with pytest.raises(errors.Unavailable):
            cids.sequence("narrow_sequence")
        with pytest.raises(errors.Unavailable):
            cids.acquire()
    with pytest.raises(errors.InvalidArgument, match="fallback"):
        Client(triton.grpc_url, fallback="nonesuch")  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e7, "1", None, True])
def test_timeouts_that_are_none(cids: Client, kind: str, timeout: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="timeout"):
        cids.sequence(MODEL, streaming=kind == "stream", timeout=timeout)
    assert cids.held().tolist() == []


def test_a_closed_client_is_closed_for_sequences(triton: TritonServer) -> None:
    cids = Client(triton.grpc_url)
    sequence = cids.sequence(MODEL)
    cids.close()
    with pytest.raises(errors.InvalidArgument, match="closed"):
        sequence.infer(number(1))
    with pytest.raises(errors.InvalidArgument, match="closed"):
        cids.acquire()
    with pytest.raises(errors.InvalidArgument, match="closed"):
        cids.release(1)
    sequence.close()


def test_closing_from_many_threads(cids: Client, kind: str) -> None:
    sequence = cids.sequence(MODEL, streaming=kind == "stream")
    sequence.infer(send(kind, 1), end=True)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: sequence.close(), range(4)))


def test_what_waits_in_line_may_be_cancelled(triton: TritonServer) -> None:
    with Client(triton.grpc_url) as cids, cids.sequence(MODEL) as sequence:
        sequence.infer(number(1))
        futures = [sequence.async_infer(number(1)) for _ in range(50)]
        cancelled = sum(future.cancel() for future in reversed(futures))
        assert total(sequence.infer(number(1), end=True)) == 2 + 50 - cancelled


@pytest.fixture
def frozen(few: Path) -> Iterator[tuple[Client, TritonServer]]:
    """A server that a test may stop and kill."""
    with Server(few) as server, Client(server.grpc_url, timeout=1.0) as client:
        yield client, server
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.pid, signal.SIGKILL)


@pytest.mark.server
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_server_that_dies_or_hangs(
    frozen: tuple[Client, TritonServer],
    streaming: bool,
    how: signal.Signals,
) -> None:
    """Everything ends in time and says `Unavailable`, with much in the queue, too."""
    client, server = frozen
    threads = threading.active_count()
    idle = client.sequence(MODEL, streaming=streaming, timeout=1.0)
    busy = client.sequence(MODEL, streaming=streaming, timeout=1.0)
    idle.infer(number(1))
    busy.infer(number(1))
    os.kill(server.pid, how)
    began = time.monotonic()
    futures = [busy.async_infer(number(1)) for _ in range(10)]
    with pytest.raises(errors.Unavailable):
        busy.infer(number(1))
    idle.close()
    with pytest.raises(ZeroDivisionError), busy:
        raise ZeroDivisionError
    assert time.monotonic() - began < 12
    if how == signal.SIGKILL:
        assert all(
            isinstance(each.exception(10), errors.CidError) for each in futures if each.done()
        )
        # The threads of a client, and none for each request; those that end may take a moment.
        deadline = time.monotonic() + 10
        while threading.active_count() > threads + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert threading.active_count() <= threads + 2, threading.enumerate()


@pytest.mark.server
def test_a_broken_stream_fails_the_future_not_the_call(frozen: tuple[Client, TritonServer]) -> None:
    """Whether the stream broke before a request or after it is nothing a caller could know."""
    client, server = frozen
    sequence = client.sequence(MODEL, streaming=True, timeout=1.0)
    sequence.infer(number(1))
    os.kill(server.pid, signal.SIGKILL)
    stream = sequence._begun._stream._stream  # type: ignore[union-attr]
    deadline = time.monotonic() + 10
    while not stream.over:  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "the stream does not notice"
        time.sleep(0.01)
    assert isinstance(sequence.async_infer(number(1)).exception(0), errors.Unavailable)
    sequence.close()


def test_threads_leave_no_files_open(triton: TritonServer) -> None:
    """The HTTP client would give every thread files of its own, and never close them."""
    with Client(triton.http_url) as cids:

        def work() -> None:
            with cids.sequence(MODEL) as sequence:
                sequence.async_infer(send("http", 1), end=True).result(30)

        def run() -> int:
            worker = threading.Thread(target=work)
            worker.start()
            worker.join()
            return len(os.listdir("/proc/self/fd"))

        first = run()
        time.sleep(0.2)
        for _ in range(20):
            last = run()
        time.sleep(0.2)
        assert last < first + 20
