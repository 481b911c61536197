"""HTTP/1.1, and HTTP/2 with gRPC's messages, as a server speaks them, right or wrong.

HTTP/2 is that of h2, so that each frame can be another one than gRPC would send.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import h2.config
import h2.connection
import h2.events
import numpy as np
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2

from cidalloc import protocol
from cidalloc.codes import Operation

__all__ = ["Asked", "Failure", "Http1", "Http2", "Tensor"]

PAGE = "<html><head><title>{0}</title></head><body><h1>{0} of a proxy</h1></body></html>"
WORDS = (
    "upstream connect error or disconnect/reset before headers. reset reason: connection failure"
)
JUNK = b"\x9f\x00\xff junk \r\n\r\n \x07" * 3
TYPES = {"UINT64": np.uint64, "INT32": np.int32, "INT8": np.int8}
Tensor = tuple[str, Any]  # the data type, and the array


class Failure(Exception):
    """An error of Triton, with its status in HTTP and in gRPC."""

    def __init__(self, text: str, http: int, grpc: int) -> None:
        super().__init__(text)
        self.http, self.grpc = http, grpc


class Asked(NamedTuple):
    """A request: the model, its inputs and its parameters; ``what`` names it in tables."""

    what: str
    model: str
    inputs: dict[str, Any]
    parameters: dict[str, Any]
    version: bool = False


class Carrier(Protocol):
    """A connection, which serves the requests that are read here."""

    wire: Any

    def serve(self, talk: Any, asked: Asked, way: Any) -> None: ...

    def refuse(self, data: bytes) -> None:
        """Hang up, since this is no request of a client."""


class Http1:
    """HTTP/1.1: one request at a time."""

    def __init__(self, connection: Carrier) -> None:
        self._connection, self._wire = connection, connection.wire
        self._data = b""

    def feed(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode().split("\r\n")
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        if "content-length" not in headers:
            self._connection.refuse(self._data)
            return
        if len(body) < int(headers["content-length"]):
            return
        self._data = b""
        path = first.split()[1].split("/")[2:]
        self._connection.serve(self, _asked(path, headers, body), None)

    def answer(self, result: Any, way: None, write: Callable[[bytes], Any] | None = None) -> None:
        if isinstance(result, Failure):
            self._write(result.http, json.dumps({"error": str(result)}).encode(), write=write)
            return
        tensors = {name: each for name, each in result.items() if isinstance(each, tuple)}
        if not tensors:
            self._write(200, json.dumps(result).encode(), write=write)
            return
        outputs, tail = [], b""
        for name, (kind, array) in tensors.items():
            data = _bytes(kind, array)
            more = {"parameters": {"binary_data_size": len(data)}, "shape": list(array.shape)}
            outputs.append({"name": name, "datatype": kind, **more})
            tail += data
        head = json.dumps({"model_name": "m", "model_version": "1", "outputs": outputs}).encode()
        length = f"Inference-Header-Content-Length: {len(head)}\r\n"
        self._write(200, head + tail, "application/octet-stream", length, write)

    def _write(
        self,
        status: int,
        body: bytes,
        kind: str = "application/json",
        more: str = "",
        write: Callable[[bytes], Any] | None = None,
    ) -> None:
        lines = f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(body)}"
        (write or self._wire.write)("\r\n".join([*lines, more, ""]).encode() + body)

    def twice(self, result: Any, way: None, _: int) -> None:
        sent: list[bytes] = []
        self.answer(result, way, sent.append)
        self._wire.write(b"".join(sent) * 2)

    def page(self, result: Any, way: None, status: int) -> None:
        more = "Retry-After: 1\r\n" * (status == 503)
        self._write(status, PAGE.format(status).encode(), "text/html", more)

    def text(self, result: Any, way: None, status: int) -> None:
        self._write(status, WORDS.encode(), "text/plain")

    def json(self, result: Any, way: None, status: int) -> None:
        self._write(status, b'{"status": "ok"}')

    def junk(self, result: Any, way: None, _: int) -> None:
        self._write(200, JUNK, "application/octet-stream")

    def last(self, result: Any, way: None, _: int) -> None:
        self.answer(result, way)
        self._wire.close()


class Http2:
    """HTTP/2 with gRPC's messages."""

    def __init__(self, connection: Carrier) -> None:
        self._connection, self._wire = connection, connection.wire
        config = h2.config.H2Configuration(client_side=False, validate_inbound_headers=False)
        self._h2 = h2.connection.H2Connection(config=config)
        self._h2.initiate_connection()
        self._methods: dict[int, str] = {}
        self._data: dict[int, bytes] = {}
        self._begun: set[int] = set()
        self._over: set[int] = set()

    def feed(self, data: bytes) -> None:
        events = self._h2.receive_data(data)
        # A call whose limit passes on a busy machine comes together with its end.
        self._over.update(
            each.stream_id for each in events if isinstance(each, h2.events.StreamReset)
        )
        for event in events:
            if isinstance(event, h2.events.RequestReceived):
                path = dict(event.headers)[b":path"].decode()
                self._methods[event.stream_id] = path.rpartition("/")[2]
                self._data[event.stream_id] = b""
            elif isinstance(event, h2.events.DataReceived):
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self._take(event.stream_id, event.data)
            elif isinstance(event, h2.events.StreamEnded) and self._streams(event.stream_id):
                self._trailers(event.stream_id, 0, "")
        self._flush()

    def _streams(self, stream: int) -> bool:
        return self._methods[stream] == "ModelStreamInfer"

    def _take(self, stream: int, data: bytes) -> None:
        left = self._data[stream] + data
        while len(left) >= 5 and len(left) >= (size := 5 + int.from_bytes(left[1:5], "big")):
            message, left = left[5:size], left[size:]
            asked = _asked_by_grpc(self._methods[stream], message)
            self._connection.serve(self, asked, (stream, asked.parameters.pop("", "")))
        self._data[stream] = left

    def _flush(self, write: Callable[[bytes], Any] | None = None) -> None:
        data = self._h2.data_to_send()
        if data and not self._wire.is_closing():
            (write or self._wire.write)(data)

    def _head(self, stream: int) -> None:
        if stream not in self._begun:
            self._begun.add(stream)
            self._h2.send_headers(
                stream, [(":status", "200"), ("content-type", "application/grpc")]
            )

    def _trailers(self, stream: int, status: int, text: str) -> None:
        if stream in self._over:
            return
        self._over.add(stream)
        trailers = [("grpc-status", str(status)), ("grpc-message", text.replace("\n", " "))]
        self._head(stream)
        self._h2.send_headers(stream, trailers, end_stream=True)

    def answer(self, result: Any, way: Any, write: Callable[[bytes], Any] | None = None) -> None:
        stream, number = way
        self._flush()
        self._send(stream, [_message(self._methods[stream], result, number)], result)
        self._flush(write)

    def _send(self, stream: int, messages: list[bytes], result: Any) -> None:
        if stream in self._over:
            return
        streaming = self._streams(stream)
        if isinstance(result, Failure) and not streaming:
            self._trailers(stream, result.grpc, str(result))
            return
        self._head(stream)
        for message in messages:
            self._h2.send_data(stream, b"\0" + len(message).to_bytes(4, "big") + message)
        if not streaming:
            self._trailers(stream, 0, "")

    def twice(self, result: Any, way: Any, _: int) -> None:
        stream, number = way
        self._send(stream, [_message(self._methods[stream], result, number)] * 2, result)
        self._flush()

    def page(self, result: Any, way: Any, status: int) -> None:
        stream, _ = way
        if stream in self._over:
            return
        if stream in self._begun:  # of a stream that was answered before, no page can be made
            self.reset_stream(result, way, 0)
            return
        self._over.add(stream)
        headers = [(":status", str(status)), ("content-type", "text/html"), ("retry-after", "1")]
        self._h2.send_headers(stream, headers)
        self._h2.send_data(stream, PAGE.format(status).encode(), end_stream=True)
        self._flush()

    def trailers(self, result: Any, way: Any, status: int) -> None:
        self._trailers(way[0], status, WORDS)
        self._flush()

    def junk(self, result: Any, way: Any, _: int) -> None:
        self._send(way[0], [JUNK], {})
        self._flush()

    def last(self, result: Any, way: Any, _: int) -> None:
        """Answer, say with GOAWAY that nothing more is taken, and close."""
        self.answer(result, way)
        self._goaway(way[0])
        self._wire.close()

    def goaway(self, result: Any, way: Any, _: int) -> None:
        self._goaway(2**31 - 1)
        self.answer(result, way)

    def goaway_before(self, result: Any, way: Any, _: int) -> None:
        """Say that this request was not taken. gRPC may send it again."""
        stream = way[0]
        self._over.add(stream)
        self._goaway(stream - 2 if stream > 1 else 0)
        self._wire.close()

    def _goaway(self, last: int) -> None:
        self._flush()
        self._wire.write(b"\x00\x00\x08\x07\x00" + struct.pack(">III", 0, last, 0))

    def refuse(self, result: Any, way: Any, _: int) -> None:
        self._reset_stream(way[0], 7)  # REFUSED_STREAM

    def reset_stream(self, result: Any, way: Any, _: int) -> None:
        self._reset_stream(way[0], 2)  # INTERNAL_ERROR

    def _reset_stream(self, stream: int, code: int) -> None:
        if stream not in self._over:
            self._over.add(stream)
            self._h2.reset_stream(stream, code)
            self._flush()


# ---- Messages


def _name(model: str, inputs: dict[str, Any], parameters: dict[str, Any]) -> str:
    if model == protocol.MODEL:
        return Operation(int(inputs[protocol.CODE].flat[0])).name
    start, end = (parameters.get(f"sequence_{each}") is True for each in ("start", "end"))
    return "START|END" if start and end else "START" if start else "END" if end else "step"


def _asked(path: list[str], headers: dict[str, str], body: bytes) -> Asked:
    """Return the request of HTTP/1.1."""
    if len(path) < 3:
        return Asked("version", "", {}, {})
    if path[-1] == "config":
        return Asked("config", path[1], {}, {})
    size = int(headers.get("inference-header-content-length", len(body)))
    head, left = json.loads(body[:size]), body[size:]
    inputs = {}
    for each in head["inputs"]:
        length = each["parameters"]["binary_data_size"]
        data, left = left[:length], left[length:]
        array = np.frombuffer(data, TYPES[each["datatype"]])
        inputs[each["name"]] = array.reshape(each["shape"])
    parameters = {k: v for k, v in head.get("parameters", {}).items() if k != "binary_data_output"}
    return Asked(_name(path[1], inputs, parameters), path[1], inputs, parameters)


def _asked_by_grpc(method: str, message: bytes) -> Asked:
    """Return the request of gRPC; its parameter without a name is the request's ID."""
    if method == "ServerMetadata":
        return Asked("version", "", {}, {})
    if method == "ModelConfig":
        return Asked("config", service_pb2.ModelConfigRequest.FromString(message).name, {}, {})
    request = service_pb2.ModelInferRequest.FromString(message)
    inputs = {
        each.name: np.frombuffer(data, TYPES[each.datatype]).reshape(each.shape)
        for each, data in zip(request.inputs, request.raw_input_contents, strict=True)
    }
    parameters = {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in request.parameters.items()
    }
    what = _name(request.model_name, inputs, parameters)
    return Asked(what, request.model_name, inputs, {**parameters, "": request.id})


def _message(method: str, result: Any, number: str) -> bytes:
    """Return the message of an answer; of an error, on a stream only."""
    if isinstance(result, Failure):
        return bytes(
            service_pb2.ModelStreamInferResponse(error_message=str(result)).SerializeToString()
        )
    if method == "ServerMetadata":
        return bytes(ParseDict(result, service_pb2.ServerMetadataResponse()).SerializeToString())
    if method == "ModelConfig":
        found = ParseDict({"config": result}, service_pb2.ModelConfigResponse())
        return bytes(found.SerializeToString())
    response = service_pb2.ModelInferResponse(model_name="m", model_version="1", id=number)
    for name, (kind, array) in result.items():
        response.outputs.add(name=name, datatype=kind, shape=array.shape)
        response.raw_output_contents.append(_bytes(kind, array))
    if method == "ModelStreamInfer":
        response = service_pb2.ModelStreamInferResponse(infer_response=response)
    return bytes(response.SerializeToString())


def _bytes(kind: str, array: Any) -> bytes:
    if kind == "BYTES":
        return b"".join(len(each).to_bytes(4, "little") + each for each in array.flat)
    return bytes(array.tobytes())
