"""Inputs, options and results of requests on the real server, each way that a request can go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import echo
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from servers import Server
from tritonclient.utils import InferenceServerException

from cidalloc.client import AsyncClient, Client
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import InvalidArgument, SequenceLost
from cidalloc.manager.settings import Settings
from cidalloc.triton_model import export

pytestmark = pytest.mark.server

WAYS = ["grpc", "stream", "http", "aio-grpc", "aio-stream", "aio-http"]
INT32 = np.dtype(np.int32)
NUMBERS = np.array([[1, 2]], np.int32)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    export(folder, Settings(first=1, capacity=100_000, cooldown_ms=0, fresh=True))
    echo.write(folder)
    echo.write(folder, "unbatched", batch=0)
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    server = Server(repository, arguments=["--model-control-mode=explicit", "--load-model=*"])
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Ask = Callable[..., Any]


@pytest.fixture
def ask(server: TritonServer, way: str) -> Ask:
    """Sends a request of a sequence of its own, or several, and returns the last result."""
    url = server.http_url if "http" in way else server.grpc_url
    streaming = "stream" in way

    def ask(*inputs: Any, model: str = "echo", sequence: Any = None, **options: Any) -> Any:
        with Client(url) as cids:
            with cids.sequence(model, streaming=streaming, **(sequence or {})) as one:
                for each in inputs[:-1]:
                    one.infer(each)
                return one.infer(inputs[-1], end=True, **options)

    async def ask_async(*inputs: Any, model: str = "echo", sequence: Any = None, **o: Any) -> Any:
        async with AsyncClient(url) as cids:
            async with cids.sequence(model, streaming=streaming, **(sequence or {})) as one:
                for each in inputs[:-1]:
                    await one.infer(each)
                return await one.infer(inputs[-1], end=True, **o)

    return ask if "aio" not in way else lambda *a, **k: asyncio.run(ask_async(*a, **k))


def seen(result: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result["SEEN"][0, 0])
    return found


# ---- Inputs


def test_arrays_lists_text_and_single_elements(ask: Ask) -> None:
    result = ask(
        {
            "NUMBERS": NUMBERS,
            "MATRIX": [[[1, 2, 3], [4.5, 5, 6]]],
            "TEXT": [[b"a", "bé"]],
            "FLAG": True,
            "HALF": 0.5,
            "BYTE": 255,
        }
    )
    assert seen(result)["inputs"] == {
        "NUMBERS": ["int32", [1, 2], [1, 2]],
        "MATRIX": ["float32", [1, 2, 3], [1, 2, 3, 4.5, 5, 6]],
        "TEXT": ["object", [1, 2], ["a", "bé"]],
        "FLAG": ["bool", [1, 1], [True]],
        "HALF": ["float16", [1, 1], [0.5]],
        "BYTE": ["uint8", [1, 1], [255]],
    }
    assert result["COUNT"].tolist() == [[6]]


@pytest.mark.parametrize("text", [b"x\0y\0", "x", np.array([[b"x"]]), np.array([["x"]])])
def test_bytes(ask: Ask, text: Any) -> None:
    wanted = "x\0y\0" if isinstance(text, bytes) else "x"
    result = ask({"NUMBERS": NUMBERS, "TEXT": text})
    assert seen(result)["inputs"]["TEXT"] == ["object", [1, 1], [wanted]]


def test_a_model_without_batches(ask: Ask) -> None:
    result = ask({"NUMBERS": [3, 4]}, model="unbatched")
    assert seen(result)["inputs"]["NUMBERS"] == ["int32", [2], [3, 4]]
    with pytest.raises(InvalidArgument, match=r"NUMBERS, INT32 of shape \[2\]: .* is \[1, 2\]"):
        ask({"NUMBERS": NUMBERS}, model="unbatched")


WRONG = {
    r"has no input 'NUMBER': it takes NUMBERS, INT32 of shape \[1, 2\]; MATRIX, FP32 of shape"
    r" \[1, any, 3\]": {"NUMBER": NUMBERS},
    "needs the input NUMBERS": {"FLAG": True},
    r"NUMBERS, INT32 of shape \[1, 2\]: the array's data type is int64": {
        "NUMBERS": NUMBERS.astype(np.int64)
    },
    "data type is >i4": {"NUMBERS": NUMBERS.astype(">i4")},
    r"the array's shape is \[2\]": {"NUMBERS": [1, 2]},
    r"the array's shape is \[2, 2\]": {"NUMBERS": [[1, 2], [3, 4]]},
    r"shape is \[1, 1\]": {"NUMBERS": 1},
    r"shape is \[1, 2, 2\]": {"NUMBERS": NUMBERS, "MATRIX": [[[1, 2], [3, 4]]]},
    r"shape is \[1, 3\]": {"NUMBERS": NUMBERS, "MATRIX": [[1, 2, 3]]},
    "2147483648 does not fit": {"NUMBERS": [[1, 2**31]]},
    r"\[\[1, 1.5\]\] is given": {"NUMBERS": [[1, 1.5]]},
    r"\[\[1, None\]\] is given": {"NUMBERS": [[1, None]]},
    "'12' is given": {"NUMBERS": "12"},
    "inhomogeneous": {"NUMBERS": [[1, 2], [3]]},
    "-1 does not fit": {"NUMBERS": NUMBERS, "BYTE": [[-1]]},
    "100000 does not fit": {"NUMBERS": NUMBERS, "HALF": 100_000},
    "2 is given": {"NUMBERS": NUMBERS, "FLAG": 2},
    "5 is neither bytes nor text": {"NUMBERS": NUMBERS, "TEXT": [[b"a", 5]]},
    "inputs are a dict of arrays or a list of tritonclient": "NUMBERS",
    "an input is a numpy.ndarray": [NUMBERS],
}


@pytest.mark.parametrize("way", ["grpc", "aio-http", "stream"], indirect=True)
@pytest.mark.parametrize("why", WRONG)
def test_wrong_inputs(ask: Ask, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        ask({"NUMBERS": NUMBERS}, WRONG[why])


def test_wrong_inputs_change_nothing(server: TritonServer) -> None:
    with Client(server.grpc_url) as cids, cids.sequence("echo") as one:
        one.infer({"NUMBERS": NUMBERS})
        with pytest.raises(InvalidArgument):
            one.infer({"NUMBERS": 1}, end=True)
        assert one.state == "live"
        one.infer({"NUMBERS": NUMBERS}, end=True)
        assert one.state == "closed, recycled"


def test_without_the_configuration(ask: Ask) -> None:
    unchecked = {"check": False, "cooldown": 20.0}
    result = ask({"NUMBERS": NUMBERS, "TEXT": np.array([["a", b"b"]], object)}, sequence=unchecked)
    assert seen(result)["inputs"] == {
        "NUMBERS": ["int32", [1, 2], [1, 2]],
        "TEXT": ["object", [1, 2], ["a", "b"]],
    }
    for value in ([[1, 2]], NUMBERS.astype(complex), 5):
        with pytest.raises(InvalidArgument, match=r"'NUMBERS' .* configuration is not known"):
            ask({"NUMBERS": value}, sequence=unchecked)


def test_infer_input_of_the_protocol(ask: Ask, way: str) -> None:
    mine, other = tritonclient.grpc, tritonclient.http
    if "http" in way:
        mine, other = other, mine

    def tensors(module: Any) -> list[Any]:
        return [module.InferInput("NUMBERS", [1, 2], "INT32").set_data_from_numpy(NUMBERS)]

    assert seen(ask(tensors(mine)))["inputs"]["NUMBERS"][2] == [1, 2]
    assert seen(ask(tuple(tensors(mine))))["inputs"]["NUMBERS"][2] == [1, 2]
    with pytest.raises(InvalidArgument, match=rf"not a {mine.__name__}.InferInput"):
        ask(tensors(other))


def test_what_triton_refuses(ask: Ask, way: str) -> None:
    """Inputs of tritonclient are checked by Triton."""
    module = tritonclient.http if "http" in way else tritonclient.grpc
    unknown = module.InferInput("WHAT", [1, 2], "INT32").set_data_from_numpy(NUMBERS)
    wrong = module.InferInput("NUMBERS", [2], "INT32").set_data_from_numpy(NUMBERS[0])
    for inputs in ([], [unknown], [wrong]):
        with pytest.raises(InferenceServerException):
            ask(inputs)


def test_end_inputs(server: TritonServer, way: str) -> None:
    url = server.http_url if "http" in way else server.grpc_url
    numbers = NUMBERS.copy()
    given: dict[str, Any] = {"streaming": "stream" in way, "end_inputs": {"NUMBERS": numbers}}

    async def run() -> str:
        async with AsyncClient(url) as cids:
            async with cids.sequence("echo", **given) as one:
                await one.infer({"NUMBERS": NUMBERS})
            with pytest.raises(InvalidArgument, match="shape"):
                await cids.sequence("echo", end_inputs={"NUMBERS": 1})
            assert len(cids.held()) == 0
            return one.state

    if "aio" in way:
        assert asyncio.run(run()) == "closed, recycled"
        return
    with Client(url) as cids:
        with cids.sequence("echo", **given) as one:
            one.infer({"NUMBERS": NUMBERS})
            numbers.resize(0, refcheck=False)  # they were read when the sequence began
        assert one.state == "closed, recycled"
        with pytest.raises(InvalidArgument, match="shape"):
            cids.sequence("echo", end_inputs={"NUMBERS": 1})
        assert len(cids.held()) == 0


def test_a_reload_with_another_signature(server: TritonServer, repository: Path) -> None:
    """A client that knows the former configuration learns of the other by its first error."""
    with (
        tritonclient.grpc.InferenceServerClient(server.grpc_url) as triton,
        Client(server.grpc_url) as cids,
    ):

        def reload(**config: Any) -> None:
            echo.write(repository, "changing", **config)
            triton.load_model("changing")

        reload()
        with cids.sequence("changing") as before:
            before.infer({"NUMBERS": [[1, 2]]})
            reload(kind="TYPE_INT64", size=3)
            with pytest.raises((SequenceLost, InferenceServerException)):
                before.infer({"NUMBERS": [[1, 2]]})
        with cids.sequence("changing") as after:
            result = after.infer({"NUMBERS": [[1, 2, 2**40]]}, end=True)
        assert seen(result)["inputs"]["NUMBERS"] == ["int64", [1, 3], [1, 2, 2**40]]

        reload()
        with cids.sequence("changing") as stale, pytest.raises(InvalidArgument, match="shape"):
            stale.infer({"NUMBERS": [[1, 2]]})  # refused by the client
        with cids.sequence("changing") as after:
            assert seen(after.infer({"NUMBERS": [[1, 2]]}, end=True))["cid"] == after.cid


# ---- Options


def test_options_that_go_every_way(ask: Ask, way: str) -> None:
    result = ask(
        {"NUMBERS": NUMBERS},
        request_id="call 7",
        timeout=5.0,
        priority=0,
        parameters={"a": 1, "b": "two", "c": True},
        model_version="1",
    )
    found = seen(result)
    assert found["request_id"] == ("call 7/1" if "stream" in way else "call 7")
    response = result.get_response()
    assert (response["id"] if isinstance(response, dict) else response.id) == "call 7"
    assert found["timeout"] == 5_000_000
    assert found["version"] == "1"
    assert {name: found["parameters"][name] for name in "abc"} == {"a": 1, "b": "two", "c": True}


def test_outputs(ask: Ask, way: str) -> None:
    module = tritonclient.http if "http" in way else tritonclient.grpc
    other = tritonclient.grpc if "http" in way else tritonclient.http
    for outputs in (["COUNT"], [module.InferRequestedOutput("COUNT")]):
        result = ask({"NUMBERS": NUMBERS}, outputs=outputs)
        assert result["COUNT"].tolist() == [[1]]
        with pytest.raises(KeyError, match="no output 'SEEN': the model answered with COUNT"):
            result["SEEN"]
    with pytest.raises(InvalidArgument, match="an output is a"):
        ask({"NUMBERS": NUMBERS}, outputs=[other.InferRequestedOutput("COUNT")])


def test_headers(ask: Ask, way: str) -> None:
    if "stream" in way:
        with pytest.raises(InvalidArgument, match="headers: a stream has it once"):
            ask({"NUMBERS": NUMBERS}, headers={"x-name": "1"})
    else:
        assert seen(ask({"NUMBERS": NUMBERS}, headers={"x-name": "1"}))
        with pytest.raises(InvalidArgument, match="not printable ASCII"):
            ask({"NUMBERS": NUMBERS}, headers={"x-name": "1\r\nevil: 2"})


def test_compression(ask: Ask, way: str) -> None:
    for how in ("gzip", "deflate"):
        if "http" in way:
            result = ask(
                {"NUMBERS": NUMBERS},
                request_compression_algorithm=how,
                response_compression_algorithm=how,
            )
            assert seen(result)["inputs"]["NUMBERS"][2] == [1, 2]
        elif "stream" not in way:
            assert seen(ask({"NUMBERS": NUMBERS}, compression_algorithm=how))
        else:
            with pytest.raises(InvalidArgument, match="compression_algorithm: a stream has it"):
                ask({"NUMBERS": NUMBERS}, compression_algorithm=how)


BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "client_timeout: timeout=, in seconds": {"client_timeout": 5},
    "timeout=5000000": {"timeout": 5_000_000},
    "timeout=0": {"timeout": 0},
    "timeout='1'": {"timeout": "1"},
    "timeout=90": {"timeout": 90},  # the sequence has 60
    "priority=-1": {"priority": -1},
    "priority='high'": {"priority": "high"},
    "request_id=7": {"request_id": 7},
    "parameters=": {"parameters": {"a": [1]}},
    "parameters={'timeout'": {"parameters": {"timeout": 1}},
    "parameters={'triton_x'": {"parameters": {"triton_x": 1}},
    "parameters={'sequence_id'": {"parameters": {"sequence_id": 1}},
    "model_version=1": {"model_version": 1},
    "outputs='COUNT'": {"outputs": "COUNT"},
    "takes no inputs_too": {"inputs_too": 1},
    "takes no sequence_id: the sequence sets it": {"sequence_id": 1},
}


@pytest.mark.parametrize("way", ["grpc", "stream", "http", "aio-grpc"], indirect=True)
@pytest.mark.parametrize("why", BAD_OPTIONS)
def test_options_that_are_refused(ask: Ask, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        ask({"NUMBERS": NUMBERS}, **BAD_OPTIONS[why])


def test_the_key_is_never_used_again(server: TritonServer) -> None:
    keys, cids_ = set(), set()
    for _ in range(2):
        with Client(server.grpc_url, ahead=1) as cids:
            for _ in range(20):
                with cids.sequence("echo") as one:
                    one.infer({"NUMBERS": NUMBERS}, end=True)
                keys.add(one.key)
                cids_.add(one.cid)
                assert len(one.key) < 50 and f"-{one.cid}-" in one.key
    assert len(keys) == 40 > len(cids_)
