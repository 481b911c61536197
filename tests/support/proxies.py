"""The real nginx and HAProxy, with the configurations of `deploy/` and addresses of a test."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}

Ports = tuple[int, int]
"""The port of HTTP and the port of gRPC."""


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nothing uses.

    The kernel gives none of them to outgoing connections, so they are still free when a server is
    started again.
    """
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    for port in random.sample(range(low // 2, low), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


class RealProxy:
    """A proxy process.

    Args:
        name: ``nginx`` or ``haproxy``.
        text: its configuration.
        ports: where it listens.
        folder: for its files.
    """

    def __init__(self, name: str, text: str, ports: Sequence[int], folder: Path) -> None:
        file = folder / FILES[name]
        file.write_text(text)
        command = [shutil.which(name) or f"/usr/sbin/{name}"]
        if name == "nginx":
            command += ["-e", "stderr", "-p", str(folder), "-g", "daemon off;", "-c", str(file)]
        else:
            command += ["-db", "-f", str(file)]
        self.name, self.ports = name, ports
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        until = time.monotonic() + 10
        while not all(map(_listens, ports)):
            if self._process.poll() is not None or time.monotonic() > until:
                self.close()
                raise RuntimeError(f"{name} does not run: {(folder / 'log').read_text()}")
            time.sleep(0.02)

    def url(self, kind: str) -> str:
        """Return its URL for ``http`` or ``grpc``."""
        return f"{kind}://127.0.0.1:{self.ports[kind == 'grpc']}"

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def has(name: str) -> bool:
    """Whether a proxy is installed."""
    return shutil.which(name, path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin") is not None


def router(name: str, servers: Sequence[Ports], folder: Path) -> RealProxy:
    """Run a proxy with its file of `deploy/`; server k has the slice k."""
    return RealProxy(name, *routing(name, servers, folder), folder)


def routing(name: str, servers: Sequence[Ports], folder: Path) -> tuple[str, Ports]:
    """Return the configuration of `deploy/` with these addresses, and the proxy's own ports."""
    http, grpc = free_ports(2)
    text = (DEPLOY / FILES[name]).read_text()
    listen = {"8000": f"127.0.0.1:{http}", "8001": f"127.0.0.1:{grpc}"}
    text = re.sub(r"(listen |bind :)(800[01])", lambda m: f"{m[1].rstrip(':')}{listen[m[2]]}", text)
    for number, ports in enumerate(servers):
        for port, own in zip(("8000", "8001"), ports, strict=True):
            text = text.replace(f"triton-{number}.triton:{port}", f"127.0.0.1:{own}")
        text = re.sub(rf"(127.0.0.1:{ports[1]} .*check port) 8000", rf"\1 {ports[0]}", text)
    text = text.replace("pid /run/nginx.pid;", f"pid {folder}/pid;")
    paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"    {each}_temp_path {folder}/{each};\n" for each in paths)
    return text.replace("http {\n", f"http {{\n{temporary}", 1), (http, grpc)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
