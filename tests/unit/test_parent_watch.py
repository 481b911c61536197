"""A process ends with its parent, also while it holds the GIL for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()  # it watches
print(child.pid, flush=True)
sys.stdin.readline()  # until we are killed
"""
CHILD = """
import ctypes, os
from cidalloc.triton_model._parent_watch import end_with_parent
end_with_parent(os.getppid())
end_with_parent(os.getppid())  # once is enough
print(flush=True)
ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the GIL
"""


def test_a_process_ends_with_its_parent() -> None:
    command = [sys.executable, "-c", PARENT, CHILD]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    time.sleep(0.1)
    assert running(child), "it lives as long as its parent"
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_whose_parent_has_ended_before_ends_at_once() -> None:
    child = CHILD.replace("os.getppid()", str(os.getpid()))
    done = subprocess.run(["sh", "-c", '"$0" -c "$1"; true', sys.executable, child], timeout=20)
    assert done.returncode == 0


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
