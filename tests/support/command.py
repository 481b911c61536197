"""Runs the command: in this process, which is quick, or in one of its own."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
from unittest import mock

from cidalloc import cli

Done = subprocess.CompletedProcess[str]


def run(*arguments: str) -> Done:
    """Run the command in this process, its way from the arguments to the exit status included."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    status: object = 0
    with (
        mock.patch.object(sys, "argv", ["cidalloc", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.run()
        except SystemExit as end:
            status = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if sys.stdout is not out:  # after an error it is /dev/null
                sys.stdout.close()
    assert status is None or isinstance(status, int), status
    shown, words = (each.buffer.getvalue().decode() for each in (out, err))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(arguments, status or 0, shown, words)


def run_process(*arguments: str) -> Done:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "cidalloc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
