"""The client's core at its edges: late answers, rounded times, and what a failure does not say."""

from __future__ import annotations

import pytest
from loopback import Loopback
from simulation import World

from cidalloc import errors
from cidalloc.client import Client
from cidalloc.client.core.effects import Idle, Reply, Send
from cidalloc.client.core.id_cache import need_ms
from cidalloc.client.core.lease import Acquired
from cidalloc.client.core.session import Session
from cidalloc.codes import Operation
from cidalloc.manager.settings import Settings
from cidalloc.protocol import IDs, Request

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
    lease, taken = session.lease, Acquired()
    flow = session.acquire(5, None, world.now + 10, taken)
    effect = next(flow)
    assert isinstance(effect, Send) and effect.request.operation is Operation.NEW
    reply = world.apply(effect.request)
    lease.lose("another request was told so")
    effect = flow.send(reply)
    assert isinstance(effect, Send) and effect.request.operation is Operation.OPEN
    assert not taken and not lease.cache.known() and lease.deadline < world.now


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


def test_ids_in_the_cache_are_not_taken_after_the_lease(world: World, session: Session) -> None:
    taken = Acquired()
    world.now += TTL
    session.lease.take_ready(1, None, taken)
    assert session.lease.cache.fresh and not taken
    world.run(session, session.establish(world.now + 10))
    session.lease.take_ready(1, None, taken)
    assert taken


# ---- Times


def test_no_pause_is_longer_than_a_part_of_the_lease(world: World) -> None:
    for tries in (1, 5, 50):
        assert 0.025 <= world.session(ttl=4.0).link.pause(tries) <= 0.5
    longest = world.session(ttl=4.0).link
    assert max(longest.pause(50) for _ in range(200)) > 0.48
    assert 1.0 <= world.session(ttl=600.0).link.pause(50) <= 2.0


def test_pauses_differ_between_clients(world: World) -> None:
    assert len({world.session(seed=seed).link.pause(3) for seed in range(5)}) == 5


def test_an_id_by_hand_waits_until_its_cooldown_is_announced(world: World) -> None:
    session = world.session(TTL)
    world.acquire(session, 1, 5_000)
    lease = session.lease
    assert lease.cache.fresh and lease.announced_ms < lease.default_ms
    assert lease.take() == 0
    world.run(session, lease.announce(lease.default_ms, world.now + 10))
    assert lease.take()


def test_a_cooldown_is_announced_once_the_manager_answers(world: World, session: Session) -> None:
    before = session.lease.announced_ms
    world.fates = ["lost"]
    with pytest.raises(errors.Unavailable):
        world.run(session, session.lease.announce(10 * before, world.now + 10))
    assert session.lease.announced_ms == before
    world.run(session, session.lease.announce(10 * before, world.now + 10))
    assert session.lease.announced_ms == 10 * before


class Noting(Loopback):
    """It notes the cooldowns of releases, and those that NEW announces."""

    def __init__(self) -> None:
        super().__init__(Settings(first=1, capacity=10, fresh=True))
        self.cooldowns: list[object] = []  # None: END was answered
        self.announced: list[object] = []

    def call(self, model: str, request: Request, timeout: float) -> tuple[IDs, str]:
        if request.operation is Operation.DELETE:
            self.cooldowns.append(request.parameters.get("cooldown_ms"))
        if request.operation is Operation.NEW:
            self.announced.append(request.parameters.get("cooldown_ms"))
        return super().call(model, request, timeout)


def test_no_cooldown_is_shorter_than_asked_for() -> None:
    manager = Noting()
    with Client(transport=manager) as cids:
        cids.release(cids.acquire(), cooldown=10.0001)
        cids.active()
        cids.release(cids.acquire())
        cids.active()
    assert manager.cooldowns == [10_001, 120_000]
    assert need_ms(10.0, 0.0001) == 10_001


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(("cooldown", "idle_ms"), [(10.0, 10_000), (0.5, 2_000)])
def test_a_sequence_without_end_cools(check: bool, cooldown: float, idle_ms: int) -> None:
    """For as long as its model may remember it, if that is known."""
    manager = Noting()
    with Client(transport=manager) as cids:
        with cids.sequence("model", cooldown=cooldown, check=check, timeout=3.0) as sequence:
            sequence.infer([])
        cids.active()
    idle_ms = idle_ms if check else int(cooldown * 1000)
    (cooled,) = manager.cooldowns
    assert cooled == pytest.approx(idle_ms + 3_000, abs=1)
    assert manager.announced[0] == idle_ms + 3_000, "for the case that the client dies"


# ---- The link


def test_when_a_request_is_given_up(world: World, session: Session) -> None:
    link = session.link
    assert link.limit(world.now + 3.0) == pytest.approx(3.0)
    assert link.limit(world.now + 30.0) == 10.0
    assert link.limit(world.now) == 10.0 / 16
    answered = errors.Unavailable("taking over")
    answered.answered = True
    world.now += 1.0
    assert link.note(Reply(error=errors.Unavailable("no answer"))) is not None
    assert link.heard_at < world.now and link.away_until == world.now + 5.0
    link.note(Reply(error=answered))
    assert link.heard_at == world.now


def test_what_a_new_session_cures_needs_no_pause_at_first(world: World, session: Session) -> None:
    error = errors.SessionUnknown("it has expired")
    deadline = world.now + 10.0
    assert list(session.link.recover(error, 3, deadline)) == []
    pause = next(session.link.recover(error, 4, deadline))
    assert isinstance(pause, Idle) and 0.2 <= pause.until - world.now <= 0.4
    first = session.link.pause(1)
    assert 0.025 <= first <= 0.05
    with pytest.raises(errors.SessionUnknown):
        next(session.link.recover(error, 4, world.now + 0.1))  # no pause is so short


def test_the_answer_to_end_gives_the_id_back() -> None:
    manager = Loopback(Settings(first=1, capacity=10, fresh=True))
    with Client(transport=manager) as cids, cids.sequence("model") as sequence:
        sequence.infer([])
        assert cids.held().tolist() == [sequence.cid]
        sequence.infer([], end=True)
        assert not cids.held().size and sequence.state == "closed, recycled"


def test_a_sequence_of_a_closed_client_sends_nothing() -> None:
    with Client(transport=Loopback(Settings(first=1, capacity=10, fresh=True))) as cids:
        sequence = cids.sequence("model")
        sequence.infer([])
        cids.close()
        with pytest.raises(errors.InvalidArgument, match="the client of this sequence is closed"):
            sequence.infer([])
