"""Many calls and clients beside each other, in one thread and in virtual time."""

from __future__ import annotations

import math
from typing import Any

from simulation import World

from cidalloc import errors
from cidalloc.client.core.effects import Flow, Idle, Reply
from cidalloc.client.core.id_cache import ENDED
from cidalloc.client.core.lease import Acquired
from cidalloc.client.core.session import Session
from cidalloc.manager.settings import Settings

SETTINGS = Settings(first=1, capacity=2, cooldown_ms=3_000, unended_cooldown_ms=3_000, fresh=True)
"""A manager with two IDs."""
TTL = 60.0


class Task:
    """A flow that runs: its result or its error once it has one, and when this was."""

    def __init__(self, session: Session, flow: Flow[Any]) -> None:
        self.session, self.flow = session, flow
        self.effect: Any = None
        self.seen = -1
        self.lost = False  # its request is not answered
        self.done_at: float | None = None
        self.error: Exception | None = None

    def cancel(self) -> None:
        self.flow.close()
        self.done_at = math.nan


class Call(Task):
    """A call that acquires IDs."""

    def __init__(self, session: Session, count: int, wait: float | None) -> None:
        now = session.now()
        self.taken = Acquired()
        until = None if wait is None else now + wait
        deadline = now + session.link.timeout
        super().__init__(session, session.acquire(count, None, deadline, self.taken, until))

    @property
    def cids(self) -> list[int]:
        assert self.error is None and self.done_at is not None, self.error
        return list(self.taken)


class Crowd:
    """Runs flows as threads would: those that can go on in their order, then time passes."""

    def __init__(self, settings: Settings = SETTINGS) -> None:
        self.world = World(settings)
        self.tasks: list[Task] = []
        self.finished: list[Task] = []
        self.away = False  # the manager does not answer

    def client(self, **options: Any) -> Session:
        session = self.world.session(TTL, seed=len(self.tasks), **options)
        self.tasks.append(Task(session, session.heartbeat()))
        return session

    def call(self, session: Session, count: int = 1, wait: float | None = None) -> Call:
        call = Call(session, count, wait)
        self.tasks.append(call)
        self.settle()
        return call

    def take(self, session: Session, count: int = 1) -> list[int]:
        return self.call(session, count).cids

    def release(self, session: Session, *cids: int, cooldown_ms: int = ENDED) -> None:
        session.lease.give(list(cids), cooldown_ms)
        if session.lease.cache.needs_maintenance:  # as Client.release does
            session.version += 1
        self.settle()

    def settle(self) -> None:
        """Let all flows go on that need no time."""
        for _ in range(10_000):
            for task in self.tasks:
                if task.done_at is None and self.ready(task):
                    self.step(task)
                    break
            else:
                return
        raise AssertionError(f"it stands still at {self.world.now}")

    def ready(self, task: Task) -> bool:
        if not isinstance(task.effect, Idle):
            return True
        if task.lost:
            return task.effect.until <= self.world.now
        return task.effect.until <= self.world.now or task.seen != task.session.version

    def step(self, task: Task) -> None:
        task.seen = task.session.version
        try:
            if task.effect is None:
                task.effect = next(task.flow)
            elif self.away and not isinstance(task.effect, Idle):
                task.effect, task.lost = Idle(self.world.now + task.effect.timeout), True
            else:
                reply = Reply()
                if task.lost:
                    reply, task.lost = Reply(error=errors.Unavailable("no answer")), False
                elif not isinstance(task.effect, Idle):
                    reply = self.world.perform(task.effect)
                task.effect = task.flow.send(reply)
        except StopIteration:
            task.done_at = self.world.now
        except errors.CidError as error:
            task.done_at, task.error = self.world.now, error
        if task.done_at is not None:
            self.finished.append(task)

    def wait(self, seconds: float) -> None:
        until = self.world.now + seconds
        while True:
            self.settle()
            times = [each.effect.until for each in self.tasks if each.done_at is None]
            if min(times, default=until) >= until:
                break
            self.world.now = min(times)
        self.world.now = until
        self.settle()
