"""The copy of this package in a model's folder, for a server whose Python does not have it.

The copy may serve several versions of Python: its compiled modules lie side by side. Those of other
versions than the one that runs come from wheels.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import InvalidArgument

__all__ = ["HERE", "Copy", "pythons_of"]

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
"""The version of the Python that runs."""

_PACKAGE = Path(__file__).parent.parent


def pythons_of(copy: Path) -> tuple[str, ...]:
    """Return the versions of Python for which a copy has compiled modules."""
    names = [each.name for each in copy.glob("_alloc.cpython-*.so")]
    found = {match[1] for name in names if (match := re.search(r"cpython-3(\d+)-", name))}
    return tuple(f"3.{minor}" for minor in sorted(found, key=int))


class Copy:
    """What a copy for some versions of Python consists of, collected before any file is written.

    Args:
        pythons: versions such as ``"3.12"``.
        wheels: a folder with wheels of this version of cidalloc, for the versions of Python that do
            not run. Without it, pip downloads them.

    Raises:
        InvalidArgument: there are no modules for one of the versions.
    """

    def __init__(self, pythons: Iterable[str], wheels: Path | None = None) -> None:
        self.modules: dict[str, bytes] = {}
        """Content of the compiled modules, by their path in the package."""
        for python in pythons:
            if python == HERE:
                self.modules.update(_own())
                continue
            if not re.fullmatch(r"3\.\d{1,3}", python):
                raise InvalidArgument(
                    f"{python!r} is not a version of Python 3: write it like 3.12"
                )
            with tempfile.TemporaryDirectory() as folder:
                for wheel in _find(python, wheels) if wheels else _download(python, Path(folder)):
                    self.modules.update(_read(wheel))

    def place_in(self, home: Path) -> None:
        """Write the package, or remove an earlier copy of it if this one is for no Python."""
        place = home / _PACKAGE.name
        draft, old = (home / f".{place.name}.{os.getpid()}.{end}" for end in ("new", "old"))
        try:
            if self.modules:
                without = shutil.ignore_patterns("__pycache__", "*.so")
                shutil.copytree(_PACKAGE, draft, ignore=without)
                for path, content in self.modules.items():
                    (draft / path).write_bytes(content)
            if place.exists():
                place.replace(old)
            if self.modules:
                draft.replace(place)
        finally:
            for each in (draft, old):
                shutil.rmtree(each, ignore_errors=True)
        # The copy reads its version from its metadata.
        for stale in home.glob(f"{place.name}-*.dist-info"):
            shutil.rmtree(stale)
        if self.modules:
            metadata = importlib.metadata.distribution(place.name)
            info = home / f"{place.name}-{metadata.version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(metadata.read_text("METADATA") or "")


def _own() -> dict[str, bytes]:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if not (_PACKAGE / f"_alloc{suffix}").is_file():
        raise InvalidArgument(
            f"{_PACKAGE} contains no extension module for this Python ({suffix}): install the"
            " wheel, not an editable or pure copy"
        )
    found = _PACKAGE.rglob(f"*{suffix}")
    return {str(each.relative_to(_PACKAGE)): each.read_bytes() for each in found}


def _find(python: str, folder: Path) -> list[Path]:
    """Return the wheels for a version of Python in a folder: one for each kind of CPU."""
    version, tag = importlib.metadata.version(_PACKAGE.name), f"cp{python.replace('.', '')}"
    pattern = f"{_PACKAGE.name}-{version}-{tag}-{tag}-*.whl"
    found = sorted(folder.glob(pattern))
    if not found:
        raise InvalidArgument(f"{folder} contains no wheel for Python {python}: no {pattern}")
    return found


def _download(python: str, folder: Path) -> list[Path]:
    """Let pip download the wheel for a version of Python and this machine's CPU."""
    wanted = f"{_PACKAGE.name}=={importlib.metadata.version(_PACKAGE.name)}"
    cpu = os.uname().machine
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"),
        *(f"--platform=manylinux_2_17_{cpu}", f"--platform=manylinux2014_{cpu}"),
        *("--dest", str(folder), wanted),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["unknown reason"])[-1]
        raise InvalidArgument(
            f"pip finds no wheel of {wanted} for Python {python} ({reason}): use --wheels with a"
            f" folder that contains it, or run this command with a Python {python} that has"
            " cidalloc installed"
        )
    return _find(python, folder)


def _read(wheel: Path) -> dict[str, bytes]:
    """Return the compiled modules of a wheel, whose other code must be that of this package."""
    prefix = f"{_PACKAGE.name}/"
    modules: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                path = name.removeprefix(prefix)
                if path == name or not path.endswith((".py", ".so")):
                    continue
                content = archive.read(name)
                if path.endswith(".so"):
                    modules[path] = content
                elif not _same(_PACKAGE / path, content):
                    raise InvalidArgument(
                        f"{wheel} has another {name} than the cidalloc that runs this command: use"
                        " wheels of the same build"
                    )
    except (OSError, zipfile.BadZipFile) as error:
        raise InvalidArgument(f"cannot read {wheel}: {error}") from None
    if not modules:
        raise InvalidArgument(f"{wheel} contains no extension module")
    return modules


def _same(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
