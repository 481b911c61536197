"""Says which mutants of mutmut survived, but for those that tests/mutants/survived.list explains.

`make mutation` runs it in the folder in which mutmut has run. Other words in an error are no fault.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

_TEXT = re.compile(r'f?"[^"]* [^"]*"')
_FOUND = ("killed", "timeout", "segfault", "caught by type check")


class Change(NamedTuple):
    """What a mutant replaces, without the lines around it."""

    file: str
    old: str
    new: str

    @property
    def is_words(self) -> bool:
        """Whether only texts differ, or how they are written, or None is in place of one."""
        old, new = (_TEXT.sub("None", text).lower() for text in (self.old, self.new))
        return old == new

    def __str__(self) -> str:
        return (
            "\n-".join([self.file, *self.old.split("\n")])
            + "\n+"
            + "\n+".join(self.new.split("\n"))
        )


def explained(path: Path) -> dict[Change, str]:
    """Return the changes in a file, and what is said of each."""
    found, why = {}, ""
    for entry in re.split(r"\n\n+(?=[^-+])", path.read_text().strip()):
        first, *lines = entry.splitlines()
        if first.startswith("## "):
            why = first.removeprefix("## ")
        else:
            found[_change(first, lines)] = why
    return found


def _change(file: str, lines: list[str]) -> Change:
    old, new = ("\n".join(line[1:].strip() for line in lines if line[:1] == sign) for sign in "-+")
    return Change(file, old, new)


def main() -> None:
    """Print what is not explained, and what is explained and did not survive; then end with 1."""
    known = explained(Path(sys.argv[1]))
    counts: Counter[str] = Counter()
    survived = set()
    for meta in sorted(Path("mutants").rglob("*.py.meta")):
        path = meta.relative_to("mutants").with_suffix("")
        data = SourceFileMutationData(path=path)
        data.load()
        for name, code in data.exit_code_by_key.items():
            status = status_by_exit_code[code]
            if status in _FOUND:
                counts["found"] += 1
                continue
            _, _, *lines = get_diff_for_mutant(name, path=path).split("\n")
            change = _change(str(path.relative_to("cidalloc")), lines)
            survived.add(change)
            if status == "not checked":  # mutmut was given a pattern
                continue
            if change.is_words:
                counts["words"] += 1
                continue
            counts["explained" if change in known else "not explained"] += 1
            if change not in known:
                print(f"{name}: {status}\n{change}\n")
    gone = known.keys() - survived
    print(*(f"explained, but found:\n{change}\n" for change in sorted(gone)), sep="\n")
    print(dict(counts))
    sys.exit(bool(gone or counts["not explained"]))


if __name__ == "__main__":
    main()
