"""The files for those who join and for releases say the same as the code and the Makefile."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_package import PUBLIC

import cidalloc
from cidalloc import snapshots
from cidalloc.manager.storage.file_format import FORMAT
from cidalloc.protocol import PROTOCOL

ROOT = Path(__file__).parent.parent.parent
MAKEFILE = ROOT / "Makefile"

pytestmark = pytest.mark.skipif(
    not (ROOT / ".github").is_dir(), reason="a source distribution has no .github"
)


def linters(text: str) -> set[str]:
    """The linters that a text calls, as commands or modules."""
    return set(
        re.findall(r"\bruff (?:check|format)|\b(?:hadolint|jactionlint|lint-imports)\b", text)
    ) | set(re.findall(r"cython-lint --\S+ \d+|-m mypy\b(?!\.)", text))


def test_hooks_are_the_linters_of_make() -> None:
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE.read_text(), re.MULTILINE)
    assert lint
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = "\n".join(hook["entry"] for hook in repository["hooks"])
    assert linters(hooks) == linters(lint[1])
    assert len(linters(hooks)) == len(repository["hooks"])


def test_citation_and_changelog_have_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == cidalloc.__version__
    latest = re.search(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest and latest[1] == cidalloc.__version__


def test_a_release_names_its_repository(tmp_path: Path) -> None:
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    script = str(ROOT / ".github/name_repository.py")
    subprocess.run([sys.executable, script, "Some/one", "v1.2.3"], cwd=tmp_path, check=True)
    readme = (tmp_path / "README.md").read_text()
    assert "\n```sh\npip install 'cidalloc[client]'\n" in readme and "'.[" not in readme
    targets = re.findall(r"\]\(([^)\s]*)\)", readme)
    assert [each for each in targets if not each.startswith("https://")] == []
    assert "(https://github.com/Some/one/blob/v1.2.3/docs/client.md)" in readme
    assert "(https://github.com/Some/one/actions/workflows/ci.yml)" in readme
    assert "(https://raw.githubusercontent.com/Some/one/v1.2.3/docs/collide.svg)" in readme
    project = (tmp_path / "pyproject.toml").read_text()
    assert '\n[project.urls]\nDocumentation = "https://some.github.io/one/"\n' in project


def test_the_site_of_a_version_is_put_beside_others(tmp_path: Path) -> None:
    publish = runpy.run_path(str(ROOT / "docs/publish_site.py"))["publish"]
    site, folder = tmp_path / "site", tmp_path / "all"
    site.mkdir()
    folder.mkdir()
    for version in ("0.9.0", "0.10.0", "0.9.1", "0.9.1"):
        (site / "index.html").write_text(version)
        publish(site, folder, version)
    listed = json.loads((folder / "versions.json").read_text())
    assert [each["version"] for each in listed] == ["0.10.0", "0.9.1", "0.9.0"]
    assert [each["aliases"] for each in listed] == [["latest"], [], []]
    for name, version in {"latest": "0.10.0", "0.9.0": "0.9.0", "0.9.1": "0.9.1"}.items():
        assert (folder / name / "index.html").read_text() == version


def test_the_site_has_all_pages() -> None:
    assert runpy.run_path(str(ROOT / "docs/make_site.py"))["omitted"]() == []


def test_wheels_are_built_for_each_python() -> None:
    """For those that the package names, and that `make pythons` tries."""
    project = (ROOT / "pyproject.toml").read_text()
    said = re.findall(r"Python :: (3\.\d+)", project)
    built = re.findall(r"\bcp3(\d+t?)-", project)
    assert [f"3.{each}" for each in built] == [*said, f"{said[-1]}t"]
    (tried,) = re.findall(r"^PYTHONS := (.*)", MAKEFILE.read_text(), re.MULTILINE)
    assert [f"3.{each}" for each in built] == tried.split()


def test_the_compatibility_page_has_the_present_numbers() -> None:
    page = (ROOT / "docs/compatibility.md").read_text()
    assert f"| protocol version, {PROTOCOL} |" in page
    assert f"| the registry's file, format {FORMAT} |" in page
    assert f"| snapshots of an allocator, version {snapshots._VERSION} |" in page
    (listed,) = re.findall(r"list in `__all__`: (.*?)\. Names", page, re.DOTALL)
    assert set(re.findall(r"`([\w.]+)`", listed)) == set(PUBLIC)


def test_make_targets_that_are_advised_exist() -> None:
    targets = set(re.findall(r"^([\w.][\w./-]*):", MAKEFILE.read_text(), re.MULTILINE))
    workflows = (ROOT / ".github/workflows").glob("*.yml")
    for path in (ROOT / "CONTRIBUTING.md", *workflows):
        named = set(
            re.findall(r"(?:`|run: |^)make ([\w.][\w./-]*)", path.read_text(), re.MULTILINE)
        )
        assert named <= targets, path.name
