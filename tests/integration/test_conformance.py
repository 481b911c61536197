"""The conformance kit finds nothing in right clients, and names what wrong ones do.

CIDALLOC_CONFORMANCE says how many seeds; `make conformance` runs 500 of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree

import pytest
from mutants import WRONG_CLIENTS, Mutant, write

from cidalloc.conformance import ledger

ROOT = Path(__file__).parent.parent.parent
EXAMPLES, CPP = ROOT / "examples", ROOT / "cpp"
SEEDS = int(os.environ.get("CIDALLOC_CONFORMANCE", "6"))
WRONG_SEEDS = {"used too late": 16}  # else 4
NODE = shutil.which("node")
PYTHON = [sys.executable, str(EXAMPLES / "conformance" / "python_client.py")]
JAVASCRIPT = [NODE or "", str(EXAMPLES / "javascript" / "conformance_client.mjs")]
LONG = SEEDS >= 100
BUILDS = LONG and (CPP / "include").is_dir()
KIT = [sys.executable, "-m", "cidalloc", "conformance"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120 + 2 * SEEDS),
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="a source distribution has no examples/"),
]
needs_node = pytest.mark.skipif(
    NODE is None, reason="node is not installed: apt-get install nodejs"
)
needs_cpp = pytest.mark.skipif(not BUILDS, reason="`make conformance` builds the client in C++")


class Kit(subprocess.Popen[str]):
    """A run of the command, which mostly waits: so all of them run at the same time."""

    def __init__(self, folder: Path, client: list[str], seeds: int) -> None:
        self.junit = folder / "junit.xml"
        arguments = ["--seeds", str(seeds), "--junit", str(self.junit), "--keep", str(folder)]
        arguments += ["--jobs", "8"] if LONG else []
        pipe = subprocess.PIPE
        super().__init__([*KIT, *arguments, "--", *client], stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Kit]]:
    with ExitStack() as stack:
        commands = {"python": PYTHON}
        if NODE:
            commands["javascript"] = JAVASCRIPT
        if BUILDS:
            commands["cpp"] = built(tmp_path_factory.mktemp("build"))
        started = {
            name: Kit(tmp_path_factory.mktemp(name), command, SEEDS)
            for name, command in commands.items()
        }
        for mutant in WRONG_CLIENTS:
            folder = tmp_path_factory.mktemp("wrong")
            write(mutant, folder)
            client = ["env", f"PYTHONPATH={folder}", "PYTHONDONTWRITEBYTECODE=1", *PYTHON]
            started[mutant.name] = Kit(folder, client, WRONG_SEEDS.get(mutant.rules, 4))
        for kit in started.values():
            stack.enter_context(kit)
            stack.callback(kit.kill)
        yield started


def built(folder: Path) -> list[str]:
    """Build the client in C++, and return its command."""
    program, source = str(folder / "client"), str(CPP / "tests" / "conformance_client.cc")
    include, libraries = f"-I{CPP / 'include'}", ["-lcurl", "-lpthread"]
    subprocess.run(["g++", "-std=c++17", include, source, "-o", program, *libraries], check=True)
    return [program]


@pytest.mark.parametrize(
    "name",
    [
        "python",
        pytest.param("javascript", marks=needs_node),
        pytest.param("cpp", marks=needs_cpp),
    ],
)
def test_a_right_client(kits: dict[str, Kit], name: str) -> None:
    shown, words = kits[name].communicate()
    assert kits[name].returncode == 0, shown + words
    assert words == ""
    found = re.search(rf"^{SEEDS} seeds, ([\d,]+) messages, \d+ s: all passed\n$", shown, re.M)
    assert found
    assert int(found[1].replace(",", "")) > 10 * SEEDS
    suite = ElementTree.parse(kits[name].junit).getroot()
    assert suite.attrib["tests"] == str(SEEDS)
    assert suite.attrib["failures"] == "0"
    assert [each.attrib["name"] for each in suite] == [f"seed {n + 1}" for n in range(SEEDS)]


@pytest.mark.parametrize("mutant", WRONG_CLIENTS, ids=lambda each: each.name)
def test_a_wrong_client(kits: dict[str, Kit], mutant: Mutant) -> None:
    kit = kits[mutant.name]
    shown, words = kit.communicate()
    assert (kit.returncode, words) == (1, "")
    assert f"{mutant.rules.upper()}: " in shown
    assert f"Asked for: {ledger.ASKED[mutant.rules]}\n" in shown
    suite = ElementTree.parse(kit.junit).getroot()
    failures = [each for each in suite.iter("failure") if each.attrib["type"] == mutant.rules]
    assert failures
    lines = (failures[0].text or "").splitlines()[2:]
    assert any(re.match(r" +\d+\.\d{3} s  ", each) for each in lines), "no time line"


def test_what_it_asks_for_is_documented() -> None:
    pages = [ROOT / "docs" / f"{name}.md" for name in ("protocol", "conformance")]
    text = " ".join(" ".join(page.read_text().replace("**", "").split()) for page in pages)
    for kind, sentence in ledger.ASKED.items():
        assert sentence in text, kind


def test_what_to_do_after_each_error_is_documented() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    errors, actions = (text.split(f"\n## {title}\n")[1] for title in ("Errors", "After an error"))
    sent = set(re.findall(r"^\| \d+ \| (\w+) \|", errors, re.MULTILINE))
    cells = re.findall(r"^\| ([A-Z_, ]+) \|", actions, re.MULTILINE)
    assert sent == {name for cell in cells for name in cell.split(", ")}


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("true", " with an empty line, or by its end\n"),
        ("while read line; do echo hm; done", " with 'hm'\n"),
        ("read a; echo ok; read b; echo ok 1 2 3 4 5", "' with 'ok 1 2 3 4 5'\n"),
        ("echo broken >&2; exit 1", "; broken"),
    ],
)
def test_a_program_that_does_not_follow_the_line_protocol(program: str, says: str) -> None:
    command = [*KIT, "--seed", "1", "--", "sh", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("LINE PROTOCOL: ")
    assert says in done.stdout


def test_no_such_program() -> None:
    command = [*KIT, "--", "/no/such/program"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: INVALID_ARGUMENT: ")
    assert len(done.stderr.splitlines()) == 1
