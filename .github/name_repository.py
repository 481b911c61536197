"""Let the pages of a release tell how to install it from PyPI, and where its repository is.

A release runs `python .github/name_repository.py OWNER/NAME TAG` before it builds. So nothing else
has to know that address, and a fork need not change a file. pyproject.toml gets it, and the
README's relative links become links to the files of the tag.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TARGET = re.compile(r"(?<=\]\()[^)\s:#][^)\s:]*(?=\))")


def linked(text: str, repository: str, tag: str) -> str:
    """Return a page of the top folder whose links work outside the repository."""

    def absolute(match: re.Match[str]) -> str:
        target = match[0]
        if target.startswith("../../"):  # a page of the repository that is no file
            return f"https://github.com/{repository}/{target[6:]}"
        if target.endswith(".svg"):
            return f"https://raw.githubusercontent.com/{repository}/{tag}/{target}"
        return f"https://github.com/{repository}/blob/{tag}/{target}"

    return TARGET.sub(absolute, text)


def installed(text: str) -> str:
    """Return a page that installs the package from PyPI, and not from a clone."""
    text = text.replace("In a clone of this repository:\n\n", "")
    return text.replace("pip install '.[", "pip install 'cidalloc[")


def main(folder: Path, repository: str, tag: str) -> None:
    """Change the files."""
    readme, project = folder / "README.md", folder / "pyproject.toml"
    for path in (folder / "docs").glob("*.md"):
        path.write_text(installed(path.read_text()))
    readme.write_text(linked(installed(readme.read_text()), repository, tag))
    page = f"https://github.com/{repository}"
    owner, name = repository.split("/")
    urls = {
        "Documentation": f"https://{owner.lower()}.github.io/{name}/",
        "Source": page,
        "Changelog": f"{page}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{page}/issues",
    }
    table = "\n".join(["[project.urls]", *(f'{key} = "{url}"' for key, url in urls.items())])
    text = project.read_text().replace("[project.scripts]", f"{table}\n\n[project.scripts]", 1)
    project.write_text(text)


if __name__ == "__main__":
    main(Path(), *sys.argv[1:])
