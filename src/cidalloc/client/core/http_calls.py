"""HTTP: requests as paths, headers and bodies, and results from answers, without any waiting."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import tritonclient.http
from tritonclient.utils import InferenceServerException

from ... import protocol
from ...errors import InvalidArgument
from .arguments import check_headers
from .result import Result
from .tensors import Library
from .transport import Address, Receive, Stream, boottime, encode

__all__ = ["HttpAnswer", "HttpBase", "HttpCall", "HttpResult"]

_BODY = tritonclient.http.InferenceServerClient.generate_request_body
_LENGTH = "Inference-Header-Content-Length"
_PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


class HttpResult(Result, tritonclient.http.InferResult):  # type: ignore[misc]
    """A result over HTTP."""


class HttpCall(NamedTuple):
    """A request to send.

    Attributes:
        method: ``GET`` or ``POST``.
        path: the path with its query.
        headers: the headers.
        body: the body.
        shown: print the answer.
    """

    method: str
    path: str
    headers: dict[str, Any]
    body: bytes = b""
    shown: bool = False


class HttpAnswer(NamedTuple):
    """An answer, read to its end; ``headers`` is case-insensitive."""

    status: int
    headers: Any
    body: bytes

    def check(self) -> None:
        """Raise tritonclient's exception if Triton answered with an error, as tritonclient does."""
        if self.status == 200:
            return
        try:
            text = json.loads(self.body)["error"]
        except (ValueError, LookupError, TypeError):
            text = self.body[:1000].decode(errors="replace")
        raise InferenceServerException(str(text), str(self.status))

    def result(self, call: HttpCall) -> HttpResult:
        """Return the result of an inference; raises what `check` does."""
        self.check()
        length = self.headers.get(_LENGTH)
        result: HttpResult = HttpResult.from_response_body(
            self.body,
            verbose=call.shown,
            header_length=None if length is None else int(length),
            content_encoding=self.headers.get("Content-Encoding"),
        )
        return result

    def json(self) -> dict[str, Any]:
        """Return the JSON object; raises what `check` does, and TypeError if it is none."""
        self.check()
        found = json.loads(self.body)
        if not isinstance(found, dict):
            raise TypeError("an answer that is not a JSON object")
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
    now = staticmethod(boottime)

    def __init__(self, address: Address, headers: Mapping[str, str] | None, verbose: bool) -> None:
        self.url = address.url
        self._root = f"{address.path}/v2"
        self._headers = check_headers(headers)
        self._verbose = verbose

    def open_stream(self, receive: Receive, /) -> Stream:
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
        **options: Any,
    ) -> HttpCall:
        """Return the request for the arguments of tritonclient's ``infer``."""
        body, size = _BODY(inputs, **options)
        shown = self._verbose and not secret
        if shown:
            print(model, body[:size])
        sent = dict(self._headers if headers is None else headers)
        if size is not None:
            sent[_LENGTH] = str(size)
        if request_compression_algorithm is not None:
            body = _PACK[request_compression_algorithm](body)
            sent["Content-Encoding"] = request_compression_algorithm
        if response_compression_algorithm is not None:
            sent["Accept-Encoding"] = response_compression_algorithm
        version = f"/versions/{quote(model_version)}" if model_version else ""
        query = f"?{urlencode(query_params, doseq=True)}" if query_params else ""
        path = f"{self._root}/models/{quote(model)}{version}/infer{query}"
        return HttpCall("POST", path, sent, body, shown)

    def _manager_request(self, model: str, request: protocol.Request) -> HttpCall:
        arguments = encode(tritonclient.http, request)
        # It is not printed, since it has secrets.
        return self._request(model, arguments.pop("inputs"), secret=True, **arguments)

    def _config_request(self, model: str) -> HttpCall:
        return HttpCall("GET", f"{self._root}/models/{quote(model)}/config", self._headers)

    def _version_request(self) -> HttpCall:
        return HttpCall("GET", self._root, self._headers)
