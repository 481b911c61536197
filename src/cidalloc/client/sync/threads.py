"""Threads of the client."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ...errors import Unavailable

__all__ = ["spawn"]


def spawn(target: Callable[..., object], *arguments: Any, name: str) -> threading.Thread:
    """Start a daemon thread, which does not keep the process from ending.

    Raises:
        Unavailable: the system refuses the thread.
    """
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    try:
        thread.start()
    except (RuntimeError, OSError, MemoryError) as error:
        raise Unavailable(f"no thread can be started: {error}") from error
    return thread
