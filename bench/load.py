"""How many requests a second the manager answers, next to a model that does nothing.

Both are Python-backend models of the same tensors on the same Triton server, under the load of
real generators in turns (or, with ``--against silent``, the other is a manager without metrics):
`wrk` alternates NEW and DELETE over HTTP, `h2load` sends RENEW over gRPC.
`make load` runs this; it prints tables in Markdown. The generator shares the machine's cores with
the server, so only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cidalloc.client.sync.transport import connect
from cidalloc.codes import Operation
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.manager.settings import Settings
from cidalloc.protocol import Request, as_ids
from cidalloc.triton_model import export

MANAGER, EMPTY, SILENT = "cidmgr", "empty", "silent"
TOKEN = "0123456789abcdef" * 2

# A reply to NEW holds an ID of the manager's pool; the empty model says to everything that it is
# one. What DELETE answers is 1, the number of IDs.
MIX = """
local path = "/v2/models/%s/infer"
local head = { ["Content-Type"] = "application/json" }
local form = '{"inputs":[{"name":"CODE","datatype":"INT8","shape":[1,1],"data":[%%d]},'
  .. '{"name":"CORRELATION_ID","datatype":"UINT64","shape":[1,%%d],"data":[%%s]}],'
  .. '"parameters":{"ended":true}}'
local held, turn = {}, 0
function request()
  turn = turn + 1
  local n = #held
  if turn %% 2 == 0 and n > 0 then
    local cid = held[n]
    held[n] = nil
    return wrk.format("POST", path, head, form:format(1, 1, cid))
  end
  return wrk.format("POST", path, head, form:format(0, 1, "0"))
end
function response(status, headers, body)
  local cid = body:match('"OUTPUT".-"data":%%[(%%d+)')
  if cid and #cid > 9 and #held < 1000 then held[#held + 1] = cid end
end
"""

NOTHING = """
import numpy as np
import triton_python_backend_utils as pb_utils

OUTPUT = np.array([[1 << 30]], np.uint64)
DETAIL = np.array([[b""]], np.object_)


class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("OUTPUT", OUTPUT), pb_utils.Tensor("DETAIL", DETAIL)]
            )
            for _ in requests
        ]
"""

WITHOUT_METRICS = """
from cidalloc.triton_model import adapter


class Metrics:
    def __init__(self, *_):
        pass

    def start(self):
        pass

    close = start


adapter.Metrics = Metrics
"""


@dataclass
class Figures:
    """What one turn of a generator came to.

    Attributes:
        rate: requests answered in a second.
        p50, p99: latency in milliseconds.
        server: CPU time of the server with all its models, in microseconds a request.
        model: of the model's own process.
    """

    rate: float
    p50: float = 0.0
    p99: float = 0.0
    server: float = 0.0
    model: float = 0.0


def repository(folder: Path, against: str) -> Path:
    """Write the manager, its file included, and the model that it is compared with."""
    state = folder / "state"
    state.mkdir()
    settings = Settings(state=str(state), fresh=True, cooldown_ms=0, max_anonymous=10**6)
    models = folder / "models"
    config = (export(models, settings) / "config.pbtxt").read_text()
    if against == SILENT:
        code = export(models, settings, name=SILENT) / "1" / "model.py"
        code.write_text(code.read_text() + WITHOUT_METRICS)
        return models
    other = models / EMPTY / "1"
    other.mkdir(parents=True)
    (other / "model.py").write_text(NOTHING)
    lines = config.splitlines()
    kept = [each for each in lines if not each.startswith(("#", "parameters"))]
    text = "\n".join(kept).replace(f'name: "{MANAGER}"', f'name: "{EMPTY}"')
    (other.parent / "config.pbtxt").write_text(text + "\n")
    return models


def processes(server: TritonServer, models: tuple[str, str]) -> dict[str, int]:
    """Return the process of each model, and the server's."""
    found = {"server": server.pid}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == server.pid:
            found |= {name: int(entry.name) for name in models if f"/{name}/" in " ".join(words)}
    return found


def cpu_us(pid: int) -> float:
    """Return the CPU time that a process has used, in microseconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1e6 / os.sysconf("SC_CLK_TCK")


def measured(
    pids: dict[str, int], model: str, seconds: float, run: Callable[[], Figures]
) -> Figures:
    """Run a generator and add what it cost the server."""
    before = {name: cpu_us(pid) for name, pid in pids.items()}
    figures = run()
    spent = {name: cpu_us(pid) - before[name] for name, pid in pids.items()}
    requests = figures.rate * seconds
    figures.model = spent[model] / requests
    figures.server = (spent["server"] + spent[model]) / requests
    return figures


def output_of(command: list[str]) -> str:
    """Return what a generator printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603


def milliseconds(text: str) -> float:
    """Return a time that is written as ``1.25ms``."""
    match = re.fullmatch(r"([\d.]+)(us|ms|s)", text)
    assert match, text
    return float(match[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[match[2]]


def wrk(server: TritonServer, script: Path, clients: int, seconds: float) -> Figures:
    """Alternate NEW and DELETE over HTTP."""
    options = ["-t1", f"-c{clients}", f"-d{seconds:.0f}s", "--latency", "-s", str(script)]
    text = output_of(["wrk", *options, server.http_url])
    if "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(f"some requests failed:\n{text}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    p50 = re.search(r"\n\s+50%\s+(\S+)", text)
    p99 = re.search(r"\n\s+99%\s+(\S+)", text)
    assert rate and p50 and p99, text
    return Figures(float(rate[1]), milliseconds(p50[1]), milliseconds(p99[1]))


def h2load(server: TritonServer, body: Path, clients: int, seconds: float) -> Figures:
    """Send the same request over gRPC."""
    url = f"http://{server.grpc_url}/inference.GRPCInferenceService/ModelInfer"
    headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    options = ["-t1", f"-c{clients}", "-m1", "-D", f"{seconds:.0f}", "-d", str(body)]
    text = output_of(["h2load", *options, *headers, url])
    done = re.search(r"finished in [\d.]+m?s, ([\d.]+) req/s", text)
    failed = re.search(r"(\d+) failed, (\d+) errored", text)
    mean = re.search(r"time for request:\s+\S+\s+\S+\s+(\S+)", text)
    if done is None or failed is None or mean is None or failed.groups() != ("0", "0"):
        raise SystemExit(f"some requests failed:\n{text}")
    return Figures(float(done[1]), milliseconds(mean[1]))


def grpc_body(model: str) -> bytes:
    """Return a framed RENEW as gRPC sends it."""
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=model)
    request.parameters["session"].string_param = TOKEN
    for name, kind, data in (
        ("CODE", "INT8", struct.pack("b", Operation.RENEW)),
        ("CORRELATION_ID", "UINT64", struct.pack("<Q", 0)),
    ):
        tensor = request.inputs.add(name=name, datatype=kind, shape=[1, 1])
        assert tensor.name == name
        request.raw_input_contents.append(data)
    message = request.SerializeToString()
    return struct.pack(">BI", 0, len(message)) + message


def median(turns: list[Figures], name: str) -> float:
    """Return the median of one figure."""
    return statistics.median(getattr(each, name) for each in turns)


def table(
    title: str, kind: str, models: tuple[str, str], results: dict[tuple[int, str], list[Figures]]
) -> None:
    """Print the figures of both models side by side."""
    other = models[1]
    latency = "p50 / p99 ms" if kind == "wrk" else "mean ms"
    print(f"\n{title}\n")
    print(
        f"| clients | requests/s: manager | {other} | ratio | {latency}: manager | {other} |"
        f" CPU µs a request: manager | {other} | of it the model: manager | {other} |"
    )
    print("|---" * 10 + "|")
    for clients in sorted({clients for clients, _ in results}):
        both = [results[clients, model] for model in models]
        ratio = statistics.median(a.rate / b.rate for a, b in zip(*both, strict=True))
        rates = [f"{median(turns, 'rate'):,.0f}" for turns in both]
        times = [
            f"{median(turns, 'p50'):.2f}"
            + (f" / {median(turns, 'p99'):.2f}" if kind == "wrk" else "")
            for turns in both
        ]
        costs = [f"{median(turns, name):.0f}" for name in ("server", "model") for turns in both]
        print(
            f"| {clients} | {rates[0]} | {rates[1]} | **{ratio:.2f}** | "
            + " | ".join(times + costs)
            + " |",
            flush=True,
        )


def main() -> None:
    """Run all turns and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("--against", choices=[EMPTY, SILENT], default=EMPTY)
    options = parser.parse_args()
    models = (MANAGER, options.against)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with TritonServer(repository(folder, options.against)) as server:
            opened = Request(Operation.OPEN, as_ids([]), {"session": TOKEN, "ttl_ms": 600_000})
            with contextlib.closing(connect(server.grpc_url)) as transport:
                for model in models:
                    if model != EMPTY:
                        transport.call(model, opened, 10.0)
            pids = processes(server, models)
            assert set(pids) == {"server", *models}, pids
            for kind, title in (
                ("wrk", "NEW and DELETE in turns, HTTP (`wrk`)"),
                ("h2load", "RENEW, gRPC (`h2load`)"),
            ):
                results: dict[tuple[int, str], list[Figures]] = {}
                for clients in options.clients:
                    for turn in range(-1, options.rounds):  # the first one warms up
                        for model in models if turn % 2 else models[::-1]:
                            figures = one(
                                kind, server, folder, pids, model, clients, options.seconds
                            )
                            if turn >= 0:
                                results.setdefault((clients, model), []).append(figures)
                    print(".", end="", file=sys.stderr, flush=True)
                table(title, kind, models, results)


def one(
    kind: str,
    server: TritonServer,
    folder: Path,
    pids: dict[str, int],
    model: str,
    clients: int,
    seconds: float,
) -> Figures:
    """Run one turn."""
    file = folder / f"{kind}-{model}"
    if kind == "wrk":
        file.write_text(MIX % model)
        return measured(pids, model, seconds, lambda: wrk(server, file, clients, seconds))
    file.write_bytes(grpc_body(model))
    return measured(pids, model, seconds, lambda: h2load(server, file, clients, seconds))


if __name__ == "__main__":
    main()
