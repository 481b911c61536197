"""Writes the numbers of the protocol into cidalloc.hpp, from their one definition in Python.

``.venv/bin/python cpp/generate.py`` changes the header; a test compares it with `generated`.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from cidalloc import protocol

ROOT = Path(__file__).parent.parent
HEADER = ROOT / "cpp" / "include" / "cidalloc.hpp"
CONSTANTS = (
    *("MODEL", "ROUTE_HEADER", "DRAINING", "STAMP_DIGITS"),
    *("PROTOCOL", "MAX_COOLDOWN_MS", "MAX_MODELS"),
)
_BLOCK = re.compile(r"(// clang-format off\n).*(// clang-format on\n)", re.DOTALL)


def generated(header: str) -> str:
    """Return the text of the header with the present numbers in its block."""
    lines = [*_enums(), *_constants()]
    block = "\n".join(["", *lines, "", ""])
    text, found = _BLOCK.subn(lambda match: match[1] + block + match[2], header)
    if found != 1:
        raise ValueError("the header has not one block for the numbers")
    return text


def _enums() -> Iterator[str]:
    operations, codes = (
        list(_members(node))
        for node in ast.parse((ROOT / "src/cidalloc/codes.py").read_text()).body
        if isinstance(node, ast.ClassDef)
    )
    errors = [each for each in codes if each[0] != "OK"]
    yield "/// Why a call failed. The numbers never change."
    yield "enum class Code {"
    for name, number, doc in errors:
        yield from _with_comment(f"  {name} = {number},", doc)
    yield "};\n"
    names = {number: f'"{name}"' for name, number, _ in errors}
    slots = [names.get(number, "nullptr") for number in range(max(names) + 1)]
    yield "namespace protocol {\n"
    yield f"inline constexpr std::array<const char*, {len(slots)}> CODE_NAMES = {{"
    yield f"{_wrapped(slots)}}};"
    yield "enum class Operation {"
    yield f"{_wrapped([f'{name} = {number}' for name, number, _ in operations])}}};"


def _with_comment(code: str, comment: str) -> list[str]:
    """Return a line of C++ with a comment, which is above it if the line gets too long."""
    line = f"{code}  ///< {comment.replace('``', '`')}"
    return [line] if len(line) <= 100 else [f"  /// {comment.replace('``', '`')}", code]


def _wrapped(parts: list[str]) -> str:
    whole = ", ".join(part.replace(" ", "\0") for part in parts)
    lines = textwrap.fill(whole, 98, initial_indent="    ", subsequent_indent="    ")
    return lines.replace("\0", " ")


def _members(node: ast.ClassDef) -> Iterator[tuple[str, int, str]]:
    """Yield the name, the number and the docstring of each member of an enumeration."""
    for member, doc in zip(node.body, node.body[1:], strict=False):
        if isinstance(member, ast.Assign):
            text = ast.literal_eval(doc.value) if isinstance(doc, ast.Expr) else ""
            yield member.targets[0].id, ast.literal_eval(member.value), " ".join(text.split())
    last = node.body[-1]
    if isinstance(last, ast.Assign):
        yield last.targets[0].id, ast.literal_eval(last.value), ""


def _constants() -> Iterator[str]:
    for name in CONSTANTS:
        value = getattr(protocol, name)
        text = f'const char* {name} = "{value}"'
        if not isinstance(value, str):
            text = f"int {name} = {value}"
        yield f"inline constexpr {text};"
    yield "\n}  // namespace protocol"


if __name__ == "__main__":
    HEADER.write_text(generated(HEADER.read_text()))
