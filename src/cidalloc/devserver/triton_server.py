"""Start a real Triton server on loopback, and stop it: for the demo, development and tests.

The binary is the one of the ``[server]`` extra, or the ``tritonserver`` found on PATH.
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
    """A Triton server process that lives as long as this object is entered.

    Args:
        repositories: model repositories to serve, as Triton's ``--model-repository``.
        log: the file that receives the server's output; by default one that is shown when
            the server does not start, and thrown away otherwise.
        arguments: further arguments of ``tritonserver``.
        ports: the HTTP, gRPC and metrics ports; 0 picks a free one.

    Raises:
        InvalidArgument: two of the ports are the same.
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
            raise InvalidArgument(f"the ports {ports} are not three different ones")
        self._wanted_ports = ports
        self._output = Path()
        self._cleanup = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._starter = ThreadPoolExecutor(1, "cidalloc-server")
        self.http_port, self.grpc_port, self.metrics_port = ports

    @property
    def grpc_url(self) -> str:
        """Where gRPC is served, as ``host:port``."""
        return f"{_HOST}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """Where HTTP is served, as ``http://host:port``."""
        return f"http://{_HOST}:{self.http_port}"

    @property
    def metrics_url(self) -> str:
        """Where Prometheus metrics are served."""
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
                # From a thread that lives as long as we do: the kernel ends the server with the
                # thread that started it.
                self._process = self._starter.submit(
                    subprocess.Popen,
                    command + list(self._arguments),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # Its own session, so that Ctrl-C reaches us alone and we stop it in order.
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                ).result()
            if self._wait_ready(time.monotonic() + timeout):
                return
            self.stop_process()
            # Between our choice of a free port and Triton's bind, someone may have taken it.
            text = log.read_text(errors="replace")
            if "Address already in use" not in text or all(self._wanted_ports) or attempt == 2:
                raise Unavailable(f"Triton did not become ready: {_complaint(text)}")

    def stop(self) -> None:
        """Stop the server, its model processes included, and remove what it needed."""
        try:
            self.stop_process()
        finally:
            self._starter.shutdown()
            self._cleanup.close()

    def stop_process(self, timeout: float = 8.0) -> None:
        """End the server in order; after ``timeout`` seconds, without asking."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # An open gRPC stream keeps Triton 2.51 from ever leaving.
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
        """Return what of the server's log says why it ended, or else its last words."""
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
                    # Or a server that is there already would pass for ours.
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
    """Return the binary, its own options and its environment."""
    environment = os.environ.copy()
    # The Python backend takes the packages of the first python3 on PATH: let it be ours.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    # Compiled files would be written next to the model, where any new file means "reload".
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
    # Triton wants the stub beside the backend's library: give it a folder of links.
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
    """Yield the folder of this Python's shared library, which the stub is linked against."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    for folder in (sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib"):
        if folder and (Path(folder) / name).exists():
            yield str(folder)
            return
    try:
        ctypes.CDLL(name)  # where the system's loader finds it, Triton does, too
    except OSError:
        raise Unavailable(
            f"Triton's Python backend needs {name}, which this Python does not bring: install it"
            " (on Debian and Ubuntu with python3-dev) or use another Python"
        ) from None


def _complaint(log: str) -> str:
    """Return what of Triton's log says why it failed, or else its last words."""
    lines = [line for line in log.splitlines() if line.strip()]
    failed = [
        line.partition("] ")[2].strip('"')
        for line in lines
        if re.search("failed to load .* version", line)
    ]
    # A model's traceback stands behind its error, in the same line.
    return "\n".join([line.partition("\\n\\nAt:")[0] for line in failed] or lines[-10:])


def _die_with_parent() -> None:
    """Ask the kernel to end the server if we are killed; runs in the child before exec.

    Its model processes leave by themselves then. SIGTERM would not do: with an open gRPC stream,
    Triton 2.51 never gets to its end.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
