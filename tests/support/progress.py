"""Progress: once the faults of a simulated fleet are over, all that begins ends within a bound.

Bounds are seconds of virtual time. They follow from what was promised: the times of sessions and
of cooldowns, the pauses between tries, and how long the simulated application takes by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemesis import GRACE_S, WINDOW_S
from nodes import DRIFT, IDLE_S, LIMIT_S, TIDIERS, TIMEOUT_S, TTL_S, WAIT_S
from sometimes import sometimes

from cidalloc.codes import Operation
from cidalloc.errors import SessionExpired

if TYPE_CHECKING:
    from fleet import Fleet
    from nodes import Node, SimSequence

    from cidalloc import protocol
    from cidalloc.client.core.effects import Reply

_NET_S = 0.1  # a message there and back, and a step of those who wait for it
_PAUSE_S = TTL_S / 8  # the longest pause between two tries, and the longest try of a heartbeat
_REFUSED = 3  # requests in a row that a manager refuses which refuses half of them
_COOLS_S = max(IDLE_S + max(LIMIT_S, WAIT_S), 9.0)  # without END: what clients announce
_DIES_S = TTL_S + GRACE_S  # after its last request a session has expired

KILL_S = 5.0  # after the calm began, a client is killed
TIDIED_S = _DIES_S + _COOLS_S + WINDOW_S  # after that the model has nothing of it
BACK_S = KILL_S + TIDIED_S + _COOLS_S  # and its IDs, and those of all who died before, are free
TAKEOVER_S = KILL_S + TIDIED_S + 2.0  # the manager then forgets the IDs of the dead
DRAIN_S = BACK_S + 2.0
CALM_S = DRAIN_S + 26.0

BOUNDS = {
    # One try more may begin just before its time is over, for HELD, NEW with and NEW without IDs
    # ahead, each of a sixteenth of the limit.
    "call": TIMEOUT_S * (1 + 3 / 16) + _NET_S,
    # The call before it in line may take as long as one answer.
    "wait": WAIT_S + TIMEOUT_S * (1 + 3 / 16) + _NET_S,
    "request": LIMIT_S + 5.0 + _NET_S,
    # Three requests of the application, and pauses of half a second.
    "sequence": 3 * (_NET_S + 0.5),
    # A call that waits may fail once; then the application pauses for two seconds at most.
    "ID": 2 * WAIT_S + 2.0,
    # The heartbeat is due after 35 % of the ttl. What was begun before may take a try and a pause,
    # and each that is refused a pause: less than a ttl, so that no lease runs out.
    "heartbeat": 0.35 * TTL_S * (1 + DRIFT) + (2 + _REFUSED) * _PAUSE_S,
    # The process before looks each 100 ms, the new one each 5 ms.
    "takeover": 0.1 + 0.005 + _NET_S,
    # A heartbeat tells each client; then its sequences end, and another try returns the IDs.
    "drain": 0.35 * TTL_S * (1 + DRIFT) + 3 * 0.6 + 4 * _PAUSE_S,
    "tidy": TIDIED_S * (1 + DRIFT) + 1.0 + _NET_S,
}


@dataclass(eq=False)
class _Expected:
    what: str
    node: Node | None
    since: float
    limit: float


class Progress:
    """What is expected of one fleet.

    Attributes:
        free_from: the time from which on there are IDs for all.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._expected: dict[_Expected, None] = {}
        self._began = self.free_from = float("inf")

    def expects(
        self, what: str, node: Node | None = None, limit: float | None = None
    ) -> Callable[[], None]:
        """Expect that something ends within its bound. Return what says that it did."""
        limit = BOUNDS[what] if limit is None else limit
        one = _Expected(what, node, self._fleet.now, limit)
        self._expected[one] = None

        def done() -> None:
            self._judge(one)
            self._expected.pop(one, None)

        return done

    def _judge(self, one: _Expected) -> None:
        fleet, since = self._fleet, max(one.since, self._began)
        if one.what == "ID":
            since = max(since, self.free_from)
        if one.what == "sequence" and one.since < self.free_from:
            return
        late = fleet.now - since - one.limit
        counts = one.node is None or (one.node.alive and not one.node.deaf)
        if late > 0 and counts and one in self._expected:
            del self._expected[one]
            who = f" of {one.node.name}" if one.node else ""
            self._wrong(f"{one.what}{who} has not ended {one.limit:.3f} s after {since:.3f}")

    def _wrong(self, text: str) -> None:
        self._fleet.wrong.append(f"P: {text}; it is {self._fleet.now:.3f}")

    # ---- The calm

    def begin(self) -> None:
        """End the faults, and look from now on."""
        fleet, now = self._fleet, self._fleet.now
        fleet.calm, self._began = True, now
        fleet.nemesis.end()
        fleet.begin_manager()
        fleet.at(now + KILL_S, self._kill)
        fleet.at(now + TAKEOVER_S, fleet.replace_manager)
        fleet.at(now + BACK_S, self._all_free)
        fleet.at(now + DRAIN_S, self._drain)
        self._look()

    def _look(self) -> None:
        fleet = self._fleet
        for one in list(self._expected):
            self._judge(one)
        for node in fleet.nodes:
            silent = fleet.now - max(node.heard, self._began)
            opened = node.client.session.lease.opened
            if opened and not node.deaf and silent > BOUNDS["heartbeat"]:
                node.heard = fleet.now
                self._wrong(f"no heartbeat of {node.name} was answered for {silent:.3f} s")
        fleet.at(fleet.now + 0.25, self._look)

    def _kill(self) -> None:
        """Kill a client; what it leaves in the model has to go, and its IDs come back."""
        fleet = self._fleet
        others = [each for each in fleet.nodes if each.name[len("client")] not in TIDIERS]
        node = fleet.nemesis.more.choice([each for each in others if not each.deaf])
        lease = node.client.session.lease
        ready = node.born < self._began and lease._announced_models
        fleet.nemesis.harm(node, "kill", 0.0)
        mine = [core for core, _ in fleet.state.values() if core.plan.lease is lease and core.dead]
        if not mine or not ready or fleet.nemesis.dead_ids < 100:
            return
        sometimes("the dead in the calm")
        done = self.expects("tidy")

        def look() -> None:
            left = [core for core, _ in fleet.state.values() if core in mine]
            if left:
                fleet.at(fleet.now + 0.1, look)
            else:
                done()

        look()

    def _all_free(self) -> None:
        self.free_from = self._fleet.now

    def _drain(self) -> None:
        fleet = self._fleet
        fleet.drain(True)
        self.free_from = float("inf")
        done = self.expects("drain")
        until = fleet.now + BOUNDS["drain"] + 1.0

        def look() -> None:
            if fleet.held() and fleet.now < until:
                fleet.at(fleet.now + 0.1, look)
                return
            done()
            fleet.drain(False)
            self._all_free()

        look()

    # ---- What clients say

    def failed(self, node: Node, core: SimSequence, error: BaseException) -> None:
        """Note that a request of a sequence failed: none does if it begins in the calm.

        But a lease may run out then that was not renewed since the faults.
        """
        if isinstance(error, SessionExpired) and node.heard < self._began:
            return
        if core.began > self._began and node.alive and not node.deaf:
            self._wrong(f"{core.holder} failed, and nothing is broken: {error}")

    def sends(self, node: Node, request: protocol.Request) -> None:
        """Note that a client sends a request."""
        if request.operation is Operation.RENEW:
            node.tries_again()

    def answered(
        self, node: Node, request: protocol.Request, reply: Reply, heartbeat: bool
    ) -> None:
        """Note an answer, or that none came. The heartbeat may have sent the request."""
        now, beats = self._fleet.now, heartbeat and request.operation is Operation.RENEW
        if reply.error is None:
            node.heard = now
            node.tries_again()
            if beats:
                node.failed, node.beat = 0, now
            return
        node.failed += 1
        if "cooldown_ms" in request.parameters:
            node.failed = 99  # the heartbeat was not over yet, so it counts on
            return
        if beats and node.client.session.lease.opened and now > self._began + KILL_S:
            # It also fails after so long if it is not its turn; that cannot be seen.
            tries = node.failed + int((now - node.beat) / _PAUSE_S) + 1
            pause = min(0.05 * 2 ** (tries - 1), _PAUSE_S)
            node.tries_again()
            node.tries_again = self.expects("another try", node, pause * (1 + DRIFT) + _NET_S)
