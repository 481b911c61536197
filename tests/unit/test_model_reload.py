"""A model is loaded anew with another idle time while sequences are on it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import slow_models
import tritonclient.grpc
from servers import Server
from simulation import World
from slow_models import count_up

from cidalloc import errors
from cidalloc.client import Client
from cidalloc.client.core.model_info import KNOWN_S, ModelInfo
from cidalloc.client.core.session import Session
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import export

TTL = 60.0
TIMEOUT = 3.0


@pytest.fixture
def world() -> World:
    world = World(Settings(first=1, capacity=10_000, max_sessions=1000, fresh=True))
    world.idle["model"] = 200.0
    return world


@pytest.fixture
def session(world: World) -> Session:
    return world.session(TTL)


def begin(world: World, session: Session, model: str = "model") -> ModelInfo:
    models = session.models
    known = models.known(model, TIMEOUT, world.now)
    return known or world.run(session, models.look(model, world.now, 1.0))


def give(world: World, session: Session, cid: int, idle: float) -> None:
    session.lease.release_unended(cid, "model", idle, TIMEOUT)


def cooldowns(world: World) -> list[int]:
    """Return for how long the manager was told to let IDs cool, one request after the other."""
    found = [each.parameters.get("cooldown_ms") for each in world.sent]
    return [each for each in found if isinstance(each, int)]


def test_what_is_known_is_not_read_again_for_a_while(world: World, session: Session) -> None:
    for _ in range(3):
        assert begin(world, session).idle_s == 200
    assert world.looks == 1
    world.now += KNOWN_S
    world.idle["model"] = 400.0
    assert begin(world, session).idle_s == 400
    assert world.looks == 2


@pytest.mark.parametrize("now", [400.0, 200.0, 1.0])
def test_an_id_without_end_cools_for_the_idle_time_of_now(
    world: World, session: Session, now: float
) -> None:
    """Of the longer one, since nobody knows on which of the two its last request came."""
    (cid,) = world.acquire(session, 1, 203_000)
    idle = begin(world, session).idle_s
    world.idle["model"] = now
    world.sent.clear()
    give(world, session, cid, idle)
    world.keep(session, world.now)
    assert cooldowns(world) == [int((max(now, 200) + TIMEOUT) * 1000)]
    assert world.held() == len(session.lease.cache.known())


def test_ids_of_a_model_that_is_away_wait_for_it(world: World, session: Session) -> None:
    cids = world.acquire(session, 3, 203_000)
    world.idle["model"] = errors.Unavailable("being loaded")
    world.sent.clear()
    for cid in cids:
        give(world, session, cid, 200)
    world.keep(session, world.now + 5)
    assert set(cids) <= session.lease.cache.known() and not cooldowns(world)
    assert set(cids).isdisjoint(session.lease.cache.fresh)
    world.idle["model"] = 300.0
    world.keep(session, world.now + 5)
    assert set(cooldowns(world)) == {303_000}
    assert set(cids).isdisjoint(session.lease.cache.known())


def test_ids_of_a_model_that_stays_away_cool_for_what_was_known(
    world: World, session: Session
) -> None:
    (cid,) = world.acquire(session, 1, 203_000)
    world.idle["model"] = errors.Unavailable("gone")
    world.sent.clear()
    give(world, session, cid, 200)
    world.keep(session, world.now + 100)
    assert set(cooldowns(world)) == {203_000}
    assert cid not in session.lease.cache.known()


def test_ids_of_a_model_that_keeps_no_sequences_any_more(world: World, session: Session) -> None:
    (cid,) = world.acquire(session, 1, 203_000)
    world.idle["model"] = errors.InvalidArgument("no sequence_batching")
    world.sent.clear()
    give(world, session, cid, 200)
    world.keep(session, world.now)
    assert cooldowns(world) == [203_000]


def test_closing_asks_before_it_gives_back(world: World, session: Session) -> None:
    (cid,) = world.acquire(session, 1, 203_000)
    world.idle["model"] = 500.0
    world.operations()
    give(world, session, cid, 200)
    world.run(session, session.close(world.now + 10))
    assert cooldowns(world) == [503_000]
    assert world.operations() == ["DELETE", "CLOSE"]


def test_closing_without_the_answer_lets_all_cool(world: World, session: Session) -> None:
    """For what was announced, since nothing better is known."""
    (cid,) = world.acquire(session, 1, 203_000)
    world.idle["model"] = errors.Unavailable("gone")
    give(world, session, cid, 200)
    world.run(session, session.close(world.now + 10))
    assert world.sent[-1].parameters["ended"] is False


def test_a_heartbeat_announces_the_longer_idle_time(world: World, session: Session) -> None:
    """So that the IDs cool for long enough if the client dies."""
    world.acquire(session, 1, 203_000)
    begin(world, session)
    world.idle["model"] = 900.0
    world.now += 1
    assert begin(world, session).idle_s == 200, "it was read a second ago"
    session.models.known("model", TIMEOUT / 3, world.now)  # by a sequence that takes less
    world.sent.clear()
    world.keep(session, world.now + TTL / 2)
    assert cooldowns(world) == [903_000]
    assert session.lease.announced_ms == 903_000
    looks = world.looks
    world.keep(session, world.now + TTL)
    assert world.looks == looks, "no sequence has begun since"


def test_a_heartbeat_with_a_model_away(world: World, session: Session) -> None:
    world.acquire(session, 1, 203_000)
    for _ in range(2):
        begin(world, session)
    world.idle["model"] = errors.Unavailable("being loaded")
    world.keep(session, world.now + TTL / 2)
    world.idle["model"] = 900.0
    world.keep(session, world.now + TTL / 2)
    assert session.lease.announced_ms == 903_000
    assert session.lease.deadline > world.now


@pytest.mark.parametrize("sign", ["another version", "forgotten"])
def test_a_sign_of_a_reload(world: World, session: Session, sign: str) -> None:
    begin(world, session)
    world.idle["model"] = 1.0
    for version in ("1", "1"):
        session.models.answered_by("model", version)
    assert begin(world, session).idle_s == 200
    if sign == "forgotten":
        session.models.forget("model")
    else:
        session.models.answered_by("model", "2")
    assert begin(world, session).idle_s == 1


@pytest.mark.server
def test_an_id_is_not_issued_while_the_model_of_now_knows_its_sequence(tmp_path: Path) -> None:
    idle_s, timeout_s = 3.0, 1.0
    slow_models.write(tmp_path, "model", idle_s=1.0)
    pool = Settings(first=7, capacity=1, cooldown_ms=100, unended_cooldown_ms=500, fresh=True)
    export(tmp_path, pool)
    options = ["--model-control-mode=explicit", "--load-model=*"]
    one = count_up(tritonclient.grpc)
    with Server(tmp_path, arguments=options) as server:
        triton = tritonclient.grpc.InferenceServerClient(server.grpc_url)
        with Client(server.grpc_url, ttl=30) as cids:
            with cids.sequence("model", timeout=timeout_s) as sequence:
                sequence.infer(one, end=True)
            slow_models.write(tmp_path, "model", idle_s=idle_s)
            triton.load_model("model")
            time.sleep(0.2)
            with cids.sequence("model", timeout=timeout_s) as sequence:
                sequence.infer(one)
                sent = time.monotonic()
            # Only this one is left, when Triton has forgotten it.
            while True:
                try:
                    with cids.sequence("model", timeout=timeout_s) as another:
                        waited = time.monotonic() - sent
                        assert another.cid == sequence.cid
                        another.infer(one, end=True)
                        break
                except errors.Exhausted:
                    assert time.monotonic() < sent + 30
                    time.sleep(0.05)
            assert waited >= idle_s + timeout_s - 0.1
        triton.close()
