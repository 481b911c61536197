"""Whether the sanitizers are at work when they are said to be: else all would pass unseen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    "CIDALLOC_SANITIZED" not in os.environ, reason="only where 'make sanitize' runs"
)

# A pool's memory is freed behind its back: the next call touches it.
STRAY = """if True:
    import ctypes, sys
    import cidalloc
    memory = bytearray(cidalloc.Allocator.buffer_size(1000, 1))
    pool = cidalloc.Allocator(1000, block=1, buffer=memory)
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    free(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    pool.acquire()
    print("unseen")
"""


def test_a_stray_access_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", STRAY], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and not done.stdout
    assert "AddressSanitizer: heap-use-after-free" in done.stderr
    assert "_alloc" in done.stderr.split("freed by", maxsplit=1)[0], "seen in the core itself"
