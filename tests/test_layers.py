"""Who may import whom: a module knows the layers below it, never those above."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "cidalloc"

LAYERS = [
    {"codes"},
    {"errors"},
    {"_alloc", "_mapping", "_orphan", "wire"},
    {"_sessions", "settings", "layout", "locks"},
    {"store"},
    {"upgrade"},
    {"records"},
    {"registry"},
    {"handover"},
    {"service", "server"},
    {"triton_model", "client"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
FORBIDDEN = {
    "client": {
        *("_alloc", "_mapping", "_orphan", "_sessions", "settings", "store"),
        *("layout", "locks", "upgrade", "records", "registry", "handover", "service", "server"),
    }
}


def level(part: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def imports(path: Path) -> set[str]:
    """Return the parts of the package, ``errors`` or ``client``, that a file imports."""
    package = ("cidalloc", *path.relative_to(SOURCE).with_suffix("").parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level]) if node.level else []
            base += (node.module or "").split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "cidalloc" and len(name) > 1}
    return {name for name in found if any(name in layer for layer in LAYERS)}


MODULES = [
    path
    for path in SOURCE.rglob("*.py")
    if path.name != "__init__.py" or path.parent != SOURCE
    if "models" not in path.parts
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_directions(path: Path) -> None:
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    above = {name for name in imports(path) if name != part and level(name) >= level(part)}
    assert not above, f"{path.name} imports {above}, which is not below it"
    assert not imports(path) & FORBIDDEN.get(part, set())


def test_the_allocator_alone_is_light() -> None:
    code = (
        "import cidalloc, sys; cidalloc.Allocator().acquire();"
        "print([m for m in sys.modules if m.startswith(('triton', 'grpc', 'click', 'rich'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
