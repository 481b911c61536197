"""A model's copy of cidalloc, for one or several versions of Python."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from command import run

import cidalloc
from cidalloc.errors import InvalidArgument
from cidalloc.triton_model import export
from cidalloc.triton_model.vendor import HERE, pythons_of

PACKAGE = Path(cidalloc.__file__).parent
MODULES = ("_alloc", "manager/storage/_mapping", "triton_model/_parent_watch")


def wheel(folder: Path, python: str, cpu: str = "x86_64", edit: Callable[[str], str] = str) -> Path:
    """Write a wheel as pip finds it; its compiled modules have only their names."""
    tag = f"cp{python.replace('.', '')}"
    name = f"cidalloc-{cidalloc.__version__}"
    path = folder / f"{name}-{tag}-{tag}-manylinux_2_17_{cpu}.manylinux2014_{cpu}.whl"
    info = f"{name}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for each in PACKAGE.rglob("*.py"):
            text = edit(each.read_text())
            archive.writestr(str(each.relative_to(PACKAGE.parent)), text)
        for module in MODULES:
            suffix = f"cpython-{tag[2:]}-{cpu}-linux-gnu.so"
            archive.writestr(f"cidalloc/{module}.{suffix}", f"{module} for {python} on {cpu}")
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: cidalloc\nVersion: {cidalloc.__version__}\n",
        )
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}-{tag}-linux_{cpu}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_a_copy_for_several_pythons(tmp_path: Path) -> None:
    """With the modules of each in place, and this one as it is installed."""
    for cpu in ("x86_64", "aarch64"):
        wheel(tmp_path, "3.98", cpu)
    wheel(tmp_path, "3.99")
    place = export(tmp_path / "models", vendor=["3.99", HERE, "3.98"], wheels=tmp_path)
    copy = place / "1" / "cidalloc"
    assert pythons_of(copy) == (HERE, "3.98", "3.99")
    for module in MODULES:
        for python, cpu in (("3.98", "x86_64"), ("3.98", "aarch64"), ("3.99", "x86_64")):
            tag = f"cpython-{python.replace('.', '')}-{cpu}"
            content = (copy / f"{module}.{tag}-linux-gnu.so").read_text()
            assert content == f"{module} for {python} on {cpu}"
    code = "import cidalloc; print(cidalloc.__file__, cidalloc.Allocator().acquire())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=place / "1", capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(copy / "__init__.py"), "1"]


def test_a_copy_for_other_pythons_only(tmp_path: Path) -> None:
    wheel(tmp_path, "3.99")
    place = export(tmp_path / "models", vendor="3.99", wheels=tmp_path)
    assert pythons_of(place / "1" / "cidalloc") == ("3.99",)


def test_pip_downloads_what_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the index that pip uses, or as here from a folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel(tmp_path, "3.99", cpu="other")
    with pytest.raises(InvalidArgument, match=r"pip finds no wheel of .* 3\.99 .* use --wheels"):
        export(tmp_path / "models", vendor="3.99")
    assert not (tmp_path / "models").exists()
    wheel(tmp_path, "3.99", cpu=os.uname().machine)
    place = export(tmp_path / "models", vendor=[HERE, "3.99"])
    assert pythons_of(place / "1" / "cidalloc") == (HERE, "3.99")


def test_wheels_that_do_not_fit(tmp_path: Path) -> None:
    def refused(words: str, python: str = "3.99") -> None:
        with pytest.raises(InvalidArgument, match=words):
            export(tmp_path / "models", vendor=python, wheels=tmp_path)
        assert not (tmp_path / "models").exists()

    refused("contains no wheel for Python 3.99: no cidalloc-.*-cp399-cp399-")
    refused("'3' is not a version of Python 3", "3")
    path = wheel(tmp_path, "3.99", edit=lambda text: text + "\n")
    refused("has another cidalloc/.* than the cidalloc that runs this command")
    path.write_text("no wheel")
    refused("cannot read .*: File is not a zip file")
    with zipfile.ZipFile(path, "w"):
        pass
    refused("contains no extension module")


def test_the_pythons_of_a_model_are_kept(tmp_path: Path) -> None:
    """If the model is replaced without saying for which Pythons its copy is."""
    models, copy = tmp_path / "models", tmp_path / "models" / "cidmgr" / "1" / "cidalloc"
    wheel(tmp_path, "3.99")
    wheels = ("--wheels", str(tmp_path))

    def export_again(*options: str) -> str:
        done = run("model", str(models), *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = export_again("--no-state", "--vendor", "--python", HERE, "--python", "3.99", *wheels)
    assert f"contains a copy of cidalloc for Python {HERE}, 3.99." in said
    export_again("-o", "--first", "7", *wheels)
    assert pythons_of(copy) == (HERE, "3.99")
    export_again("-o", "--python", HERE)
    assert pythons_of(copy) == (HERE,)
    for option in (("--python", HERE), wheels):
        refused = run("model", str(models), "-o", "--no-vendor", *option)
        assert refused.returncode == 1
        assert "--python and --wheels need --vendor" in refused.stderr
    assert pythons_of(copy) == (HERE,)
