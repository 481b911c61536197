"""The manager's metrics on Triton's /metrics.

Each update is a round trip to the server's process (75 to 100 µs). A thread updates the changed
values about once a second, so no request waits for an update.

During a reload the old process and the new one run side by side, and if one of them drops a series,
the other loses it, too. So the old process drops its series immediately when it gives the registry
away, and the new process creates its own a few seconds later.
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
"""The series are created when so many flushes in a row have seen the registry."""

Labels = tuple[tuple[str, str], ...]
Figures = Mapping[tuple[str, Labels], float]
"""Values by the name of the family and the labels."""

FAMILIES = {
    "cidmgr_ids": ("gauge", "IDs that are held or cooling"),
    "cidmgr_ids_used": ("gauge", "IDs in use, as clients said with their last heartbeat"),
    "cidmgr_ids_peak": ("gauge", "Maximum number of IDs held at the same time"),
    "cidmgr_capacity": ("gauge", "IDs in the pool"),
    "cidmgr_sessions": ("gauge", "Open sessions, one per client"),
    "cidmgr_anonymous": ("gauge", "IDs held without a session"),
    "cidmgr_draining": ("gauge", "1 while the server is being drained"),
    "cidmgr_start_time_seconds": ("gauge", "Unix time at which this process took the registry"),
    "cidmgr_updated_time_seconds": (
        "gauge",
        "Unix time of the last update of these metrics: it grows while the manager is alive",
    ),
    "cidmgr_acquired_total": ("counter", "Issued IDs"),
    "cidmgr_released_total": ("counter", "Released IDs, by how they were released"),
    "cidmgr_sessions_expired_total": ("counter", "Sessions that expired"),
    "cidmgr_sessions_expired_in_use_total": ("counter", "Sessions that expired with IDs in use"),
    "cidmgr_errors_total": ("counter", "Requests answered with an error, by code"),
}


def series(
    status: Mapping[str, Any], started: float, now: float
) -> dict[tuple[str, Labels], float]:
    """Return the value of each series.

    Args:
        status: the answer to STATUS.
        started: Unix time at which the process took the registry.
        now: Unix time.
    """
    values: dict[tuple[str, Labels], float] = {
        ("cidmgr_ids", (("state", "held"),)): status["held"],
        ("cidmgr_ids", (("state", "cooling"),)): status["cooling"],
        ("cidmgr_ids_used", ()): status["used"],
        ("cidmgr_ids_peak", ()): status["peak"],
        ("cidmgr_capacity", ()): status["pool"]["capacity"],
        ("cidmgr_sessions", ()): status["sessions_total"],
        ("cidmgr_anonymous", ()): status["anonymous"],
        ("cidmgr_draining", ()): status["draining"],
        ("cidmgr_start_time_seconds", ()): started,
        ("cidmgr_updated_time_seconds", ()): now,
        ("cidmgr_acquired_total", ()): status["acquired"],
        ("cidmgr_sessions_expired_total", ()): status["sessions_expired"],
        ("cidmgr_sessions_expired_in_use_total", ()): status["sessions_expired_in_use"],
    }
    for how, count in status["released"].items():
        values["cidmgr_released_total", (("how", how),)] = count
    for code in Code:
        if code.name in status["errors"]:
            values["cidmgr_errors_total", (("code", code.name),)] = status["errors"][code.name]
    return values


class Metrics:
    """Updates Triton's series from the service's figures.

    Args:
        status: returns the answer to STATUS, or None while another process has the registry.
        model: name of the manager, the label ``model`` of each series.
        family: creates a family: ``pb_utils.MetricFamily``.
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
            # For example, the server was started with --allow-metrics=false.
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
        # Series before families. The counts of a new registry begin at zero, as new series do.
        self._series.clear()
        self._families.clear()
        self._sent.clear()
        self._seen = 0
