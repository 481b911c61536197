"""Which lines of the Cython code no test reached: reads what gcc counted. See `make coverage`.

A line counts as reached if any of the C code that was made of it was; so half of a line, or the
error that a call may raise, does not show.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

FOLDER = Path(__file__).parent.parent.parent / "src" / "cidalloc"
SOURCES = {path.name: path for kind in ("*.pyx", "*.pxd") for path in FOLDER.rglob(kind)}


def counts(folder: Path) -> dict[str, dict[int, int]]:
    """Return how often each line ran, by file."""
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for data in sorted(folder.rglob("*.gcno")):
        command = ["gcov", "--stdout", "--json-format", str(data)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for file in json.loads(text)["files"]:
            name = Path(file["file"]).name
            if name in SOURCES:
                lines, code = found[name], statements(SOURCES[name])
                for line in file["lines"]:
                    number = line["line_number"]
                    if number in code:
                        lines[number] = max(lines.get(number, 0), line["count"])
    return found


def statements(source: Path) -> set[int]:
    """Return the numbers of the lines that hold code; what helps it along counts elsewhere."""
    found, inside = set(), False
    for number, text in enumerate(source.read_text().splitlines(), 1):
        line = text.strip()
        quotes = line.count('"""')
        if (
            not inside
            and not quotes
            and line
            and not line.startswith(("#", "def ", "@", "cdef class"))
        ):
            found.add(number)
        inside ^= quotes % 2 == 1
    return found


def ranges(numbers: list[int]) -> str:
    """Return numbers as people write them: 3, 7-9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def main(folder: Path) -> None:
    """Print a table."""
    every = 0, 0
    for name, lines in sorted(counts(folder).items()):
        reached = sum(count > 0 for count in lines.values())
        every = every[0] + reached, every[1] + len(lines)
        missing = ranges(sorted(number for number, count in lines.items() if not count))
        print(f"{name:16} {len(lines):5} lines {reached / len(lines):6.1%}  {missing}")
    print(f"{'all':16} {every[1]:5} lines {every[0] / every[1]:6.1%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
