"""Waiting and the ID caches of clients, in virtual time: who gives IDs back, and who keeps them."""

from __future__ import annotations

import pytest
from crowd import TTL, Crowd

from cidalloc.manager.settings import Settings


@pytest.fixture
def crowd() -> Crowd:
    return Crowd()


def test_a_recycled_id_goes_to_the_call_that_waits(crowd: Crowd) -> None:
    client = crowd.client(ahead=2)
    assert crowd.take(client, 2) == [1, 2]
    began = crowd.world.now
    crowd.release(client, 2)
    crowd.wait(0.3)
    call = crowd.call(client, wait=60.0)
    crowd.wait(2.699)
    assert call.done_at is None
    crowd.world.now += 0.002
    assert client.lease.take() == 0, "it is ready, but not for this call"
    crowd.settle()
    assert call.cids == [2]
    assert call.done_at == pytest.approx(began + 3.001)
    assert client.lease.starved is None and not client.line


def test_unused_ids_do_not_stay_with_a_client_that_had_to_wait(crowd: Crowd) -> None:
    """Others may wait for them, and it knows that the pool is small."""
    client = crowd.client()
    crowd.take(client, 2)
    call = crowd.call(client, wait=60.0)
    crowd.release(client, 1)
    crowd.wait(3.1)
    crowd.release(client, *call.cids)
    crowd.wait(0.1)
    assert crowd.world.held() == 1, "at once"
    crowd.wait(15.0)
    crowd.release(client, 2)
    assert crowd.world.held() == 1, "and after some time as usual"


def test_unused_ids_of_others_come_back_at_their_next_heartbeat() -> None:
    settings = Settings(first=1, capacity=8, cooldown_ms=1_000, unended_cooldown_ms=0, fresh=True)
    crowd = Crowd(settings)
    saver = crowd.client(ahead=8)
    crowd.release(saver, *crowd.take(saver, 6))
    assert crowd.world.held() >= 6
    call = crowd.call(crowd.client(ahead=0), 8, wait=100.0)
    began = crowd.world.now
    crowd.wait(100.0)
    assert len(call.cids) == 8
    assert call.done_at is not None and call.done_at - began < TTL * 0.35 + 3.0


def test_a_client_that_waits_does_not_keep_unused_ids_from_those_before_it() -> None:
    settings = Settings(first=1, capacity=6, cooldown_ms=1_000, unended_cooldown_ms=0, fresh=True)
    crowd = Crowd(settings)
    holder, one, other = crowd.client(ahead=0), crowd.client(ahead=0), crowd.client(ahead=8)
    crowd.take(holder, 3)
    crowd.release(other, *crowd.take(other, 3))
    first = crowd.call(one, 4, wait=100.0)
    second = crowd.call(other, 5, wait=100.0)
    crowd.release(holder, 1, 2, 3)
    began = crowd.world.now
    crowd.wait(TTL * 0.35 + 3.0)
    assert len(first.cids) == 4
    crowd.release(one, *first.cids)
    crowd.wait(3.0)
    assert len(second.cids) == 5
    assert second.done_at is not None and second.done_at - began < 30.0


def test_the_first_client_in_line_keeps_the_ids_that_it_has() -> None:
    settings = Settings(first=1, capacity=6, cooldown_ms=1_000, unended_cooldown_ms=0, fresh=True)
    crowd = Crowd(settings)
    holder, one, other = crowd.client(ahead=0), crowd.client(ahead=8), crowd.client(ahead=0)
    crowd.take(holder, 4)
    crowd.release(one, *crowd.take(one, 2))
    first, second = crowd.call(one, 4, wait=100.0), crowd.call(other, wait=100.0)
    crowd.wait(40.0)
    assert second.done_at is None
    crowd.release(holder, 1, 2)
    crowd.wait(3.0)
    assert len(first.cids) == 4
    assert second.done_at is None


def test_a_cache_in_use_is_kept_though_others_wait() -> None:
    settings = Settings(first=1, capacity=8, cooldown_ms=1_000, unended_cooldown_ms=0, fresh=True)
    crowd = Crowd(settings)
    busy = crowd.client(ahead=8)
    crowd.release(busy, *crowd.take(busy, 8))
    crowd.call(crowd.client(), 1, wait=100.0)
    for _ in range(20):
        crowd.wait(3.0)
        cid = busy.lease.take()
        assert cid
        crowd.release(busy, cid)


def test_several_ids_that_become_ready_one_by_one(crowd: Crowd) -> None:
    client = crowd.client(ahead=2)
    crowd.take(client, 2)
    for cid in (1, 2):
        crowd.wait(1.0)
        crowd.release(client, cid)
    call = crowd.call(client, 2, wait=60.0)
    began = crowd.world.now
    crowd.world.operations()
    crowd.wait(10.0)
    assert call.cids == [1, 2]
    assert call.done_at == pytest.approx(began + 3.0)
    assert len(crowd.world.operations()) < 10


def test_unused_ids_stay_while_nobody_waits() -> None:
    crowd = Crowd(Settings(first=1, capacity=8, cooldown_ms=1_000, fresh=True))
    saver = crowd.client(ahead=8)
    crowd.release(saver, *crowd.take(saver, 6))
    crowd.world.operations()
    crowd.wait(28.0)
    assert crowd.world.operations() == ["RENEW"]
    assert crowd.world.held() >= 6
