"""A fleet in one thread: clients, a manager and a Triton, with virtual time and every fault.

The clients' own decisions and the real service run against each other; what is simulated is the
clock, the network, the processes and the model that keeps state. A seed decides everything, so a
run that fails can be repeated: `python simulate.py SEED`.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from disk import Disk
from nemesis import CAPACITY, GRACE_S, Nemesis, opening
from nodes import CLIENTS, DRIFT, IDLE_S, TTL_S, Node, SimSequence
from progress import CALM_S, Progress
from sometimes import reached, sometimes
from tritonclient.utils import InferenceServerException

from cidalloc import protocol
from cidalloc.client.core import tidy
from cidalloc.client.core.effects import Reply
from cidalloc.codes import Operation
from cidalloc.conformance import history, recorder
from cidalloc.conformance.recorder import Recorder
from cidalloc.errors import CidError, Draining, Unavailable
from cidalloc.manager import dead_ids, registry
from cidalloc.manager import takeover as handover
from cidalloc.manager.registry import Registry
from cidalloc.manager.service import Service
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.drain import DrainSwitch
from cidalloc.manager.takeover import OWNER_POLL_S, WAITING_POLL_S

COOLDOWN_S = 2.0
RULES = history.Rules(TTL_S, GRACE_S, COOLDOWN_S, slack=0.01 + 2 * DRIFT * (TTL_S + GRACE_S))
LENGTH_S = 90.0  # until all faults are over
_LIVELOCK = 5_000  # steps without time
SETTINGS: dict[str, int] = {
    "first": 1,
    "capacity": 40,
    "cooldown_ms": int(COOLDOWN_S * 1000),
    "unended_cooldown_ms": 9_000,
    "grace_ms": int(GRACE_S * 1000),
    "fresh": True,
}


_NOWHERE = Recorder("nowhere", lambda _: None, float)  # of what is not judged


class Fleet:
    """The whole of it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.dice = random.Random(seed)
        self.now = 1000.0
        self.log: list[history.Event] = []
        self.counts: Counter[str] = Counter()
        self.numbers = itertools.count(1)
        self.wrong: list[str] = []
        self.nemesis = Nemesis(self, seed)
        self.fate = self.nemesis.fate
        self.progress = Progress(self)
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        # What the model keeps until END, by ID; Triton itself forgets a sequence after IDLE_S.
        self.state: dict[int, tuple[SimSequence, float]] = {}
        self.expired: dict[int, float] = {}  # when sessions did
        self.named: set[int] = set()  # what askers of DEAD got to know
        self._triton = Recorder("triton", self.write, lambda: self.now)
        self.slow_until = self.stopped_until = self.moved_until = 0.0
        self.calm = False  # no fault happens any more but one that stays
        capacity = CAPACITY.get(self.nemesis.lasting, SETTINGS["capacity"])
        values = SETTINGS | {"capacity": capacity}
        self._settings = Settings(state=str(folder), **values)  # type: ignore[arg-type]
        self._service: Service | None = None
        self._olds: list[Service] = []  # processes that the present one has replaced
        self._processes = itertools.count(1)
        self.booted = 0.0
        self.drained = False
        self._switch: DrainSwitch | None = None
        recorder.booted = 0.0
        self.begin_manager()
        # Another server, which sometimes has the address; a session of a stranger is all it allows.
        self._other = Service(Settings(max_sessions=1, **SETTINGS), self.boottime)  # type: ignore[arg-type]
        self.manage(opening(600.0), here=False)
        self.disk = Disk(folder / f"{protocol.MODEL}.cidalloc", self.fate)
        self.nodes = [Node(self, f"client{n}") for n in range(CLIENTS)]

    def at(self, when: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._queue, (when, next(self._order), what))

    def run(self) -> list[str]:
        """Run to the end and return what is wrong."""
        until = self.now + LENGTH_S
        self.nemesis.begin()
        if self.nemesis.calms:
            self.at(until, self.progress.begin)
            until += CALM_S
        steps = 0
        while self._queue and self._queue[0][0] < until:
            then, (self.now, _, what) = self.now, heapq.heappop(self._queue)
            what()
            steps = steps + 1 if self.now == then else 0
            if steps > _LIVELOCK:
                return [f"it stands still at {self.now:.3f}"]
        self.drain(False)
        self.crash_manager()
        return history.check(self.log, RULES) + self.wrong

    # ---- The manager

    def begin_manager(self) -> None:
        if self._service is None:
            self._service = self._new_manager()

    def _new_manager(self) -> Service | None:
        name = f"manager{next(self._processes)}"
        recorder.writer = Recorder(name, self.write, lambda: self.now)
        try:
            return Service(self._settings, self.boottime)
        except CidError as error:
            self.wrong.append(f"C: the manager cannot start again: {error}")
            return None

    def replace_manager(self) -> None:
        """Start another process on the manager's file, as a reload of its model does.

        Triton sends all requests to the new one. It ends the one before later.
        """
        old = self._service
        if old is None:
            return
        sometimes("two processes wait for the file", old._holder.waits)
        new = self._new_manager()
        if new is None:
            return
        self._service = new
        self._olds.append(old)
        self.counts["takeover"] += 1
        done = self.progress.expects("takeover")

        def poll(service: Service, every: float) -> None:
            if service not in (self._service, *self._olds):
                done()  # it was killed, or is the one before
                return
            waited = service._holder.waits
            if self.now >= self.stopped_until:
                service.poll()
            if service is not new or service._holder.waits:
                self.at(self.now + every, lambda: poll(service, every))
            elif waited:
                done()
                if service._holder._registry is None:
                    trouble = service._holder._trouble
                    self.wrong.append(f"C: the new process cannot have the file: {trouble}")
            if waited and service is self._service and not service._holder.waits:
                asking = any(node.asking and node.alive for node in self.nodes)
                sometimes("takeover under load", asking and self.held())

        self.at(self.now + OWNER_POLL_S, lambda: poll(old, OWNER_POLL_S))
        self.at(self.now + WAITING_POLL_S, lambda: poll(new, WAITING_POLL_S))
        self.at(self.now + 5.0, lambda: self._end_old(old))

    def _end_old(self, old: Service) -> None:
        if old in self._olds:
            self._olds.remove(old)
            old.close()

    @property
    def runs(self) -> bool:
        """Whether a process of the manager has the file."""
        return any(each._holder._registry for each in (self._service, *self._olds) if each)

    def held(self) -> int:
        """Return how many IDs clients hold that get answers."""
        registry = self._service and self._service._holder._registry
        if registry is None:
            return 0
        mine = {node.client.session.lease.generation for node in self.nodes if not node.deaf}
        sessions = [each for each in registry.sessions if each.generation in mine]
        return sum(registry.pool.held_count(each.number) for each in sessions)

    def crowded(self) -> bool:
        """Whether sessions wait for IDs at the manager."""
        registry = self._service and self._service._holder._registry
        return registry is not None and registry.waiting.any(self.boottime())

    def write(self, event: history.Event) -> None:
        """Add what a process did to the history."""
        self.log.append(event)
        if event.get("why") == "expired":
            self.expired[event["session"]] = self.now

    def boottime(self) -> int:
        return int((self.now - self.booted) * 1000)

    def boot_id(self) -> bytes:
        return int(self.booted * 1e6).to_bytes(16, "little")

    def crash_manager(self) -> None:
        for each in (self._service, *self._olds):
            if each is not None and each._holder._registry is not None:
                # As if killed: nothing is written any more.
                each._holder._registry.store._signed = False
        self.end_manager()

    def end_manager(self) -> None:
        for each in (self._service, *self._olds):
            if each is not None:
                each.close()
        self._service = None
        self._olds.clear()

    def drain(self, on: bool) -> None:
        """Drain the server, or end that."""
        self.drained = on
        if on and self._switch is None:
            self.counts["drain"] += 1
            self._switch = DrainSwitch(self.disk.path)
            self._switch.set(True)
        elif not on and self._switch is not None:
            self._switch.set(False)
            self._switch.close()
            self._switch = None

    @property
    def here(self) -> bool:
        """Whether the address leads to the server, and not to another one."""
        return self.now >= self.moved_until

    def manage(
        self, request: protocol.Request, here: bool | None = None, client: str = ""
    ) -> Reply:
        """Answer a request to the manager ``here``, on the server, or to that of another one."""
        if client and self.nemesis.refuses(client, request.operation):
            return Reply(error=Unavailable("too many requests"))
        here = self.here if here is None else here
        service = self._service if here else self._other
        if service is None or (here and self.now < self.stopped_until):
            return Reply(error=Unavailable("nobody listens"))
        if here and self.fate.random() < 0.05:
            self.disk.note()
        tensors = request.encode()
        with ExitStack() as unnoted:
            if not here:
                unnoted.enter_context(patch.object(recorder, "writer", _NOWHERE))
            answer = service.answer(
                tensors[protocol.CODE],
                tensors[protocol.CORRELATION_ID],
                json.dumps(dict(request.parameters)),
            )
        if isinstance(answer, CidError):
            self.counts["refused"] += isinstance(answer, Draining)
            return Reply(error=protocol.parse_error(protocol.error_text(answer)))
        if here and request.operation is Operation.DEAD:
            sometimes("no room for the dead", service._holder.registry().dead._full)
        if here and self.drained and request.operation in (Operation.NEW, Operation.OPEN):
            self.wrong.append(f"D: {request.operation.name} in a drain at {self.now:.3f}")
        return Reply(answer[0][0], answer[1])

    # ---- The model

    def triton(self, core: SimSequence, flags: dict[str, Any]) -> Any:
        if not self.here:
            return Unavailable("another server, which has no such model")
        cid = flags["sequence_id"]
        owner, last = self.state.get(cid, (None, 0.0))
        known = owner is not None and self.now <= last + IDLE_S
        if flags.get("sequence_start"):
            if owner is not None and owner is not core and owner.dead:
                self.counts["dead stayed" if cid in self.named else "dead not named"] += 1
            self.named.discard(cid)
            owner = core
        elif not known or owner is None:
            return InferenceServerException("the first request must specify the START flag")
        elif owner is not core:
            self.wrong.append(
                f"U: {core.holder} met the state of {owner.holder} in ID {cid} at {self.now:.3f}"
            )
        if flags.get("sequence_end"):
            self.state.pop(cid, None)
        else:
            self.state[cid] = owner, self.now
        self.counts["inferences"] += 1
        return Reply()

    def end_dead(self, asker: str, cid: int, here: bool) -> None:
        """Take START and END in one request, by which an asker ends a sequence of the dead."""
        self.counts["END for the dead"] += 1
        if not here:  # where somebody else has this ID
            self.wrong.append(f"U: END of {asker} for ID {cid} at another server, {self.now:.3f}")
            return
        self._triton.note("end_dead", cids=[cid], asker=asker)
        owner, last = self.state.pop(cid, (None, 0.0))
        if owner is not None:
            self.counts["dead ended"] += owner.dead
            if self.now <= last + IDLE_S:
                self.wrong.append(
                    f"U: END of {asker} met the state of {owner.holder} in ID {cid}"
                    f" at {self.now:.3f}"
                )

    # ---- The network

    def carry(
        self,
        node: Node,
        deliver: Callable[[], Any],
        back: Callable[[Any], None],
        most: float = 30.0,
    ) -> None:
        """Carry a message there and its answer back, or lose one, or bring it twice."""
        calm = self.calm

        def arrive(answer: bool) -> None:
            if self.now < node.cut_until or (self.calm and not (calm and answer)):
                return  # of what is late nothing arrives in the calm
            result = deliver()
            sometimes("a client without answers", node.deaf)
            if answer and self.dice.random() >= lost and not node.deaf:
                self.at(self.now + self.delay(), lambda: back(result))

        lost = self.lost
        if self.now < node.cut_until:
            return
        once = self.dice.random() >= lost
        if once:
            self.at(self.now + min(self.delay(), most), lambda: arrive(True))
        if self.dice.random() < (lost if once else 0.5):
            self.counts["late or twice"] += 1
            # After END was answered a packet may be late, but not by more than the least cooldown.
            late = min(most, 0.9 * COOLDOWN_S) if once and most < 30 else most
            self.at(self.now + self.dice.uniform(0, late), lambda: arrive(False))

    @property
    def lost(self) -> float:
        """The part of the messages that is lost."""
        if self.calm:
            return 0.0
        return 0.1 if self.now < self.slow_until else 0.005

    def delay(self) -> float:
        if self.now < self.slow_until:
            return self.dice.uniform(0, 1.9)
        return self.dice.uniform(0.001, 0.02)


@contextmanager
def scaled(nemesis: Nemesis) -> Iterator[None]:
    """Shorten the times of END for the dead, and maybe the list of their IDs."""
    window, within = int(nemesis.window * 1000), int(nemesis.within * 1000)
    # The last share comes late, so that IDs are also named at the end of the window.
    shares = np.array([0, 0.4, 0.95]) * (window - within)
    with (
        patch.object(registry, "DEAD_WINDOW_MS", window),
        patch.multiple(dead_ids, DEAD_WINDOW_MS=window, END_WITHIN_MS=within, _ASKS_MS=within),
        patch.multiple(dead_ids, _SHARES_AT_MS=shares, _MOST=nemesis.dead_ids),
        patch.multiple(tidy, END_WITHIN_MS=within, _ROUND_S=(0.5, 1.5), _PAUSE_S=2.0),
    ):
        yield


def simulate(seed: int, keep: Path | None = None) -> tuple[list[str], Counter[str], Counter[str]]:
    """Run one fleet; return what is wrong, what happened, and which rare states were reached."""
    reached.clear()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        with recorder.watched(Registry), patch.object(handover, "boot_id") as boot_id:
            boot_id.return_value = bytes(16)
            fleet = Fleet(seed, Path(name))
            boot_id.side_effect = fleet.boot_id
            with (
                patch.multiple(os, fsync=fleet.disk.sync, posix_fallocate=fleet.disk.allocate),
                scaled(fleet.nemesis),
            ):
                wrong = fleet.run()
    if keep is not None:
        keep.write_text("".join(json.dumps(each) + "\n" for each in fleet.log))
    return wrong, fleet.counts + history.counts(fleet.log), Counter({*reached})
