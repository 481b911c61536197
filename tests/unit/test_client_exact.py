"""The client's core at its edges: late answers, rounded times, and what a failure does not say."""

from __future__ import annotations

import pytest
from simulation import World

from cidalloc import errors
from cidalloc.client.core.effects import Reply, Send
from cidalloc.client.core.lease import Acquired
from cidalloc.client.core.session import Session
from cidalloc.codes import Operation
from cidalloc.manager.settings import Settings

TTL = 60.0


@pytest.fixture
def world() -> World:
    return World(Settings(first=1, capacity=1000, max_sessions=10, fresh=True))


@pytest.fixture
def session(world: World) -> Session:
    session = world.session(TTL)
    world.acquire(session)
    return session


# ---- Answers that come late


def test_an_answer_that_was_overtaken_shortens_no_lease(world: World, session: Session) -> None:
    renewal = session.lease.renew(world.now + 10)
    early = next(renewal)
    assert isinstance(early, Send)
    reply = world.apply(early.request)
    world.now += 3
    sent = world.now
    world.acquire(session, 5)
    assert session.lease.deadline == sent + TTL
    with pytest.raises(StopIteration):
        renewal.send(reply)
    assert session.lease.deadline == sent + TTL


def test_new_ids_that_come_after_the_lease_are_not_handed_out(world: World) -> None:
    session = world.session(ttl=1.0)
    world.acquire(session)
    taken = Acquired()
    flow = session.acquire(5, None, world.now + 10, taken)
    effect = next(flow)
    assert isinstance(effect, Send) and effect.request.operation is Operation.NEW
    reply = world.apply(effect.request)
    world.now += 1.2
    effect = flow.send(reply)
    assert not taken
    assert isinstance(effect, Send) and effect.request.operation is Operation.RENEW
    with pytest.raises(StopIteration):
        flow.send(world.apply(effect.request))
    assert len(taken) == 5


def test_a_late_answer_does_not_revive_a_lost_session(world: World, session: Session) -> None:
    lease = session.lease
    renewal = lease.renew(world.now + 10)
    effect = next(renewal)
    assert isinstance(effect, Send)
    reply = world.apply(effect.request)
    lease.lose("another request was told so")
    with pytest.raises(errors.SessionUnknown, match="told so"):
        renewal.send(reply)
    assert lease.deadline < world.now and lease.state == "not opened"


def test_a_heartbeat_leaves_time_for_more_tries(world: World, session: Session) -> None:
    world.now = session.lease.renew_at
    effect = next(session.heartbeat())
    assert isinstance(effect, Send) and effect.request.operation is Operation.RENEW
    assert effect.timeout == pytest.approx(TTL / 8)


def test_a_failure_says_nothing_of_a_drain(world: World, session: Session) -> None:
    assert Reply(error=errors.Draining("no new one")).draining is True
    assert Reply(error=errors.Unavailable("no answer")).draining is None
    session.lease.cache.drain(True)
    world.fates = ["lost"]
    with pytest.raises(errors.Unavailable):
        world.run(session, session.lease.renew(world.now + 10))
    assert session.lease.cache.draining


def test_a_lost_lease_has_no_slice() -> None:
    world = World(Settings(capacity=64, slice="3/4", max_sessions=10, fresh=True))
    session = world.session(TTL)
    world.acquire(session)
    assert session.route() == 3
    session.lease.lose("it expired")
    assert session.route() is None
