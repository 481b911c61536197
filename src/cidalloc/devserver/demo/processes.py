"""Client processes that run at once and report what they saw."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from typing import Any

__all__ = ["Report", "run_at_once"]


@dataclass(frozen=True, slots=True)
class Report:
    """What a process returned, or the words of what it died of."""

    value: Any = None
    failure: str | None = None


def run_at_once(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    *,
    timeout: float = 240.0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Report]:
    """Call ``function(barrier, *each)`` for each of ``arguments``, in a process of its own.

    Args:
        function: a function at the top of a module. Its barrier is that of all processes.
        arguments: what each process is given.
        timeout: seconds after which those that have not reported are ended.
        progress: told, whenever a process has reported, how many have.
    """
    # Forked from a small server process that has loaded the modules, but opened no connection:
    # starting 50 interpreters from nothing would take most of a minute.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    barrier = context.Barrier(len(arguments))
    readers: list[Connection] = []
    workers: list[BaseProcess] = []
    try:
        for each in arguments:
            reader, writer = context.Pipe(duplex=False)
            args = (function, barrier, writer, each)
            worker: BaseProcess = context.Process(target=_work, args=args, daemon=True)
            worker.start()
            writer.close()
            readers.append(reader)
            workers.append(worker)
        found = _collect(readers, time.monotonic() + timeout, progress)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    return [found.get(reader, Report(failure="no report in time")) for reader in readers]


def _collect(
    readers: list[Connection], deadline: float, progress: Callable[[int], None]
) -> dict[Connection, Report]:
    found: dict[Connection, Report] = {}
    while len(found) < len(readers):
        pending = [reader for reader in readers if reader not in found]
        ready = wait(pending, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for reader in ready:
            assert isinstance(reader, Connection)
            try:
                found[reader] = reader.recv()
            except EOFError:
                found[reader] = Report(failure="the process died")
            progress(len(found))
    return found


def _work(
    function: Callable[..., Any], barrier: Barrier, writer: Connection, arguments: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us all; the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        writer.send(Report(function(barrier, *arguments)))
    except Exception as error:
        barrier.abort()  # the others would wait in vain
        writer.send(Report(failure=f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
