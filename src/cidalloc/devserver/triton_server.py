"""Starts and stops a real Triton server on loopback, for the demo, development and tests.

The binary comes from the ``[server]`` extra, or is the ``tritonserver`` on PATH.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from ..errors import InvalidArgument, Unavailable

__all__ = ["TritonServer"]

_HOST = "127.0.0.1"
_PR_SET_PDEATHSIG = 1


class TritonServer:
    """A Triton server process that runs while this context manager is entered.

    Args:
        repositories: model repositories to serve, as Triton's ``--model-repository``.
        log: file for the server's output. By default the output is shown if the server does not
            start, and discarded otherwise.
        arguments: further arguments of ``tritonserver``.
        ports: the HTTP, gRPC and metrics ports; 0 chooses a free port.

    Raises:
        InvalidArgument: two of the ports are equal.
        Unavailable: no Triton was found, or it did not become ready.
    """

    def __init__(
        self,
        *repositories: Path,
        log: Path | None = None,
        arguments: Iterable[str] = (),
        ports: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        self._repositories = repositories
        self._log = log
        self._arguments = tuple(arguments)
        if len(set(filter(None, ports))) < len(list(filter(None, ports))):
            raise InvalidArgument(
                f"the ports {ports} are not distinct: choose three different ports"
            )
        self._wanted_ports = ports
        self._output = Path()
        self._cleanup = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._starter = ThreadPoolExecutor(1, "cidalloc-server")
        self.http_port, self.grpc_port, self.metrics_port = ports

    @property
    def grpc_url(self) -> str:
        """Address of gRPC, as ``host:port``."""
        return f"{_HOST}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """Address of HTTP, as ``http://host:port``."""
        return f"http://{_HOST}:{self.http_port}"

    @property
    def metrics_url(self) -> str:
        """Address of the Prometheus metrics."""
        return f"http://{_HOST}:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        """The process ID of the running server."""
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    def __enter__(self) -> TritonServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, timeout: float = 60.0) -> None:
        """Start the server and wait until it and its models are ready; ``timeout`` in seconds."""
        folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="cidalloc-")))
        binary, options, environment = _find_triton(folder)
        self._output = log = self._log or folder / "tritonserver.log"
        for attempt in range(3):
            self._choose_ports()
            command = [binary, *options, "--exit-timeout-secs=5"]
            command += [f"--model-repository={folder}" for folder in self._repositories]
            for name in ("http", "grpc", "metrics"):
                command.append(f"--{name}-address={_HOST}")
                command.append(f"--{name}-port={getattr(self, f'{name}_port')}")
            with log.open("wb") as output:
                # Start it from a thread that lives as long as this process: the kernel ends the
                # server together with the thread that started it.
                self._process = self._starter.submit(
                    subprocess.Popen,
                    command + list(self._arguments),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # A new session, so that Ctrl-C reaches only this process, which then stops the
                    # server in order.
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                ).result()
            if self._wait_ready(time.monotonic() + timeout):
                return
            self.stop_process()
            text = log.read_text(errors="replace")
            # Another process may have taken the free port before Triton bound it.
            again = "Address already in use" in text and not all(self._wanted_ports)
            # Triton 2.51 sometimes closes a descriptor of gRPC's at its start.
            again = again or "epoll_wait error: Bad file descriptor" in text
            if not again or attempt == 2:
                raise Unavailable(f"Triton did not become ready: {_complaint(text)}")

    def stop(self) -> None:
        """Stop the server and its model processes, and remove its temporary files."""
        try:
            self.stop_process()
        finally:
            self._starter.shutdown()
            self._cleanup.close()

    def stop_process(self, timeout: float = 8.0) -> None:
        """Stop the server in order, and kill it if it still runs after ``timeout`` seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # Triton 2.51 does not exit while a gRPC stream is open.
                process.wait(timeout)
        finally:
            # Also on a second Ctrl-C. Its model processes share its process group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def poll(self) -> int | None:
        """Return the exit status of the server process, or None while it runs."""
        assert self._process is not None, "the server has not been started"
        return self._process.poll()

    def complaint(self) -> str:
        """Return the lines of the log that say why the server ended, or its last lines."""
        return _complaint(self._output.read_text(errors="replace"))

    def _choose_ports(self) -> None:
        with contextlib.ExitStack() as stack:
            chosen = []
            for port in self._wanted_ports:
                sock = stack.enter_context(socket.socket())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    sock.bind((_HOST, port))
                except (OSError, OverflowError) as error:
                    # Otherwise a server that already runs there could be taken for this one.
                    raise Unavailable(f"cannot serve on port {port}: {error}") from None
                chosen.append(sock.getsockname()[1])
        self.http_port, self.grpc_port, self.metrics_port = chosen

    def _wait_ready(self, deadline: float) -> bool:
        while self.poll() is None and time.monotonic() < deadline:
            connection = http.client.HTTPConnection(_HOST, self.http_port, timeout=5)
            try:
                connection.request("GET", "/v2/health/ready")
                if connection.getresponse().status == 200:
                    return True
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            time.sleep(0.05)
        return False


def _find_triton(folder: Path) -> tuple[str, list[str], dict[str, str]]:
    """Return the binary, the options that it needs, and its environment."""
    environment = os.environ.copy()
    # The Python backend uses the packages of the first python3 on PATH: make this one first.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    # Compiled files next to a model would make Triton reload it.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    spec = importlib.util.find_spec("pytriton")
    if spec is not None and spec.origin is not None:
        return _bundled_triton(Path(spec.origin).parent, folder, environment)
    binary = shutil.which("tritonserver")
    if binary is None:
        raise Unavailable(
            "no Triton server found: pip install 'cidalloc[server]' (Linux x86-64, Python 3.10 to"
            " 3.13), or put tritonserver on PATH"
        )
    return binary, [], environment


def _bundled_triton(
    package: Path, folder: Path, environment: dict[str, str]
) -> tuple[str, list[str], dict[str, str]]:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    carried = package / "tritonserver"
    stub = carried / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise Unavailable(f"the bundled Triton has no Python backend for Python {version}")
    # Triton needs the stub beside the backend's library: create a folder of links.
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True, exist_ok=True)
    for file in (*(carried / "backends" / "python").iterdir(), stub):
        link = backend / file.name
        if not link.exists():
            link.symlink_to(file)
    libraries = [str(package.parent / "nvidia_pytriton.libs"), *_python_library_folders()]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(
        [*libraries, *filter(None, [environment.get("LD_LIBRARY_PATH")])]
    )
    options = [f"--backend-directory={backend.parent}"]
    return str(carried / "bin" / "tritonserver"), options, environment


def _python_library_folders() -> Iterator[str]:
    """Yield the folder of this Python's shared library, which the stub needs."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    for folder in (sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib"):
        if folder and (Path(folder) / name).exists():
            yield str(folder)
            return
    try:
        ctypes.CDLL(name)  # if the system's loader finds it, so does Triton
    except OSError:
        raise Unavailable(
            f"Triton's Python backend needs {name}, which this Python does not have: install it"
            " (on Debian and Ubuntu with python3-dev) or use another Python"
        ) from None


def _complaint(log: str) -> str:
    """Return the lines of Triton's log that say why it failed, or its last lines."""
    lines = [line for line in log.splitlines() if line.strip()]
    failed = [
        line.partition("] ")[2].strip('"')
        for line in lines
        if re.search("failed to load .* version", line)
    ]
    # A model's traceback follows its error in the same line.
    return "\n".join([line.partition("\\n\\nAt:")[0] for line in failed] or lines[-10:])


def _die_with_parent() -> None:
    """Tell the kernel to kill the server if this process is killed; runs in the child before exec.

    The model processes then exit by themselves. SIGTERM is not enough: with an open gRPC stream,
    Triton 2.51 does not exit.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
