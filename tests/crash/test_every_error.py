"""Lets each call of the system, and each allocation, fail in turn, in everything that a registry does.

CIDALLOC_ERRORS=all does it for every operation and every kind of fault.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from failing import CALLS, MEMORY, Child
from failing_acts import OPERATIONS

pytestmark = pytest.mark.slow

ALL = os.environ.get("CIDALLOC_ERRORS") == "all"
COMMANDS = [name for name in OPERATIONS if name.startswith("registry ") or name == "drain"]


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    child = Child(tmp_path_factory.mktemp("failing"))
    yield child
    child.end()
