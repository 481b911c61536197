"""What docs/security.md promises: each bound of a request, and that a token shows nowhere."""

from __future__ import annotations

import json
import logging
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from click.testing import CliRunner

from cidalloc.cli import main
from cidalloc.client.sync.transport import connect
from cidalloc.codes import Code, Operation
from cidalloc.devserver.triton_server import TritonServer
from cidalloc.errors import CidError, LimitExceeded, SessionUnknown
from cidalloc.manager.inspection import SHOWN
from cidalloc.manager.service import Service
from cidalloc.manager.settings import Settings
from cidalloc.protocol import Request, as_ids
from cidalloc.triton_model.metrics import series

PAGE = Path(__file__).parent.parent.parent / "docs" / "security.md"
TOKEN, OTHER = "c0ffee" * 5 + "00", "ab" * 16
BOUNDS = Settings(
    first=1,
    capacity=10_000,
    fresh=True,
    max_count=50,
    max_held=70,
    max_sessions=3,
    max_anonymous=20,
    max_cooldown_ms=600_000,
)


def ask(service: Service, code: int, ids: Any = (), **parameters: Any) -> Any:
    """Return the OUTPUT and DETAIL, or the error."""
    tensor = np.array([[code]], np.int8)
    return service.answer(tensor, np.array([ids], np.uint64), json.dumps(parameters))


def limited(service: Service, setting: str, code: int, ids: Any = (), **parameters: Any) -> None:
    """See that a request is refused, by a text that names the setting, and changes nothing."""
    before = service.figures()
    error = ask(service, code, ids, **parameters)
    assert isinstance(error, CidError), error
    assert error.code is Code.LIMIT_EXCEEDED
    assert setting in str(error)
    after = service.figures()
    assert before and after
    assert {**before, "errors": 0, "operations": 0} == {**after, "errors": 0, "operations": 0}


@pytest.fixture
def service() -> Service:
    service = Service(BOUNDS, lambda: 1000)
    assert not isinstance(ask(service, Operation.OPEN, session=TOKEN, ttl_ms=60_000), CidError)
    return service


def test_one_operation_in_a_request(service: Service) -> None:
    error = service.answer(np.zeros((2, 1), np.int8), None, "{}")
    assert isinstance(error, CidError)
    assert error.code is Code.INVALID_ARGUMENT


def test_ids_in_a_request(service: Service) -> None:
    limited(service, "max_count", Operation.NEW, count=51)
    limited(service, "max_count", Operation.NEW, count=2**62)
    limited(service, "max_count", Operation.DELETE, list(range(1, 52)))


def test_ids_of_a_session(service: Service) -> None:
    ask(service, Operation.NEW, session=TOKEN, seq=1, count=50)
    limited(service, "max_held", Operation.NEW, session=TOKEN, seq=2, count=21)


def test_sessions(service: Service) -> None:
    for n in range(2):
        ask(service, Operation.OPEN, session=f"{n:032x}", ttl_ms=60_000)
    limited(service, "max_sessions", Operation.OPEN, session=OTHER, ttl_ms=60_000)


def test_ids_without_a_session(service: Service) -> None:
    limited(service, "max_anonymous", Operation.NEW, count=21)
    ask(service, Operation.NEW, count=20)
    limited(service, "max_anonymous", Operation.NEW)
    found = service.figures()
    assert found
    assert found["anonymous"] == 20


def test_times(service: Service) -> None:
    for ttl in (0, BOUNDS.min_ttl_ms - 1, BOUNDS.max_ttl_ms + 1, 2**62):
        limited(service, "ttl_ms", Operation.OPEN, session=OTHER, ttl_ms=ttl)
    more = {"session": OTHER, "ttl_ms": 60_000}
    limited(service, "max_cooldown_ms", Operation.OPEN, **more, cooldown_ms=600_001)
    cooldown = {"session": TOKEN, "seq": 1, "cooldown_ms": 600_001}
    limited(service, "max_cooldown_ms", Operation.NEW, **cooldown)
    cid = ask(service, Operation.NEW)[0][0, 0]
    limited(service, "max_cooldown_ms", Operation.DELETE, [cid], cooldown_ms=2**62)


@pytest.mark.parametrize("label", ["x" * 65, "\x1b[31m", "a\nb", 7])
def test_labels(service: Service, label: Any) -> None:
    error = ask(service, Operation.OPEN, session=OTHER, ttl_ms=60_000, label=label)
    assert isinstance(error, CidError)
    assert error.code is Code.INVALID_ARGUMENT


def test_sessions_in_a_status() -> None:
    service = Service(Settings(first=1, capacity=10_000, fresh=True), lambda: 1000)
    for n in range(SHOWN + 5):
        ask(service, Operation.OPEN, session=f"{n:032x}", ttl_ms=60_000)
    found = json.loads(ask(service, Operation.STATUS)[1])
    assert len(found["sessions"]) == SHOWN
    assert found["sessions_total"] == SHOWN + 5


def test_what_belongs_to_a_session_is_its_own(service: Service) -> None:
    ids = ask(service, Operation.NEW, session=TOKEN, seq=1, count=5)[0][0].tolist()
    for token in (None, OTHER):
        owner = {} if token is None else {"session": token, "seq": 1}
        error = ask(service, Operation.DELETE, ids, **owner)
        assert isinstance(error, CidError)
        assert error.code in (Code.NOT_OWNER, Code.SESSION_UNKNOWN)
    for operation in (Operation.RENEW, Operation.CLOSE, Operation.HELD):
        assert isinstance(ask(service, operation, session=OTHER), SessionUnknown)
    assert ask(service, Operation.HELD, session=TOKEN)[0][0].tolist() == ids


def test_a_token_shows_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    service = Service(Settings(state=str(tmp_path)), lambda: 1000)
    said: list[Any] = [ask(service, Operation.OPEN, session=TOKEN, ttl_ms=60_000, label="mine")]
    said.append(ask(service, Operation.OPEN, session=TOKEN, ttl_ms=1))
    said.append(ask(service, Operation.NEW, session=TOKEN, seq=1, count=10**9))
    said.append(ask(service, Operation.NEW, session=TOKEN + "0", seq=1))
    said.append(ask(service, Operation.DELETE, [5], session=TOKEN, seq=2))
    said.append(ask(service, Operation.STATUS))
    figures = service.figures()
    assert figures
    said.append(series(figures, 0.0, 0.0))
    (file,) = tmp_path.iterdir()
    said.append(CliRunner().invoke(main, ["registry", "show", str(file)]).output)
    service.close()
    assert TOKEN not in repr(said) + caplog.text
    data = file.read_bytes()
    assert bytes.fromhex(TOKEN) not in data
    assert TOKEN.encode() not in data
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_page_names_the_bounds() -> None:
    text = PAGE.read_text()
    defaults = Settings()
    for name in ("max_count", "max_held", "max_sessions", "max_anonymous"):
        assert f"`{name}` ({getattr(defaults, name):,})" in text
    assert re.search(rf"sessions in a STATUS \| {SHOWN} \|", text)


@pytest.mark.server
def test_over_the_wire(triton: TritonServer) -> None:
    """The same through Triton, whose own checks come first."""
    transport = connect(triton.grpc_url)
    many = Request(Operation.NEW, as_ids([]), {"count": 10**12})
    with pytest.raises(LimitExceeded, match="max_count"):
        transport.call("cidmgr", many, 30.0)
    transport.close()
    client = tritonclient.grpc.InferenceServerClient(triton.grpc_url)
    wrong = tritonclient.grpc.InferInput("CODE", [1, 2], "INT8")
    wrong.set_data_from_numpy(np.zeros((1, 2), np.int8))
    with pytest.raises(tritonclient.grpc.InferenceServerException):
        client.infer("cidmgr", [wrong])
    client.close()
