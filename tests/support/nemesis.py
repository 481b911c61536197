"""The nemesis of a simulated fleet: what breaks, when, and what a seed lets go on for ever."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from nodes import CLIENTS, TTL_S, Node
from sometimes import sometimes
from streams import SimStream

from cidalloc import protocol
from cidalloc.codes import Operation
from cidalloc.conformance import recorder

if TYPE_CHECKING:
    from fleet import Fleet

GRACE_S = 2.0
FAULTS = ["freeze", "freeze all", "kill", "cut", "cut all", "manager", "stop", "slow", "moved"]
PROVOKED = ["freeze", "freeze", "freeze", "kill", "cut", "manager", "moved"]  # just before END
DRAINS = 0.2  # of the fleets that are drained once for a while
POWER = 0.2  # of the fleets in which the manager's machine loses it once
TAKEOVERS = 0.3  # of the fleets whose manager's model is reloaded while faults happen
WINDOW_S, WITHIN_S = 12.0, 5.0  # for the END of the dead, and after DEAD was sent
LONG_S = 38.0, 34.0  # the same in half of the fleets with a power cut: longer than a session lives
LASTING = ["", "deaf", "full", "refuses", "few"]
"""What stays when all other faults are over: nothing; a client to which no answer comes; a full
disk; a manager that refuses half of the requests; a pool with few IDs."""
CAPACITY = {"few": 14, "full": 2080}  # 2047 have room in the file before it grows
_IN_A_ROW = 3  # requests of one kind of a client that are refused
_STRANGER = "5" * 32


class Nemesis:
    """What happens to one fleet.

    Attributes:
        fate: draws what happens to the machine of the manager.
        ahead: the limits of clients' caches, by their names.
        dead_ids: how many IDs of the dead the manager remembers.
        calms: all faults end after a while but the ``lasting`` one.
        refusing: the manager refuses requests.
    """

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet, self.dice = fleet, fleet.dice
        self.fate = random.Random(seed + 10**6)
        self._operator = random.Random(seed + 2 * 10**6)
        # What came later draws here, so that a seed is still nearly what it was.
        self.more = more = random.Random(seed + 3 * 10**6)
        self._power = self.fate.random() < POWER
        self.window, self.within = WINDOW_S, WITHIN_S
        if self._power and self.fate.random() < 0.5:
            self.window, self.within = LONG_S
        self.ahead: dict[str, int] = {}
        if self._power:
            self.ahead[f"client{more.randrange(CLIENTS)}"] = more.choice([1, 2])
        self.dead_ids = 5 if more.random() < 0.2 else 100_000
        # With the long times of END, IDs cool for longer than a calm is worth.
        self.calms = more.random() < 0.45 and not self.long
        self.lasting = more.choice(LASTING) if self.calms else ""
        if self._power and self.lasting == "full":
            self.lasting = ""  # a stranger has most of the IDs there, and would lose them
        self.refusing = False
        self._refused: Counter[tuple[str, Operation]] = Counter()  # in a row

    @property
    def long(self) -> bool:
        return self.within != WITHIN_S

    def begin(self) -> None:
        """Plan the first faults."""
        fleet, now = self.fleet, self.fleet.now
        fleet.at(now + 5.0, self.trouble)
        fleet.at(now + 5.0, self.theft)
        if self.lasting == "full":
            fleet.disk.full = True
            fleet.manage(opening(ttl_s=600.0))
            for seq in range(1, 4):  # so much that the clients need room on the disk
                what = {"session": _STRANGER, "seq": seq, "count": 675}
                fleet.manage(protocol.Request(Operation.NEW, parameters=what))
        if self._power and not self.long:
            self._when(now + self.fate.uniform(10.0, 35.0), self._without_room, self.power)
        elif self._power:  # once END is about to be sent
            fleet.at(now + 6.0, lambda: self.harm(fleet.nodes[0], "kill", 0.0))
        if self._operator.random() < DRAINS:
            ready = self._in_doubt if self.more.random() < 0.7 else _at_once
            self._when(now + self._operator.uniform(5.0, 50.0), ready, self.drain)
        if self.more.random() < TAKEOVERS:
            then = now + self.more.uniform(5.0, 80.0)
            for _ in range(self.more.choice([1, 2])):
                fleet.at(then, fleet.replace_manager)
                then += self.more.uniform(0.02, 0.08)

    def _in_doubt(self) -> bool:
        return any(node.client.session.lease.doubtful for node in self.fleet.nodes)

    def _without_room(self) -> bool:
        caches = [node.client.session.lease.cache for node in self.fleet.nodes]
        return any(0 < each.ahead <= len(each.fresh) + len(each.cooling) for each in caches)

    def _when(self, then: float, ready: Callable[[], bool], what: Callable[[], None]) -> None:
        """Do something at a time, or when it is ready, within ten seconds after that."""
        fleet, until = self.fleet, then + 10.0

        def look() -> None:
            if ready() or fleet.now >= until:
                what()
            else:
                fleet.at(fleet.now + 0.02, look)

        fleet.at(then, look)

    def end(self) -> None:
        """End all faults but the lasting one. Clients that are frozen are killed."""
        fleet = self.fleet
        self._power = False
        fleet.drain(False)
        fleet.stopped_until = fleet.moved_until = fleet.slow_until = fleet.now
        for node in list(fleet.nodes):
            node.cut_until = fleet.now
            if fleet.now < node.thaws:
                self.harm(node, "kill", 0.0)
        self.refusing = self.lasting == "refuses"
        if self.lasting == "deaf":
            self.more.choice(fleet.nodes).deaf = True

    def refuses(self, client: str, operation: Operation) -> bool:
        """Whether the manager refuses a request: half of them, but not many in a row."""
        if not self.refusing:
            return False
        key = client, operation
        refused = self._refused[key] < _IN_A_ROW and self.more.random() < 0.5
        self._refused[key] = self._refused[key] + 1 if refused else 0
        sometimes("half is refused", refused)
        return refused

    def trouble(self) -> None:
        """One fault, and the next one later."""
        if self.fleet.calm:
            return
        dice = self.dice
        node, fault = dice.choice(self.fleet.nodes), dice.choice(FAULTS)
        seconds = dice.choice([0.3, 3.0, TTL_S, TTL_S + GRACE_S, 2 * TTL_S])
        self.harm(node, fault, seconds * dice.uniform(0.5, 1.5))
        self.fleet.at(self.fleet.now + dice.uniform(1.0, 12.0), self.trouble)

    def provoke(self, node: Node, stream: SimStream) -> None:
        """Maybe do something while an asker holds an answer, just before it sends END."""
        dice, fleet = self.dice, self.fleet
        if fleet.calm:
            return
        left = stream.closes - fleet.now - dice.uniform(0, 0.2)  # END comes at the last moment
        if self._power and self.long:
            self._power = False
            fleet.at(fleet.now + dice.uniform(0, 0.3), self.power)
            self.harm(node, "freeze", left)
        elif dice.random() < 0.08:
            fleet.counts["provoked"] += 1
            seconds = dice.choice([left, left, left, dice.uniform(0, 2) * (self.window + TTL_S)])
            self.harm(node, dice.choice(PROVOKED), seconds)

    def harm(self, node: Node, fault: str, seconds: float) -> None:
        """Begin a fault, which is over after so many seconds."""
        fleet = self.fleet
        fleet.counts[fault] += 1
        until = fleet.now + seconds
        if fault == "kill":
            node.alive = False
            if self.more.random() < 0.5 and not fleet.calm:  # its last DELETE may come again, late
                fleet.at(fleet.now + self.more.uniform(5.0, 25.0), node.last_release)
            name = f"{node.name.split('.')[0]}.{next(fleet.numbers)}"
            fleet.nodes[fleet.nodes.index(node)] = Node(fleet, name)
        elif fault == "manager":
            self.dice.choice([fleet.crash_manager, fleet.end_manager])()
            fleet.at(fleet.now + self.dice.choice([0.1, seconds / 2]), fleet.begin_manager)
        elif fault == "stop":  # of its process, which goes on later
            fleet.stopped_until = until
        elif fault == "moved":
            fleet.moved_until = until
        elif fault == "slow":
            fleet.slow_until = until
        else:
            for each in fleet.nodes if fault.endswith(" all") else [node]:
                if fault.startswith("freeze"):
                    each.frozen_until = until
                    each.thaws = max(each.thaws, until)
                else:
                    each.cut_until = until

    def power(self) -> None:
        """Cut the power of the manager's machine, whose clock begins anew. The model's goes on."""
        fleet = self.fleet
        sometimes("power cut with a full ID cache", self._without_room())
        fleet.crash_manager()
        fleet.disk.cut()
        assert recorder.writer is not None
        recorder.writer.note("power")
        fleet.booted = recorder.booted = fleet.now
        fleet.drained = False
        fleet.at(fleet.now + self.fate.uniform(0.1, 3.0), fleet.begin_manager)

    def drain(self) -> None:
        """Somebody drains the server, and changes his mind after a while."""
        fleet = self.fleet
        if not fleet.runs:
            fleet.at(fleet.now + 0.5, self.drain)
            return
        sometimes("drain with a session in doubt", self._in_doubt())
        fleet.drain(True)
        fleet.at(fleet.now + self._operator.uniform(1.0, 20.0), lambda: fleet.drain(False))

    def theft(self) -> None:
        """Somebody tries to give back what is another's: by a session of its own, and without."""
        fleet = self.fleet
        stolen = protocol.as_ids([self.dice.randint(1, 40)])
        fleet.manage(opening())
        own = {"session": _STRANGER, "seq": 9 + next(fleet.numbers), "cooldown_ms": 0}
        for parameters in (own, {"cooldown_ms": 0}):
            reply = fleet.manage(protocol.Request(Operation.DELETE, stolen, parameters))
            fleet.counts["thefts"] += reply.error is None or reply.error.answered
        fleet.at(fleet.now + self.dice.uniform(0.5, 2.0), self.theft)


def opening(ttl_s: float = TTL_S) -> protocol.Request:
    """Return the request that opens the session of a stranger."""
    what = {"session": _STRANGER, "ttl_ms": int(ttl_s * 1000)}
    return protocol.Request(Operation.OPEN, parameters=what)


def _at_once() -> bool:
    return True
