"""An HTTP server with what clients of the manager need of Triton: the manager, and one model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..codes import Code
from ..errors import CidError
from ..manager.service import Answer
from ..protocol import CODE, CORRELATION_ID, DETAIL, MODEL, OUTPUT, error_text

__all__ = ["IDLE_MS", "SEQUENCE_MODEL", "Call", "ConnectionCut", "Front"]

SEQUENCE_MODEL = "sequence"
"""The model, which takes every request of a sequence."""
IDLE_MS = 3_000
"""The idle time of its sequences."""

_LENGTH = "inference-header-content-length"
_TYPES = {CODE: ("INT8", np.int8), CORRELATION_ID: ("UINT64", np.uint64)}
_STATUS = {
    Code.EXHAUSTED: 503,
    Code.NOT_HELD: 404,
    Code.SESSION_UNKNOWN: 404,
    Code.UNKNOWN_OPERATION: 501,
    Code.UNAVAILABLE: 503,
    Code.REGISTRY_LOCKED: 503,
    Code.DRAINING: 503,
    Code.INTERNAL: 500,
}
_MANAGER_CONFIG = {
    "name": MODEL,
    "backend": "python",
    "max_batch_size": 1024,
    "input": [
        {"name": CODE, "data_type": "TYPE_INT8", "dims": [1]},
        {"name": CORRELATION_ID, "data_type": "TYPE_UINT64", "dims": [-1], "optional": True},
    ],
    "output": [
        {"name": OUTPUT, "data_type": "TYPE_UINT64", "dims": [-1]},
        {"name": DETAIL, "data_type": "TYPE_STRING", "dims": [1]},
    ],
    "dynamic_batching": {},
}
_SEQUENCE_CONFIG = {
    "name": SEQUENCE_MODEL,
    "backend": "python",
    "max_batch_size": 1,
    "input": [{"name": "INPUT", "data_type": "TYPE_INT32", "dims": [1]}],
    "output": [{"name": "OUTPUT", "data_type": "TYPE_INT32", "dims": [1]}],
    "sequence_batching": {"max_sequence_idle_microseconds": 1000 * IDLE_MS},
}


class ConnectionCut(Exception):
    """The connection ends here; ``sent`` goes out before, instead of an answer."""

    def __init__(self, sent: bytes = b"") -> None:
        super().__init__()
        self.sent = sent


@dataclass
class Call:
    """A request to the manager."""

    code: npt.NDArray[Any]
    ids: npt.NDArray[Any] | None
    parameters: dict[str, Any]


class _Page(NamedTuple):
    """What is sent back."""

    status: int
    body: bytes
    binary_from: int | None = None


class _Refused(Exception):
    """Triton itself refuses the request, with status 400."""


class Front:
    """The server.

    Args:
        manage: answers a request to the manager. It may raise `ConnectionCut`.
    """

    def __init__(self, manage: Callable[[Call], Awaitable[Answer | CidError]]) -> None:
        self._manage = manage
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> str:
        """Start it on a free port of loopback, and return its URL."""
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
                while await self._exchange(reader, writer):
                    pass
        except ConnectionCut as cut:
            writer.write(cut.sent)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether the connection stays open."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        method, path, _ = first.split(" ", 2)
        headers = {
            name.lower(): value.strip()
            for name, _, value in (each.partition(":") for each in lines)
        }
        if "transfer-encoding" in headers:
            page = _Page(411, _json({"error": "send Content-Length"}))
        else:
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            try:
                page = await self._page(method, path.split("?")[0].split("/")[1:], headers, body)
            except _Refused as error:
                page = _Page(400, _json({"error": str(error)}))
        extra = "" if page.binary_from is None else f"{_LENGTH}: {page.binary_from}\r\n"
        kind = "application/json" if page.binary_from is None else "application/octet-stream"
        head = f"HTTP/1.1 {page.status} -\r\nContent-Type: {kind}\r\n{extra}"
        writer.write(f"{head}Content-Length: {len(page.body)}\r\n\r\n".encode() + page.body)
        await writer.drain()
        return page.status != 411 and headers.get("connection", "").lower() != "close"

    async def _page(
        self, method: str, path: list[str], headers: Mapping[str, str], body: bytes
    ) -> _Page:
        match [method, *path]:
            case ["GET", "v2"]:
                return _Page(200, _json({"name": "triton", "version": "2.51.0"}))
            case ["GET", "v2", "health", "live" | "ready"]:
                return _Page(200, b"")
            case ["GET", "v2", "models", ("cidmgr" | "sequence") as name, "config"]:
                return _Page(200, _json(_MANAGER_CONFIG if name == MODEL else _SEQUENCE_CONFIG))
            case ["POST", "v2", "models", "cidmgr", "generate"]:
                return _short(await self._manage(_read_short(body)))
            case ["POST", "v2", "models", ("cidmgr" | "sequence") as name, "infer"]:
                request, tensors = _read(body, int(headers.get(_LENGTH, len(body))))
                found: dict[str, tuple[str, npt.NDArray[Any]]]
                if name == SEQUENCE_MODEL:
                    found = {"OUTPUT": ("INT32", np.array([[1]], np.int32))}
                    return _long(name, request, found)
                parameters = request.get("parameters", {})
                given = {k: v for k, v in parameters.items() if k != "binary_data_output"}
                if CODE not in tensors:
                    raise _Refused(f"expected the input {CODE} for model '{MODEL}'")
                call = Call(tensors[CODE], tensors.get(CORRELATION_ID), given)
                answer = await self._manage(call)
                if isinstance(answer, CidError):
                    status = _STATUS.get(answer.code, 400)
                    return _Page(status, _json({"error": error_text(answer)}))
                detail = np.array([[answer[1]]], np.object_)
                found = {OUTPUT: ("UINT64", answer[0]), DETAIL: ("BYTES", detail)}
                return _long(name, request, found)
        return _Page(400, _json({"error": f"Request for unknown model or path: {'/'.join(path)}"}))


def _json(found: object) -> bytes:
    return json.dumps(found, separators=(",", ":")).encode()


def _loads(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _Refused("failed to parse the request JSON buffer")
    return found


def _array(name: str, data: object, shape: list[int] | None = None) -> npt.NDArray[Any]:
    _, kind = _TYPES[name]
    try:
        array: npt.NDArray[Any] = np.array(data, kind)
        return array.reshape(shape or (1, -1))
    except (ValueError, TypeError, OverflowError) as error:
        raise _Refused(f"unable to parse 'data' of {name}: {error}") from None


def _read_short(body: bytes) -> Call:
    given = _loads(body)
    if CODE not in given:
        raise _Refused(f"expected the input {CODE} for model '{MODEL}'")
    code = _array(CODE, given.pop(CODE))
    ids = given.pop(CORRELATION_ID, None)
    return Call(code, None if ids is None else _array(CORRELATION_ID, ids), given)


def _short(answer: Answer | CidError) -> _Page:
    if isinstance(answer, CidError):
        return _Page(400, _json({"error": error_text(answer)}))
    numbers = answer[0][0].tolist()
    output = numbers[0] if len(numbers) == 1 else numbers
    found = {DETAIL: answer[1], OUTPUT: output, "model_name": MODEL, "model_version": "1"}
    return _Page(200, _json(found))


def _read(body: bytes, size: int) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Return the JSON of a request, and its tensors for the manager."""
    request, tensors, at = _loads(body[:size]), {}, size
    for each in request.get("inputs", ()):
        length = each.get("parameters", {}).get("binary_data_size")
        name, shape = each.get("name"), each.get("shape")
        if name in _TYPES:
            datatype, kind = _TYPES[name]
            if each.get("datatype") != datatype:
                raise _Refused(f"inference input '{name}' data-type is not '{datatype}'")
            data = (
                each.get("data") if length is None else np.frombuffer(body[at : at + length], kind)
            )
            tensors[name] = _array(name, data, shape)
        at += length or 0
    return request, tensors


def _long(
    name: str, request: Mapping[str, Any], found: Mapping[str, tuple[str, npt.NDArray[Any]]]
) -> _Page:
    """Return the answer in Triton's usual form; each tensor as JSON or as bytes, as asked for."""
    all_binary = request.get("parameters", {}).get("binary_data_output", False)
    wanted = {each["name"]: each for each in request.get("outputs", ())}
    outputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for output, (datatype, array) in found.items():
        if wanted and output not in wanted:
            continue
        head: dict[str, Any] = {"name": output, "datatype": datatype, "shape": list(array.shape)}
        asked = wanted.get(output, {}).get("parameters", {})
        if asked.get("binary_data", all_binary):
            data = array.tobytes()
            if datatype == "BYTES":
                text = array[0, 0].encode()
                data = len(text).to_bytes(4, "little") + text
            parts.append(data)
            head["parameters"] = {"binary_data_size": len(data)}
        else:
            head["data"] = array.ravel().tolist()
        outputs.append(head)
    answer: dict[str, Any] = {"model_name": name, "model_version": "1", "outputs": outputs}
    if "id" in request:
        answer["id"] = request["id"]
    text = _json(answer)
    return _Page(200, text + b"".join(parts), len(text) if parts else None)
