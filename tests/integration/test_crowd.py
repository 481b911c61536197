"""Many client processes with many sequences each, some of which are killed: is any sum wrong?

CIDALLOC_CROWD says how many processes, sequences and seconds: `make crowd` takes 50x20x60.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import crowd_client
import pytest
from crowd_client import TTL_S
from servers import Server

from cidalloc.client import Client
from cidalloc.devserver import demo
from cidalloc.manager.settings import Settings

PROCESSES, SEQUENCES, SECONDS = map(int, os.environ.get("CIDALLOC_CROWD", "6x8x5").split("x"))
GRACE_S = 1.0
PAUSE_S = PROCESSES * SEQUENCES / 800  # so that two cores are busy, and no more than that
MODEL = "crowd_sequence"


pytestmark = pytest.mark.slow


def write_repository(folder: Path, state: Path) -> None:
    """Write a repository whose model has room for all of them."""
    settings = Settings(grace_ms=int(GRACE_S * 1000), cooldown_ms=200, fresh=True, state=str(state))
    demo.write_repository(folder, settings)
    shutil.copytree(folder / demo.MODEL, folder / MODEL)
    config = folder / MODEL / "config.pbtxt"
    text = config.read_text().replace(demo.MODEL, MODEL)
    assert "direct { }" in text
    config.write_text(text.replace("direct { }", "oldest { max_candidate_sequences: 4096 }"))


def start(url: str) -> subprocess.Popen[str]:
    script = Path(crowd_client.__file__)
    command = [sys.executable, str(script), url, MODEL, str(SEQUENCES), str(PAUSE_S)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.server
@pytest.mark.timeout(SECONDS + 400)
def test_no_sum_is_wrong(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    (tmp_path / "state").mkdir()
    write_repository(tmp_path / "models", tmp_path / "state")
    with Server(tmp_path / "models") as server:
        crowd = [start(server.grpc_url) for _ in range(PROCESSES)]
        killed = 0
        try:
            for process in crowd:
                ready(process)
            for process in crowd:
                go(process)
            fresh: list[subprocess.Popen[str]] = []
            for _ in range(max(4, SECONDS // 2)):
                time.sleep(dice.uniform(0.5, 1.5))
                victim = dice.choice([each for each in crowd if each not in fresh])
                victim.kill()
                victim.communicate()
                killed += 1
                crowd.remove(victim)
                crowd.append(start(server.grpc_url))
                go(crowd[-1])
                # One at a time is new; it is left in peace until it has begun.
                for process in fresh:
                    ready(process)
                fresh = crowd[-1:]
            for process in fresh:
                ready(process)
            for process in crowd:
                assert process.stdin is not None
                process.stdin.close()
                process.stdin = None  # type: ignore[assignment]  # or communicate() minds
            found = [json.loads(process.communicate(timeout=120)[0]) for process in crowd]
        finally:
            for process in crowd:
                process.kill()
                process.communicate()
        ended = time.monotonic()
        with Client(server.grpc_url) as cids:
            while True:
                status = cids.status()
                if status["sessions_total"] == 0 == status["held"]:
                    break
                assert time.monotonic() < ended + TTL_S + GRACE_S + 10, status
                time.sleep(0.1)
        total = {name: sum(each[name] for each in found) for name in found[0]}
        print(f"{PROCESSES} processes, {killed} killed, {total}, peak {status['peak']:,}")
        assert total["wrong"] == 0
        assert total["sums"] > 2 * PROCESSES * SEQUENCES
        assert 0 < status["sessions_expired"] <= killed, "none but those"
