"""The manager's figures on Triton's own /metrics.

Each update is a round trip to the server's process (75 to 100 µs), so a thread of its own makes
those that are due, about once a second and for what has changed; no request waits for it.

On a reload, the process that goes and the one that comes live side by side, and a series that one
of them drops is gone for both. So the one that has given the registry away drops its series at
once, and the one that has it makes its own a few seconds later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..codes import Code

__all__ = ["FAMILIES", "Metrics"]

_log = logging.getLogger("cidalloc.metrics")

INTERVAL_S = 1.0
SETTLED = 3
"""How many flushes in a row must see the registry before the series are made."""

Labels = tuple[tuple[str, str], ...]
Figures = Mapping[tuple[str, Labels], float]
"""Values by the name of the family and the labels."""

FAMILIES = {
    "cidmgr_ids": ("gauge", "IDs that are held, or cooling after they were given back"),
    "cidmgr_ids_peak": ("gauge", "The most IDs that were held at once"),
    "cidmgr_capacity": ("gauge", "IDs in the pool"),
    "cidmgr_sessions": ("gauge", "Open sessions: clients"),
    "cidmgr_anonymous": ("gauge", "IDs that are held without a session"),
    "cidmgr_start_time_seconds": ("gauge", "When this process took the registry, in Unix time"),
    "cidmgr_updated_time_seconds": (
        "gauge",
        "When the manager last updated these, in Unix time: it grows while the manager lives",
    ),
    "cidmgr_acquired_total": ("counter", "IDs that were issued"),
    "cidmgr_released_total": ("counter", "IDs that came back, by how"),
    "cidmgr_sessions_expired_total": ("counter", "Sessions that ended without a word"),
    "cidmgr_errors_total": ("counter", "Requests that were answered by an error, by its code"),
}


def series(
    status: Mapping[str, Any], started: float, now: float
) -> dict[tuple[str, Labels], float]:
    """Return the value of each series that a status means.

    Args:
        status: as STATUS says it.
        started: when the process took the registry, in Unix time.
        now: Unix time.
    """
    values: dict[tuple[str, Labels], float] = {
        ("cidmgr_ids", (("state", "held"),)): status["held"],
        ("cidmgr_ids", (("state", "cooling"),)): status["cooling"],
        ("cidmgr_ids_peak", ()): status["peak"],
        ("cidmgr_capacity", ()): status["pool"]["capacity"],
        ("cidmgr_sessions", ()): status["sessions_total"],
        ("cidmgr_anonymous", ()): status["anonymous"],
        ("cidmgr_start_time_seconds", ()): started,
        ("cidmgr_updated_time_seconds", ()): now,
        ("cidmgr_acquired_total", ()): status["acquired"],
        ("cidmgr_sessions_expired_total", ()): status["sessions_expired"],
    }
    for how, count in status["released"].items():
        values["cidmgr_released_total", (("how", how),)] = count
    for code in Code:
        if code.name in status["errors"]:
            values["cidmgr_errors_total", (("code", code.name),)] = status["errors"][code.name]
    return values


class Metrics:
    """Keeps Triton's series in step with the service's figures.

    Args:
        status: returns what STATUS says, or None while another process has the registry.
        model: the manager's name, the label ``model`` of each series.
        family: makes a family: ``pb_utils.MetricFamily``.
        clock: returns Unix time, in seconds.
    """

    def __init__(
        self,
        status: Callable[[], Mapping[str, Any] | None],
        model: str,
        family: Any,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._status = status
        self._model = model
        self._family = family
        self._clock = clock
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, Labels], Any] = {}
        self._sent: dict[tuple[str, Labels], float] = {}
        self._seen = 0
        self._started = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cidalloc-metrics", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, and drop the series."""
        self._stopped.set()
        self._thread.join(2 * INTERVAL_S)

    def _run(self) -> None:
        try:
            while not self._stopped.wait(INTERVAL_S):
                self.flush()
        except Exception as error:
            # As where the server was started with --allow-metrics=false.
            _log.warning("no metrics from now on: %s", error)
        self._drop()

    def flush(self) -> None:
        """Bring the series up to date."""
        status = self._status()
        if status is None:
            self._drop()
            return
        now = self._clock()
        self._seen += 1
        if self._seen < SETTLED:
            return
        if self._seen == SETTLED:
            self._started = now - status["uptime_s"]
        for key, value in series(status, self._started, now).items():
            sent = self._sent.get(key)
            if value == sent:
                continue
            metric = self._metric(*key)
            if FAMILIES[key[0]][0] == "gauge":
                metric.set(value)
            else:
                metric.increment(value - (sent or 0))
            self._sent[key] = value

    def _metric(self, name: str, labels: Labels) -> Any:
        if (name, labels) not in self._series:
            if name not in self._families:
                kind, words = FAMILIES[name]
                kind = self._family.GAUGE if kind == "gauge" else self._family.COUNTER
                self._families[name] = self._family(name=name, description=words, kind=kind)
            self._series[name, labels] = self._families[name].Metric(
                labels={"model": self._model, **dict(labels)}
            )
        return self._series[name, labels]

    def _drop(self) -> None:
        # Series before their families; a new registry's counts begin at zero, as new series do.
        self._series.clear()
        self._families.clear()
        self._sent.clear()
        self._seen = 0
