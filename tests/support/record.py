"""The track record: bugs that were found, each shown by a test on the commit before it was mended.

`python record.py [NAME ...]` shows the named rows of `record.json`, or some at random. The test of
a row runs twice: with the package before the mend, where it must fail with the error that the row
has, and with the package of the mend, where it must pass.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pages import ROOT, TESTING, fill, markdown

CACHE = ROOT / ".cache" / "record"
LIMIT_S = 60
"""One test may take so long."""


@dataclass(frozen=True)
class Row:
    """One bug.

    Attributes:
        name: of the row.
        bug: what it was.
        since: the commit that brought it in.
        broke: the promise of docs/design.md, or a link to what another page says.
        found: who found it, or what, if the history tells.
        mended: the commit that mended it.
        test: its ID for pytest; one without parameters stands for several tests.
        fails: part of its error without the mend.
        tests_of: the commit that has the test, if that is not ``mended``.
    """

    name: str
    bug: str
    since: str
    broke: str
    found: str
    mended: str
    test: str
    fails: str
    tests_of: str = ""

    @property
    def commits(self) -> list[str]:
        """All commits that are needed to show it."""
        return [f"{self.mended}^", self.mended, self.tests_of or self.mended]


def load() -> dict[str, Row]:
    """Return all rows by name, those mended first before others."""
    rows = json.loads(Path(__file__).with_suffix(".json").read_text())
    return {each["name"]: Row(**each) for each in rows}


def table(rows: Iterable[Row]) -> list[str]:
    """Return the lines of the table in docs/testing.md."""
    found = [["row", "what was wrong", "promise", "found by", "since", "mended"]]
    for each in rows:
        commits = [f"`{commit[:7]}`" for commit in (each.since, each.mended)]
        found.append([f"`{each.name}`", each.bug, each.broke, each.found, *commits])
    return markdown(found)


def _git(*arguments: str, stdin: str = "") -> bytes:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, input=stdin.encode(), stdout=-1, check=True).stdout


def lacks(rows: Iterable[Row]) -> list[str]:
    """Return the commits that this clone does not have."""
    names = sorted({f"{commit}^{{tree}}" for row in rows for commit in row.commits})
    if not (ROOT / ".git").exists():
        return names
    found = _git("cat-file", "--batch-check", stdin="\n".join(names)).decode()
    return re.findall(r"^(\w+).* missing$", found, re.M)


def _extract(commit: str, to: Path, *paths: str) -> None:
    with tarfile.open(fileobj=io.BytesIO(_git("archive", commit, *paths))) as archive:
        archive.extractall(to)


def _extensions(commit: str) -> Path:
    """Return a folder with the extension modules of a commit. Equal sources are built once."""
    files = _git("ls-tree", "-r", commit, "--", "src", "CMakeLists.txt").decode().splitlines()
    sources = [each for each in files if re.search(r"\.p(yx|xd|xi)$|CMakeLists\.txt$", each)]
    key = hashlib.sha256("\n".join([sys.version, *sources]).encode()).hexdigest()
    folder = CACHE / key[:16]
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as path:
            tree, built, kept = (Path(path, name) for name in ("tree", "built", "kept"))
            _extract(commit, tree)
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation"]
            command += ["--no-deps", f"--target={built}", str(tree)]
            command += ["-Ccmake.build-type=Debug"]  # not to optimize takes half the time
            subprocess.run(command, check=True)
            for module in built.rglob("*.so"):
                to = kept / module.relative_to(built)
                to.parent.mkdir(parents=True, exist_ok=True)
                module.rename(to)
            kept.rename(folder)
    return folder


def run(commit: str, tests_of: str, test: str) -> tuple[int, str]:
    """Run a test of one commit with the package of another one.

    Returns:
        pytest's exit status, and what it printed.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as path:
        tree, src = Path(path), Path(path, "src")
        _extract(tests_of, tree)
        shutil.rmtree(src)
        _extract(commit, tree, "src")
        shutil.copytree(_extensions(commit), src, dirs_exist_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--hypothesis-seed=0"]
        command += ["-pno:cacheprovider", f"--timeout={LIMIT_S}", test]
        env = {**os.environ, "PYTHONPATH": str(src)}
        done = subprocess.run(command, cwd=tree, env=env, stdout=-1, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.decode()


def errors(row: Row, out: str) -> list[str]:
    """Return the lines of what pytest printed that have the row's error."""
    return [line for line in out.splitlines() if line.startswith("E  ") and row.fails in line]


def wrong(row: Row, without: tuple[int, str], mended: tuple[int, str]) -> str:
    """Return what is wrong with what `run` returned without the mend and with it, if anything.

    Without the mend the test has to fail, and not at an import or a fixture.
    """
    status, out = without
    if status != 1 or not re.search(r"^\d+ failed(, \d+ errors?)? in ", out, re.M):
        return f"without the mend the test does not fail:\n{out}"
    if not errors(row, out):
        return f"without the mend the test does not fail with {row.fails!r}:\n{out}"
    status, out = mended
    if status or not re.search(r"^\d+ passed in ", out, re.M):
        return f"with the mend the test does not pass:\n{out}"
    return ""


def main() -> int:
    """Show rows, or write the table."""
    rows = load()
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a row; none: some at random")
    parser.add_argument("--rows", type=int, default=5, help="how many at random")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--table", action="store_true", help="only write docs/testing.md")
    options = parser.parse_args()
    if options.table:
        fill(TESTING, "record", table(rows.values()))
        return 0
    if unknown := set(options.names) - set(rows):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    names = options.names
    if not names:
        count = min(options.rows, len(rows))
        names = random.Random(options.seed).sample(sorted(rows), count)
        print(f"{count} rows of {len(rows)}: --rows {count} --seed {options.seed}", flush=True)
    if lacking := lacks(rows[name] for name in names):
        print(
            "error: this clone lacks commits of the record, such as"
            f" {lacking[0].rstrip('^')}. If it is shallow, `git fetch --unshallow` gets them.",
            file=sys.stderr,
        )
        return 1
    failed = 0
    for name in names:
        row, start = rows[name], time.monotonic()
        print(f"{name}: {row.bug}\n  {row.test}", flush=True)
        test = row.tests_of or row.mended, row.test
        without, mended = run(f"{row.mended}^", *test), run(row.mended, *test)
        if found := wrong(row, without, mended):
            failed += 1
            print(f"error: {found}")
        else:
            print(f"  {row.mended}^: {errors(row, without[1])[0]}\n  {row.mended}: passed", end="")
            print(f" ({time.monotonic() - start:.0f} s)", flush=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
