"""Sends the package's log to Triton's log."""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["log_to"]


class _Handler(logging.Handler):
    def __init__(self, triton: Any) -> None:
        super().__init__()
        self._triton = triton
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if record.levelno >= logging.ERROR:
                self._triton.log_error(text)
            elif record.levelno >= logging.WARNING:
                self._triton.log_warn(text)
            else:
                self._triton.log_info(text)
        except Exception:
            self.handleError(record)


def log_to(triton: Any) -> None:
    """Send all records of the package from level INFO on to Triton's ``pb_utils.Logger``."""
    logger = logging.getLogger("cidalloc")
    for handler in logger.handlers[:]:
        if isinstance(handler, _Handler):
            logger.removeHandler(handler)
    logger.addHandler(_Handler(triton))
    logger.setLevel(logging.INFO)
    logger.propagate = False
