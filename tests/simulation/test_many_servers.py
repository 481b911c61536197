"""Many simulated servers: no ID shared, every client gets on, load and heartbeats are bounded.

`make simulate-fleet` runs larger fleets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import many_servers
import pytest
from many_servers import NOTICE_S, PAUSE_S, World
from sometimes import reached
from virtual_servers import LAG_S, SimTransport

SERVERS, CLIENTS, SUBSET = 20, 300, 4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fleet() -> Iterator[World]:
    reached.clear()
    world = World(1, SERVERS, CLIENTS, SUBSET)
    world.run()
    yield world
    world.close()


def during(world: World, part: str, after: float = 0.0) -> list[dict[str, Any]]:
    parts = [*many_servers.STORY]
    start = world.began[part]
    end = start + many_servers.STORY[parts[parts.index(part)]]
    return [each for each in world.samples if start + after < each["at"] <= end]


def test_no_sequence_meets_the_state_of_another(fleet: World) -> None:
    assert not fleet.wrong
    # All that may go wrong did.
    assert fleet.counts["sequences"] > 10 * CLIENTS
    assert fleet.counts["lost: SequenceLost"] > CLIENTS / 10
    assert fleet.counts["lost: Unavailable"] > CLIENTS / 10
    assert reached["moved before START"] > CLIENTS / 10


def test_every_client_gets_on(fleet: World) -> None:
    """One whose servers are all in the lost zone waits for the names of the others."""
    assert fleet.longest <= NOTICE_S + LAG_S + 30.0 + 5.0
    assert sorted(fleet.waited)[len(fleet.waited) * 99 // 100] < 2.1, "two servers that hang"
    assert len(fleet.waited) > 10 * CLIENTS


def test_the_load_of_a_zone_that_came_back(fleet: World) -> None:
    assert many_servers.share(during(fleet, "a zone is lost")[-1]) == 0
    took = fleet.spread_after(0.4)  # by chance, a zone of seven servers has more or less
    assert took is not None and took < NOTICE_S + LAG_S + 60.0


def test_the_heartbeats(fleet: World) -> None:
    """A session renews each 36 s, and before a sequence if its server was not heard just now."""
    for sample in during(fleet, "20 % come", after=60.0):
        begun = CLIENTS / SERVERS / (PAUSE_S + 40.0)
        assert sample["renewals"] <= sample["sessions"] / 30 + 2 * begun
        assert sample["sessions"] / 60 < sample["renewals"]
        assert sample["sessions"] <= CLIENTS * SUBSET / SERVERS
    assert max(each["most"] for each in fleet.samples) < CLIENTS * SUBSET / SERVERS


def test_a_seed_is_one_story() -> None:
    found = []
    for _ in range(2):
        world = World(5, 6, 30, 3)
        world.run()
        found.append((world.counts, world.waited, world.samples))
        world.close()
    assert found[0] == found[1]


def test_a_guard_that_is_missing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a request goes to whatever has the address now, where another uses its ID."""
    monkeypatch.setattr(SimTransport, "broke", lambda _: False)
    parts = list(many_servers.STORY)
    for name in parts[parts.index("rolling restart") + 1 :]:
        monkeypatch.setitem(many_servers.STORY, name, 0.0)
    world = World(2, SERVERS, CLIENTS, SUBSET)
    world.run()
    assert any("met the state of" in each for each in world.wrong)
    world.close()
