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
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import history
import recorder
from disk import Disk
from recorder import Recorder
from tritonclient.utils import InferenceServerException

from cidalloc import protocol
from cidalloc.client.core.client import Base
from cidalloc.client.core.effects import Config, Idle, Reply, Send
from cidalloc.client.core.lease import Acquired
from cidalloc.client.core.plan import Plan
from cidalloc.client.core.sequence import SequenceCore
from cidalloc.client.core.tensors import Library
from cidalloc.codes import Operation
from cidalloc.errors import CidError, Draining, Unavailable
from cidalloc.manager import takeover as handover
from cidalloc.manager.registry import Registry
from cidalloc.manager.service import Service
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.drain import DrainSwitch

TTL_S, GRACE_S, COOLDOWN_S = 10.0, 2.0, 2.0
IDLE_S, LIMIT_S = 4.0, 3.0  # of the model, and of a request to it
WAIT_S = 5.0  # for which half of the clients wait for an ID
DRIFT = 0.003
RULES = history.Rules(TTL_S, GRACE_S, COOLDOWN_S, slack=0.01 + 2 * DRIFT * (TTL_S + GRACE_S))
CLIENTS, TALKERS = 4, 3
LENGTH_S = 75.0
FAULTS = ["freeze", "freeze all", "kill", "cut", "cut all", "manager", "slow"]
DRAINS = 0.2  # of the fleets that are drained once for a while
POWER = 0.2  # of the fleets in which the manager's machine loses it once
_LIVELOCK = 5_000  # steps without time
SETTINGS: dict[str, int] = {
    "first": 1,
    "capacity": 40,
    "cooldown_ms": int(COOLDOWN_S * 1000),
    "unended_cooldown_ms": 9_000,
    "grace_ms": int(GRACE_S * 1000),
    "fresh": True,
}


@dataclass
class Infer:
    """A request to the model, as part of a sequence."""

    core: SimSequence
    flags: dict[str, Any]


class SimSequence(SequenceCore):
    """A sequence whose requests are simulated."""

    def __init__(self, client: SimClient, plan: Plan, holder: str) -> None:
        super().__init__(client, plan, False, None)  # type: ignore[arg-type]
        self.cid = plan.cid
        self.holder = holder


class SimClient(Base):
    """A client's decisions, without its ways to wait; it is its own runner."""

    _new_runner = staticmethod(lambda *_: None)

    def __init__(self, rng: random.Random, now: Callable[[], float]) -> None:
        self.transport: Any = SimpleNamespace(
            url="simulated", library=Library(object, object, frozenset()), now=now, broke=bool
        )
        super().__init__(
            model="cidmgr", ttl=TTL_S, label="simulated", timeout=2.0, transport=self.transport
        )
        self.sequences: dict[SequenceCore, None] = {}
        self._rng = self._session.link.rng = rng  # type: ignore[assignment]
        self.session = self._session
        self.lock = nullcontext()
        self.now = now

    def wake(self) -> None:
        """The heartbeat looks after each step anyway."""

    def __del__(self) -> None:
        """What a killed process leaves is no oversight of its program."""


Task = Generator[Any, Any, None]
_ANSWER = SimpleNamespace(get_response=dict)  # of the model; it does not say its version


class Node:
    """A client process."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        dice = fleet.dice
        self.fleet, self.name = fleet, name
        self.alive = True
        self.frozen_until = self.cut_until = 0.0
        self._offset, self._rate = dice.uniform(0, 1e6), 1 + dice.uniform(-DRIFT, DRIFT)
        self.client = SimClient(random.Random(dice.getrandbits(64)), self.clock)
        self.recorder = Recorder(name, fleet.log.append, lambda: fleet.now)
        self.waiting: dict[Callable[[Reply], None], None] = {}  # in order
        self._keeping = False
        for _ in range(TALKERS):
            self.run(self.talker())

    def clock(self) -> float:
        return self._offset + self.fleet.now * self._rate

    def real(self, local: float) -> float:
        return (local - self._offset) / self._rate + 1e-6  # not before it, however it is rounded

    def run(self, task: Task) -> None:
        self.resume(task, None)

    def resume(self, task: Task, result: Any) -> None:
        """Run one step of a task, as soon as the process runs at all."""
        if not self.alive:
            return
        if self.fleet.now < self.frozen_until:
            self.fleet.at(self.frozen_until, lambda: self.resume(task, result))
            return
        session = self.client.session
        seen = session.version
        try:
            if isinstance(result, BaseException):
                effect = task.throw(result)
            else:
                effect = next(task) if result is None else task.send(result)
        except StopIteration:
            return
        finally:
            if not self._keeping and session.lease.opened:
                self._keeping = True
                self.fleet.at(self.fleet.now, lambda: self.run(session.heartbeat()))
            if session.version != seen or session.lease.cache.needs_maintenance:
                session.lease.cache.needs_maintenance = False
                waiting, self.waiting = self.waiting, {}
                for wake in waiting:
                    wake(Reply())
        self.perform(effect, self.once(task))

    def once(self, task: Task) -> Callable[[Any], None]:
        """Return what resumes the task, the first time that it is called."""
        done = False

        def go(result: Any) -> None:
            nonlocal done
            if not done:
                done = True
                self.waiting.pop(go, None)
                self.fleet.at(self.fleet.now, lambda: self.resume(task, result))

        return go

    def perform(self, effect: Any, resume: Callable[[Any], None]) -> None:
        if isinstance(effect, Idle):
            self.waiting[resume] = None
            if effect.until < float("inf"):
                self.fleet.at(max(self.real(effect.until), self.fleet.now), lambda: resume(Reply()))
        elif isinstance(effect, Config):
            idle = int(IDLE_S * 1e6)
            config = {"name": "model", "sequence_batching": {}}
            config["sequence_batching"] = {"max_sequence_idle_microseconds": idle}
            resume(Reply(config=config))
        elif isinstance(effect, Send):
            self.send(effect, resume)
        else:
            self.infer(effect, resume)

    def send(self, effect: Send, resume: Callable[[Any], None]) -> None:
        """Send a request to the manager, and note it."""
        fleet, lease = self.fleet, self.client.session.lease
        request, more = effect.request, {}
        if request.operation.name == "OPEN":
            more["first"] = self.real(lease.first_sent)
        number = self.recorder.invoke("message", operation=request.operation.name, **more)
        renews = "session" in request.parameters

        def answered(reply: Reply) -> None:
            if reply.error is None and renews and not lease.lost_why and self.alive:
                fields = request.operation.name == "OPEN"
                generation = reply.output.tolist()[1] if fields else lease.generation
                self.recorder.done(number, session=generation)
            resume(reply)

        fleet.carry(self, lambda: fleet.manage(request), answered)
        timeout = Reply(error=Unavailable("no answer"))
        fleet.at(fleet.now + effect.timeout, lambda: resume(timeout))

    def infer(self, effect: Infer, resume: Callable[[Any], None]) -> None:
        """Send a request to the model, and note it."""
        fleet, core = self.fleet, effect.core
        number = self.recorder.invoke(
            "use", cid=core.cid, holder=core.holder, session=self.client.session.lease.generation
        )

        def answered(result: Any) -> None:
            if self.alive:
                self.recorder.done(number, "fail" if isinstance(result, Exception) else "ok")
                resume(result)

        fleet.carry(self, lambda: fleet.triton(core, effect.flags), answered, LIMIT_S)
        timeout = Unavailable("no answer")
        fleet.at(fleet.now + LIMIT_S + 5.0, lambda: resume(timeout))

    def talker(self) -> Task:
        """The application: one sequence after the other."""
        dice, client = self.fleet.dice, self.client
        wait = WAIT_S if self.name[len("client")] in "13" else None
        while True:
            began = self.clock()
            try:
                plan = yield from client._begin_sequence(
                    "model", LIMIT_S, None, True, Acquired(), wait
                )
                self.fleet.counts["waited"] += self.clock() > began + 0.5
            except CidError:
                yield from self.pause(dice.uniform(0.1, 2.0))
                continue
            holder = f"{self.name}.{next(self.fleet.numbers)}"
            core = SimSequence(client, plan, holder)
            self.recorder.note(
                "hold",
                cid=core.cid,
                holder=holder,
                session=client.session.lease.generation,
                need=IDLE_S + LIMIT_S,
            )
            self.fleet.counts["sequences"] += 1
            yield from self.converse(core, dice.randint(1, 8))
            core.finish()
            yield from self.pause(dice.expovariate(4))

    def converse(self, core: SimSequence, length: int) -> Task:
        dice = self.fleet.dice
        for step in range(length):
            end = step == length - 1 and dice.random() < 0.8
            request = core.request([], end, {})
            try:
                assert core.enter(request), "one request after the other"
            except CidError:
                return
            error: BaseException | None = None
            try:
                yield Infer(core, request.options)
            except Exception as caught:
                error = caught
            core.over(request, _ANSWER, error)
            if error is not None and dice.random() < 0.7:
                return
            if core.state.recycled:
                self.recorder.note("ended", holder=core.holder)
            yield from self.pause(dice.choice([0.0, 0.05, 0.5, dice.uniform(0, 4.5)]))

    def pause(self, seconds: float) -> Task:
        until = self.clock() + seconds
        while self.clock() < until:
            yield Idle(until)


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
        self._state: dict[int, tuple[str, float]] = {}  # of the model, by ID
        self._slow_until = 0.0
        self._settings = Settings(state=str(folder), **SETTINGS)  # type: ignore[arg-type]
        self._service: Service | None = None
        self._processes = itertools.count(1)
        self._booted = 0.0
        self._drained = False
        recorder.booted = 0.0
        self.begin_manager()
        self.disk = Disk(folder / f"{protocol.MODEL}.cidalloc", self.fate)
        self.nodes = [Node(self, f"client{n}") for n in range(CLIENTS)]

    def at(self, when: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._queue, (when, next(self._order), what))

    def run(self) -> list[str]:
        """Run to the end and return what is wrong."""
        until = self.now + LENGTH_S
        self.at(self.now + 5.0, self.trouble)
        self.at(self.now + 5.0, self.theft)
        if self.fate.random() < POWER:
            self.at(self.now + self.fate.uniform(10.0, 35.0), self.power)
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
            store.close()
            self._service = None

    def manage(self, request: protocol.Request) -> Reply:
        if self._service is None:
            return Reply(error=Unavailable("nobody listens"))
        if self.fate.random() < 0.05:
            self.disk.note()
        tensors = request.encode()
        answer = self._service.answer(
            tensors[protocol.CODE],
            tensors[protocol.CORRELATION_ID],
            json.dumps(dict(request.parameters)),
        )
        if isinstance(answer, CidError):
            self.counts["refused"] += isinstance(answer, Draining)
            return Reply(error=protocol.parse_error(protocol.error_text(answer)))
        if self._drained and request.operation in (Operation.NEW, Operation.OPEN):
            self.wrong.append(f"D: {request.operation.name} in a drain at {self.now:.3f}")
        return Reply(answer[0][0], answer[1])

    # ---- The model

    def triton(self, core: SimSequence, flags: dict[str, Any]) -> Any:
        cid, holder = flags["sequence_id"], core.holder
        owner, last = self._state.get(cid, ("", 0.0))
        if owner and self.now > last + IDLE_S:
            owner = ""
        if flags.get("sequence_start"):
            owner = holder
        elif not owner:
            return InferenceServerException("the first request must specify the START flag")
        elif owner != holder:
            self.wrong.append(f"U: {holder} met the state of {owner} in ID {cid} at {self.now:.3f}")
        if flags.get("sequence_end"):
            self._state.pop(cid, None)
        else:
            self._state[cid] = owner, self.now
        self.counts["inferences"] += 1
        return Reply()

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

        slow = self.now < self._slow_until
        lost = 0.1 if slow else 0.005
        if self.now < node.cut_until:
            return
        if self.dice.random() >= lost:
            self.at(self.now + min(self.delay(), most), lambda: arrive(True))
        if self.dice.random() < lost:  # a second time, even if it was lost
            self.counts["late or twice"] += 1
            # After END was answered a packet may be late, but not by more than the least cooldown.
            late = min(most, 0.9 * COOLDOWN_S) if most < 30 else most
            self.at(self.now + self.dice.uniform(0, late), lambda: arrive(False))

    def delay(self) -> float:
        if self.now < self._slow_until:
            return self.dice.uniform(0, 1.9)
        return self.dice.uniform(0.001, 0.02)

    # ---- The nemesis

    def trouble(self) -> None:
        """One fault, and the next one later."""
        dice = self.dice
        node = dice.choice(self.nodes)
        fault = dice.choice(FAULTS)
        self.counts[fault] += 1
        seconds = dice.choice([0.3, 3.0, TTL_S, TTL_S + GRACE_S, 2 * TTL_S]) * dice.uniform(
            0.5, 1.5
        )
        if fault == "freeze":
            node.frozen_until = self.now + seconds
        elif fault == "freeze all":
            for each in self.nodes:
                each.frozen_until = self.now + seconds
        elif fault == "kill":
            node.alive = False
            name = f"{node.name.split('.')[0]}.{next(self.numbers)}"
            self.nodes[self.nodes.index(node)] = Node(self, name)
        elif fault.startswith("cut"):
            for each in self.nodes if fault == "cut all" else [node]:
                each.cut_until = self.now + seconds
        elif fault == "manager":
            self.crash_manager()
            self.at(self.now + dice.choice([0.1, seconds / 2]), self.begin_manager)
        else:
            self._slow_until = self.now + seconds
        self.at(self.now + dice.uniform(1.0, 12.0), self.trouble)

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
        token = {"session": "5" * 32}
        stolen = protocol.as_ids([self.dice.randint(1, SETTINGS["capacity"])])
        self.manage(protocol.Request(Operation.OPEN, parameters={**token, "ttl_ms": 600_000}))
        own = {**token, "seq": next(self.numbers), "cooldown_ms": 0}
        for parameters in (own, {"cooldown_ms": 0}):
            reply = self.manage(protocol.Request(Operation.DELETE, stolen, parameters))
            self.counts["thefts"] += reply.error is None or reply.error.answered
        self.at(self.now + self.dice.uniform(0.5, 2.0), self.theft)


def simulate(seed: int, keep: Path | None = None) -> tuple[list[str], Counter[str]]:
    """Run one fleet; return what is wrong, and what happened."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        with recorder.watched(Registry), patch.object(handover, "boot_id") as boot_id:
            boot_id.return_value = bytes(16)
            fleet = Fleet(seed, Path(name))
            boot_id.side_effect = fleet.boot_id
            with patch.object(os, "fsync", fleet.disk.sync):
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
    print(f"{options.runs} runs, nothing wrong:", dict(total.most_common()))


if __name__ == "__main__":
    main()
