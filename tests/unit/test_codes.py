"""The numbers of the protocol never change their meaning."""

import re
from pathlib import Path

import pytest

from cidalloc import errors
from cidalloc.codes import Code, Operation

OPERATIONS = {
    "NEW": 0,
    "DELETE": 1,
    "ACTIVE": 2,
    "INACTIVE": 3,
    "PEAK": 4,
    "OPEN": 5,
    "RENEW": 6,
    "CLOSE": 7,
    "HELD": 8,
    "STATUS": 9,
    "DEAD": 10,
}

CODES = {
    "OK": 0,
    "EXHAUSTED": 1,
    "NOT_HELD": 2,
    "NOT_OWNER": 3,
    "OUT_OF_RANGE": 4,
    "DUPLICATE": 5,
    "INVALID_ARGUMENT": 6,
    "UNKNOWN_OPERATION": 7,
    "SESSION_UNKNOWN": 8,
    "LIMIT_EXCEEDED": 9,
    "REPEATED": 10,
    "REGISTRY_LOCKED": 11,
    "REGISTRY_CORRUPT": 12,
    "REGISTRY_MISMATCH": 13,
    "UNAVAILABLE": 14,
    "PROTOCOL": 15,
    "INTERNAL": 16,
    "SESSION_EXPIRED": 17,
    "SEQUENCE_LOST": 18,
    "FORKED": 19,
    "DRAINING": 20,
}


def test_operations_keep_their_numbers() -> None:
    assert {each.name: each.value for each in Operation} == OPERATIONS


def test_codes_keep_their_numbers() -> None:
    assert {each.name: each.value for each in Code} == CODES


def test_c_codes_are_the_same() -> None:
    import cidalloc

    pxd = (Path(cidalloc.__file__).parent / "_core/pool.pxd").read_text()
    declared = re.search(r"cdef enum:[^\n]*codes.py[^\n]*\n((?: {4}\w+ = \d+\n)+)", pxd)
    assert declared is not None
    pairs = re.findall(r"(\w+) = (\d+)", declared[1])
    assert len(pairs) == 10 and all(CODES[name] == int(number) for name, number in pairs)


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
def test_every_code_has_one_exception(code: Code) -> None:
    error = errors.error_for(code, "words")
    assert error.code is code
    assert str(error) == "words"
    assert type(error).__name__ in errors.__all__
