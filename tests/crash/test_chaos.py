"""A short form of `make chaos`: a real server, some clients, and each fault at least once.

CIDALLOC_SEED says in which order.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from chaos import FAULTS, run

pytestmark = pytest.mark.slow


@pytest.mark.server
@pytest.mark.timeout(300)
def test_no_promise_is_broken(tmp_path: Path) -> None:
    seed = int(os.environ.get("CIDALLOC_SEED", "7"))
    report = run(seed, 25.0, 6, tmp_path / "histories")
    assert not report.wrong, f"seed {seed}: {report.wrong[:10]}"
    assert set(report.faults) == set(FAULTS) - set(report.left_out)
    assert report.seen["sums"] > 100
    if "fill the disk" not in report.left_out and not report.seen["Triton did not outlive it"]:
        assert report.seen["on a full disk: FULL"], report.seen
        assert report.seen["with room again: OK"], report.seen
