"""A model that adds up what each sequence sends, and notes what must not happen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

__all__ = ["DEAD_END", "AddingModel"]

DEAD_END = 9999
"""The input of END for sequences of the dead."""


class AddingModel:
    """A sequence's inputs are its number times 100 and a number of the request; END is 99.

    Args:
        wrong: where it notes what breaks a promise.
        cooldown_s: no ID begins again earlier after its END.
        now: the time.

    Attributes:
        idle_s: of its configuration; it never forgets a sequence by itself.
        live: the sequence that has an ID, by the ID.
        late: how many requests are on their way with an ID.
        ran: the inputs that it got.
        ends: how many requests had END, by their sequence and whether START was there, too.
    """

    idle_s = 60.0

    def __init__(self, wrong: list[str], cooldown_s: float, now: Callable[[], float]) -> None:
        self._wrong, self._cooldown_s, self._now = wrong, cooldown_s, now
        self.live: dict[int, int] = {}
        self.late: Counter[int] = Counter()
        self.ran: Counter[int] = Counter()
        self.ends: Counter[tuple[int, bool]] = Counter()
        self.dead: set[int] = set()
        self._sums: dict[int, int] = {}
        self._ended_at: dict[int, float] = {}

    @property
    def in_doubt(self) -> set[int]:
        """The IDs that a live sequence has, or a late request."""
        return {*self.live, *(+self.late)} - self.dead

    def config(self, name: str) -> dict[str, Any]:
        """Return its configuration as Triton's JSON."""
        control = {"name": "CORRID", "control": []}
        control["control"] = [{"kind": "CONTROL_SEQUENCE_CORRID", "data_type": "TYPE_UINT64"}]
        return {
            "name": name,
            "max_batch_size": 8,
            "input": [{"name": "INPUT", "data_type": "TYPE_INT32", "dims": ["1"]}],
            "output": [{"name": "OUTPUT", "data_type": "TYPE_INT32", "dims": ["1"]}],
            "sequence_batching": {
                "max_sequence_idle_microseconds": str(int(self.idle_s * 1e6)),
                "control_input": [control],
            },
        }

    def die(self, cids: Iterable[int]) -> None:
        """Let sequences of a client that died have these IDs."""
        for cid in map(int, cids):
            self.live[cid] = self._sums[cid] = 0
            self.dead.add(cid)

    def repeated(self) -> Iterator[str]:
        """Say which requests, and which END, came twice; not those for the dead."""
        for value, times in self.ran.items():
            if times > 1 and value != DEAD_END:
                yield f"the model ran request {value} {times} times"
        for (sequence, start), times in self.ends.items():
            if times > 1 and sequence != DEAD_END // 100:
                yield f"END of sequence {sequence} was sent {times} times, START: {start}"

    def expect(self, parameters: dict[str, Any]) -> None:
        """Note that a request is late."""
        if cid := parameters.get("sequence_id"):
            parameters["late"] = True
            self.late[cid] += 1

    def infer(self, inputs: dict[str, Any], parameters: dict[str, Any]) -> Any:
        """Take a request; raise `ValueError` as Triton refuses it."""
        cid = parameters["sequence_id"]
        self.late[cid] -= bool(parameters.get("late"))
        start, end = (parameters.get(f"sequence_{each}") is True for each in ("start", "end"))
        value = int(inputs["INPUT"].flat[0])
        sequence = value // 100
        has = self.live.get(cid)
        if end:
            self.ends[sequence, start] += 1
        if has is None and not start:
            raise ValueError(
                f"inference request for sequence {cid} to model 'adds' must specify the START flag"
                " on the first request of the sequence"
            )
        if has not in (None, sequence) and cid not in self.dead:
            self._wrong.append(f"ID {cid} of sequence {has} got a request of {sequence}")
        since = self._now() - self._ended_at.pop(cid, float("-inf"))
        if since < self._cooldown_s - 0.02 and value % 100 != 99:
            self._wrong.append(f"ID {cid} began {since:.2f} s after its END")
        self.ran[value] += 1
        self._sums[cid] = value + (0 if start else self._sums[cid])
        self.live[cid] = sequence
        if end:
            del self.live[cid]
            self.dead.discard(cid)
            self._ended_at[cid] = self._now()
        return np.array([[self._sums[cid]]], np.int32)
