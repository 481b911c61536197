"""A fleet in one thread: clients, a manager and a Triton, with virtual time and every fault.

The clients' own decisions and the real service run against each other; what is simulated is the
clock, the network, the processes and the model that keeps state. A seed decides everything, so a
run that fails can be repeated: `python fleet.py SEED`. `make simulate` runs thousands.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import logging
import multiprocessing
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from disk import Disk
from nodes import CLIENTS, DRIFT, IDLE_S, TTL_S, Node, SimSequence
from streams import SimStream
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

GRACE_S, COOLDOWN_S = 2.0, 2.0
RULES = history.Rules(TTL_S, GRACE_S, COOLDOWN_S, slack=0.01 + 2 * DRIFT * (TTL_S + GRACE_S))
LENGTH_S = 90.0
FAULTS = ["freeze", "freeze all", "kill", "cut", "cut all", "manager", "stop", "slow", "moved"]
PROVOKED = ["freeze", "freeze", "freeze", "kill", "cut", "manager", "moved"]  # just before END
DRAINS = 0.2  # of the fleets that are drained once for a while
POWER = 0.2  # of the fleets in which the manager's machine loses it once
WINDOW_S, WITHIN_S = 12.0, 5.0  # for the END of the dead, and after DEAD was sent
LONG_S = 38.0, 34.0  # the same in half of the fleets with a power cut: longer than a session lives
_LIVELOCK = 5_000  # steps without time
SETTINGS: dict[str, int] = {
    "first": 1,
    "capacity": 40,
    "cooldown_ms": int(COOLDOWN_S * 1000),
    "unended_cooldown_ms": 9_000,
    "grace_ms": int(GRACE_S * 1000),
    "fresh": True,
}


_STRANGER = "5" * 32
_OPEN = protocol.Request(Operation.OPEN, parameters={"session": _STRANGER, "ttl_ms": 600_000})
_NOWHERE = Recorder("nowhere", lambda _: None, float)  # of what is not judged


class Fleet:
    """The whole of it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.dice = random.Random(seed)
        self.fate = random.Random(seed + 10**6)  # of what happens to the machine of the manager
        self.operator = random.Random(seed + 2 * 10**6)
        self.now = 1000.0
        self.log: list[history.Event] = []
        self.counts: Counter[str] = Counter()
        self.numbers = itertools.count(1)
        self.wrong: list[str] = []
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        # What the model keeps until END, by ID; Triton itself forgets a sequence after IDLE_S.
        self._state: dict[int, tuple[SimSequence, float]] = {}
        self.named: set[int] = set()  # what askers of DEAD got to know
        self._triton = Recorder("triton", self.log.append, lambda: self.now)
        self._slow_until = self._stopped_until = self._moved_until = 0.0
        self._settings = Settings(state=str(folder), **SETTINGS)  # type: ignore[arg-type]
        self._service: Service | None = None
        self._processes = itertools.count(1)
        self._booted = 0.0
        self._drained = False
        self._power = self.fate.random() < POWER
        self.window, self.within = WINDOW_S, WITHIN_S
        if self._power and self.fate.random() < 0.5:
            self.window, self.within = LONG_S
        recorder.booted = 0.0
        self.begin_manager()
        # Another server, which sometimes has the address; a session of a stranger is all it allows.
        self._other = Service(Settings(max_sessions=1, **SETTINGS), self.boottime)  # type: ignore[arg-type]
        self.manage(_OPEN, here=False)
        self.disk = Disk(folder / f"{protocol.MODEL}.cidalloc", self.fate)
        self.nodes = [Node(self, f"client{n}") for n in range(CLIENTS)]

    def at(self, when: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._queue, (when, next(self._order), what))

    def run(self) -> list[str]:
        """Run to the end and return what is wrong."""
        until = self.now + LENGTH_S
        self.at(self.now + 5.0, self.trouble)
        self.at(self.now + 5.0, self.theft)
        if self._power and self.within == WITHIN_S:
            self.at(self.now + self.fate.uniform(10.0, 35.0), self.power)
        elif self._power:  # once END is about to be sent
            self.at(self.now + 6.0, lambda: self.harm(self.nodes[0], "kill", 0.0))
        if self.operator.random() < DRAINS:
            self.at(self.now + self.operator.uniform(5.0, 50.0), self.drain)
        steps = 0
        while self._queue and self._queue[0][0] < until:
            then, (self.now, _, what) = self.now, heapq.heappop(self._queue)
            what()
            steps = steps + 1 if self.now == then else 0
            if steps > _LIVELOCK:
                return [f"it stands still at {self.now:.3f}"]
        self.crash_manager()
        return history.check(self.log, RULES) + self.wrong

    # ---- The manager

    def begin_manager(self) -> None:
        if self._service is None:
            name = f"manager{next(self._processes)}"
            recorder.writer = Recorder(name, self.log.append, lambda: self.now)
            try:
                self._service = Service(self._settings, self.boottime)
            except CidError as error:
                self.wrong.append(f"C: the manager cannot start again: {error}")

    def boottime(self) -> int:
        return int((self.now - self._booted) * 1000)

    def crash_manager(self) -> None:
        if self._service is not None:
            store = self._service._holder.registry().store
            store._signed = False  # as if killed: nothing is written any more
            self.end_manager()

    def end_manager(self) -> None:
        if self._service is not None:
            self._service.close()
            self._service = None

    @property
    def here(self) -> bool:
        """Whether the address leads to the server, and not to another one."""
        return self.now >= self._moved_until

    def manage(self, request: protocol.Request, here: bool | None = None) -> Reply:
        """Answer a request to the manager ``here``, on the server, or to that of another one."""
        here = self.here if here is None else here
        service = self._service if here else self._other
        if service is None or (here and self.now < self._stopped_until):
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
        if here and self._drained and request.operation in (Operation.NEW, Operation.OPEN):
            self.wrong.append(f"D: {request.operation.name} in a drain at {self.now:.3f}")
        return Reply(answer[0][0], answer[1])

    # ---- The model

    def triton(self, core: SimSequence, flags: dict[str, Any]) -> Any:
        if not self.here:
            return Unavailable("another server, which has no such model")
        cid = flags["sequence_id"]
        owner, last = self._state.get(cid, (None, 0.0))
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
            self._state.pop(cid, None)
        else:
            self._state[cid] = owner, self.now
        self.counts["inferences"] += 1
        return Reply()

    def end_dead(self, asker: str, cid: int, here: bool) -> None:
        """Take START and END in one request, by which an asker ends a sequence of the dead."""
        self.counts["END for the dead"] += 1
        if not here:  # where somebody else has this ID
            self.wrong.append(f"U: END of {asker} for ID {cid} at another server, {self.now:.3f}")
            return
        self._triton.note("end_dead", cids=[cid], asker=asker)
        owner, last = self._state.pop(cid, (None, 0.0))
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

        def arrive(answer: bool) -> None:
            if self.now < node.cut_until:
                return
            result = deliver()
            if answer and self.dice.random() >= lost:
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
        return 0.1 if self.now < self._slow_until else 0.005

    def delay(self) -> float:
        if self.now < self._slow_until:
            return self.dice.uniform(0, 1.9)
        return self.dice.uniform(0.001, 0.02)

    # ---- The nemesis

    def trouble(self) -> None:
        """One fault, and the next one later."""
        dice = self.dice
        node, fault = dice.choice(self.nodes), dice.choice(FAULTS)
        seconds = dice.choice([0.3, 3.0, TTL_S, TTL_S + GRACE_S, 2 * TTL_S])
        self.harm(node, fault, seconds * dice.uniform(0.5, 1.5))
        self.at(self.now + dice.uniform(1.0, 12.0), self.trouble)

    def provoke(self, node: Node, stream: SimStream) -> None:
        """Maybe do something while an asker holds an answer, just before it sends END."""
        dice = self.dice
        left = stream.closes - self.now - dice.uniform(0, 0.2)  # END comes at the last moment
        if self._power and self.within != WITHIN_S:
            self._power = False
            self.at(self.now + dice.uniform(0, 0.3), self.power)
            self.harm(node, "freeze", left)
        elif dice.random() < 0.08:
            self.counts["provoked"] += 1
            seconds = dice.choice([left, left, left, dice.uniform(0, 2) * (self.window + TTL_S)])
            self.harm(node, dice.choice(PROVOKED), seconds)

    def harm(self, node: Node, fault: str, seconds: float) -> None:
        """Begin a fault, which is over after so many seconds."""
        self.counts[fault] += 1
        until = self.now + seconds
        if fault == "kill":
            node.alive = False
            name = f"{node.name.split('.')[0]}.{next(self.numbers)}"
            self.nodes[self.nodes.index(node)] = Node(self, name)
        elif fault == "manager":
            self.dice.choice([self.crash_manager, self.end_manager])()
            self.at(self.now + self.dice.choice([0.1, seconds / 2]), self.begin_manager)
        elif fault == "stop":  # of its process, which goes on later
            self._stopped_until = until
        elif fault == "moved":
            self._moved_until = until
        elif fault == "slow":
            self._slow_until = until
        else:
            for each in self.nodes if fault.endswith(" all") else [node]:
                if fault.startswith("freeze"):
                    each.frozen_until = until
                else:
                    each.cut_until = until

    def power(self) -> None:
        """Cut the power of the manager's machine, whose clock begins anew. The model's goes on."""
        self.crash_manager()
        self.disk.cut()
        assert recorder.writer is not None
        recorder.writer.note("power")
        self._booted = recorder.booted = self.now
        self._drained = False
        self.at(self.now + self.fate.uniform(0.1, 3.0), self.begin_manager)

    def boot_id(self) -> bytes:
        return int(self._booted * 1e6).to_bytes(16, "little")

    def drain(self) -> None:
        """Somebody drains the server, and changes his mind after a while."""
        if self._service is None:
            self.at(self.now + 0.5, self.drain)
            return
        switch = DrainSwitch(self.disk.path)
        switch.set(True)
        self._drained = True
        self.counts["drain"] += 1

        def undo() -> None:
            self._drained = False
            switch.set(False)
            switch.close()

        self.at(self.now + self.operator.uniform(1.0, 20.0), undo)

    def theft(self) -> None:
        """Somebody tries to give back what is another's: by a session of its own, and without."""
        stolen = protocol.as_ids([self.dice.randint(1, SETTINGS["capacity"])])
        self.manage(_OPEN)
        own = {"session": _STRANGER, "seq": next(self.numbers), "cooldown_ms": 0}
        for parameters in (own, {"cooldown_ms": 0}):
            reply = self.manage(protocol.Request(Operation.DELETE, stolen, parameters))
            self.counts["thefts"] += reply.error is None or reply.error.answered
        self.at(self.now + self.dice.uniform(0.5, 2.0), self.theft)


@contextmanager
def scaled(window_s: float, within_s: float) -> Iterator[None]:
    """Shorten the times of END for the dead."""
    window, within = int(window_s * 1000), int(within_s * 1000)
    # The last share comes late, so that IDs are also named at the end of the window.
    shares = np.array([0, 0.4, 0.95]) * (window - within)
    with (
        patch.object(registry, "DEAD_WINDOW_MS", window),
        patch.multiple(dead_ids, DEAD_WINDOW_MS=window, END_WITHIN_MS=within, _ASKS_MS=within),
        patch.object(dead_ids, "_SHARES_AT_MS", shares),
        patch.multiple(tidy, END_WITHIN_MS=within, _ROUND_S=(0.5, 1.5), _PAUSE_S=2.0),
    ):
        yield


def simulate(seed: int, keep: Path | None = None) -> tuple[list[str], Counter[str]]:
    """Run one fleet; return what is wrong, and what happened."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        with recorder.watched(Registry), patch.object(handover, "boot_id") as boot_id:
            boot_id.return_value = bytes(16)
            fleet = Fleet(seed, Path(name))
            boot_id.side_effect = fleet.boot_id
            with patch.object(os, "fsync", fleet.disk.sync), scaled(fleet.window, fleet.within):
                wrong = fleet.run()
    if keep is not None:
        keep.write_text("".join(json.dumps(each) + "\n" for each in fleet.log))
    return wrong, fleet.counts + history.counts(fleet.log)


def main() -> None:
    """Run many; end with 1 at the first that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="write the history of one run to this file")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    total: Counter[str] = Counter()
    seeds = range(options.seed, options.seed + options.runs)
    with multiprocessing.Pool(min(len(os.sched_getaffinity(0)), len(seeds))) as pool:
        results = pool.imap(partial(simulate, keep=options.keep), seeds, 10)
        for seed, (wrong, counts) in zip(seeds, results, strict=True):
            total += counts
            if wrong:
                first = {each[0]: each for each in reversed(wrong)}  # by rule
                print(f"seed {seed}: {len(wrong)} wrong", *first.values(), sep="\n  ")
                sys.exit(1)
    if options.runs > 10 and total["dead ended"] <= total["dead stayed"]:
        print(f"{options.runs} runs, but wrong: most of what the dead left has stayed: {total}")
        sys.exit(1)
    print(f"{options.runs} runs, nothing wrong:", dict(total.most_common()))


if __name__ == "__main__":
    main()
