"""How the command reaches a server: CIDALLOC_URL, headers and TLS; and what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from command import run
from tls import Certificate, make_certificate, terminated

from cidalloc.cli import _GROUPS
from cidalloc.client import AsyncClient, Client
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import InvalidArgument, Unavailable

NOWHERE = "http://127.0.0.1:1"

# ---- The URL


@pytest.fixture
def url(triton: TritonServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CIDALLOC_URL", triton.http_url)
    return triton.http_url


def test_the_url_of_the_environment(url: str) -> None:
    assert json.loads(run("status", "--json").stdout)["held"] >= 0
    assert run("probe").stdout.startswith("cidmgr answers")
    assert "UNAVAILABLE" in run("probe", NOWHERE, "--timeout", "1").stderr, "one that is given wins"


def test_ids_without_a_url(url: str) -> None:
    ids = run("acquire", "--count", "3").stdout.split()
    assert len(ids) == 3
    assert run("release", "--ended", *ids[:2]).returncode == 0
    assert run("release", url, "--ended", ids[2]).returncode == 0
    done = run("release", ids[0])
    assert (done.returncode, "NOT_HELD" in done.stderr) == (1, True)


@pytest.mark.parametrize("arguments", [["status"], ["probe"], ["release"], ["release", "5"]])
def test_no_url(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIDALLOC_URL", raising=False)
    done = run(*arguments)
    assert (done.returncode, "Missing argument 'URL'" in done.stderr) == (2, True), done.stderr


def test_a_release_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("release", NOWHERE)
    assert (done.returncode, "Missing argument 'CID" in done.stderr) == (2, True), done.stderr


# ---- Headers


def test_headers_are_sent_with_every_request() -> None:
    seen: list[dict[str, str]] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(dict(self.headers))
            self.send_error(503)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        for command in ("probe", "doctor"):
            run(
                command,
                url,
                "--header",
                "authorization: Bearer a:b",
                "--header",
                "x-team:  vision ",
            )
        assert len(seen) > 2
        for each in seen:
            assert each.get("authorization") == "Bearer a:b"
            assert each.get("x-team") == "vision"
    finally:
        server.shutdown()
        server.server_close()


def test_headers_over_grpc(triton: TritonServer) -> None:
    assert run("probe", triton.grpc_url, "--header", "X-Team: vision").returncode == 0


@pytest.mark.parametrize(
    "text", ["", "name", ":value", " : value", "a b: c", "a: b\nc", "ä: b", "a: ä"]
)
def test_a_header_that_is_not_valid(text: str) -> None:
    done = run("probe", NOWHERE, "--header", text)
    assert done.returncode == 1
    assert done.stderr.startswith("error: INVALID_ARGUMENT: ")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("where", ["http://127.0.0.1:1", "grpc://127.0.0.1:1"])
def test_a_header_with_a_newline(kind: Any, where: str) -> None:
    for headers in ({"a": "secret\r\nb: c"}, {"a\n": "secret"}, {"a": 5}, {5: "a"}, "a: b", [1]):
        with pytest.raises(InvalidArgument, match="header") as caught:
            kind(where, headers=headers)
        assert "secret" not in str(caught.value)


# ---- TLS


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"), "server")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"), "client")


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_tls(scheme: str, triton: TritonServer, ours: Certificate, theirs: Certificate) -> None:
    behind = triton.grpc_port if scheme == "grpcs" else triton.http_port
    ca = ("--ca", str(ours.cert))
    with terminated(behind, ours) as port:
        url = f"{scheme}://127.0.0.1:{port}"
        assert run("probe", url, *ca).stdout.startswith("cidmgr answers")
        assert "UNAVAILABLE" in run("probe", url, "--timeout", "3").stderr, "an unknown certificate"
        assert "UNAVAILABLE" in run("probe", url, "--ca", str(theirs.cert), "--timeout", "3").stderr
        found = run("doctor", url, *ca, "--json")
        assert {each["level"] for each in json.loads(found.stdout)} & {"ok", "note"}, found
    with terminated(behind, ours, theirs) as port:
        url = f"{scheme}://127.0.0.1:{port}"
        bearer = ("--cert", str(theirs.cert), "--key", str(theirs.key))
        assert run("probe", url, *ca, *bearer).stdout.startswith("cidmgr answers")
        assert "UNAVAILABLE" in run("probe", url, *ca, "--timeout", "3").stderr, "no certificate"


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_a_certificate_that_does_not_fit(
    scheme: str, triton: TritonServer, ours: Certificate, theirs: Certificate
) -> None:
    behind = triton.grpc_port if scheme == "grpcs" else triton.http_port
    file = str(theirs.cert)
    options = (
        {"root_certificates": file} if scheme == "grpcs" else {"ssl_options": {"ca_certs": file}}
    )
    with (
        terminated(behind, ours) as port,
        Client(f"{scheme}://127.0.0.1:{port}", timeout=3, **options) as cids,
        pytest.raises(Unavailable, match=r"(?i)certificate|ssl|failed to connect"),
    ):
        cids.acquire()


def test_tls_options_that_do_not_fit(ours: Certificate) -> None:
    for url, arguments, words in (
        (
            "http://127.0.0.1:1",
            ["--ca", ours.cert],
            "--ca needs a URL that begins with grpcs or https",
        ),
        ("127.0.0.1:1", ["--cert", ours.cert], "--cert needs a URL"),
        ("https://127.0.0.1:1", ["--cert", ours.cert], "--cert and --key belong together"),
        ("grpcs://127.0.0.1:1", ["--key", ours.key], "--cert and --key belong together"),
    ):
        done = run("probe", url, *map(str, arguments))
        assert (done.returncode, words in done.stderr) == (1, True), done.stderr
    assert run("probe", "https://127.0.0.1:1", "--ca", "/nowhere").returncode == 2


# ---- What is imported


@pytest.mark.parametrize(
    ("arguments", "without"),
    [
        (["--help"], "grpc tritonclient aiohttp gevent rich textual"),
        (["--version"], "grpc tritonclient aiohttp gevent rich textual"),
        (["probe", "--help"], "tritonclient.grpc tritonclient.http aiohttp gevent rich"),
        (["probe", "grpc://127.0.0.1:1"], "tritonclient.http aiohttp gevent rich"),
        (["top", "--help"], "textual textual_serve aiohttp gevent"),
        (
            ["top", "grpc://127.0.0.1:1", "--once"],
            "textual textual_serve tritonclient.http aiohttp",
        ),
        (["model", "--help"], "grpc aiohttp gevent"),
    ],
)
def test_a_command_imports_what_it_needs(arguments: list[str], without: str) -> None:
    script = f"""
import contextlib, io, sys
from cidalloc import cli
sys.argv = ["cidalloc", *{arguments!r}]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    with contextlib.suppress(SystemExit):
        cli.run()
print(*[name for name in "{without}".split() if name in sys.modules], file=sys.__stdout__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done


def test_once_without_the_extra() -> None:
    script = """
import sys
sys.modules["textual"] = None
from cidalloc import cli
sys.argv = ["cidalloc", "top", "127.0.0.1:1", "localhost:1", "--timeout", "1", "--once"]
cli.run()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.count("no answer") >= 2, "each with its reason"
    assert done.stderr.startswith("error: UNAVAILABLE: ") and done.stderr.count("\n") == 1


def test_the_screen_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cidalloc.cli.top.find_spec", lambda name: None)
    done = run("top", NOWHERE, "--web")
    assert done.returncode == 1
    assert "pip install 'cidalloc[top]'" in done.stderr and done.stderr.count("\n") == 1


def test_every_command_of_the_list_has_help() -> None:
    for commands in _GROUPS.values():
        for name, (_, words) in commands.items():
            assert words in run("--help").stdout
            done = run(name, "--help")
            assert (done.returncode, done.stdout[:6]) == (0, "Usage:")
