"""A real Triton, many clients, and somebody who breaks one thing after the other.

Clients and manager write histories, and in the end `history.py` judges them. A seed decides what is
broken and when: `python chaos.py --seed N` does the same again, as far as a real machine can.
`make chaos` runs some minutes of it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import tritonclient.http
from chaos_client import IDLE_S, TTL_S
from proxy import Proxy
from servers import Server
from tritonclient.utils import InferenceServerException

from cidalloc.client import Client
from cidalloc.client.sync.transport import connect
from cidalloc.codes import Operation
from cidalloc.conformance import history
from cidalloc.devserver import demo
from cidalloc.errors import CidError, Unavailable
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file_lock import writer_of
from cidalloc.protocol import IDs, Request, as_ids

_HERE = Path(__file__).parent
GRACE_S, COOLDOWN_S = 1.0, 1.0
RULES = history.Rules(TTL_S, GRACE_S, COOLDOWN_S, slack=0.02)
_UNKNOWN = -1
HOARD = 40_000  # more IDs than the file has room for at first
FAULTS = (
    "kill a client",
    "stop a client",
    "kill the stub",
    "stop the stub",
    "kill the server",
    "reload the model",
    "cut the network",
    "slow the network",
    "fill the disk",
)

MANAGER = """
import os
from pathlib import Path
from cidalloc.conformance import recorder
from cidalloc.manager.registry import Registry
recorder.writer = recorder.append_to(Path({file!r}), f"manager{{os.getpid()}}")
recorder.watched(Registry).__enter__()
from cidalloc.triton_model.adapter import TritonPythonModel
"""


@dataclass
class Report:
    """What came of it."""

    wrong: list[str]
    faults: Counter[str]
    seen: Counter[str]
    gap: float
    events: int
    left_out: list[str] = field(default_factory=list)


class Chaos:
    """The server, its clients, and what is done to them."""

    def __init__(self, folder: Path, seed: int, clients: int) -> None:
        self.folder, self.dice = folder, random.Random(seed)
        self.logs, self.state = folder / "logs", folder / "state"
        self.logs.mkdir()
        self.state.mkdir()
        self.faults: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.left_out: list[str] = []
        self._size, self._names = clients, iter(range(1_000_000))
        self._cleanup = contextlib.ExitStack()
        self._hoarded = 0

    def __enter__(self) -> Chaos:
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "cidalloc", str(self.state)],
            capture_output=True,
        ).returncode:
            self.left_out.append("fill the disk")  # that takes a disk of our own
        else:
            command = ["umount", "-l", str(self.state)]
            self._cleanup.callback(subprocess.run, command, check=False)
        models = self.folder / "models"
        settings = Settings(
            first=1,
            capacity=2**20,
            cooldown_ms=int(COOLDOWN_S * 1000),
            unended_cooldown_ms=2_000,
            grace_ms=int(GRACE_S * 1000),
            state=str(self.state),
            fresh=True,
        )
        demo.write_repository(models, settings)
        config = models / demo.MODEL / "config.pbtxt"
        idle = f"idle_microseconds: {int(IDLE_S * 1e6)}"
        text = re.sub(r"idle_microseconds: \d+", idle, config.read_text())
        config.write_text(text)
        self._code = models / "cidmgr" / "1" / "model.py"
        self._code.write_text(MANAGER.format(file=str(self.logs / "manager.jsonl")))
        self._models = models
        self.server = self._serve()
        self.proxy = Proxy(self.server.grpc_port)
        self._cleanup.callback(self.proxy.close)
        self.clients = [self._client() for _ in range(self._size)]
        for each in self.clients:
            assert each.stdout is not None
            each.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.clients:
            each.kill()
            each.communicate()
        self.server.stop()
        self._cleanup.close()

    def _serve(self) -> Server:
        options = ["--model-control-mode=explicit", "--load-model=*"]
        log = self.logs / f"triton{next(self._names)}.log"
        server = Server(self._models, arguments=options, log=log)
        server.start()
        return server

    def _client(self) -> subprocess.Popen[str]:
        file = self.logs / f"client{next(self._names)}.jsonl"
        command = [sys.executable, str(_HERE / "chaos_client.py"), self.proxy.url, str(file)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    # ---- What is broken

    def schedule(self, seconds: float) -> Iterator[tuple[float, str, float]]:
        """Yield when what is broken, and for how long; each fault in its turn, in mixed order."""
        at, bag = 2.0, [""]
        while at < seconds:
            bag.pop()
            if not bag:
                bag = [each for each in FAULTS if each not in self.left_out]
                self.dice.shuffle(bag)
            yield at, bag[-1], self.dice.choice([0.3, 1.0, 3.0, TTL_S, TTL_S + 2.0])
            at += self.dice.uniform(0.5, 2.5)

    def run(self, seconds: float) -> None:
        """Break things for so long, then let all come to rest."""
        began = time.monotonic()
        for at, fault, lasting in list(self.schedule(seconds)):
            time.sleep(max(0.0, began + at - time.monotonic()))
            self._revive()
            print(f"{time.monotonic() - began:6.1f} s: {fault}", flush=True)
            try:
                getattr(self, "_" + fault.replace(" ", "_"))(lasting)
            except (OSError, HTTPException, InferenceServerException):
                self._revive(hangs=True)
            self.faults[fault] += 1
        time.sleep(TTL_S)
        self._revive()
        self._rest()

    def _revive(self, *, hangs: bool = False) -> None:
        """Start Triton anew: 2.51 at times does not outlive that a model's process dies or stops.

        It crashes, or hangs, when that process has a request.
        """
        if hangs or self.server.poll() is not None:
            self.seen["Triton did not outlive it"] += 1
            self._kill_the_server(0.0)

    def _kill_a_client(self, _: float) -> None:
        at = self.dice.randrange(len(self.clients))
        self.clients[at].kill()
        self.clients[at].communicate()
        self.clients[at] = self._client()

    def _stop_a_client(self, seconds: float) -> None:
        self._stop(self.dice.choice(self.clients).pid, 3 * seconds)

    def _kill_the_stub(self, seconds: float) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._stub(), signal.SIGKILL)
        time.sleep(min(seconds, 1.0))
        self._load(unload=True)

    def _stop_the_stub(self, seconds: float) -> None:
        self._stop(self._stub(), seconds)

    def _kill_the_server(self, seconds: float) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.server.pid, signal.SIGKILL)
        self.server.stop()
        time.sleep(min(seconds, 1.0))
        self.server = self._serve()
        self.proxy.target = self.server.grpc_port

    def _reload_the_model(self, _: float) -> None:
        self._code.write_text(self._code.read_text() + "# changed\n")
        self._load()

    def _cut_the_network(self, seconds: float) -> None:
        self.proxy.cut_all()
        threading.Timer(seconds, self.proxy.mend).start()

    def _slow_the_network(self, seconds: float) -> None:
        self.proxy.delay = self.dice.uniform(0.05, 0.6)
        threading.Timer(seconds, self.proxy.mend).start()

    def _fill_the_disk(self, _: float) -> None:
        """With a full disk the pool cannot grow; when there is room again, it can."""
        filler = self.state / "filler"
        self._hoarded = min(self._hoarded + HOARD, 2 * HOARD)
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        try:
            self.seen["on a full disk: " + self._hoard()] += 1
        finally:
            filler.unlink()
        self.seen["with room again: " + self._hoard()] += 1

    def _hoard(self) -> str:
        """Take many IDs and give them back, as soon as the manager answers; return the outcome."""
        token, seq = {"session": os.urandom(16).hex()}, itertools.count(1)
        deadline = time.monotonic() + 20

        def ask(operation: Operation, cids: IDs, **more: Any) -> IDs:
            request = Request(operation, cids, {**token, **more})
            with contextlib.closing(connect(self.server.grpc_url)) as transport:
                return transport.call("cidmgr", request, 5.0)[0]

        while True:
            try:
                ask(Operation.OPEN, as_ids([]), ttl_ms=int(TTL_S * 1000))
                cids = ask(Operation.NEW, as_ids([]), seq=next(seq), count=self._hoarded)
                ask(Operation.DELETE, cids, seq=next(seq), ended=True)
                return "OK"
            except CidError as error:
                if "make room" in str(error):
                    return "FULL"
                if not isinstance(error, Unavailable):
                    return error.code.name
                if time.monotonic() > deadline:
                    raise TimeoutError from None
            self._revive()
            time.sleep(0.1)

    def _stub(self) -> int:
        return writer_of(self.state / "cidmgr.cidalloc")[0] or self.server.pid

    def _stop(self, pid: int, seconds: float) -> None:
        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        with contextlib.suppress(ProcessLookupError):
            if pid != self.server.pid:
                os.kill(pid, signal.SIGSTOP)
                threading.Timer(seconds, go_on).start()

    def _load(self, *, unload: bool = False) -> None:
        triton = tritonclient.http.InferenceServerClient(
            self.server.http_url.removeprefix("http://"), network_timeout=15
        )
        with contextlib.closing(triton):
            if unload:
                triton.unload_model("cidmgr")
                deadline = time.monotonic() + 10
                while triton.is_model_ready("cidmgr") and time.monotonic() < deadline:
                    time.sleep(0.02)
            triton.load_model("cidmgr")

    # ---- How it ends

    def _rest(self) -> None:
        for each in self.clients:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGCONT)
        self.proxy.mend()
        for each in self.clients:
            assert each.stdin is not None
            each.stdin.close()
            each.stdin = None
        for each in self.clients:
            text, _ = each.communicate(timeout=60)
            self.seen.update(json.loads(text.splitlines()[-1]) if text.strip() else {"silent": 1})
        heard = time.monotonic()
        deadline = heard + TTL_S + GRACE_S + 60
        while left := self._left():
            if time.monotonic() > deadline:
                self.seen["leaked"] += left
                return
            if left != _UNKNOWN:
                heard = time.monotonic()
            # The last faults may have been too much for Triton, too.
            self._revive(hangs=time.monotonic() > heard + 20)
            time.sleep(0.1)

    def _left(self) -> int:
        """Return how many sessions and held IDs there still are."""
        with contextlib.suppress(Unavailable), Client(self.server.grpc_url, timeout=5) as cids:
            status = cids.status()
            return int(status["sessions_total"] + status["held"])
        return _UNKNOWN

    def report(self) -> Report:
        """Judge the histories."""
        events = []
        for file in sorted(self.logs.glob("*.jsonl")):
            with file.open() as lines:
                events += history.read(lines)
        wrong = history.check(events, RULES)
        for name, count in self.seen.items():
            if count and (name in ("wrong", "leaked", "silent") or name.startswith("unexpected")):
                wrong.append(f"{name}: {count}")
        return Report(
            wrong, self.faults, self.seen, history.gap(events), len(events), self.left_out
        )


def run(seed: int, seconds: float, clients: int, keep: Path | None = None) -> Report:
    """Do all of it, and return what came of it."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        chaos = Chaos(Path(name), seed, clients)
        with chaos:
            chaos.run(seconds)
        report = chaos.report()
        if keep is not None:
            shutil.copytree(chaos.logs, keep, dirs_exist_ok=True)
    return report


def main(say: Callable[..., None] = print) -> None:
    """Run and report; end with 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--keep", type=Path, help="copy the histories to this folder")
    options = parser.parse_args()
    say(f"seed {options.seed}", flush=True)
    report = run(options.seed, options.seconds, options.clients, options.keep)
    for title, what in (("faults", report.faults), ("clients", report.seen)):
        say(f"{title}: " + ", ".join(f"{count} {name}" for name, count in what.most_common()))
    if report.left_out:
        say("left out, since it cannot be done here: " + ", ".join(report.left_out))
    say(f"nobody could acquire for at most {report.gap:.2f} s")
    say(f"{report.events} lines of history; {len(report.wrong)} wrong")
    for line in report.wrong[:20]:
        say("  " + line)
    sys.exit(1 if report.wrong else 0)


if __name__ == "__main__":
    main()
