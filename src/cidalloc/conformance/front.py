"""An HTTP server with what clients of the manager need of Triton: the manager, and one model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..codes import Code
from ..errors import CidError
from ..manager.service import Answer
from ..protocol import CODE, CORRELATION_ID, DETAIL, MODEL, OUTPUT, error_text

__all__ = ["IDLE_MS", "Call", "ConnectionCut", "Front"]

IDLE_MS = 3_000
"""The idle time of the model ``sequence``, which takes every request."""

_LENGTH = "inference-header-content-length"
_TYPES = {CODE: ("INT8", np.int8), CORRELATION_ID: ("UINT64", np.uint64)}
_STATUS = {
    **dict.fromkeys((Code.NOT_HELD, Code.SESSION_UNKNOWN), 404),
    **dict.fromkeys((Code.EXHAUSTED, Code.UNAVAILABLE, Code.REGISTRY_LOCKED, Code.DRAINING), 503),
    Code.UNKNOWN_OPERATION: 501,
    Code.INTERNAL: 500,
}
_CONFIGS: dict[str, Any] = {
    MODEL: {"name": MODEL, "max_batch_size": 1024, "dynamic_batching": {}},
    "sequence": {
        "name": "sequence",
        "max_batch_size": 1,
        "sequence_batching": {"max_sequence_idle_microseconds": 1000 * IDLE_MS},
        "input": [{"name": "INPUT", "data_type": "TYPE_INT32", "dims": [1]}],
        "output": [{"name": "OUTPUT", "data_type": "TYPE_INT32", "dims": [1]}],
    },
}
_Tensors = dict[str, tuple[str, npt.NDArray[Any]]]


class ConnectionCut(Exception):
    """The connection ends here; ``sent`` goes out instead of an answer."""

    def __init__(self, sent: bytes = b"") -> None:
        super().__init__()
        self.sent = sent


class Call(NamedTuple):
    """A request to the manager."""

    code: npt.NDArray[Any]
    ids: npt.NDArray[Any] | None
    parameters: dict[str, Any]


class _Page(NamedTuple):
    status: int
    body: bytes
    binary_from: int | None = None


class _Refused(Exception):
    """Triton itself refuses the request, with status 400."""


class Front:
    """The server; as a context it is the URL.

    Args:
        manage: answers a request to the manager. It may raise `ConnectionCut`.
    """

    def __init__(self, manage: Callable[[Call], Awaitable[Answer | CidError]]) -> None:
        self._manage = manage
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        tasks = list(self._tasks)
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
                while True:
                    await self._exchange(reader, writer)
        except ConnectionCut as cut:
            writer.write(cut.sent)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        pairs = (each.partition(":") for each in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        length, words = headers.get("content-length", "0"), first.split()
        if len(words) != 3 or not length.isdecimal() or "transfer-encoding" in headers:
            raise ConnectionCut(b"HTTP/1.1 411 -\r\nContent-Length: 0\r\n\r\n")
        body = await reader.readexactly(int(length))
        try:
            page = await self._page(words[0], words[1].split("?")[0].split("/")[1:], headers, body)
        except _Refused as error:
            page = _Page(400, _json({"error": str(error)}))
        binary = "" if page.binary_from is None else f"{_LENGTH}: {page.binary_from}\r\n"
        head = f"HTTP/1.1 {page.status} -\r\n{binary}Content-Length: {len(page.body)}\r\n\r\n"
        writer.write(head.encode() + page.body)
        await writer.drain()

    async def _page(
        self, method: str, path: list[str], headers: Mapping[str, str], body: bytes
    ) -> _Page:
        match [method, *path]:
            case ["GET", "v2"]:
                return _Page(200, _json({"name": "triton", "version": "2.51.0"}))
            case ["GET", "v2", "health", _]:
                return _Page(200, b"")
            case ["GET", "v2", "models", name, "config"] if name in _CONFIGS:
                return _Page(200, _json(_CONFIGS[name]))
            case ["POST", "v2", "models", "cidmgr", "generate"]:
                answer = await self._manage(_read_short(body))
                if isinstance(answer, CidError):
                    raise _Refused(error_text(answer))
                numbers = answer[0][0].tolist()
                output = numbers[0] if len(numbers) == 1 else numbers
                found = {DETAIL: answer[1], OUTPUT: output}
                return _Page(200, _json({**found, "model_name": MODEL, "model_version": "1"}))
            case ["POST", "v2", "models", "sequence", "infer"]:
                request = _loads(body[: int(headers.get(_LENGTH, len(body)))])
                one: _Tensors = {"OUTPUT": ("INT32", np.array([[1]], np.int32))}
                return _long("sequence", request, one)
            case ["POST", "v2", "models", "cidmgr", "infer"]:
                request, call = _read_long(body, int(headers.get(_LENGTH, len(body))))
                answer = await self._manage(call)
                if isinstance(answer, CidError):
                    error = _json({"error": error_text(answer)})
                    return _Page(_STATUS.get(answer.code, 400), error)
                detail = np.array([[answer[1]]], np.object_)
                return _long(
                    MODEL, request, {OUTPUT: ("UINT64", answer[0]), DETAIL: ("BYTES", detail)}
                )
        raise _Refused(f"unknown path: {method} /{'/'.join(path)}")


def _json(found: object) -> bytes:
    return json.dumps(found, separators=(",", ":")).encode()


def _loads(body: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(found := json.loads(body), dict):
            return found
    raise _Refused("failed to parse the request JSON buffer")


def _call(given: Mapping[str, Any], shapes: Mapping[str, Any], parameters: dict[str, Any]) -> Call:
    if CODE not in given:
        raise _Refused(f"expected the input {CODE} for model '{MODEL}'")
    tensors = {}
    for name, data in given.items():
        try:
            tensors[name] = np.array(data, _TYPES[name][1]).reshape(shapes.get(name, (1, -1)))
        except (ValueError, TypeError, OverflowError) as error:
            raise _Refused(f"unable to parse 'data' of {name}: {error}") from None
    return Call(tensors[CODE], tensors.get(CORRELATION_ID), parameters)


def _read_short(body: bytes) -> Call:
    read = _loads(body)
    return _call({name: read.pop(name) for name in _TYPES if name in read}, {}, read)


def _read_long(body: bytes, at: int) -> tuple[dict[str, Any], Call]:
    request, given, shapes = _loads(body[:at]), {}, {}
    for each in request.get("inputs", ()):
        name = each.get("name")
        if name not in _TYPES or each.get("datatype") != _TYPES[name][0]:
            raise _Refused(f"unexpected inference input '{name}', or data type of it")
        given[name], shapes[name] = each.get("data"), each.get("shape")
        length = each.get("parameters", {}).get("binary_data_size")
        if length is not None:
            given[name] = np.frombuffer(body[at : at + length], _TYPES[name][1])
            at += length
    parameters = dict(request.get("parameters", {}))
    parameters.pop("binary_data_output", None)
    return request, _call(given, shapes, parameters)


def _long(name: str, request: Mapping[str, Any], found: _Tensors) -> _Page:
    """Return the answer in Triton's usual form; each tensor as JSON or as bytes, as asked for."""
    all_binary = request.get("parameters", {}).get("binary_data_output", False)
    wanted = {each["name"]: each.get("parameters", {}) for each in request.get("outputs", ())}
    outputs, parts = [], []
    for output in wanted or found:
        datatype, array = found[output]
        head: dict[str, Any] = {"name": output, "datatype": datatype, "shape": list(array.shape)}
        if wanted.get(output, {}).get("binary_data", all_binary):
            data = array.tobytes()
            if datatype == "BYTES":
                text = array[0, 0].encode()
                data = len(text).to_bytes(4, "little") + text
            parts.append(data)
            head["parameters"] = {"binary_data_size": len(data)}
        else:
            head["data"] = array.ravel().tolist()
        outputs.append(head)
    answer = {"model_name": name, "model_version": "1", "outputs": outputs}
    text = _json({**answer, "id": request["id"]} if "id" in request else answer)
    return _Page(200, text + b"".join(parts), len(text) if parts else None)
