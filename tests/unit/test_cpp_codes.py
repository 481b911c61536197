"""The header in C++ has the numbers of the protocol as they are now."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from cidalloc.codes import Code, Operation

SCRIPT = Path(__file__).parent.parent.parent / "cpp" / "generate.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="a source distribution has none")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_header_is_fresh() -> None:
    """Otherwise run ``.venv/bin/python cpp/generate.py``."""
    script = load()
    header = script.HEADER.read_text()
    assert script.generated(header) == header
    number = int(Code.NOT_HELD)
    stale = header.replace(f"NOT_HELD = {number},", "NOT_HELD = 99,")
    assert stale != header and script.generated(stale) == header


def test_every_number_is_there() -> None:
    header = load().HEADER.read_text()
    for each in (*(code for code in Code if code is not Code.OK), *Operation):
        assert re.search(rf"\b{each.name} = {each.value}\b", header)
    names = re.findall(r'"([A-Z_]+)"', header[header.index("CODE_NAMES") :].partition(";")[0])
    assert names == [code.name for code in Code if code is not Code.OK]
