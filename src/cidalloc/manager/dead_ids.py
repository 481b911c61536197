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

from ..protocol import DEAD_WINDOW_MS, END_WITHIN_MS, IDs

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
        self._asked: dict[str, dict[int, int]] = {}  # by model: when a session asked last
        self._count = 0
        self._full = False

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
        """
        self._drop_old(now, model)
        if model not in self._rows:
            return np.empty(0, np.uint64)
        (rows,) = self._rows[model]
        asked = self._asked.setdefault(model, {})
        for each in [each for each, last in asked.items() if now - last > _ASKS_MS]:
            del asked[each]
        asked[asker] = now
        shares = np.searchsorted(_SHARES_AT_MS, now - rows["since"], side="right")
        place = list(asked).index(asker)
        mine = (rows["cid"] + shares.astype(np.uint64)) % np.uint64(len(asked)) == place
        chosen = np.flatnonzero(mine & (shares > rows["named"]))[:count]
        rows["named"][chosen] = shares[chosen]
        ids: IDs = rows["cid"][chosen]
        return ids

    def leave(self, asker: int) -> None:
        """Note that a session has ended: it gets no share."""
        for asked in self._asked.values():
            asked.pop(asker, None)

    def count(self, now: int) -> int:
        """Return how many IDs are or will be named; one counts once for each of its models."""
        self._drop_old(now)
        return self._count

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
                else:
                    self._asked.pop(model, None)
