"""The client's core alone: what it sends, and when, and what it makes of what comes back."""

from __future__ import annotations

import pytest
from simulation import World

from cidalloc import errors
from cidalloc.client.core.effects import Idle, Reply, Send
from cidalloc.client.core.id_cache import ENDED, IdCache
from cidalloc.client.core.lease import Acquired
from cidalloc.client.core.session import Session
from cidalloc.codes import Operation
from cidalloc.manager.settings import Settings
from cidalloc.protocol import as_ids

SETTINGS = Settings(first=1, capacity=10_000, max_sessions=1000, fresh=True)
TTL = 60.0


@pytest.fixture
def world() -> World:
    return World(SETTINGS)


@pytest.fixture
def session(world: World) -> Session:
    return world.session(TTL)


# ---- The cache


def test_the_session_opens_when_it_is_needed(world: World, session: Session) -> None:
    assert not session.lease.opened
    assert world.acquire(session) == [1]
    assert world.operations() == ["OPEN", "NEW"]


def test_the_usual_acquire_sends_nothing(world: World, session: Session) -> None:
    world.acquire(session)
    world.operations()
    assert session.lease.take() == 2
    assert world.operations() == []


def test_new_ids_go_to_their_caller_and_not_through_the_cache(
    world: World, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IdCache, "take", lambda *_: pytest.fail("an ID came out of the cache"))
    assert world.acquire(session, 3) == [1, 2, 3]
    assert session.lease.cache.used == {1, 2, 3}
    assert list(session.lease.cache.fresh) == [4]


def test_new_ids_complete_those_of_the_cache(world: World, session: Session) -> None:
    world.acquire(session)
    assert world.acquire(session, 3) == [2, 3, 4], "the oldest first"
    assert session.lease.cache.used == {1, 2, 3, 4}


def test_ids_that_others_took_meanwhile(world: World, session: Session) -> None:
    """Then the new ones wait in the cache for the next try."""
    world.acquire(session)
    taken = Acquired()
    flow = session.acquire(2, None, world.now + 10, taken)
    effect = next(flow)
    assert isinstance(effect, Send) and effect.request.parameters["count"] == 3
    assert session.lease.take() == 2
    with pytest.raises(StopIteration):
        flow.send(world.apply(effect.request))
    assert taken == [3, 4]
    assert session.lease.cache.used == {1, 2, 3, 4}


def test_ended_ids_recycle_oldest_first_after_their_cooldown(
    world: World, session: Session
) -> None:
    cids = world.acquire(session, 5)
    spare = session.lease.cache.fresh.copy()
    for cid in cids:
        world.release(session, cid)
    for _ in spare:
        assert session.lease.take() not in cids
    world.operations()
    world.now += SETTINGS.cooldown_ms / 1000 - 0.001
    assert session.lease.take() == 0
    world.now += 0.001
    assert [session.lease.take() for _ in cids] == cids
    assert world.operations() == []


def test_the_cache_grows_with_demand(world: World, session: Session) -> None:
    world.acquire(session)
    world.operations()
    for _ in range(1000):
        if not session.lease.take():
            world.acquire(session)
        world.keep(session, world.now + 0.001)
    assert len(world.operations()) < 40
    assert session.lease.cache.target_size > 50


def test_a_cache_without_demand_goes_back(world: World, session: Session) -> None:
    for _ in range(50):
        cids = world.acquire(session, 20)
        world.release(session, *cids)
        world.now += 0.01
    assert world.held() > 500
    world.keep(session, world.now + 600)
    assert world.held() == 0
    assert "DELETE" in world.operations()
    world.acquire(session)


@pytest.mark.parametrize("ahead", [0, 1, 7])
def test_no_more_ahead_than_was_said(world: World, ahead: int) -> None:
    session = world.session(TTL, ahead=ahead)
    for _ in range(200):
        cids = world.acquire(session, 3)
        assert world.held() <= 3 + ahead
        world.release(session, *cids)
        world.keep(session, world.now + 0.01)
        assert world.held() <= ahead
        assert len(session.lease.cache.cooling) + len(session.lease.cache.fresh) <= ahead
    assert world.held() == len(session.lease.cache.known())


def test_what_is_surplus_goes_in_bulk(world: World, session: Session) -> None:
    cids = world.acquire(session, 900)
    world.release(session, *cids)
    world.operations()
    world.keep(session, world.now + 300)
    assert world.operations().count("DELETE") <= 2


def test_an_id_without_end_cools_at_the_manager(world: World, session: Session) -> None:
    (cid,) = world.acquire(session)
    held = world.held()
    world.release(session, cid, cooldown_ms=70_000)
    world.keep(session, world.now)
    assert world.held() == held - 1
    (request,) = [each for each in world.sent if each.operation is Operation.DELETE]
    assert request.ids.tolist() == [cid]
    assert request.parameters["cooldown_ms"] == 70_000


def test_a_pool_without_any_ahead(world: World) -> None:
    """What is there is given, though it is not enough for the cache as well."""
    world = World(Settings(first=1, capacity=3, max_sessions=10, fresh=True))
    session = world.session()
    assert world.acquire(session, 3) == [1, 2, 3]
    with pytest.raises(errors.Exhausted, match="held"):
        world.acquire(session)
    world.release(session, 2)
    with pytest.raises(errors.Exhausted):
        world.acquire(session)
    world.now += 5
    assert world.acquire(session) == [2]


def test_large_batches_are_cut_to_what_the_manager_takes() -> None:
    world = World(Settings(first=1, capacity=1000, max_sessions=10, fresh=True, max_count=100))
    session = world.session()
    cids = [cid for _ in range(4) for cid in world.acquire(session, 90)]
    world.release(session, *cids, cooldown_ms=1)
    world.keep(session, world.now + 1)
    assert world.held() <= 100
    with pytest.raises(errors.LimitExceeded):
        world.acquire(session, 200)


def test_a_cooldown_that_the_manager_refuses_stops_nothing_else() -> None:
    """Such IDs stay the session's until it ends; nobody gets them too early."""
    world = World(Settings(first=1, capacity=99, fresh=True, max_cooldown_ms=200_000))
    session = world.session(TTL)
    cids = world.acquire(session, 20)
    world.release(session, *cids[:3], cooldown_ms=200_001)
    world.release(session, *cids[3:], cooldown_ms=200_000)
    world.keep(session, world.now + 2 * TTL)
    assert session.lease.opened
    assert session.now() < session.lease.deadline, "heartbeats went on"
    assert world.held() == 3 + len(session.lease.cache.fresh)
    assert session.lease.cache.used == set(cids[:3])


@pytest.mark.parametrize(
    ("cids", "kind"),
    [
        ([1, 1], errors.Duplicate),
        ([1, 9], errors.NotHeld),
        ([0], errors.OutOfRange),
        ([1, 2**63], errors.OutOfRange),
    ],
)
def test_wrong_releases_change_nothing(
    world: World, session: Session, cids: list[int], kind: type[errors.CidError]
) -> None:
    assert world.acquire(session, 2) == [1, 2]
    for cooldown_ms in (ENDED, None, 5):
        with pytest.raises(kind):
            world.release(session, *cids, cooldown_ms=cooldown_ms)
    assert session.lease.cache.used == {1, 2}


# ---- Cooldowns are announced before an ID is used


def cooldown(world: World) -> int:
    return world.read(lambda registry: [*registry.sessions.named.values()][-1].cooldown)


def test_a_longer_cooldown_is_announced_first(world: World, session: Session) -> None:
    world.acquire(session, 1, 20_000)
    assert cooldown(world) == 20_000
    world.operations()
    taken = Acquired()
    session.lease.take_ready(1, 30_000, taken)
    assert not taken, "in the cache, but not announced"
    world.acquire(session, 1, 30_000)
    assert world.operations() == ["RENEW"], "and that takes no further ID"
    assert cooldown(world) == 30_000
    world.acquire(session, 1, 25_000)
    assert world.operations() == ["NEW"]
    assert cooldown(world) == 30_000


def test_an_id_by_hand_is_good_for_what_the_manager_takes(world: World, session: Session) -> None:
    world.acquire(session, 1, 20_000)
    world.acquire(session)
    assert cooldown(world) == SETTINGS.unended_cooldown_ms


def test_a_refill_announces_nothing_longer(world: World, session: Session) -> None:
    world.acquire(session, 1, 20_000)
    world.acquire(session, 1, 20_000)
    world.keep(session, world.now)
    assert world.sent[-1].operation is Operation.NEW
    assert session.lease.announced_ms == cooldown(world) == 20_000


def test_an_id_of_a_lost_lease_is_not_that_of_its_successor(world: World) -> None:
    """Though its number may be the same."""
    world = World(Settings(first=1, capacity=1, max_sessions=10, fresh=True))
    session = world.session(TTL)
    (cid,) = world.acquire(session)
    lease = session.lease
    world.now += 10 * TTL
    assert world.held() == 0
    world.now += SETTINGS.unended_cooldown_ms / 1000
    assert world.acquire(session) == [cid]
    session.lease.check(cid, world.now)
    with pytest.raises(errors.SequenceLost, match="does not know its session"):
        lease.check(cid, world.now)
    lease.release_from(cid, ENDED)
    assert session.lease.cache.used == {cid}


# ---- Time


def test_heartbeats_also_of_a_busy_client(world: World, session: Session) -> None:
    """Other requests renew the lease, too. But only RENEW tells of models, and of who waits."""
    world.acquire(session)
    world.operations()
    began = world.now
    for _ in range(100):
        world.keep(session, world.now + 10)
        if world.now - began < 500:
            world.acquire(session, 5)
    names = world.operations()
    assert names.count("NEW") >= 40
    busy = len(names) - names[::-1].index("NEW")
    for part in (names[:busy], names[busy:]):
        assert 500 / (0.35 * TTL) - 2 < part.count("RENEW") < 500 / (0.25 * TTL) + 2
    assert world.now < session.lease.deadline


def test_a_busy_client_announces_its_models_again(world: World, session: Session) -> None:
    """A manager that was reloaded has forgotten them."""
    (cid,) = world.acquire(session)
    session.lease.begin_sequence(cid, "model")
    world.keep(session, world.now + 1)
    sessions = world.read(lambda registry: list(registry.sessions.named.values()))
    assert [each.models for each in sessions] == [("model",)]
    sessions[0].models = ()  # as a reload leaves it
    for _ in range(10):
        world.keep(session, world.now + TTL / 20)
        world.acquire(session, 5)
    assert sessions[0].models == ("model",)


def test_the_lease_counts_from_when_the_request_was_sent(world: World, session: Session) -> None:
    flow = session.acquire(1, None, world.now + 10, Acquired())
    effect = next(flow)
    for _ in range(2):
        assert isinstance(effect, Send)
        sent = world.now
        world.now += 3.0
        try:
            effect = flow.send(world.apply(effect.request))
        except StopIteration:
            break
    assert session.lease.deadline == sent + TTL


def test_the_lease_of_a_repeated_open_counts_from_the_first(world: World, session: Session) -> None:
    """Which may have arrived, and OPEN of a session that lives renews nothing."""
    began = world.now
    world.fates = ["unanswered", "unanswered"]
    for _ in range(2):
        with pytest.raises(errors.Unavailable):
            world.run(session, session._establish(world.now + 1))
    world.run(session, session._establish(world.now + 1))
    assert world.operations() == ["OPEN"] * 3
    assert session.lease.deadline == began + TTL


def test_without_an_answer_its_ids_are_not_used(world: World) -> None:
    session = world.session(TTL, timeout=5.0)
    (cid,) = world.acquire(session)
    lease, sent = session.lease, world.now
    world.fates = ["lost"] * 1000
    world.keep(session, sent + TTL - 0.01)
    lease.check(cid, world.now)
    world.keep(session, sent + TTL)
    with pytest.raises(errors.SessionExpired):
        lease.check(cid, world.now)
    assert session.lease.take() == 0
    with pytest.raises(errors.SessionExpired, match="no heartbeat"):
        world.acquire(session)
    # The manager was away for less than it waits itself, so nothing is lost.
    world.fates.clear()
    world.keep(session, world.now + 3)
    lease.check(cid, world.now)
    assert world.acquire(session)
    assert session.lease is lease


def test_a_client_that_was_frozen_sends_nothing_of_old(world: World, session: Session) -> None:
    (cid,) = world.acquire(session)
    lease = session.lease
    world.release(session, *world.acquire(session, 2), cooldown_ms=7)
    world.now += TTL + SETTINGS.grace_ms / 1000 + 1
    world.operations()
    with pytest.raises(errors.SessionExpired):
        lease.check(cid, world.now)
    world.keep(session, world.now + 1)
    assert world.operations() == ["RENEW"]
    with pytest.raises(errors.SequenceLost, match="does not know its session"):
        lease.check(cid, world.now)
    with pytest.raises(errors.SessionExpired, match=f"ID {cid} had been lost"):
        world.release(session, cid)
    fresh = world.acquire(session, 3)
    assert session.lease is not lease
    assert cid not in fresh
    assert world.operations() == ["OPEN", "NEW"]


def test_a_lost_id_among_others_gives_none_back(world: World, session: Session) -> None:
    (lost,) = world.acquire(session)
    world.now += TTL + SETTINGS.grace_ms / 1000 + 1
    world.keep(session, world.now + 1)
    (live,) = world.acquire(session)
    for others in ([live], [live, live]):
        session.lease._lost[lost] = "the session was lost"
        with pytest.raises(errors.SessionExpired, match="no other was given back"):
            world.release(session, lost, *others, cooldown_ms=60_000)
        assert live in session.lease.cache.used and not session.lease.cache.to_release
    world.release(session, live, cooldown_ms=60_000)


def test_an_answer_that_comes_after_the_lease_renews_nothing(world: World) -> None:
    session = world.session(ttl=1.0)
    world.acquire(session)
    world.now += 2.0
    flow = session.acquire(1, None, world.now + 10, Acquired())
    effect = next(flow)
    with pytest.raises(errors.SessionExpired, match="longer to answer"):
        while True:
            # Each answer takes longer than the lease lasts.
            if isinstance(effect, Send):
                reply = world.apply(effect.request)
                world.now += 1.2
            else:
                reply = world.perform(effect)
            effect = flow.send(reply)
    assert world.now < 10_000


def test_the_manager_expires_later_than_the_client(world: World, session: Session) -> None:
    world.acquire(session)
    world.fates = ["lost"] * 1000
    world.keep(session, session.lease.deadline)
    assert world.held() > 0
    world.now += SETTINGS.grace_ms / 1000 - 0.001
    assert world.held() > 0
    world.now += 2
    assert world.held() == 0


def test_a_manager_that_forgot_is_a_new_session(world: World, session: Session) -> None:
    (cid,) = world.acquire(session)
    lease = session.lease
    world.restart()
    world.keep(session, world.now + TTL / 2)
    with pytest.raises(errors.SequenceLost, match="another registry"):
        lease.check(cid, world.now)
    assert world.acquire(session)
    assert session.lease is not lease


def test_two_managers_in_turns(world: World, session: Session) -> None:
    """Ours still answers, too: that is no restart, but a load balancer."""
    world.acquire(session)
    lease, ours = session.lease, world.service
    world.restart()
    flow = session.acquire(5, None, world.now + 10, Acquired())
    reply: Reply | None = None
    services = [world.service, world.service, ours]
    with pytest.raises(errors.RegistryMismatch, match="load balancer"):
        while True:
            effect = flow.send(reply) if reply is not None else next(flow)
            world.service = services.pop(0)
            reply = world.perform(effect)
    assert session.lease is lease
    assert world.acquire(session)


# ---- Answers that cannot be


@pytest.mark.parametrize("said", [[5, 6], [], [5, 6, 0], [1, 2, 3, 4]])
def test_a_new_that_is_answered_with_other_than_was_asked_for(
    world: World, session: Session, said: list[int]
) -> None:
    """Nothing is used of it; then the manager is asked what it really did."""
    cids = world.acquire(session, 2)
    world.lies[Operation.NEW] = Reply(as_ids(said))
    with pytest.raises(errors.ProtocolError, match="asked for"):
        world.acquire(session, 100)
    world.operations()
    assert not set(world.acquire(session, 100)) & set(cids)
    assert world.operations()[0] == "HELD"
    assert world.held() == len(session.lease.cache.known())


def test_a_delete_that_is_refused_though_we_hold_them(world: World, session: Session) -> None:
    """What the manager counts as ours goes back all the same."""
    cids = world.acquire(session, 3)
    world.release(session, *cids, cooldown_ms=10_000)
    refused = errors.NotHeld("nobody holds it")
    refused.answered = True
    world.lies[Operation.DELETE] = Reply(error=refused)
    world.operations()
    world.keep(session, world.now)
    assert world.operations()[:3] == ["DELETE", "HELD", "DELETE"]
    assert world.held() == len(session.lease.cache.known())


def test_an_id_that_the_manager_does_not_count_as_ours_is_lost(
    world: World, session: Session
) -> None:
    one, two = world.acquire(session, 2)
    token, seq = bytes.fromhex(session.lease.token), session.lease._seq + 1
    world.read(
        lambda registry: registry.release(
            as_ids([one]), world.clock(), token=token, seq=seq, ended=True
        )
    )
    world.acquire(session, 100)  # a change of ours is a repeated one now, so we ask
    with pytest.raises(errors.SequenceLost, match="does not count it"):
        session.lease.check(one, world.now)
    session.lease.check(two, world.now)


@pytest.mark.parametrize("said", ["nonsense", "[]", "{}", '{"pool": {"first": 1}}'])
def test_a_status_that_is_none(world: World, session: Session, said: str) -> None:
    world.acquire(session)
    world.lies[Operation.STATUS] = Reply(as_ids([]), said)
    with pytest.raises(errors.ProtocolError, match="status"):
        world.run(session, session.pool(world.now + 10))
    pool = world.run(session, session.pool(world.now + 10))
    assert pool == range(1, SETTINGS.capacity + 1)
    world.operations()
    assert world.run(session, session.pool(world.now + 10)) is pool
    assert world.operations() == []


def test_others_see_gone_what_is_leaving_in_spite_of_a_lost_answer(
    world: World, session: Session
) -> None:
    cids = world.acquire(session, 3)
    world.release(session, *cids, cooldown_ms=10_000)
    world.fates = ["lost"]
    world.operations()
    status = world.run(session, session.status(world.now + 10))
    assert world.operations() == ["DELETE", "HELD", "DELETE", "STATUS"]
    assert status["held"] == len(session.lease.cache.known())
    assert status["cooling"] == 3


# ---- Lost answers


@pytest.mark.parametrize("fate", ["lost", "unanswered", "late"])
def test_a_new_without_an_answer(world: World, session: Session, fate: str) -> None:
    world.acquire(session)
    world.operations()
    world.fates = [fate]
    cids = world.acquire(session, 10)
    assert world.operations()[:2] == ["NEW", "HELD"]
    for request in world.late:
        assert isinstance(world.apply(request).error, errors.Repeated)
    assert world.held() == len(session.lease.cache.known())
    assert len(set(cids)) == 10
    # Those of the lost answer are in the cache.
    if fate == "unanswered":
        assert world.operations() == []


@pytest.mark.parametrize("fate", ["lost", "unanswered", "late"])
def test_a_delete_without_an_answer(world: World, session: Session, fate: str) -> None:
    cids = world.acquire(session, 10)
    world.release(session, *cids[:5], cooldown_ms=10_000)
    world.fates = [fate]
    world.operations()
    world.keep(session, world.now + 3)
    expected = ["DELETE", "HELD"] + ["DELETE"] * (fate != "unanswered")
    assert world.operations()[: len(expected)] == expected
    for request in world.late:
        assert isinstance(world.apply(request).error, errors.Repeated)
    assert world.held() == len(session.lease.cache.known())
    assert session.lease.cache.used == set(cids[5:])


def test_an_answer_is_waited_for_no_longer_than_was_said(world: World, session: Session) -> None:
    world.acquire(session)
    world.fates = ["lost"] * 1000
    began = world.now
    with pytest.raises(errors.Unavailable):
        world.acquire(session, 10)
    assert 5 < world.now - began <= 10.5
    pauses = len(world.operations())
    assert pauses < 20


def test_a_wrong_address_shows_at_once(world: World, session: Session) -> None:
    world.fates = ["lost"] * 10
    with pytest.raises(errors.Unavailable):
        world.acquire(session)
    assert world.operations() == ["OPEN"]


def test_a_session_that_turns_out_to_be_gone_after_some_lost_answers(
    world: World, session: Session
) -> None:
    world.acquire(session)
    lease = session.lease
    world.now += TTL + SETTINGS.grace_ms / 1000 + 1
    world.fates = ["lost"] * 4
    assert world.acquire(session)
    assert session.lease is not lease


def test_an_open_that_comes_late_opens_nothing_that_is_ours(world: World, session: Session) -> None:
    """The session has expired; a second copy of its OPEN makes one of another generation."""
    cids = world.acquire(session, 3)
    lease = session.lease
    opened = world.sent[0]
    world.now += TTL + SETTINGS.grace_ms / 1000 + 1
    assert world.held() == 0
    world.apply(opened)
    assert not set(world.acquire(session, 3)) & set(cids)
    assert session.lease is not lease
    assert "under its name" in lease.lost_why


def test_an_id_that_was_lost_may_be_ours_again() -> None:
    world = World(Settings(first=1, capacity=3, max_sessions=10, fresh=True))
    session = world.session(TTL)
    cids = world.acquire(session, 3)
    world.now += TTL + SETTINGS.grace_ms / 1000 + 1
    assert world.held() == 0
    world.now += SETTINGS.unended_cooldown_ms / 1000
    world.fates = ["ok", "ok", "ok", "unanswered"]
    assert sorted(world.acquire(session, 3)) == cids
    assert world.operations()[-5:] == ["RENEW", "OPEN", "NEW", "NEW", "HELD"]
    world.release(session, *cids)


def test_a_handover_is_waited_for(world: World, session: Session) -> None:
    world.acquire(session)
    old = world.service._holder._registry
    world.service._holder._registry = None
    taken = Acquired()
    flow = session.acquire(5, None, world.now + 10, taken)
    reply: Reply | None = None
    refused = 0
    try:
        while True:
            effect = flow.send(reply) if reply is not None else next(flow)
            reply = world.perform(effect)
            if isinstance(effect, Send) and reply.error is not None:
                assert isinstance(reply.error, errors.Unavailable) and reply.error.answered
                refused += 1
                if refused == 4:
                    world.service._holder._registry = old
    except StopIteration:
        assert len(taken) == 5
    assert world.operations()[-5:] == ["NEW"] * 5


def test_a_flow_that_is_broken_off_leaves_a_doubt_and_no_block(
    world: World, session: Session
) -> None:
    world.acquire(session)
    flow = session.acquire(5, None, world.now + 10, Acquired())
    effect = next(flow)
    assert isinstance(effect, Send)
    world.apply(effect.request)
    flow.close()
    world.operations()
    assert len(world.acquire(session, 5)) == 5
    assert world.operations() == ["HELD"]
    assert world.held() == len(session.lease.cache.known())


def test_one_change_at_a_time(world: World, session: Session) -> None:
    world.acquire(session)
    first = session.acquire(5, None, world.now + 10, Acquired())
    second = session.acquire(5, None, world.now + 10, Acquired())
    one = next(first)
    assert isinstance(one, Send)
    assert isinstance(next(second), Idle)
    with pytest.raises(StopIteration):
        first.send(world.apply(one.request))
    two = second.send(Reply())
    assert isinstance(two, Send)
    seqs = [one.request.parameters["seq"], two.request.parameters["seq"]]
    assert seqs == sorted(set(seqs))
    world.now += 11
    third = session.acquire(500, None, session.now() - 1, Acquired())
    with pytest.raises(errors.Unavailable, match="other requests come first"):
        next(third)


# ---- Closing


@pytest.mark.parametrize("in_use", [False, True])
def test_closing_gives_everything_back(world: World, session: Session, in_use: bool) -> None:
    (cid,) = world.acquire(session)
    if not in_use:
        world.release(session, cid)
    world.run(session, session.close(world.now + 10))
    assert world.held() == 0
    (request,) = [each for each in world.sent if each.operation is Operation.CLOSE]
    assert request.parameters["ended"] is not in_use
    world.operations()
    world.run(session, session.close(world.now + 10))
    assert world.operations() == []
    with pytest.raises(errors.InvalidArgument, match="closed"):
        world.acquire(session)


@pytest.mark.parametrize("left", ["leaving", "sent", "asking", "in doubt"])
def test_closing_says_ended_only_if_nothing_is_left(
    world: World, session: Session, left: str
) -> None:
    """As when the manager does not answer to what gives the rest back."""
    (cid,) = world.acquire(session, 1, 60_000)
    if left == "asking":
        world.idle["model"] = errors.Unavailable("away")
        session.lease.release_unended(cid, "model", 10.0, 1.0)
    else:
        world.release(session, cid, cooldown_ms=60_000)
        world.lies[Operation.DELETE] = Reply(error=errors.Unavailable("no answer"))
        if left != "leaving":
            world.lies[Operation.HELD] = Reply(error=errors.Unavailable("no answer"))
            with pytest.raises(errors.Unavailable):
                world.run(session, session.lease.release(world.now + 1))
        if left == "in doubt":
            session.lease.cache.releasing = []
    world.run(session, session.close(world.now + 10))
    (request,) = [each for each in world.sent if each.operation is Operation.CLOSE]
    assert request.parameters["ended"] is False


def test_what_is_held_is_asked_for_so_that_nothing_late_can_act(
    world: World, session: Session
) -> None:
    world.acquire(session)
    world.fates = ["late"]
    world.acquire(session, 500)
    (request,) = [each for each in world.sent if each.operation is Operation.HELD]
    (late,) = world.late
    assert request.parameters["seq"] == late.parameters["seq"] + 1
    answer = world.apply(late)
    assert isinstance(answer.error, errors.Repeated)


def test_closing_what_was_never_opened_sends_nothing(world: World, session: Session) -> None:
    world.run(session, session.close(world.now + 10))
    assert world.operations() == []


def test_closing_without_a_manager_is_quick(world: World, session: Session) -> None:
    world.acquire(session)
    world.fates = ["lost"] * 100
    began = world.now
    world.run(session, session.close(world.now + 10))
    assert world.now - began < 1.5


def test_the_token_is_never_shown(world: World, session: Session) -> None:
    world.acquire(session)
    assert session.lease.token and session.lease.token not in f"{session!r}{session}"
