"""Runs the command: in this process, which is quick, or in processes of its own."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
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


_NEXT = ";;"

FORKING = """
import gc, os, sys
from cidalloc import cli
from cidalloc.cli import ask, demo, doctor, model, registry, serve, top  # noqa: F401

gc.freeze()  # what is shared stays shared, so that a child ends quickly
folder, stdout, *words = sys.argv[1:]
commands = [each.split("\\0") for each in "\\0".join(words).split("\\0;;\\0")]
children = []
for number, command in enumerate(commands):
    child = os.fork()
    if not child:
        flags = os.O_WRONLY | os.O_CREAT
        shown = int(stdout) if stdout else os.open(f"{folder}/{number}.out", flags)
        os.dup2(shown, 1)
        os.dup2(os.open(f"{folder}/{number}.err", flags), 2)
        sys.argv = ["cidalloc", *command]
        cli.run()
        sys.exit()
    children.append(child)
for child in children:
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
"""Imports the package once, and runs each command in a child that ends as any process does."""


class Ended(NamedTuple):
    """What a process left."""

    status: int
    stdout: bytes
    stderr: bytes


def run_all(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str], stdout: int | None = None
) -> list[Ended]:
    """Run commands side by side, each in a process; return what each left.

    Args:
        commands: the arguments of each.
        environment: in addition to this process's.
        stdout: where they write to; if it is None, they are read.
    """
    words = [word for command in commands for word in (_NEXT, *command)][1:]
    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(
            [sys.executable, "-c", FORKING, name, "" if stdout is None else str(stdout), *words],
            env={**os.environ, **environment},
            pass_fds=() if stdout is None else (stdout,),
            stdout=subprocess.PIPE,
            timeout=90,
            check=True,
        )
        statuses = [int(each) for each in done.stdout.split()]
        assert len(statuses) == len(commands)
        texts = [
            [
                file.read_bytes() if (file := Path(name, f"{number}.{kind}")).exists() else b""
                for kind in ("out", "err")
            ]
            for number in range(len(commands))
        ]
    return [Ended(status, *text) for status, text in zip(statuses, texts, strict=True)]
