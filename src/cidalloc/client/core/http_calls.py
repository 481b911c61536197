"""HTTP: requests as paths, headers and bodies, and results from answers, without any waiting."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import httptools
import tritonclient.http
from tritonclient.utils import InferenceServerException

from ... import protocol
from ...codes import Operation
from ...errors import InvalidArgument, ProtocolError
from ...protocol import ROUTE_HEADER
from .arguments import check_headers
from .result import Result
from .tensors import Library
from .transport import (
    NOT_TRITON,
    STRANGE,
    Address,
    Receive,
    Route,
    Stream,
    boottime,
    encode,
    without_tags,
)

__all__ = ["IDLE_S", "HttpAnswer", "HttpBase", "HttpCall", "HttpResult"]

IDLE_S = 30.0
"""An idle connection is kept for so many seconds."""

_BODY = tritonclient.http.InferenceServerClient.generate_request_body
_LENGTH = b"inference-header-content-length"
_PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


class HttpResult(Result, tritonclient.http.InferResult):  # type: ignore[misc]
    """A result over HTTP."""


class HttpCall(NamedTuple):
    """A request to send.

    Attributes:
        url: the server.
        data: the whole request, head and body.
        shown: print the answer.
    """

    url: str
    data: bytes
    shown: bool = False

    def unlike(self, what: object) -> ProtocolError:
        """Return the error for an answer that is not Triton's, for example a page of a proxy."""
        return ProtocolError(f"{self.url} answers unlike Triton: {without_tags(str(what))}")


class HttpAnswer:
    """An answer, which is fed with the bytes of a connection. httptools calls its ``on_`` methods.

    Attributes:
        done: it was read to its end.
        reusable: the connection can be used again.
    """

    def __init__(self) -> None:
        self.done = self.reusable = False
        self.status = 0
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []

    def feed(self, data: bytes) -> bool:
        """Read some bytes, or the end of the connection if there are none; return `done`.

        Raises:
            ConnectionError: the connection ended too early, or this is not HTTP.
        """
        if not data:
            # Without a length, the end of the connection is the end of the answer.
            if not self.status or {b"content-length", b"transfer-encoding"} & self._headers.keys():
                raise ConnectionError("the connection was closed before the answer was complete")
            self.done = True
        else:
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
                raise ConnectionError(f"this is not HTTP: {error}") from None
        return self.done

    def on_message_begin(self) -> None:
        if self.done:
            self.reusable = False
            raise ConnectionError("more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        self._body.append(part)

    def on_message_complete(self) -> None:
        if self.status < 200:  # an interim answer
            self.status = 0
            self._headers.clear()
        else:
            self.done = True
            self.reusable = self._parser.should_keep_alive()

    # ---- What it says

    def _checked(self) -> bytes:
        """Return the body; raise tritonclient's exception if Triton answered with an error."""
        body = b"".join(self._body)
        if self.status == 200:
            return body
        try:
            text = str(json.loads(body)["error"])
        except STRANGE:
            page = without_tags(body[:1000].decode(errors="replace"))
            text = f"{NOT_TRITON}: {page or f'HTTP status {self.status}'}"
        raise InferenceServerException(text, str(self.status))

    def result(self, call: HttpCall) -> HttpResult:
        """Return the result of an inference.

        Raises:
            InferenceServerException: Triton answered with an error.
            ProtocolError: this is not Triton's answer.
        """
        body, length = self._checked(), self._headers.get(_LENGTH)
        encoding = self._headers.get(b"content-encoding")
        try:
            result: HttpResult = HttpResult.from_response_body(
                body,
                verbose=call.shown,
                header_length=None if length is None else int(length),
                content_encoding=None if encoding is None else encoding.decode("latin-1"),
            )
        except (InferenceServerException, *STRANGE) as error:  # the first one: it is no UTF-8
            page = body[:200].decode(errors="replace")
            raise call.unlike(page if "<" in page else repr(error)) from error
        answer = result.get_response()
        if not isinstance(answer, dict) or "model_name" not in answer:
            raise call.unlike(body[:200].decode(errors="replace"))
        return result

    def json(self, call: HttpCall) -> dict[str, Any]:
        """Return a JSON object; raises what `result` does."""
        body = self._checked()
        try:
            found = json.loads(body)
        except STRANGE as error:
            raise call.unlike(body[:200].decode(errors="replace")) from error
        if not isinstance(found, dict):
            raise call.unlike("not with a JSON object")
        return found


class HttpBase:
    """What the blocking and the asyncio transport have in common.

    Args:
        address: the server.
        headers: sent with every request.
        verbose: print the requests of sequences and their answers.
    """

    library = Library.of(
        tritonclient.http,
        *("headers", "query_params"),
        *("request_compression_algorithm", "response_compression_algorithm"),
    )
    streams = False
    now = staticmethod(boottime)

    def __init__(self, address: Address, headers: Mapping[str, str] | None, verbose: bool) -> None:
        self.url = address.url
        host, _, port = address.target.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._name = address.name or self._host  # for TLS, and in the header Host
        self._target = f"{address.name}:{port}" if address.name else address.target
        self._root = f"{address.path}/v2"
        self._headers = self._checked(headers)
        self.route: Route = lambda: None
        self._verbose = verbose
        self._broke = False

    @staticmethod
    def _checked(headers: Mapping[str, str] | None) -> dict[str, Any]:
        found = check_headers(headers)
        for name in found:
            if name.lower() in ("content-length", "transfer-encoding"):
                raise InvalidArgument(f"the header {name} is set by the client")
        return found

    def broke(self) -> bool:
        """See `Transport`."""
        broke, self._broke = self._broke, False  # first: a request may fail while this looks
        return self._closed_by_server() or broke

    def _closed_by_server(self) -> bool:
        """Drop the connections without a request that the server has closed; return whether any."""
        raise NotImplementedError

    def open_stream(self, receive: Receive, /, limit: float | None = None) -> Stream:
        """Raise `InvalidArgument`: HTTP has no streams."""
        raise InvalidArgument(f"streaming needs gRPC, and {self.url} is HTTP")

    def _request(
        self,
        model: str,
        inputs: list[Any],
        /,
        *,
        model_version: str = "",
        headers: Mapping[str, str] | None = None,
        query_params: Mapping[str, Any] | None = None,
        request_compression_algorithm: str | None = None,
        response_compression_algorithm: str | None = None,
        secret: bool = False,
        anywhere: bool = False,
        **options: Any,
    ) -> HttpCall:
        """Return the request for the arguments of tritonclient's ``infer``.

        A ``secret`` request is never printed. One that may go ``anywhere`` carries no route.
        """
        body, size = _BODY(inputs, **options)
        shown = self._verbose and not secret
        if shown:
            print(model, body[:size])
        sent = dict(self._headers if headers is None else self._checked(headers))
        if size is not None:
            sent["Inference-Header-Content-Length"] = size
        if request_compression_algorithm is not None:
            body = _PACK[request_compression_algorithm](body)
            sent["Content-Encoding"] = request_compression_algorithm
        if response_compression_algorithm is not None:
            sent["Accept-Encoding"] = response_compression_algorithm
        version = f"/versions/{quote(model_version)}" if model_version else ""
        query = f"?{urlencode(query_params, doseq=True)}" if query_params else ""
        path = f"/models/{quote(model)}{version}/infer{query}"
        return HttpCall(self.url, self._message("POST", path, sent, body, anywhere), shown)

    def _manager_request(self, model: str, request: protocol.Request) -> HttpCall:
        arguments = encode(self.library, request)
        arguments["anywhere"] = request.operation is Operation.OPEN
        return self._request(model, arguments.pop("inputs"), secret=True, **arguments)

    def _config_request(self, model: str) -> HttpCall:
        path = f"/models/{quote(model)}/config"
        return HttpCall(self.url, self._message("GET", path, self._headers))

    def _version_request(self) -> HttpCall:
        return HttpCall(self.url, self._message("GET", "", self._headers))

    def _message(
        self,
        method: str,
        path: str,
        headers: Mapping[str, Any],
        body: bytes = b"",
        anywhere: bool = False,
    ) -> bytes:
        if (number := self.route()) is not None and not anywhere:
            headers = {**headers, ROUTE_HEADER: number}
        if not any(name.lower() == "host" for name in headers):
            headers = {"Host": self._target, **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"{method} {self._root}{path} HTTP/1.1\r\n{lines}"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
