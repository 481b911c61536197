"""gRPC: messages and streams. No request is cancelled here; so no deadline is short."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import tritonclient.grpc
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from ... import protocol
from ...codes import Operation
from ...errors import InvalidArgument, ProtocolError, Unavailable
from .arguments import check_headers
from .grpc_connections import Connections
from .result import Result
from .tensors import Library
from .transport import Address, Receive, Route, boottime, check_options, encode

__all__ = [
    "SHORT_S",
    "Calls",
    "GrpcBase",
    "GrpcResult",
    "StreamBase",
    "read_config",
]

SHORT_S = 1.0
"""The shortest deadline: Triton 2.51 was seen to die of requests cancelled within 6 ms."""

_DEFAULTS: dict[str, Any] = {
    "grpc.max_send_message_length": 2**31 - 1,
    "grpc.max_receive_message_length": 2**31 - 1,
    # Servers end a connection with pings more often than every five minutes ("too many pings").
    "grpc.keepalive_time_ms": 310_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.http2.max_pings_without_data": 0,
}


_PARAMETERS = {
    bool: "bool_param",
    int: "int64_param",
    float: "double_param",
    str: "string_param",
}


LIBRARY = Library.of(tritonclient.grpc, "compression_algorithm", "headers")


class GrpcResult(Result, tritonclient.grpc.InferResult):  # type: ignore[misc]
    """A result over gRPC."""


class Calls:
    """The messages and channels of the blocking and of the asyncio transport.

    Args:
        address: the server.
        headers: sent with every request.
        options: options of tritonclient's client.

    Raises:
        InvalidArgument: an option is not valid, or a file cannot be read.
    """

    def __init__(
        self, address: Address, headers: Mapping[str, str] | None, options: Mapping[str, Any]
    ) -> None:
        found = check_options(tritonclient.grpc.InferenceServerClient, address, options)
        self.url, self.target = address.url, address.target
        self.verbose = found["verbose"]
        self.headers = _metadata(headers)
        self.route: Route = lambda: None
        arguments = {**_DEFAULTS, **_keepalive(found["keepalive_options"])}
        if found["channel_args"] is not None:
            arguments = dict(found["channel_args"])
        # Each client has connections of its own, so that it can replace one that went silent.
        self.arguments = [*arguments.items(), ("grpc.use_local_subchannel_pool", 1)]
        if address.name:
            self.arguments.append(("grpc.default_authority", address.name))
            if address.tls:
                self.arguments.append(("grpc.ssl_target_name_override", address.name))
        self.credentials = found["creds"] or (_credentials(found) if address.tls else None)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The headers of each request but OPEN."""
        return self._routed(self.headers)

    def _routed(self, headers: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        number = self.route()
        return headers if number is None else (*headers, (protocol.ROUTE_HEADER, str(number)))

    def channel(self, library: Any) -> Any:
        """Return a new channel of ``grpc`` or ``grpc.aio``."""
        if self.credentials is not None:
            return library.secure_channel(self.target, self.credentials, options=self.arguments)
        return library.insecure_channel(self.target, options=self.arguments)

    def request(
        self,
        model: str,
        inputs: list[Any],
        /,
        *,
        model_version: str = "",
        outputs: list[Any] | None = None,
        request_id: str = "",
        sequence_id: int | str = 0,
        sequence_start: bool = False,
        sequence_end: bool = False,
        priority: int = 0,
        timeout: int | None = None,
        parameters: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        compression_algorithm: str | None = None,
        tell_final: bool = False,
        secret: bool = False,
    ) -> tuple[Any, dict[str, Any]]:
        """Return the message and gRPC's arguments for the arguments of tritonclient's ``infer``.

        With ``tell_final`` the server marks the last answer. A ``secret`` message is never printed.
        """
        # tritonclient does the same, with 1.5 times the work: what is absent is false or 0.
        request = service_pb2.ModelInferRequest()
        request.model_name = model
        flags = request.parameters
        if isinstance(sequence_id, str):
            flags["sequence_id"].string_param = sequence_id
        elif sequence_id:
            flags["sequence_id"].int64_param = sequence_id
        if sequence_start:
            flags["sequence_start"].bool_param = True
        if sequence_end:
            flags["sequence_end"].bool_param = True
        if timeout is not None:
            flags["timeout"].int64_param = timeout
        if tell_final:
            flags["triton_enable_empty_final_response"].bool_param = True
        if priority:
            flags["priority"].uint64_param = priority
        for name, value in (parameters or {}).items():
            setattr(flags[name], _PARAMETERS[type(value)], value)
        if model_version:
            request.model_version = model_version
        if request_id:
            request.id = request_id
        for each in inputs:
            request.inputs.append(each._get_tensor())
            content = each._get_content()
            if content is not None:
                request.raw_input_contents.append(content)
        for each in outputs or ():
            request.outputs.append(each._get_tensor())
        if self.verbose and not secret:
            print(request)
        beside: dict[str, Any] = {}
        if metadata := self._routed(self.headers if headers is None else _metadata(headers)):
            beside["metadata"] = metadata
        if compression_algorithm is not None:
            beside["compression"] = _compression(compression_algorithm)
        return request, beside

    def manager_request(self, model: str, request: protocol.Request) -> tuple[Any, dict[str, Any]]:
        """Return the message and gRPC's arguments for a request to the manager."""
        arguments = encode(LIBRARY, request)
        found = self.request(model, arguments.pop("inputs"), secret=True, **arguments)
        if request.operation is Operation.OPEN:  # any server may answer it
            found[1]["metadata"] = self.headers
        return found

    def config_request(self, model: str) -> tuple[Any, dict[str, Any]]:
        """Return the message and gRPC's arguments that ask for a configuration."""
        return service_pb2.ModelConfigRequest(name=model), {"metadata": self.metadata}

    def version_request(self) -> tuple[Any, dict[str, Any]]:
        """Return the message and gRPC's arguments that ask for the version of the server."""
        return service_pb2.ServerMetadataRequest(), {"metadata": self.metadata}

    def result(self, answer: Any) -> GrpcResult:
        """Return the result of an answer.

        Raises:
            ProtocolError: it is none of Triton's. grpc.aio returns None, or an empty message, for
                what cannot be read.
        """
        if answer is None or not answer.model_name:
            raise ProtocolError(f"{self.url} answers unlike Triton: its message cannot be read")
        if self.verbose:
            print(answer)
        return GrpcResult(answer)


def read_config(answer: Any) -> Mapping[str, Any]:
    """Return a configuration as JSON."""
    config: Mapping[str, Any] = MessageToDict(answer, preserving_proto_field_name=True)["config"]
    return config


_NAME = re.compile(r"[0-9a-z_.-]+")  # of gRPC's metadata


def _metadata(headers: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    # HTTP/2 has lower case only.
    found = tuple((name.lower(), value) for name, value in check_headers(headers).items())
    for name, _ in found:
        if not _NAME.fullmatch(name):
            raise InvalidArgument(f"gRPC does not allow the name of the header {name!r}")
    return found


def _keepalive(options: Any) -> dict[str, Any]:
    if options is None:
        return {}
    return {
        "grpc.keepalive_time_ms": options.keepalive_time_ms,
        "grpc.keepalive_timeout_ms": options.keepalive_timeout_ms,
        "grpc.keepalive_permit_without_calls": options.keepalive_permit_without_calls,
        "grpc.http2.max_pings_without_data": options.http2_max_pings_without_data,
    }


def _credentials(options: Mapping[str, Any]) -> Any:
    files: dict[str, bytes | None] = {}
    for name in ("root_certificates", "private_key", "certificate_chain"):
        try:
            if options[name] is None:
                files[name] = None
            else:
                with open(options[name], "rb") as file:
                    files[name] = file.read()
        except OSError as error:
            raise InvalidArgument(f"{name}: {error}") from None
    return grpc.ssl_channel_credentials(**files)


def _compression(name: str) -> Any:
    return {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}[name]


class GrpcBase:
    """What the blocking and the asyncio transport have in common.

    Args:
        library: ``grpc`` or ``grpc.aio``.
        shut: closes a channel.
        is_ready: whether a channel is connected.
        address, headers, options: see `Calls`.
    """

    library = LIBRARY
    streams = True
    now = staticmethod(boottime)

    def __init__(
        self,
        library: Any,
        shut: Callable[[Any], object],
        is_ready: Callable[[Any], bool],
        address: Address,
        headers: Mapping[str, str] | None,
        options: Mapping[str, Any],
    ) -> None:
        self.url = address.url
        self._calls = Calls(address, headers, options)
        # The manager's requests never wait for those of sequences.
        self._asks, self._sequences = (
            Connections(lambda: self._calls.channel(library), shut, is_ready) for _ in range(2)
        )
        self.broke = self._sequences.broke

    @property
    def route(self) -> Route:
        """See `Transport`."""
        return self._calls.route

    @route.setter
    def route(self, route: Route) -> None:
        self._calls.route = route


class StreamBase:
    """A `Stream`, without the thread or task that reads its answers.

    Args:
        connections: the stream takes one of these.
        calls: makes the messages.
        receive: is called with each answer.
        queue: the requests that gRPC sends; None is the end.
    """

    _answers: Any = None  # gRPC's call, which keeps the connection open while anything refers to it

    def __init__(
        self, connections: Connections, calls: Calls, receive: Receive, queue: Any
    ) -> None:
        self.over = False
        self._trouble = ""  # why it broke
        self._connections, self._calls, self._receive = connections, calls, receive
        self._queue = queue
        self._connection = connections.take()

    def send(self, model: str, inputs: list[Any], /, **options: Any) -> None:
        request, _ = self._calls.request(model, inputs, **options)
        if self.over:
            raise Unavailable(
                f"the stream to {self._calls.url} broke{self._trouble}; open a new sequence"
            )
        self._queue.put_nowait(request)

    def end(self) -> None:
        self._queue.put_nowait(None)

    def cut(self) -> None:
        answers = self._answers
        if answers is not None:
            answers.cancel()

    def suspect(self) -> None:
        self._connections.retire(self._connection)

    def _received(self, answer: Any) -> None:
        """Pass an answer on."""
        if answer is not None and answer.error_message:
            error = InferenceServerException(answer.error_message)
            self._receive(answer.infer_response.id, True, None, error)
            return
        response: Any = None if answer is None else answer.infer_response
        try:
            result = self._calls.result(response)
        except ProtocolError as unlike:
            self._receive("", True, None, unlike)
            return
        final = "triton_final_response"
        last = final not in response.parameters or response.parameters[final].bool_param
        self._receive(response.id, last, result, None)

    def _ended(self, failure: Exception | None) -> None:
        """Note that gRPC has closed the stream, and fail the requests that are unanswered."""
        url = self._calls.url
        error = Unavailable(f"the stream to {url} was closed")
        if failure is not None:
            self.suspect()
            # gRPC's errors have many lines.
            details = getattr(failure, "details", None)
            text = details() if callable(details) else str(failure)
            first = str(text or type(failure).__name__).splitlines()[0]
            self._trouble = f": {first}"
            error = Unavailable(f"the stream to {url} broke{self._trouble}")
        self.over, self._answers = True, None
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._queue.put_nowait(None)  # gRPC's sending thread or task ends
        self._connections.release(self._connection)
        self._receive("", True, None, error)
