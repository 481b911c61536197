"""An older content of the manager's file is put back: each client's next request proves it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import tritonclient.http
from servers import Server
from sparse import content

from cidalloc.client import AsyncClient, Client
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import Exhausted
from cidalloc.manager.settings import Settings
from cidalloc.manager.storage.file_lock import writer_of
from cidalloc.protocol import MODEL
from cidalloc.triton_model import export

pytestmark = pytest.mark.server

SCRIPT = Path(__file__).parent.parent.parent / "examples/javascript/conformance_client.mjs"
NODE = shutil.which("node") if SCRIPT.exists() else None
MANY = 100  # more than a cache has
Acquire = Callable[[], object]


@contextmanager
def javascript(server: TritonServer) -> Iterator[Acquire]:
    pipe = subprocess.PIPE
    with subprocess.Popen([NODE or "", SCRIPT], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(line: str) -> str:
            print(line, file=process.stdin, flush=True)
            return process.stdout.readline()

        assert ask(f"open {server.http_url} 60000") == "ok \n"
        try:
            yield lambda: ask(f"acquire {MANY}")
        finally:
            process.kill()


@contextmanager
def blocking(url: str, model: str) -> Iterator[Acquire]:
    with Client(url, model=model) as cids:
        yield lambda: cids.acquire_many(MANY)


@contextmanager
def awaiting(url: str, model: str) -> Iterator[Acquire]:
    loop = asyncio.new_event_loop()
    cids = AsyncClient(url, model=model)
    yield lambda: loop.run_until_complete(cids.acquire_many(MANY))
    loop.run_until_complete(cids.close())
    loop.close()


def test_each_client_proves_it(tmp_path: Path) -> None:
    """Each has a manager of its own, so none profits from what another one has seen."""
    names = ["blocking", "awaiting"] + [MODEL] * (NODE is not None)
    files = {name: tmp_path / name / f"{name}.cidalloc" for name in names}
    for name, file in files.items():
        file.parent.mkdir()
        settings = Settings(capacity=2**20, fresh=True, state=str(file.parent))
        export(tmp_path / "models", settings, name=name)
    arguments = ["--model-control-mode=explicit", "--load-model=*"]
    with ExitStack() as stack:
        server = stack.enter_context(Server(tmp_path / "models", arguments=arguments))
        triton = tritonclient.http.InferenceServerClient(server.http_url.removeprefix("http://"))
        stack.callback(triton.close)
        opened = {
            "blocking": stack.enter_context(blocking(server.grpc_url, "blocking")),
            "awaiting": stack.enter_context(awaiting(server.http_url, "awaiting")),
        }
        if NODE:
            opened[MODEL] = stack.enter_context(javascript(server))
        before = {}
        for name, acquire in opened.items():
            acquire()
            before[name] = content(files[name])
            acquire()
            triton.unload_model(name)
        deadline = time.monotonic() + 10
        while any(writer_of(file)[0] for file in files.values()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for name, acquire in opened.items():
            before[name].put(files[name])
            triton.load_model(name)
            if name == MODEL:
                assert "REGISTRY_MISMATCH" in str(acquire())
            else:
                with pytest.raises(Exhausted, match="new or restored"):
                    acquire()
            with Client(server.grpc_url, model=name) as cids:
                assert cids.status()["restored"]
