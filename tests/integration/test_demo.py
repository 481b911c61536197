"""The demo, word for word, and the runs that show why it exists."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tritonclient.grpc
from anonymous import Anonymous
from click.testing import CliRunner
from command import run, run_process
from servers import Server

from cidalloc import cli
from cidalloc.client import Client
from cidalloc.client.sync.transport import connect
from cidalloc.devserver import demo
from cidalloc.devserver.demo import sequences
from cidalloc.devserver.demo.collide import collide
from cidalloc.devserver.demo.stress import Hold, Outcome, overlapping, stress
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import Unavailable
from cidalloc.triton_model import export

SUMS = """\
[0] 0 : 100
[1] 11 : 89
[2] 18 : 82
[3] 23 : 77
[4] 26 : 74
[5] 28 : 72
[6] 28 : 72
[7] 29 : 71
"""
OUTPUT = f"""\
Have Correlation Id: {{}}
Have Correlation Id: {{}}
{{}}
{SUMS}Removing managed Correlation ID: {{}}
Removing managed Correlation ID: {{}}
"""


@pytest.mark.server
def test_the_demo_prints_what_it_printed_in_2019() -> None:
    done = run_process("demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout == OUTPUT.format(1, 2, "streaming : non-streaming", 2, 1)


@pytest.mark.parametrize(
    ("options", "header"),
    [
        ([], "streaming : non-streaming"),
        (["--async"], "streaming : non-streaming"),
        (["--reverse"], "non-streaming : streaming"),
        (["--async", "--reverse"], "non-streaming : streaming"),
    ],
)
def test_the_demo_on_a_server_that_runs(
    triton: TritonServer, options: list[str], header: str
) -> None:
    done = CliRunner().invoke(cli.main, ["demo", "--url", triton.grpc_url, *options])
    assert done.exit_code == 0, done.output
    first, second = (int(line.split()[-1]) for line in done.output.splitlines()[:2])
    assert done.output == OUTPUT.format(first, second, header, second, first)


def test_the_demo_notices_wrong_sums(triton: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sequences.expected_sums
    monkeypatch.setattr(sequences, "expected_sums", lambda v: [*right(v)[:-1], 12])
    done = CliRunner().invoke(cli.main, ["demo", "--url", triton.grpc_url])
    assert done.exit_code == 1
    assert "[ expected ] 12 : 12" in done.output
    assert "2 sums are wrong" in done.output


def test_collide(triton: TritonServer) -> None:
    unmanaged = collide(triton.http_url, managed=False)
    assert {lane.cid for lane in unmanaged} == {10086}
    assert all(lane.statuses == [200] * 8 for lane in unmanaged)
    assert sum(lane.wrong for lane in unmanaged) == 14
    assert [lane.end_status for lane in unmanaged] == [200, 400]
    assert "must specify the START flag" in unmanaged[1].end_words
    managed = collide(triton.http_url, managed=True)
    assert managed[0].cid != managed[1].cid
    assert all(lane.statuses == [200] * 8 and lane.end_status == 200 for lane in managed)
    assert sum(lane.wrong for lane in managed) == 0
    assert managed[0].sums[-1] == 29


def test_collide_as_it_is_shown(triton: TritonServer) -> None:
    done = CliRunner().invoke(cli.main, ["demo", "--collide", "--url", triton.http_url])
    assert done.exit_code == 0, done.output
    words = "14 of 16 sums are wrong. Triton answered 16 of these 16 requests with 200."
    assert words in done.output
    assert "Only the END of B was refused: 400" in done.output
    assert "0 of 16 sums are wrong." in done.output


def test_stress(triton: TritonServer) -> None:
    seen: list[int] = []
    with Client(triton.grpc_url) as client:
        held = client.active()
        outcome = stress(triton.grpc_url, 6, seen.append)
        assert client.active() == held
    assert outcome.failures == []
    assert outcome.good
    assert len(outcome.holds) == 12
    assert seen == [1, 2, 3, 4, 5, 6]


def test_stress_notices_what_is_still_held(triton: TritonServer) -> None:
    with Anonymous(connect(triton.grpc_url)) as client:
        leaked: list[int] = []
        outcome = stress(triton.grpc_url, 1, lambda done: leaked.append(client.acquire()))
        assert outcome.still_held == 1
        assert not outcome.good
        client.release_many(leaked)


def test_stress_as_it_is_shown(triton: TritonServer) -> None:
    done = CliRunner().invoke(cli.main, ["stress", "-p", "2", "-e", "1", "--url", triton.grpc_url])
    assert done.exit_code == 0, done.output
    rows = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines())
    assert rows == {
        "client processes": "2",
        "failed": "0",
        "sequences run": "4",
        "wrong sums": "0",
        "IDs shared by two sequences": "0",
        "IDs still held afterwards": "0",
    }


def test_stress_reports_failures() -> None:
    done = run("stress", "-p", "65", "-e", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "1 to 64 clients" in done.stderr
    done = run("stress", "--url", "127.0.0.1:1")
    assert done.returncode == 1
    assert "\nerror: UNAVAILABLE: " in f"\n{done.stderr}"


@pytest.mark.server
def test_without_the_model_the_demos_say_so(tmp_path: Path) -> None:
    export(tmp_path)
    with Server(tmp_path) as server:
        outcome = stress(server.grpc_url, 2)
        assert len(outcome.failures) == 2
        assert all("serves no model simple_sequence" in each for each in outcome.failures)
        assert not outcome.good
        with pytest.raises(Unavailable, match="no sequence can start on simple_sequence"):
            collide(server.http_url, managed=False)


@pytest.mark.server
def test_a_port_that_is_taken(triton: TritonServer) -> None:
    done = run("serve", "--http-port", str(triton.http_port), "--grpc-port=0", "--metrics-port=0")
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"cannot serve on port {triton.http_port}" in done.stderr


@pytest.mark.server
def test_the_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    export(tmp_path)
    server = Server(tmp_path)
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    try:
        time.sleep(0.3)
        assert server.poll() is None
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("holds", "shared"),
    [
        ([Hold(1, 0, 10), Hold(1, 10, 20)], set()),
        ([Hold(1, 0, 10), Hold(2, 5, 20)], set()),
        ([Hold(1, 5, 10), Hold(1, 0, 6)], {1}),
        ([Hold(1, 0, 9), Hold(1, 2, 3)], {1}),
    ],
)
def test_overlapping_holds_are_found(holds: list[Hold], shared: set[int]) -> None:
    assert overlapping(holds) == shared
    assert Outcome(holds=holds).good == (not shared)


@pytest.mark.server
def test_nothing_is_left_running() -> None:
    """However the command ends, its server ends, too, and takes its model processes along."""
    ways = (
        (signal.SIGINT, False),
        (signal.SIGTERM, True),
        (signal.SIGHUP, False),
        (signal.SIGKILL, True),
    )
    with ThreadPoolExecutor(len(ways)) as pool:  # side by side, since each takes seconds
        running = [pool.submit(leaves_nothing, *way) for way in ways]
    for each in running:
        each.result()


def leaves_nothing(signal_number: int, busy: bool) -> None:
    command = [sys.executable, "-m", "cidalloc", "serve"]
    command += ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    with (
        contextlib.ExitStack() as stack,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(4)]
            assert "Ctrl-C stops it" in lines[-1], lines
            url = lines[1].split()[1]
            if busy:
                stack.enter_context(open_stream(url))
            servers = children(process.pid)
            assert servers
            stubs = [stub for server in servers for stub in children(server)]
            assert len(stubs) == 2
            process.send_signal(signal_number)
            process.wait(30)
        finally:
            process.kill()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in servers + stubs):
        assert time.monotonic() < deadline, "the server outlived its command"
        time.sleep(0.1)


@contextlib.contextmanager
def open_stream(url: str) -> Iterator[None]:
    """Keep a gRPC stream open, which keeps Triton 2.51 from leaving in order."""
    triton = tritonclient.grpc.InferenceServerClient(url)
    triton.start_stream(lambda result, error: None)
    triton.async_stream_infer(demo.MODEL, sequences.number(1), sequence_id=1, sequence_start=True)
    time.sleep(0.2)
    yield
    triton.stop_stream(cancel_requests=True)
    triton.close()


def children(pid: int) -> list[int]:
    return [
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if (fields := read_stat(stat)) and fields[1] == str(pid)
    ]


def alive(pid: int) -> bool:
    fields = read_stat(Path(f"/proc/{pid}/stat"))
    return bool(fields) and fields[0] != "Z"


def read_stat(path: Path) -> list[str]:
    try:
        return path.read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def test_the_demo_model_is_where_the_server_looks(tmp_path: Path) -> None:
    demo.write_repository(tmp_path, demo.FRESH)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cidmgr", demo.MODEL]
