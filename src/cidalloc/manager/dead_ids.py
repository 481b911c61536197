"""The IDs of expired sessions, on which models may keep state until somebody sends END.

Each session that asks for such IDs gets a share. After a while an ID goes to another one's share:
the one before may have died, or may be a stranger that does nothing. It is only in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import LimitExceeded
from ..protocol import DEAD_WINDOW_MS, END_WITHIN_MS, MAX_MODELS, IDs

__all__ = ["DeadIds"]

_log = logging.getLogger("cidalloc.manager.dead_ids")

_MOST = 100_000
_SHARES_AT_MS = np.array([0, 15_000, 45_000])
"""When the shares are made, after which IDs go to another one's. So an ID is named three times."""
_ASKS_MS = 25_000  # a session that has not asked for so long gets no share
_ROW = np.dtype([("cid", np.uint64), ("since", np.int64), ("named", np.uint8)])

Rows = npt.NDArray[Any]


class DeadIds:
    """IDs of expired sessions for each model on which they may be known. Times are milliseconds."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Rows]] = {}  # by model
        self._asked: dict[str, dict[int, int]] = {}  # by model: when each session asked last
        self._models: dict[int, list[str]] = {}  # for which a session asked
        self._count = 0
        self._full = False

    def asked_for(self, models: Iterable[str], now: int) -> list[str]:
        """Return those of the models for which sessions ask: only for these END will be sent."""
        return [model for model in models if self._askers(model, now)]

    def add(self, ids: IDs, models: Iterable[str], since: int, now: int) -> None:
        """Let IDs be named from the time ``since`` on, for `DEAD_WINDOW_MS`.

        If there are too many already, some of these are left out.
        """
        for model in models:
            if self._count + len(ids) > _MOST:
                self._drop_old(now)
            rows = np.zeros(min(len(ids), _MOST - self._count), _ROW)
            rows["cid"], rows["since"] = ids[: len(rows)], since
            self._rows.setdefault(model, []).append(rows)
            self._count += len(rows)
            full = len(rows) < len(ids)
            if full and not self._full:
                _log.warning("more than %d IDs of expired sessions: some get no END", _MOST)
            self._full = full

    def name(self, model: str, asker: int, count: int, now: int) -> IDs:
        """Return at most ``count`` IDs of a model out of the asker's share, each once.

        Args:
            model: the name of the model.
            asker: the generation of the session that asks.
            count: the number of IDs.
            now: the time.

        Raises:
            LimitExceeded: the session has asked for too many other models.
        """
        askers = self._askers(model, now)
        if asker not in askers:
            models = self._models.setdefault(asker, [])
            if model not in models and len(models) == MAX_MODELS:
                raise LimitExceeded(f"a session asks for {MAX_MODELS} models at most")
            models += [model] * (model not in models)
            askers = self._asked.setdefault(model, askers)
        askers[asker] = now
        self._drop_old(now, model)
        if model not in self._rows:
            return np.empty(0, np.uint64)
        (rows,) = self._rows[model]
        shares = np.searchsorted(_SHARES_AT_MS, now - rows["since"], side="right")
        place = list(askers).index(asker)
        mine = (rows["cid"] + shares.astype(np.uint64)) % np.uint64(len(askers)) == place
        chosen = np.flatnonzero(mine & (shares > rows["named"]))
        # Those first that were named least: there may be no time for all.
        chosen = chosen[np.argsort(rows["named"][chosen], kind="stable")][:count]
        rows["named"][chosen] = shares[chosen]
        ids: IDs = rows["cid"][chosen]
        return ids

    def leave(self, asker: int) -> None:
        """Note that a session has ended: it gets no share."""
        for model in self._models.pop(asker, ()):
            self._forget(model, [asker])

    def count(self, now: int) -> int:
        """Return how many IDs are or will be named; one counts once for each of its models."""
        self._drop_old(now)
        return self._count

    def _askers(self, model: str, now: int) -> dict[int, int]:
        """Return the sessions that ask for a model, and when each of them asked last."""
        asked = self._asked.get(model, {})
        self._forget(model, [each for each, last in asked.items() if now - last > _ASKS_MS])
        return asked

    def _forget(self, model: str, askers: list[int]) -> None:
        asked = self._asked.get(model, {})
        for asker in askers:
            asked.pop(asker, None)
        if not asked:
            self._asked.pop(model, None)

    def _drop_old(self, now: int, *models: str) -> None:
        """Drop the IDs of which the time is over; join what is left of each model."""
        for model in models or tuple(self._rows):
            if parts := self._rows.pop(model, None):
                rows = np.concatenate(parts)
                # An END that is sent at the last moment must arrive within the window.
                left = rows[rows["since"] + (DEAD_WINDOW_MS - END_WITHIN_MS) >= now]
                self._count -= len(rows) - len(left)
                if len(left):
                    self._rows[model] = [left]
