"""Two client processes that pick the same ID: Triton's answers, and the sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier

import tritonclient.http
from tritonclient.utils import InferenceServerException

from ...client import Client
from ...errors import Unavailable
from . import MODEL
from .processes import run_at_once
from .sequences import FIRST, SECOND, expected_sums, number

__all__ = ["Lane", "collide", "self_picked_id"]

_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Lane:
    """The values that one client sent, with the status and the sum of each answer."""

    cid: int
    values: tuple[int, ...]
    statuses: list[int] = field(default_factory=list)
    sums: list[int | None] = field(default_factory=list)
    end_status: int = 0
    end_words: str = ""

    @property
    def wrong(self) -> int:
        """Number of sums that differ from those of a separate sequence."""
        expected = expected_sums(self.values)
        return sum(got != want for got, want in zip(self.sums, expected, strict=True))


def self_picked_id(task: int) -> int:
    """Return an ID as many clients pick it: a constant plus the index of the task."""
    return 10086 + task


def collide(http_url: str, *, managed: bool) -> tuple[Lane, Lane]:
    """Run two clients in lockstep, each in its own process, and return what each received.

    Args:
        http_url: ``http://host:port`` of the server. HTTP, since it has a status for each answer.
        managed: whether the manager chooses the IDs; otherwise each client does.
    """
    reports = run_at_once(
        _client, [(http_url, managed, turn, values) for turn, values in enumerate((FIRST, SECOND))]
    )
    for report in reports:
        if report.failure is not None:
            raise Unavailable(f"a client process failed: {report.failure}")
    return reports[0].value, reports[1].value


def _client(
    barrier: Barrier, http_url: str, managed: bool, turn: int, values: tuple[int, ...]
) -> Lane:
    # In turns, so that the numbers are the same in every run.
    def turns() -> Iterator[None]:
        for whose in (0, 1):
            barrier.wait(_TIMEOUT_S)
            if whose == turn:
                yield

    with Client(http_url) as manager:
        # Each process counts its own tasks; this is the first one.
        cid = self_picked_id(task=0)
        for _ in turns():
            cid = manager.acquire() if managed else cid
        lane = Lane(cid, values)
        triton = tritonclient.http.InferenceServerClient(http_url.removeprefix("http://"))

        def send(value: int, start: bool = False, end: bool = False) -> tuple[int, int | None, str]:
            try:
                result = triton.infer(
                    MODEL,
                    number(value, tritonclient.http),
                    sequence_id=lane.cid,
                    sequence_start=start,
                    sequence_end=end,
                )
            except InferenceServerException as error:
                return int(error.status()), None, error.message()
            return 200, int(result.as_numpy("OUTPUT")[0, 0]), ""  # tritonclient accepts only 200

        for step, value in enumerate(values):
            for _ in turns():
                status, total, words = send(value, start=step == 0)
                if step == 0 and status != 200:
                    raise Unavailable(f"no sequence can start on {MODEL}: {words}")
                lane.statuses.append(status)
                lane.sums.append(total)
        for _ in turns():
            lane.end_status, _, lane.end_words = send(0, end=True)
        triton.close()
        if managed:
            manager.release(lane.cid, ended=lane.end_status == 200)
        return lane
