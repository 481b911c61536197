"""The manager as its clients see it: over a loopback, and on the real server by gRPC and HTTP."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from anonymous import Anonymous
from tritonclient.utils import InferenceServerException

from cidalloc import errors
from cidalloc.client.core.transport import translate
from cidalloc.codes import Code
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.protocol import parse_error

POOL = range(1000, 1008)


def test_acquire_and_release(small: Anonymous) -> None:
    first, second = small.acquire(), small.acquire()
    assert first != second
    assert {first, second} <= set(POOL)
    assert small.active() == 2
    assert small.peak() >= 2
    small.release(first, ended=True)
    small.release(second, cooldown_ms=0)
    assert small.active() == 0
    assert small.inactive() >= 2


def test_many_at_once(small: Anonymous) -> None:
    cids = small.acquire_many(8)
    assert cids.dtype == np.uint64
    assert sorted(cids.tolist()) == list(POOL)
    small.release_many(cids[:5])
    small.release_many(cids[5:].tolist())
    assert small.active() == 0


def test_what_was_given_back_first_is_issued_first(small: Anonymous) -> None:
    cids = small.acquire_many(8).tolist()
    order = cids[::-1]
    for cid in order:
        small.release(cid)
    assert small.acquire_many(8).tolist() == order
    small.release_many(order)


def test_exhausted_says_why(small: Anonymous) -> None:
    cids = small.acquire_many(8)
    with pytest.raises(errors.Exhausted, match=r"8 .*held"):
        small.acquire()
    small.release_many(cids)


@pytest.mark.parametrize(
    ("cids", "kind"),
    [
        ([0], errors.OutOfRange),
        ([-1], errors.OutOfRange),
        ([999], errors.OutOfRange),
        ([1008], errors.OutOfRange),
        ([2**64], errors.OutOfRange),
        ([1007], errors.NotHeld),
        ([], errors.InvalidArgument),
        (["1000"], errors.InvalidArgument),
    ],
)
def test_wrong_ids(small: Anonymous, cids: list[Any], kind: type[errors.CidError]) -> None:
    held = small.acquire_many(3).tolist()
    free = next(cid for cid in POOL if cid not in held)
    cids = [free if cid == 1007 else cid for cid in cids]
    with pytest.raises(kind):
        small.release_many(held + cids if cids else [])
    assert small.active() == 3, "a release that was refused took something back"
    small.release_many(held)


def test_the_same_id_twice(small: Anonymous) -> None:
    cid = small.acquire()
    with pytest.raises(errors.Duplicate, match=str(cid)):
        small.release_many([cid, cid])
    small.release(cid)
    with pytest.raises(errors.NotHeld, match=str(cid)):
        small.release(cid)


@pytest.mark.parametrize(
    ("count", "kind"),
    [
        (0, errors.InvalidArgument),
        (-3, errors.InvalidArgument),
        (10**9, errors.LimitExceeded),
        (9, errors.Exhausted),
    ],
)
def test_wrong_counts(small: Anonymous, count: Any, kind: type[errors.CidError]) -> None:
    with pytest.raises(kind):
        small.acquire_many(count)
    assert small.active() == 0


def test_many_threads_share_a_client(small: Anonymous) -> None:
    held: set[int] = set()
    lock = threading.Lock()

    def work(_: int) -> None:
        for _ in range(20):
            cid = small.acquire()
            with lock:
                assert cid not in held
                held.add(cid)
            with lock:
                held.remove(cid)
            small.release(cid)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert small.active() == 0


# What only a raw request can get wrong. Triton checks dtypes and shapes by itself.


def infer(
    triton: Any,
    module: Any,
    code: np.ndarray[Any, Any],
    ids: np.ndarray[Any, Any] | None,
    model: str = "small_raw",
    **options: Any,
) -> list[int]:
    kinds = {"int8": "INT8", "uint64": "UINT64", "int32": "INT32", "int64": "INT64"}
    inputs = []
    for name, array in (("CODE", code), ("CORRELATION_ID", ids)):
        if array is not None:
            tensor = module.InferInput(name, list(array.shape), kinds[str(array.dtype)])
            inputs.append(tensor.set_data_from_numpy(array))
    result = triton.infer(model, inputs, **options)
    assert result.as_numpy("DETAIL").tolist() == [[b""]]
    return result.as_numpy("OUTPUT")[0].tolist()  # type: ignore[no-any-return]


@pytest.fixture(params=["grpc", "http"])
def raw(request: pytest.FixtureRequest, triton: TritonServer) -> Any:
    module = getattr(tritonclient, request.param)
    port = triton.grpc_port if request.param == "grpc" else triton.http_port
    client = module.InferenceServerClient(f"127.0.0.1:{port}")

    def call(code: Any, ids: Any = None, **options: Any) -> list[int]:
        return infer(client, module, code, ids, **options)

    yield call
    client.close()


def codes(*numbers: int, dtype: Any = np.int8) -> np.ndarray[Any, Any]:
    return np.array([numbers], dtype)


def test_a_request_as_in_2019(raw: Any) -> None:
    """With a sequence ID and START, as the old clients sent."""
    zero = np.zeros([1, 1], np.uint64)
    start = {"sequence_id": 1, "sequence_start": True}
    (cid,) = raw(codes(0), zero, **start)
    assert cid in POOL
    assert raw(codes(2), zero, **start) == [1]
    assert raw(codes(1), np.array([[cid]], np.uint64), sequence_id=1) == [1]
    assert raw(codes(2), zero, **start) == [0]


def test_the_ids_may_be_left_out_or_empty(raw: Any) -> None:
    assert raw(codes(2)) == [0]
    assert raw(codes(2), np.empty([1, 0], np.uint64)) == [0]


def test_several_ids_in_one_request(raw: Any) -> None:
    cids = raw(codes(0), parameters={"count": 3})
    assert len(cids) == 3
    assert raw(codes(1), np.array([cids], np.uint64)) == [3]


@pytest.mark.parametrize(
    ("code", "ids", "options", "expected"),
    [
        (codes(99), None, {}, Code.UNKNOWN_OPERATION),
        (codes(1), None, {}, Code.INVALID_ARGUMENT),
        (codes(0).repeat(3, 0), None, {}, Code.INVALID_ARGUMENT),
        (codes(0), None, {"parameters": {"count": "1"}}, Code.INVALID_ARGUMENT),
        (codes(0), None, {"parameters": {"count": True}}, Code.INVALID_ARGUMENT),
        (codes(1), codes(0, dtype=np.uint64), {}, Code.OUT_OF_RANGE),
        (codes(1), codes(1003, dtype=np.uint64), {}, Code.NOT_HELD),
    ],
)
def test_codes_in_the_text_of_triton_errors(
    raw: Any, code: Any, ids: Any, options: dict[str, Any], expected: Code
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        raw(code, ids, **options)
    error = parse_error(caught.value.message())
    assert error is not None
    assert error.code is expected
    assert expected.name in caught.value.message()
    assert raw(codes(2)) == [0]


@pytest.mark.parametrize(
    ("code", "ids"),
    [
        (codes(0, dtype=np.int32), None),
        (codes(0, 0), None),
        (np.zeros([1], np.int8), None),
        (codes(1), codes(5, dtype=np.int64)),
        (codes(1), np.array([5], np.uint64)),
        (codes(0).repeat(300, 0), None),
    ],
)
def test_what_triton_refuses_is_an_invalid_argument(raw: Any, code: Any, ids: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        raw(code, ids)
    assert translate(caught.value, "small_raw", "url").code is Code.INVALID_ARGUMENT


def test_a_bad_request_spoils_no_other(raw: Any, triton: TritonServer) -> None:
    """Good and bad requests at once, so that the server puts them into common batches."""
    client = tritonclient.grpc.InferenceServerClient(triton.grpc_url)
    done: list[Any] = []
    full = threading.Semaphore(0)

    def collect(result: Any, error: Any) -> None:
        done.append((result, error))
        full.release()

    for number in range(200):
        tensor = tritonclient.grpc.InferInput("CODE", [1, 1], "INT8")
        tensor.set_data_from_numpy(codes(99 if number % 2 else 2))
        client.async_infer("small_raw", [tensor], collect)
    for _ in range(200):
        assert full.acquire(timeout=30)
    client.close()
    good = [result for result, error in done if error is None]
    bad = [parse_error(error.message()) for _, error in done if error is not None]
    assert len(good) == len(bad) == 100
    assert all(result.as_numpy("OUTPUT").tolist() == [[0]] for result in good)
    assert all(error is not None and error.code is Code.UNKNOWN_OPERATION for error in bad)


def post(url: str, body: object) -> tuple[int, Any]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def tensor(name: str, kind: str, *values: int) -> dict[str, Any]:
    return {"name": name, "datatype": kind, "shape": [1, len(values)], "data": values}


STATUSES: list[tuple[int, list[int], dict[str, Any], int, str]] = [
    (99, [], {}, 501, "UNKNOWN_OPERATION"),
    (1, [], {}, 400, "INVALID_ARGUMENT"),
    (1, [0], {}, 400, "OUT_OF_RANGE"),
    (1, [1003], {}, 404, "NOT_HELD"),
    (1, [2**63], {}, 400, "OUT_OF_RANGE"),
    (0, [], {"count": 0}, 400, "INVALID_ARGUMENT"),
    (0, [], {"count": 9}, 503, "EXHAUSTED"),
    (0, [], {"count": 2**63 + 1}, 400, "INVALID_ARGUMENT"),
]


@pytest.mark.parametrize(("code", "ids", "parameters", "status", "name"), STATUSES)
def test_http_status_of_errors(
    triton: TritonServer,
    code: int,
    ids: list[int],
    parameters: dict[str, Any],
    status: int,
    name: str,
) -> None:
    inputs = [tensor("CODE", "INT8", code), tensor("CORRELATION_ID", "UINT64", *ids)]
    url = f"{triton.http_url}/v2/models/small_raw"
    got, answer = post(f"{url}/infer", {"inputs": inputs, "parameters": parameters})
    assert f"{name}]" in answer["error"]
    assert got == status
    # The short form knows no status but 400.
    body = {"CODE": code, **({"CORRELATION_ID": ids} if ids else {}), **parameters}
    got, answer = post(f"{url}/generate", body)
    assert f"{name}]" in answer["error"]
    assert got == 400


def test_int8_of_json_wraps(triton: TritonServer) -> None:
    """Triton's own doing, and in the protocol's documentation."""
    got, answer = post(f"{triton.http_url}/v2/models/small_raw/generate", {"CODE": 256 + 2})
    assert got == 200
    assert answer["OUTPUT"] == 0


def test_text_that_is_none_spoils_no_other(triton: TritonServer) -> None:
    """Triton hands on bytes of a string that are no UTF-8."""
    url = f"{triton.http_url}/v2/models/small_raw/generate"
    body = b'{"CODE": 5, "ttl_ms": 5000, "label": "\xff\xfe", "session": "\xff"}'
    statuses: list[int] = []

    def bad() -> None:
        for _ in range(20):
            request = urllib.request.Request(url, body)
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    statuses.append(answer.status)
            except urllib.error.HTTPError as error:
                statuses.append(error.code if b"[CIDALLOC 6 " in error.read() else 0)

    threads = [threading.Thread(target=bad) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        assert post(url, {"CODE": 2})[0] == 200
    for thread in threads:
        thread.join()
    assert statuses == [400] * 80
