"""The package as a whole: its public names, its version, its files."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import files, metadata
from pathlib import Path

import pytest

import cidalloc
from cidalloc import errors

ROOT = Path(__file__).parent.parent.parent

PUBLIC = {
    "cidalloc": ["Allocator", "CidError", "Code", "__version__"],
    "cidalloc.client": [
        "AsyncClient",
        "AsyncFleet",
        "AsyncSequence",
        "Client",
        "Fleet",
        "FleetServer",
        "Sequence",
        *errors.__all__,
    ],
    "cidalloc.codes": ["Code", "Operation"],
    "cidalloc.manager.registry": ["Grant", "Registry"],
    "cidalloc.manager.settings": ["Settings"],
    "cidalloc.manager.service": ["Service", "boottime_ms"],
    "cidalloc.devserver.triton_server": ["TritonServer"],
    "cidalloc.triton_model": ["default_state_folder", "export", "settings_from"],
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(PUBLIC[name])
    assert all(hasattr(module, each) for each in module.__all__)


def test_the_changelog_leads_with_this_version() -> None:
    versions = re.findall(r"^## \[?([\w.]+)\]?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == cidalloc.__version__


def test_what_is_installed() -> None:
    names = {str(path) for path in files("cidalloc") or ()}
    for wanted in (
        "cidalloc/py.typed",
        "cidalloc/_alloc.pyi",
        "cidalloc/manager/storage/_mapping.pyi",
        "cidalloc/triton_model/_parent_watch.pyi",
        "cidalloc/triton_model/config.pbtxt",
        "cidalloc/cli/top/page.html",
        "cidalloc/devserver/demo/models/simple_sequence/1/model.py",
    ):
        assert wanted in names
    for path in (ROOT / "src").rglob("*.pxd"):
        assert str(path.relative_to(ROOT / "src")) in names, (
            "others cimport it, or what it cimports"
        )
    assert metadata("cidalloc")["License-Expression"] == "Apache-2.0"


def test_every_file_says_what_it_is_for() -> None:
    source = ROOT / "src" / "cidalloc"
    for path in [*source.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert path.read_text().startswith('"""'), f"{path.name} does not begin with its purpose"
    for path in source.rglob("*.pxd"):
        assert path.read_text().startswith("# "), f"{path.name} does not begin with its purpose"


@pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="a source distribution has none")
def test_another_python_begins_anew(tmp_path: Path) -> None:
    """And none that is named keeps the environment that is there."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "CMakeLists.txt", "requirements.lock"):
        (tmp_path / name).touch()
    (tmp_path / "src").mkdir()
    here, other = tmp_path / ".venv" / "bin" / "python", tmp_path / "other"
    here.parent.mkdir(parents=True)
    for path, version in ((here, "3.11.1 /usr"), (other, "3.12.1 /usr")):
        path.write_text(f"#!/bin/sh\necho {version}\n")
        path.chmod(0o755)
    for stamp in (".ready", ".built"):
        (tmp_path / ".venv" / stamp).touch()

    def planned(*arguments: str) -> str:
        command = ["make", "-n", "demo", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    assert "rm -rf .venv" in planned(f"PYTHON={other}")
    assert f"{other} -m venv" in planned(f"PYTHON={other}")
    for arguments in ([], [f"PYTHON={here}"]):
        assert "venv" not in planned(*arguments).replace(".venv/bin/cidalloc demo", "")


def test_the_allocator_alone_is_light() -> None:
    code = (
        "import cidalloc, sys; cidalloc.Allocator().acquire();"
        "print([m for m in sys.modules if m.startswith(('triton', 'grpc', 'click', 'rich'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_source_distribution_has_only_sources(tmp_path: Path) -> None:
    """And nothing of the folders in which others build."""
    pytest.importorskip("scikit_build_core")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tree)
    wanted, other = ("src/cidalloc/a.py", "tests/a.py"), (".venv", ".cache", "build", "dist")
    for name in (*wanted, *(f"{each}/{path}" for each in other for path in wanted)):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    code = f"import scikit_build_core.build as b; b.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {*wanted, "CMakeLists.txt"} <= names
    assert [name for name in names if name.startswith(other)] == []


NOT_COMPILED = """
import sys
for name in ("_alloc", "manager.storage._mapping", "triton_model._parent_watch"):
    sys.modules[f"cidalloc.{name}"] = None
"""


def without_modules(code: str) -> subprocess.CompletedProcess[str]:
    """Run code as in a pure install."""
    command = [sys.executable, "-c", NOT_COMPILED + code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_client_needs_no_compiled_module() -> None:
    done = without_modules(
        "import cidalloc.client, cidalloc.client.asyncio.grpc, cidalloc.client.asyncio.http\n"
        "import cidalloc.client.sync.grpc, cidalloc.client.sync.http\n"
        "print(cidalloc.client.Client.__name__, cidalloc.__version__)"
    )
    assert (done.stdout, done.stderr) == (f"Client {cidalloc.__version__}\n", "")


@pytest.mark.parametrize(
    "command", ["status", "top", "probe", "doctor", "tidy", "acquire", "release"]
)
def test_commands_that_need_no_compiled_module(command: str) -> None:
    done = without_modules(
        f"sys.argv = ['cidalloc', {command!r}, '--help']\n"
        "from cidalloc.__main__ import main\nmain()"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"cidalloc {command}" in done.stdout


def test_what_needs_a_compiled_module_says_so() -> None:
    words = "this cidalloc has no compiled modules for this Python"
    allocator = without_modules("import cidalloc; cidalloc.Allocator")
    assert f"ImportError: {words}" in allocator.stderr
    code = "sys.argv = ['cidalloc', 'model', '/x']\nfrom cidalloc.__main__ import main\nmain()"
    command = without_modules(code)
    assert command.returncode == 1
    assert command.stderr.startswith(f"error: UNAVAILABLE: {words}")
