"""The clients of a simulated fleet: processes with clocks of their own, and what they do."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sometimes import sometimes
from streams import SimStream

from cidalloc.client.core.client import Base
from cidalloc.client.core.effects import Config, Idle, Reply, Send
from cidalloc.client.core.grpc_calls import LIBRARY
from cidalloc.client.core.id_cache import MAX_AHEAD
from cidalloc.client.core.lease import Acquired
from cidalloc.client.core.plan import Plan
from cidalloc.client.core.sequence import SequenceCore
from cidalloc.client.core.tidy import Tidier
from cidalloc.conformance.recorder import Recorder
from cidalloc.errors import CidError, Unavailable

if TYPE_CHECKING:
    from fleet import Fleet

TTL_S = 10.0
IDLE_S, LIMIT_S = 4.0, 3.0  # of the model, and of a request to it
TIMEOUT_S = 2.0  # of a request to the manager
WAIT_S = 5.0  # for which clients 1 and 3 wait for an ID
DRIFT = 0.003
CLIENTS, TALKERS = 4, 3
TIDIERS = "12"  # the clients that end sequences of the dead


@dataclass
class Infer:
    """A request to the model, as part of a sequence."""

    core: SimSequence
    flags: dict[str, Any]


class SimSequence(SequenceCore):
    """A sequence whose requests are simulated."""

    def __init__(self, node: Node, plan: Plan, holder: str) -> None:
        super().__init__(node.client, plan, False, None)  # type: ignore[arg-type]
        self.cid = plan.cid
        self.holder, self.began = holder, node.fleet.now
        self._node, self._lease = node, plan.lease
        self._left = False

    @property
    def dead(self) -> bool:
        """Whether its client was killed, or lost its session, while it had the sequence."""
        lost = not self._node.alive or bool(self._lease and self._lease.lost_why)
        return lost and not self._left

    def finish(self) -> None:
        """Release the ID."""
        self._left = not self.dead
        super().finish()


class SimClient(Base):
    """A client's decisions, without its ways to wait; it is its own runner."""

    _new_runner = staticmethod(lambda *_: None)

    def __init__(
        self,
        rng: random.Random,
        now: Callable[[], float],
        open_stream: Callable[..., SimStream],
        ahead: int = MAX_AHEAD,
    ) -> None:
        self.transport: Any = SimpleNamespace(
            url="simulated", library=LIBRARY, now=now, open_stream=open_stream, broke=bool
        )
        self.model = "cidmgr"
        super().__init__(
            model=self.model,
            ttl=TTL_S,
            label="simulated",
            timeout=TIMEOUT_S,
            transport=self.transport,
            ahead=ahead,
        )
        self.sequences: dict[SequenceCore, None] = {}
        self._rng = self._session.link.rng = rng  # type: ignore[assignment]
        self.session = self._session
        self.lock = nullcontext()
        self.now = now

    def unsure(self) -> bool:
        """Messages need no connection here, so none breaks."""
        return False

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
        self.born = fleet.now
        self.deaf = False  # no answer reaches it
        self.frozen_until = self.cut_until = 0.0
        self.thaws = 0.0  # the latest end of a freeze: another one may have cut it short
        self.heard = self.beat = fleet.now  # the last answers of the manager, and to a heartbeat
        self.asking = self.failed = 0  # requests without an answer yet; those that failed in a row
        self.last_release: Callable[[], object] = lambda: None
        self.tries_again: Callable[[], None] = lambda: None
        self._lost_change = False
        self._arrived: tuple[Any, ...] = None, 0, 0.0  # the last change at the manager
        self._offset, self._rate = dice.uniform(0, 1e6), 1 + dice.uniform(-DRIFT, DRIFT)
        self.client = SimClient(
            random.Random(dice.getrandbits(64)),
            self.clock,
            partial(SimStream, self),
            fleet.nemesis.ahead.get(name.split(".")[0], MAX_AHEAD),
        )
        self.recorder = Recorder(name, fleet.write, lambda: fleet.now)
        self.waiting: dict[Callable[[Reply], None], None] = {}  # in order
        self._heartbeat: Task | None = None
        for _ in range(TALKERS):
            self.run(self.talker())
        if name[len("client")] in TIDIERS:
            self.run(Tidier(self.client, {"model": []}).rounds())  # type: ignore[arg-type]

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
            if self._heartbeat is None and session.lease.opened:
                self._heartbeat = heartbeat = session.heartbeat()
                self.fleet.at(self.fleet.now, lambda: self.run(heartbeat))
            if session.version != seen or session.lease.cache.needs_maintenance:
                session.lease.cache.needs_maintenance = False
                self.wake()
        self._running = task
        self.perform(effect, self.once(task))

    def wake(self) -> None:
        """Resume the tasks that wait."""
        waiting, self.waiting = self.waiting, {}
        for resume in waiting:
            resume(Reply())

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
        change = request.operation.name in ("NEW", "DELETE")
        self.fleet.progress.sends(self, request)
        heartbeat = self._running is self._heartbeat
        sent, generation, waits = fleet.now, lease.generation, True

        def arrive() -> Reply:
            name, seq = request.operation.name, request.parameters.get("seq")
            ended = fleet.expired.get(generation, 0.0)
            sometimes("expiry in the middle of a release", name == "DELETE" and ended > sent)
            if seq:
                token, before, when = self._arrived
                other = token == request.token and before != seq
                sometimes("two changes at once", when > sent and other)
                self._arrived = request.token, seq, fleet.now
            return fleet.manage(request, client=self.name)

        def answered(reply: Reply) -> None:
            if reply.error is None and renews and not lease.lost_why and self.alive:
                fields = request.operation.name == "OPEN"
                generation = reply.output.tolist()[1] if fields else lease.generation
                self.recorder.done(number, session=generation)
            back(reply)

        def back(reply: Reply) -> None:
            nonlocal waits
            if waits:
                waits = False
                self.asking -= 1
                held = request.operation.name == "HELD" and reply.error is None
                sometimes("HELD after a lost answer", held and self._lost_change)
                unknown = reply.error is not None and not reply.error.answered
                self._lost_change = (unknown and change) or (self._lost_change and not held)
                resume(reply)
                self.fleet.progress.answered(self, request, reply, heartbeat)

        if request.operation.name == "DELETE":
            self.last_release = arrive
        self.asking += 1
        fleet.carry(self, arrive, answered)
        timeout = Reply(error=Unavailable("no answer"))
        fleet.at(fleet.now + effect.timeout, lambda: back(timeout))

    def infer(self, effect: Infer, resume: Callable[[Any], None]) -> None:
        """Send a request to the model, and note it."""
        fleet, core = self.fleet, effect.core
        number = self.recorder.invoke(
            "use", cid=core.cid, holder=core.holder, session=self.client.session.lease.generation
        )

        done = fleet.progress.expects("request", self)

        def answered(result: Any) -> None:
            done()
            if self.alive:
                self.recorder.done(number, "fail" if isinstance(result, Exception) else "ok")
                resume(result)

        fleet.carry(self, lambda: fleet.triton(core, effect.flags), answered, LIMIT_S)

        def give_up() -> None:
            done()
            resume(Unavailable("no answer"))

        fleet.at(fleet.now + LIMIT_S + 5.0, give_up)

    def talker(self) -> Task:
        """The application: one sequence after the other."""
        fleet, dice, client = self.fleet, self.fleet.dice, self.client
        waits = self.name[len("client")] in "13" or fleet.nemesis.lasting == "few"
        wait = WAIT_S if waits else None
        progress, got = fleet.progress, None
        while True:
            began = self.clock()
            if waits and got is None:  # the others come after all that wait
                got = progress.expects("ID", self)
            ended = progress.expects("wait" if waits else "call", self)
            try:
                plan = yield from client._begin_sequence(
                    "model", LIMIT_S, None, True, Acquired(), wait
                )
                fleet.counts["waited"] += self.clock() > began + 0.5
            except CidError:
                ended()
                yield from self.pause(dice.uniform(0.1, 2.0))
                continue
            ended()
            if got is not None:
                got()
                got = None
            sometimes("a crowd for few IDs", fleet.crowded() and waits)
            holder = f"{self.name}.{next(fleet.numbers)}"
            core = SimSequence(self, plan, holder)
            self.recorder.note(
                "hold",
                cid=core.cid,
                holder=holder,
                session=client.session.lease.generation,
                need=IDLE_S + LIMIT_S,
            )
            fleet.counts["sequences"] += 1
            ended = progress.expects("sequence", self)
            length = dice.randint(1, 8)
            yield from self.converse(core, min(length, 3) if fleet.calm else length)
            core.finish()
            ended()
            pause = dice.expovariate(4)
            if fleet.calm:  # less to do, except when it is judged
                pause *= 2 if fleet.now > progress.free_from else 8
            yield from self.pause(pause)

    def converse(self, core: SimSequence, length: int) -> Task:
        dice = self.fleet.dice
        for step in range(length):
            end = step == length - 1 and dice.random() < 0.8
            request = core.request([], end, {})
            try:
                assert core.enter(request), "one request after the other"
            except CidError as refused:
                self.fleet.progress.failed(self, core, refused)
                return
            error: BaseException | None = None
            try:
                yield Infer(core, request.options)
            except Exception as caught:
                error = caught
                self.fleet.progress.failed(self, core, caught)
            core.over(request, _ANSWER, error)
            if error is not None and dice.random() < 0.7:
                return
            if core.state.recycled:
                self.recorder.note("ended", holder=core.holder)
            pause = dice.choice([0.0, 0.05, 0.5, dice.uniform(0, 4.5)])
            yield from self.pause(min(pause, 0.5) if self.fleet.calm else pause)

    def pause(self, seconds: float) -> Task:
        until = self.clock() + seconds
        while self.clock() < until:
            yield Idle(until)
