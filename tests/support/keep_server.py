"""A process that runs a Triton server until its standard input ends: see based.py.

    python keep_server.py MODELS HTTP-PORT GRPC-PORT METRICS-PORT

It prints the server's process ID once the server is ready. A test process that has used gRPC cannot
safely start a server itself: `TritonServer` forks, and gRPC's threads are lost in the child.
"""

from __future__ import annotations

import sys
from pathlib import Path

from servers import Server


def main(models: str, http: str, grpc: str, metrics: str) -> None:
    """Run the server."""
    server = Server(Path(models), ports=(int(http), int(grpc), int(metrics)))
    try:
        server.start()
        print(server.pid, flush=True)
        sys.stdin.read()
    finally:
        server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
