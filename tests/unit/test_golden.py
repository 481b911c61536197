"""This version reads what versions before it have written: docs/compatibility.md promises it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden import FOLDER, found_in

from cidalloc import __version__, snapshots
from cidalloc.manager.storage.file_format import FORMAT

FILES = sorted(path for path in FOLDER.iterdir() if path.suffix != ".json")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_golden_file(file: Path, tmp_path: Path) -> None:
    found = json.loads(found_in(file, tmp_path / "it"))
    expected = json.loads(file.with_suffix(".json").read_text())
    assert {key: found.get(key) for key in expected} == expected  # and it may know more


def test_this_version_has_its_own() -> None:
    """`python tests/support/golden.py` writes them."""
    assert {path.name for path in FILES} >= {
        f"registry-{FORMAT}.xz",
        f"snapshot-{snapshots._VERSION}.bin",
        f"config-{__version__}.pbtxt",
    }
