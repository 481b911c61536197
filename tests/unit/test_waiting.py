"""Calls that wait for IDs, in virtual time: who is served, and when."""

from __future__ import annotations

import math

import pytest
from crowd import Call, Crowd, Task

from cidalloc import errors, protocol
from cidalloc.client.core.effects import Idle, Reply, Send
from cidalloc.client.core.session import Session
from cidalloc.codes import Operation
from cidalloc.manager.settings import Settings


@pytest.fixture
def crowd() -> Crowd:
    return Crowd()


@pytest.fixture
def holder(crowd: Crowd) -> Session:
    """A client that holds both IDs, and caches none."""
    holder = crowd.client(ahead=0)
    assert crowd.take(holder, 2) == [1, 2]
    return holder


def test_without_waiting_it_fails_at_once(crowd: Crowd, holder: Session) -> None:
    crowd.release(holder, 1)
    other = crowd.client()
    for wait in (None, 0.0):
        call = crowd.call(other, wait=wait)
        assert isinstance(call.error, errors.Exhausted) and call.error.due_s == 3.0
        assert call.done_at == crowd.world.now


def test_an_id_is_there_when_it_is_due(crowd: Crowd, holder: Session) -> None:
    call = crowd.call(crowd.client(), wait=60.0)
    began = crowd.world.now
    crowd.wait(10.0)
    assert call.done_at is None
    crowd.release(holder, 2)
    crowd.wait(10.0)
    assert call.cids == [2]
    assert call.done_at == pytest.approx(began + 13.0, abs=0.03)


def test_it_asks_seldom(crowd: Crowd, holder: Session) -> None:
    other = crowd.client()
    crowd.call(other, wait=100.0)
    crowd.world.operations()
    crowd.wait(50.0)
    asked = crowd.world.operations().count("NEW")
    assert 45 < asked < 60, "about once a second"


def test_the_time_is_over(crowd: Crowd, holder: Session) -> None:
    other, began = crowd.client(), crowd.world.now
    call = crowd.call(other, wait=7.3)
    crowd.wait(6.0)
    crowd.release(holder, 1)
    crowd.wait(6.0)
    assert call.done_at == pytest.approx(began + 7.3)
    assert isinstance(call.error, errors.Exhausted)
    assert "the next is due in 1.7 s; waited 7.3 s" in str(call.error)
    assert call.error.due_s == pytest.approx(1.7)
    assert crowd.world.held() == 1
    assert crowd.take(crowd.client()) == [1], "its place is gone, too"


def test_a_last_try_when_the_time_is_over(crowd: Crowd, holder: Session) -> None:
    call = crowd.call(crowd.client(), wait=3.0)
    crowd.release(holder, 1)
    crowd.wait(3.0)
    assert call.cids == [1]


def test_calls_are_served_in_their_order(crowd: Crowd, holder: Session) -> None:
    other = crowd.client()
    calls = [crowd.call(other, wait=600.0) for _ in range(6)]
    for cid, call in zip([1, 2, 1, 2, 1, 2], calls, strict=True):
        crowd.wait(2.0)
        assert all(each.done_at is None for each in calls[calls.index(call) :])
        crowd.release(holder if cid not in other.lease.cache.used else other, cid)
        crowd.wait(3.1)
        assert call.cids == [cid]


def test_clients_are_served_in_their_order(crowd: Crowd, holder: Session) -> None:
    clients = [crowd.client(ahead=0) for _ in range(6)]
    calls = []
    for client in clients:
        calls.append(crowd.call(client, wait=600.0))
        crowd.wait(0.2)
    late = crowd.call(crowd.client(), wait=0.5)
    for client, call in zip([holder, holder, *clients], calls, strict=False):
        crowd.release(client, *client.lease.cache.used)
        crowd.wait(6.0)
        assert call.cids
        assert len([each for each in calls if each.done_at]) >= calls.index(call) + 1
    done = [call.done_at for call in calls]
    assert done == sorted(done, key=lambda at: at or math.inf)
    assert isinstance(late.error, errors.Exhausted) and late.error.others_wait


@pytest.mark.parametrize("ahead", [0, 8])
def test_clients_with_many_calls_take_turns(crowd: Crowd, holder: Session, ahead: int) -> None:
    one, other = crowd.client(ahead=ahead), crowd.client(ahead=ahead)
    ones = [crowd.call(one, wait=600.0) for _ in range(3)]
    crowd.wait(0.5)
    others = [crowd.call(other, wait=600.0) for _ in range(3)]
    served = []
    for _ in range(6):
        user = next(each for each in (holder, one, other) if each.lease.cache.used)
        crowd.release(user, sorted(user.lease.cache.used)[0])
        crowd.wait(5.0)
        served = [each for each in crowd.finished if each in ones + others]
    assert served == [ones[0], others[0], ones[1], others[1], ones[2], others[2]]


def test_a_call_that_does_not_wait_takes_nothing_from_those_that_do(
    crowd: Crowd, holder: Session
) -> None:
    """Neither at the manager nor out of the cache."""
    call = crowd.call(holder, wait=60.0)
    crowd.release(holder, 1)
    crowd.wait(1.0)
    stranger = crowd.call(crowd.client())
    assert isinstance(stranger.error, errors.Exhausted)
    own = crowd.call(holder)
    assert isinstance(own.error, errors.Exhausted)
    assert "calls before this one wait" in str(own.error)
    assert own.error.due_s is not None
    crowd.wait(3.0)
    assert call.cids == [1]


def test_an_own_release_reaches_the_manager_meanwhile(crowd: Crowd, holder: Session) -> None:
    call = crowd.call(holder, wait=60.0)
    crowd.wait(0.5)
    crowd.release(holder, 1, cooldown_ms=4_000)
    assert crowd.world.held() == 1
    crowd.wait(4.1)
    assert call.cids == [1]


def test_many_ids_are_not_starved_by_single_ones(crowd: Crowd, holder: Session) -> None:
    call = crowd.call(crowd.client(), 2, wait=60.0)
    small = crowd.client(ahead=0)
    for cid in (1, 2):
        crowd.release(holder, cid)
        single = crowd.call(small, wait=4.0)
        crowd.wait(5.0)
        if cid == 1:
            assert isinstance(single.error, errors.Exhausted)
    assert call.cids == [1, 2]


def test_a_cancelled_call_lets_the_next_one_go_first(crowd: Crowd, holder: Session) -> None:
    other = crowd.client()
    first, second, third = (crowd.call(other, wait=60.0) for _ in range(3))
    second.cancel()
    assert len(other.line) == 2
    crowd.wait(1.0)
    first.cancel()
    crowd.release(holder, 1)
    crowd.wait(5.0)
    assert third.cids == [1]
    assert not other.line


def test_a_call_that_is_cancelled_at_any_effect_loses_no_id() -> None:
    """Its last request may have been answered with an ID."""
    for at in range(1, 30):
        crowd = Crowd()
        holder = crowd.client(ahead=0)
        crowd.take(holder, 2)
        other = crowd.client()
        call = Call(other, 1, 60.0)
        crowd.release(holder, 1)
        flow, effect, steps = call.flow, next(call.flow), 1
        try:
            while steps < at:
                effect = flow.send(crowd.world.perform(effect))
                steps += 1
        except StopIteration:
            assert steps > 5
            return
        if not isinstance(effect, Idle):
            crowd.world.perform(effect)  # it arrives
        call.cancel()
        crowd.wait(10.0)
        assert crowd.take(other) == [1]
        assert other.lease.cache.known() == {1}
        assert not other.line and other.lease.starved is None
    raise AssertionError("it never got an ID")


def test_a_client_that_dies_holds_others_up_for_seconds(crowd: Crowd, holder: Session) -> None:
    dead, other = crowd.client(), crowd.client()
    crowd.call(dead, wait=600.0)
    call = crowd.call(other, wait=60.0)
    for task in crowd.tasks:
        if task.session is dead:
            task.cancel()
    crowd.release(holder, 1)
    began = crowd.world.now
    crowd.wait(10.0)
    assert call.cids == [1]
    assert call.done_at is not None and call.done_at - began < 5.0


def test_closing_ends_all_waiting(crowd: Crowd, holder: Session) -> None:
    other = crowd.client()
    calls = [crowd.call(other, wait=600.0) for _ in range(3)]
    crowd.wait(1.0)
    began = crowd.world.now
    crowd.tasks.append(Task(other, other.close(began + 10)))
    crowd.settle()
    for call in calls:
        assert isinstance(call.error, errors.InvalidArgument)
        assert call.done_at == began


def test_a_manager_that_is_away_ends_the_waiting(crowd: Crowd, holder: Session) -> None:
    other, began = crowd.client(), crowd.world.now
    calls = [crowd.call(other, wait=wait) for wait in (100.0, 100.0, 5.0)]
    crowd.wait(1.0)
    crowd.away = True
    crowd.wait(50.0)
    for call, kind, seconds in zip(
        calls, (errors.Unavailable, errors.Unavailable, errors.Exhausted), (12, 22, 5), strict=True
    ):
        assert isinstance(call.error, kind)
        assert call.done_at is not None and call.done_at <= began + seconds


def test_a_manager_that_restarts_has_a_new_line(crowd: Crowd) -> None:
    """Without a file it forgets the sessions, too."""
    holder = crowd.client(ahead=0)
    crowd.take(holder, 2)
    call = crowd.call(crowd.client(), wait=60.0)
    crowd.wait(2.0)
    crowd.world.restart()
    crowd.wait(20.0)
    assert call.cids


def test_a_manager_that_knows_no_places(crowd: Crowd, holder: Session) -> None:
    """An earlier version ignores the parameter, and rounds the time until the next ID is due."""
    apply = crowd.world.apply

    def earlier(request: protocol.Request) -> Reply:
        known = {name: each for name, each in request.parameters.items() if name != "wait_ms"}
        reply = apply(protocol.Request(request.operation, request.ids, known))
        if isinstance(reply.error, errors.Exhausted) and reply.error.due_s is not None:
            words = str(reply.error).split("the next is")[0]
            error = errors.Exhausted(f"{words}the next is due in {reply.error.due_s:.1f} s")
            error.answered = True
            return Reply(error=error)
        if request.operation is Operation.RENEW and reply.error is None:
            return Reply(reply.output[:2])
        return reply

    crowd.world.apply = earlier  # type: ignore[method-assign]
    other = crowd.client()
    calls = [crowd.call(other, wait=60.0) for _ in range(2)]
    crowd.wait(0.21)
    crowd.release(holder, 1)
    crowd.wait(0.53)
    crowd.release(holder, 2)
    crowd.wait(4.0)
    assert [call.cids for call in calls] == [[1], [2]]
    crowd.wait(100.0)
    assert other.lease.opened


def test_calls_with_a_time_limit_stand_in_line_only_if_they_have_to(crowd: Crowd) -> None:
    crowd = Crowd(Settings(first=1, capacity=1000, fresh=True))
    client = crowd.client()
    calls = [crowd.call(client, wait=5.0) for _ in range(20)]
    assert sorted(cid for call in calls for cid in call.cids) == list(range(1, 21))
    assert not client.line and client.lease.starved is None
    assert crowd.world.now == 1000.0


def test_the_place_of_a_cancelled_call_is_not_in_the_way_of_its_client() -> None:
    crowd = Crowd(Settings(first=1, capacity=2, cooldown_ms=0, fresh=True))
    holder, other = crowd.client(ahead=0), crowd.client(ahead=0)
    crowd.take(holder, 2)
    call = crowd.call(other, wait=60.0)
    crowd.wait(1.0)
    call.cancel()
    crowd.release(holder, 1)
    assert isinstance(crowd.call(crowd.client()).error, errors.Exhausted), "it is still there"
    assert crowd.take(other) == [1]
    crowd.release(holder, 2)
    assert crowd.take(crowd.client()) == [2]


def test_the_next_call_takes_over_the_place_of_one_that_gives_up(
    crowd: Crowd, holder: Session
) -> None:
    one, other = crowd.client(), crowd.client()
    crowd.call(one, wait=2.0)
    second = crowd.call(one, wait=60.0)
    rival = crowd.call(other, wait=60.0)
    crowd.wait(2.5)
    crowd.release(holder, 1)
    crowd.wait(6.0)
    assert second.cids == [1]
    assert rival.done_at is None


def test_the_last_call_that_gives_up_leaves_no_place() -> None:
    crowd = Crowd(Settings(first=1, capacity=2, cooldown_ms=0, fresh=True))
    holder = crowd.client(ahead=0)
    crowd.take(holder, 2)
    crowd.call(crowd.client(), wait=2.0)
    crowd.wait(2.0)
    crowd.release(holder, 1)
    assert crowd.take(crowd.client()) == [1]


def test_a_line_that_waits_for_an_answer_only(crowd: Crowd) -> None:
    """Nobody knows yet whether the pool is exhausted, so the error does not say so."""
    client = crowd.client(timeout=5.0, ahead=0)
    crowd.take(client)
    crowd.away = True
    calls = [crowd.call(client, wait=1.0) for _ in range(2)]
    crowd.wait(20.0)
    for call in calls:
        assert isinstance(call.error, errors.Unavailable)
        assert call.done_at is not None and 1004.9 < call.done_at <= 1011.0


def test_whether_the_pool_is_exhausted_is_found_out_again(crowd: Crowd, holder: Session) -> None:
    """A call that gets its IDs at once shows that calls without a time limit may have some, too."""
    other = crowd.client(ahead=0)
    first, second, third = (crowd.call(other, wait=600.0) for _ in range(3))
    crowd.wait(0.1)
    crowd.release(holder, 1, 2)
    crowd.world.now += 3.0
    for call in (first, second):
        assert other.lease.starved is not None
        with pytest.raises(errors.Exhausted, match="calls before this one wait"):
            next(Call(other, 1, None).flow)
        while call.done_at is None:
            crowd.step(call)
    assert third.done_at is None and other.line
    assert other.lease.starved is None
    assert isinstance(next(Call(other, 1, None).flow), Send)


def test_a_place_is_kept_for_as_long_as_it_takes(crowd: Crowd, holder: Session) -> None:
    first, second = (crowd.call(crowd.client(), wait=60.0) for _ in range(2))
    crowd.wait(15.0)
    crowd.release(holder, 1)
    crowd.wait(5.0)
    assert first.cids == [1]
    assert second.done_at is None
