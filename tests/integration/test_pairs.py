"""Pairs of requests and answers, against the real server and against the front of the kit.

A line of ``tests/conformance/*.jsonl`` is a request and what comes back, both in the short form;
``form`` says in which one they are sent. ``$name`` is a variable, which the first answer with it
sets; tokens are drawn, and ``$registry`` is the UUID of ``$high`` and ``$low``. ``...`` stands for
numbers that later versions append.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from cidalloc.conformance.front import Call, Front
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import CidError
from cidalloc.manager.service import Answer, Service
from cidalloc.manager.settings import Settings

FILES = sorted((Path(__file__).parent.parent / "conformance").glob("*.jsonl"))
KINDS = {"CODE": "INT8", "CORRELATION_ID": "UINT64"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def front() -> Iterator[str]:
    """The URL of the kit's front, with a manager."""
    service = Service(Settings())

    async def manage(call: Call) -> Answer | CidError:
        return service.answer(call.code, call.ids, json.dumps(call.parameters))

    loop, stack = asyncio.new_event_loop(), AsyncExitStack()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    opening = stack.enter_async_context(Front(manage))
    yield asyncio.run_coroutine_threadsafe(opening, loop).result(10)
    asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(params=["front", "triton"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "front":
        return str(request.getfixturevalue("front"))
    server: TritonServer = request.getfixturevalue("triton")
    return server.http_url


@pytest.mark.server
@pytest.mark.parametrize("file", FILES, ids=lambda each: each.stem)
def test_pairs(url: str, file: Path) -> None:
    values: dict[str, Any] = {"$token": secrets.token_hex(16), "$other": secrets.token_hex(16)}
    for line in file.read_text().splitlines():
        pair = json.loads(line)
        status, answer = post(url, pair["form"], filled(pair["send"], values))
        assert status == pair["status"], (pair["about"], answer)
        if "error" in pair:
            assert pair["error"] in answer["error"], (pair["about"], answer)
            continue
        for name, expected in pair["answer"].items():
            assert fits(expected, answer[name], values), (pair["about"], name, answer, values)
        if "$low" in values:
            values["$registry"] = str(UUID(int=values["$high"] << 64 | values["$low"]))


def filled(part: Any, values: dict[str, Any]) -> Any:
    if isinstance(part, dict):
        return {name: filled(each, values) for name, each in part.items()}
    if isinstance(part, list):
        return [filled(each, values) for each in part]
    return values[part] if isinstance(part, str) and part.startswith("$") else part


def fits(expected: Any, got: Any, values: dict[str, Any]) -> bool:
    if isinstance(expected, list):
        if expected[-1:] == ["..."]:
            expected = expected[:-1]
            got = got[: len(expected)]
        if not isinstance(got, list) or len(got) != len(expected):
            return False
        return all(fits(e, g, values) for e, g in zip(expected, got, strict=True))
    if isinstance(expected, str) and expected.startswith("$"):
        return type(got) in (int, str) and values.setdefault(expected, got) == got
    return type(got) is type(expected) and got == expected


def post(url: str, form: str, send: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Send a request in this form, and return the status and the answer in the short form."""
    if form == "infer":
        send = long(send)
    body = json.dumps(send).encode()
    request = urllib.request.Request(f"{url}/v2/models/cidmgr/{form}", body, JSON)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
    if form == "generate":
        return 200, found
    outputs = {each["name"]: each["data"] for each in found["outputs"]}
    return 200, {name: data[0] if len(data) == 1 else data for name, data in outputs.items()}


def long(send: dict[str, Any]) -> dict[str, Any]:
    inputs = []
    for name, kind in KINDS.items():
        data = send.get(name, [])
        data = data if isinstance(data, list) else [data]
        inputs.append({"name": name, "datatype": kind, "shape": [1, len(data)], "data": data})
    given = {name: value for name, value in send.items() if name not in KINDS}
    return {"inputs": inputs, "parameters": given}
