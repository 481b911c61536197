"""Exceptions: what a caller may catch, and what survives a trip between processes."""

import pickle

import pytest

from cidalloc import errors
from cidalloc.codes import Code


@pytest.mark.parametrize(
    ("code", "builtin"),
    [
        (Code.OUT_OF_RANGE, ValueError),
        (Code.DUPLICATE, ValueError),
        (Code.INVALID_ARGUMENT, ValueError),
        (Code.UNKNOWN_OPERATION, ValueError),
        (Code.NOT_HELD, LookupError),
        (Code.SESSION_UNKNOWN, LookupError),
        (Code.NOT_OWNER, PermissionError),
        (Code.EXHAUSTED, RuntimeError),
        (Code.LIMIT_EXCEEDED, RuntimeError),
        (Code.REGISTRY_LOCKED, OSError),
        (Code.UNAVAILABLE, ConnectionError),
        (Code.FORKED, RuntimeError),
    ],
)
def test_what_a_python_user_would_catch(code: Code, builtin: type[Exception]) -> None:
    assert isinstance(errors.error_for(code, "words"), builtin)


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
def test_pickle(code: Code) -> None:
    error = errors.error_for(code, "words, and 12")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)


@pytest.mark.parametrize("code", [0, 77, -1])
def test_a_number_of_the_future_is_not_lost(code: int) -> None:
    error = errors.error_for(code, "words")
    assert isinstance(error, errors.ProtocolError)
    assert str(code) in str(error) and "words" in str(error)


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        indent, _, rest = line.rpartition("── ")
        if not rest or not rest.split():
            continue
        if not indent and "CidError" not in rest:
            continue
        name = rest.split()[0]
        if name in errors.__all__:
            depth = len(indent) // 4
            path[depth:] = [name]
            drawn[name] = path[depth - 1] if depth > 1 or len(path) > 1 else ""
    for name, parent in drawn.items():
        if parent:
            assert getattr(errors, parent) in getattr(errors, name).__bases__
    assert set(drawn) | {"CidError", "error_for"} == set(errors.__all__)
