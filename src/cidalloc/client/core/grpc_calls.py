"""gRPC: channels, how many requests are on their way over each, and what is sent.

No request is cancelled in here. gRPC does so when a channel is closed, and when a deadline is over;
so a channel is closed after the last of its requests, and no deadline is short.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import tritonclient.grpc
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.grpc._utils import _get_inference_request
from tritonclient.utils import InferenceServerException

from ... import protocol
from ...errors import CidError, InvalidArgument, Unavailable
from .transport import Address, check_options, encode, unreachable

__all__ = [
    "SHORT_S",
    "Calls",
    "Connection",
    "Connections",
    "explained",
    "read_config",
    "read_stream",
    "stream_broke",
]

SHORT_S = 1.0
"""The shortest deadline: Triton 2.51 was seen to die of requests cancelled within 6 ms."""

_MOST_AT_ONCE = 100
# Proxies allow about so many requests on one connection; gRPC lets others wait behind them.

_DEFAULTS: dict[str, Any] = {
    "grpc.max_send_message_length": 2**31 - 1,
    "grpc.max_receive_message_length": 2**31 - 1,
    # Servers end a connection with pings more often than every five minutes ("too many pings").
    "grpc.keepalive_time_ms": 310_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.http2.max_pings_without_data": 0,
}


class Connection:
    """A channel, its methods, and how many requests are on their way over it."""

    __slots__ = ("busy", "channel", "config", "infer", "stream")

    def __init__(self, channel: Any) -> None:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.channel = channel
        self.infer, self.stream, self.config = (
            *(stub.ModelInfer, stub.ModelStreamInfer),
            stub.ModelConfig,
        )
        self.busy = 0


class Connections:
    """The channels of a client for one purpose.

    Args:
        make: makes a channel.
        shut: closes one.
    """

    def __init__(self, make: Callable[[], Any], shut: Callable[[Any], object]) -> None:
        self._make, self._shut = make, shut
        self._lock = threading.Lock()
        self._usable: list[Connection] = []
        self._closed = False

    def take(self) -> Connection:
        """Return a connection for one request or stream; `release` it when that is over.

        Raises:
            InvalidArgument: the client is closed.
        """
        with self._lock:
            for connection in self._usable:
                if connection.busy < _MOST_AT_ONCE:
                    break
            else:
                if self._closed:
                    raise InvalidArgument("this client is closed")
                connection = Connection(self._make())
                self._usable.append(connection)
            connection.busy += 1
        return connection

    def retire(self, connection: Connection) -> None:
        """Send nothing more over a connection, since something was not answered on it."""
        with self._lock:
            if connection in self._usable:
                self._usable.remove(connection)

    def failed(self, connection: Connection, error: Any, url: str) -> InferenceServerException:
        """Return tritonclient's exception for gRPC's; if no answer came, retire the connection."""
        found = explained(error)
        if unreachable(found, url):
            self.retire(connection)
        return found

    def release(self, connection: Connection) -> None:
        """Note that a request is over; close the connection if it was the last of a retired one."""
        with self._lock:
            connection.busy -= 1
            last = not connection.busy and connection not in self._usable
        if last:
            self._shut(connection.channel)

    def give_up(self, connection: Connection, error: BaseException) -> None:
        """Leave a connection alone on which a request could not even begin.

        Raises:
            Unavailable: it was for want of a thread.
        """
        self.retire(connection)
        if isinstance(error, RuntimeError | MemoryError) and not isinstance(error, CidError):
            # gRPC would wait for that thread for ever when the channel is closed or collected.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection.channel))
            raise Unavailable(f"no thread can be started: {error}") from error

    def close(self) -> None:
        """Close the connections, each when nothing is on its way over it any more."""
        with self._lock:
            self._closed = True
            idle = [connection for connection in self._usable if not connection.busy]
            self._usable.clear()
        for connection in idle:
            self._shut(connection.channel)


class Calls:
    """What the blocking and the awaiting transport send, and to where.

    Args:
        address: the server.
        headers: go with every request.
        options: of tritonclient's client.

    Raises:
        InvalidArgument: an option that is none, or a file that cannot be read.
    """

    def __init__(
        self, address: Address, headers: Mapping[str, str] | None, options: Mapping[str, Any]
    ) -> None:
        found = check_options(tritonclient.grpc.InferenceServerClient, address, options)
        self.url, self.target = address.url, address.target
        self.verbose = found["verbose"]
        self._metadata = _metadata(headers)
        arguments = {**_DEFAULTS, **_keepalive(found["keepalive_options"])}
        if found["channel_args"] is not None:
            arguments = dict(found["channel_args"])
        # Each client makes connections of its own, so that it can replace one that went silent.
        self.arguments = [*arguments.items(), ("grpc.use_local_subchannel_pool", 1)]
        self.credentials = found["creds"] or (_credentials(found) if address.tls else None)

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
        sequence_id: int = 0,
        sequence_start: bool = False,
        sequence_end: bool = False,
        priority: int = 0,
        timeout: int | None = None,
        headers: Mapping[str, str] | None = None,
        compression_algorithm: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        tell_final: bool = False,
    ) -> tuple[Any, dict[str, Any]]:
        """Return the message for what tritonclient's ``infer`` takes, and what goes beside it.

        With ``tell_final`` the server says which answer is the last one.
        """
        request = _get_inference_request(
            model_name=model,
            inputs=inputs,
            model_version=model_version,
            request_id=request_id,
            outputs=outputs,
            sequence_id=sequence_id,
            sequence_start=sequence_start,
            sequence_end=sequence_end,
            priority=priority,
            timeout=timeout,
            parameters=parameters,
        )
        if tell_final:
            request.parameters["triton_enable_empty_final_response"].bool_param = True
        beside: dict[str, Any] = {
            "metadata": self._metadata if headers is None else _metadata(headers)
        }
        if compression_algorithm is not None:
            beside["compression"] = _compression(compression_algorithm)
        return request, beside

    def manager_request(self, model: str, request: protocol.Request) -> tuple[Any, dict[str, Any]]:
        """Return the message for a request to the manager, and what goes beside it."""
        arguments = encode(tritonclient.grpc, request)
        return self.request(model, arguments.pop("inputs"), **arguments)

    def config_request(self, model: str) -> tuple[Any, dict[str, Any]]:
        """Return the message that asks for a configuration, and what goes beside it."""
        return service_pb2.ModelConfigRequest(name=model), {"metadata": self._metadata}

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with a stream."""
        return self._metadata

    def show(self, what: Any) -> None:
        """Print what is sent or received for ``verbose``; the manager's requests have secrets."""
        if self.verbose:
            print(what)


def read_config(answer: Any) -> Mapping[str, Any]:
    """Return a configuration as JSON has it."""
    config: Mapping[str, Any] = MessageToDict(answer, preserving_proto_field_name=True)["config"]
    return config


def explained(error: Any) -> InferenceServerException:
    """Return tritonclient's exception for one of gRPC's, as tritonclient does."""
    code = error.code()
    text = error.details() or ""
    return InferenceServerException(text, str(code), error.debug_error_string())


def _metadata(headers: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    # HTTP/2 has small letters only.
    return tuple((name.lower(), value) for name, value in (headers or {}).items())


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
    kinds = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}
    if str(name).lower() not in kinds:
        raise InvalidArgument(f"compression_algorithm={name!r} is neither 'gzip' nor 'deflate'")
    return kinds[name.lower()]


def read_stream(answer: Any) -> tuple[str, bool, Any, BaseException | None]:
    """Return what `Receive` takes, for what came over a stream."""
    response = answer.infer_response
    if answer.error_message:
        return response.id, True, None, InferenceServerException(answer.error_message)
    final = "triton_final_response"
    last = final not in response.parameters or response.parameters[final].bool_param
    return response.id, last, tritonclient.grpc.InferResult(response), None


def stream_broke(error: Exception, url: str) -> CidError:
    """Return our error for what ended a stream; gRPC's errors run over many lines."""
    details = getattr(error, "details", None)
    text = details() if callable(details) else str(error)
    first = str(text or type(error).__name__).splitlines()[0]
    return Unavailable(f"the stream to {url} broke: {first}")
