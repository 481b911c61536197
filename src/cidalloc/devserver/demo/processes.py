"""Runs client processes in parallel and collects their reports."""

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
    """The value that a process returned, or the text of its failure."""

    value: Any = None
    failure: str | None = None


def run_at_once(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    *,
    timeout: float = 240.0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Report]:
    """Call ``function(barrier, *each)`` for each of ``arguments``, each in its own process.

    Args:
        function: a function at the top level of a module. All processes share the barrier.
        arguments: the arguments for each process.
        timeout: seconds after which processes without a report are killed.
        progress: called after each report with the number of reports.
    """
    # Fork from a small server process that has loaded the modules but opened no connection: to
    # start 50 interpreters would take most of a minute.
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
    return [
        found.get(reader, Report(failure="the process did not report in time"))
        for reader in readers
    ]


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        writer.send(Report(function(barrier, *arguments)))
    except Exception as error:
        barrier.abort()  # so that the others do not wait for this one
        writer.send(Report(failure=f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
