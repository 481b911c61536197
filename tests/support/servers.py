"""A Triton server for tests, which is killed when it is no longer needed."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from cidalloc.devserver.triton_server import TritonServer


class Server(TritonServer):
    """Ends by SIGKILL: to end in order takes Triton two seconds, and up to eight with a stream.

    Tests of how a server ends, and of what comes after, use `TritonServer` itself.
    """

    def stop_process(self, timeout: float = 0.0) -> None:
        shared: set[str] = set()
        if self._process is not None:
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{self.pid}/maps").read_text()
                shared.update(re.findall(r"/dev/shm/\S+", maps))
        super().stop_process(timeout)
        for name in shared:  # of its models; it would have removed them itself
            Path(name).unlink(missing_ok=True)
