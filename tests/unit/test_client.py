"""The client's own part: URLs, and what becomes of failures to reach the manager."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from cidalloc import errors
from cidalloc.client import AsyncClient, Client
from cidalloc.client.core.grpc_calls import GrpcResult
from cidalloc.client.core.http_calls import HttpResult
from cidalloc.client.core.transport import (
    NOT_TRITON,
    parse_url,
    read_answer,
    translate,
    unreachable,
)
from cidalloc.client.sync.grpc import GrpcTransport
from cidalloc.client.sync.http import HttpTransport
from cidalloc.client.sync.transport import connect
from cidalloc.devserver.triton_server import TritonServer


@pytest.mark.parametrize(
    ("url", "kind", "where"),
    [
        ("localhost:9001", GrpcTransport, "localhost:9001"),
        ("localhost", GrpcTransport, "localhost:8001"),
        ("grpc://host:1", GrpcTransport, "host:1"),
        ("grpcs://host", GrpcTransport, "host:443"),
        ("http://host", HttpTransport, "host:8000"),
        ("http://[::1]:80/", HttpTransport, "[::1]:80"),
        ("https://host", HttpTransport, "host:443"),
        ("HTTP://host:1", HttpTransport, "host:1"),
        ("Grpcs://Host", GrpcTransport, "host:443"),
        ("http://host/triton/", HttpTransport, "host:8000"),
        ("[::1]:8001", GrpcTransport, "[::1]:8001"),
        ("dns:8001", GrpcTransport, "dns:8001"),
        ("dns:///host:8001", GrpcTransport, "dns:///host:8001"),
        ("unix:/run/triton.sock", GrpcTransport, "unix:/run/triton.sock"),
        ("unix:///run/triton.sock", GrpcTransport, "unix:///run/triton.sock"),
        ("grpc://unix:/run/triton.sock", GrpcTransport, "unix:/run/triton.sock"),
        ("ipv6:[::1]:8001", GrpcTransport, "ipv6:[::1]:8001"),
    ],
)
def test_urls(url: str, kind: type[Any], where: str) -> None:
    address = parse_url(url)
    assert address.target == where
    assert address.path == ("/triton" if "triton/" in url and "host" in url else "")
    transport = connect(url)
    assert type(transport) is kind
    transport.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "form scheme://host:port"),
        ("ftp://host", "scheme is one of grpc, http, grpcs, https"),
        ("grpc://", "form scheme://host:port"),
        ("host:port", "ort"),
        ("http://u:p@host", "form scheme://host:port"),
        ("h:99999", "ort"),
        ("::1:8001", r"in brackets, as \[::1\]:8001"),
        ("http://fe80::1", "in brackets"),
        ("grpc://host:8001/triton", "no path"),
        ("http://host?x=1", "form scheme://host:port"),
        ("host\n:1", "not a URL"),
        (None, "not a URL"),
    ],
)
def test_urls_that_are_none(url: str, words: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(errors.InvalidArgument, match=words):
            kind(url)


@pytest.fixture(params=["grpc", "http"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_nobody_there(scheme: str) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with (
        Client(f"{scheme}://127.0.0.1:{port}", timeout=2) as client,
        pytest.raises(errors.Unavailable, match=str(port)),
    ):
        client.acquire()


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that takes connections and says nothing."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_a_server_that_hangs(scheme: str, silent: int) -> None:
    with (
        Client(f"{scheme}://127.0.0.1:{silent}", timeout=0.5) as client,
        pytest.raises(errors.Unavailable),
    ):
        client.acquire()


def test_a_server_that_hangs_up(scheme: str) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()

        def hang_up() -> None:
            try:
                while True:
                    connection, _ = sock.accept()
                    connection.recv(100)
                    connection.close()
            except OSError:
                pass

        threading.Thread(target=hang_up, daemon=True).start()
        url = f"{scheme}://127.0.0.1:{sock.getsockname()[1]}"
        with Client(url, timeout=2) as client, pytest.raises(errors.Unavailable):
            client.acquire()
        sock.shutdown(socket.SHUT_RDWR)


def test_no_manager_on_the_server(scheme: str, triton: TritonServer) -> None:
    url = triton.grpc_url if scheme == "grpc" else triton.http_url
    with Client(url, model="nonesuch") as client:
        with pytest.raises(errors.Unavailable, match="serves no model nonesuch"):
            client.acquire()


def test_another_model_than_a_manager(scheme: str, triton: TritonServer) -> None:
    url = triton.grpc_url if scheme == "grpc" else triton.http_url
    with Client(url, model="simple_sequence") as client, pytest.raises(errors.InvalidArgument):
        client.acquire()


def test_a_model_that_answers_unlike_a_manager(scheme: str, triton: TritonServer) -> None:
    url = triton.grpc_url if scheme == "grpc" else triton.http_url
    with Client(url, model="impostor") as client, pytest.raises(errors.ProtocolError):
        client.acquire()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionRefusedError(), errors.Unavailable),
        (TimeoutError("timed out"), errors.Unavailable),
    ],
)
def test_socket_errors(error: OSError, kind: type[errors.CidError]) -> None:
    found = translate(error, "cidmgr", "http://host")
    assert type(found) is kind
    assert "http://host" in str(found)


@pytest.mark.parametrize(
    ("text", "status", "kind"),
    [
        ("failed to connect", "StatusCode.UNAVAILABLE", errors.Unavailable),
        ("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED", errors.Unavailable),
        ("Stub process 'x' is not healthy.", "500", errors.Unavailable),
        ("Stub process 'x' is not healthy.", "StatusCode.INTERNAL", errors.Unavailable),
        ("Failed to process the requests.", "500", errors.Unavailable),
        ("Failed to process the requests.", "StatusCode.INTERNAL", errors.Unavailable),
        ("upstream", "503", errors.Unavailable),
        ("Request for unknown model: 'm' is not found", "404", errors.Unavailable),
        ("unexpected shape", "400", errors.InvalidArgument),
        ("unexpected shape", "StatusCode.INVALID_ARGUMENT", errors.InvalidArgument),
        ("url should not include the scheme", None, errors.ProtocolError),
        ("boom", "500", errors.InternalError),
        ("Received RST_STREAM with error code 8", "StatusCode.CANCELLED", errors.Unavailable),
        (
            "Received RST_STREAM with error code 11",
            "StatusCode.RESOURCE_EXHAUSTED",
            errors.Unavailable,
        ),
        ("Received RST_STREAM with error code 2", "StatusCode.INTERNAL", errors.Unavailable),
        ("Channel closed!", "StatusCode.CANCELLED", errors.Unavailable),
        ("Too many requests", "StatusCode.RESOURCE_EXHAUSTED", errors.Unavailable),
        (
            "message larger than max (9 vs. 8)",
            "StatusCode.RESOURCE_EXHAUSTED",
            errors.LimitExceeded,
        ),
        ("contention", "StatusCode.ABORTED", errors.Unavailable),
        ("boom", "StatusCode.UNKNOWN", errors.InternalError),
        ("lost", "StatusCode.DATA_LOSS", errors.InternalError),
        ("no such method", "StatusCode.UNIMPLEMENTED", errors.ProtocolError),
        ("no", "StatusCode.NOT_FOUND", errors.ProtocolError),
        ("no", "StatusCode.PERMISSION_DENIED", errors.ProtocolError),
        ("no", "StatusCode.UNAUTHENTICATED", errors.ProtocolError),
        ("no", "StatusCode.ALREADY_EXISTS", errors.ProtocolError),
        ("no", "StatusCode.FAILED_PRECONDITION", errors.ProtocolError),
        ("no", "StatusCode.OUT_OF_RANGE", errors.ProtocolError),
        ("late", "408", errors.Unavailable),
        ("too large", "413", errors.LimitExceeded),
        ("slow down", "429", errors.Unavailable),
        ("<html>", "502", errors.Unavailable),
        ("<html>", "504", errors.Unavailable),
        ("no", "401", errors.ProtocolError),
        ("forbidden", "403", errors.ProtocolError),
        ("no such page", "404", errors.ProtocolError),
        ("no", "405", errors.ProtocolError),
        ("no", "501", errors.ProtocolError),
        ("step 1: [CIDALLOC 3 NOT_OWNER] not yours", "500", errors.NotOwner),
        ("[CIDALLOC 20 DRAINING] no new ones", "503", errors.Draining),
        # Of a later version, whose code this one does not know.
        ("[CIDALLOC 77 LATER] not now", "503", errors.Unavailable),
        ("[CIDALLOC 77 LATER] not so", "StatusCode.INVALID_ARGUMENT", errors.InvalidArgument),
        ("[CIDALLOC 77 LATER] where?", "StatusCode.NOT_FOUND", errors.ProtocolError),
    ],
)
def test_triton_errors(text: str, status: str | None, kind: type[errors.CidError]) -> None:
    found = translate(InferenceServerException(text, status), "m", "host")
    assert type(found) is kind


def test_each_status_of_grpc_has_a_meaning() -> None:
    """The table in docs/client.md says the same."""
    guide = (Path(__file__).parent.parent.parent / "docs" / "client.md").read_text()
    for code in grpc.StatusCode:
        if code is grpc.StatusCode.OK:
            continue
        found = translate(InferenceServerException("words", str(code)), "m", "host")
        (line,) = [each for each in guide.splitlines() if re.search(rf"`{code.name}`.*\|", each)]
        assert line.endswith(f"| `{type(found).__name__}` |"), line


@pytest.mark.parametrize(
    ("text", "status", "ours"),
    [
        ("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED", True),
        ("Channel closed!", "StatusCode.CANCELLED", True),
        ("Received RST_STREAM with error code 2", "StatusCode.INTERNAL", True),
        ("Socket closed", "StatusCode.UNAVAILABLE", True),
        ("Exceeds maximum queue size", "StatusCode.UNAVAILABLE", False),
        ("Exceeds maximum queue size", "503", False),
        (f"{NOT_TRITON}: 503 Service Temporarily Unavailable", "503", True),
        ("upstream timed out", "504", True),
        ("the model failed", "StatusCode.INTERNAL", False),
        ("the model failed", "500", False),
        ("unexpected shape", "400", False),
    ],
)
def test_what_means_that_no_answer_came(text: str, status: str, ours: bool) -> None:
    found = unreachable(InferenceServerException(text, status), "host")
    assert (type(found) is errors.Unavailable) == ours


def test_repr() -> None:
    client = Client("host:1")
    assert repr(client) == "<cidalloc Client of cidmgr at grpc://host:1, not opened, 0 in use>"
    client.close()
    assert "closed" in repr(client)


def test_an_answer_without_outputs_is_none() -> None:
    """Triton 2.51 gives it, rarely, after a proxy has given requests up."""
    body = b'{"model_name":"cidmgr","model_version":"1"'
    over_http = [HttpResult.from_response_body(body + end) for end in (b"}", b',"outputs":[]}')]
    message = service_pb2.ModelInferResponse(model_name="cidmgr", model_version="1")
    for result in (*over_http, GrpcResult(message)):
        with pytest.raises(errors.Unavailable, match=r"no answer from x: .*without outputs"):
            read_answer(result, "cidmgr", "x")
    with pytest.raises(errors.ProtocolError):
        read_answer(GrpcResult(service_pb2.ModelInferResponse()), "cidmgr", "x")
