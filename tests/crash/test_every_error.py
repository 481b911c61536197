"""Lets each call of the system and each allocation fail in turn, in all that a registry does.

CIDALLOC_ERRORS=all is the long form, `make errors`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from failing import CALLS, MEMORY, Child
from failing_acts import OPERATIONS

pytestmark = pytest.mark.slow

ALL = os.environ.get("CIDALLOC_ERRORS") == "all"
COMMANDS = [name for name in OPERATIONS if name.startswith(("registry ", "drain"))]
FILES = ["make", "make with folders", "reopen", "reopen amid an end", "reboot", "look", "enlarge"]
LONG = [*COMMANDS, *FILES, "take over"]
SHORT_OF_MEMORY = [
    *("open", "release all", "release many", "acquire one in another order"),
    "release without a session of two ages",
]


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    child = Child(tmp_path_factory.mktemp("failing"))
    yield child
    child.end()


def step(name: str, kind: str) -> int:
    """Return of how many calls one fails: all of them take too long for each `make test`."""
    if ALL:
        return 11 if name in COMMANDS and kind == MEMORY else 1
    return 13 if name in LONG else 4 if kind == MEMORY else 1


def faults(child: Child, name: str, kind: str, for_ever: bool) -> int:
    """Check that nothing comes of any failure; return how many there were."""
    if kind == MEMORY and not find_spec("_testcapi"):
        pytest.skip("this Python has no _testcapi, which lets allocations fail")
    sweep = child.sweep(name, kind, for_ever, step(name, kind))
    how = "for ever" if for_ever else "once"
    print(f"{name}: {kind} {how}:", dict(sweep.failed), dict(sweep.errors))
    assert not sweep.faults, f"{len(sweep.faults)} faults\n" + "\n".join(sweep.faults[:3])
    return sweep.failed.total()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_call_fails_once(child: Child, name: str) -> None:
    failed = faults(child, name, CALLS[0], False)
    if name in LONG:
        assert failed > 1, "it uses a file"
    if ALL:
        for kind in CALLS[1:]:
            faults(child, name, kind, False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", [n for n in OPERATIONS if ALL or n in ("grow by blocks", "enlarge")]
)
def test_each_call_fails_from_then_on(child: Child, name: str) -> None:
    faults(child, name, CALLS[0], True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "many"])
@pytest.mark.parametrize("name", OPERATIONS if ALL else SHORT_OF_MEMORY)
def test_each_allocation_fails(child: Child, name: str, for_ever: bool) -> None:
    failed = faults(child, name, MEMORY, for_ever)
    assert failed or name not in SHORT_OF_MEMORY
