"""Build the site of mkdocs.yml from docs/ and the changelog: `make docs`.

The pages link to files of this repository that are no pages, such as examples. Each of them becomes
a page with its text, since the site has to work without the repository.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = ROOT / "build" / "pages"
SITE = ROOT / "build" / "site"
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
LANGUAGES = {".cc": "cpp", ".conf": "nginx", ".mjs": "js", ".py": "python", ".yaml": "yaml"}


def place(path: Path) -> Path:
    """Return the file of the site, below build/pages, that shows a file of this repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS)
    within = path.relative_to(ROOT)
    if path.suffix == ".md":
        return Path(str(within).lower())
    return Path("files", within, "index.md") if path.is_dir() else Path("files", f"{within}.md")


def relinked(text: str, source: Path, found: set[Path]) -> str:
    """Return a page whose links lead to the site's files, and add these files to ``found``."""
    here = place(source).parent

    def relink(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(source.parent / match[2]))
        if not path.exists():
            return match[0]  # see broken()
        found.add(path)
        return f"{match[1]}{os.path.relpath(place(path), here)}{match[3] or ''}"

    return LINK.sub(relink, text)


def shown(path: Path, found: set[Path]) -> str:
    """Return the page of a file or folder that is no page of its own."""
    name = path.relative_to(ROOT)
    if path.is_file():
        fence, language = "`" * 4, LANGUAGES.get(path.suffix, "text")
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            text = f"{path.stat().st_size} bytes\n"
        return f"# {name}\n\n{fence}{language}\n{text}{fence}\n"
    listed = subprocess.run(
        ["git", "ls-files", "."],  # noqa: S607
        cwd=path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    rows = [f"- [{each}]({each})" for each in listed if (path / each).stat().st_size]
    return relinked("\n".join([f"# {name}", "", *rows, ""]), path / "index", found)


def collect() -> None:
    """Fill build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    done: set[Path] = set()
    found = {ROOT / "CHANGELOG.md", DOCS / "site.css", *DOCS.rglob("*.md")}
    while new := found - done:
        for path in sorted(new):
            target = PAGES / place(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".md":
                target.write_text(relinked(path.read_text(), path, found))
            elif path.is_relative_to(DOCS):
                shutil.copy(path, target)
            else:
                target.write_text(shown(path, found))
        done |= new


def omitted() -> list[str]:
    """Return the pages that the navigation lacks."""
    config = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r"- (?:\w+: )?(\S+\.md)$", config, re.MULTILINE)
    there = [str(place(each)) for each in (*DOCS.glob("*.md"), *DOCS.glob("api/*.md"))]
    return [f"mkdocs.yml lacks {each}" for each in sorted({*there} - {*named})]


def build() -> bool:
    """Build the site and return whether there was no warning, also about a docstring."""
    # Within build, since Zensical empties the folder .cache beside its configuration.
    config = (ROOT / "mkdocs.yml").read_text()
    for path, there in {"build/": "", "docs/constructor.py": str(DOCS / "constructor.py")}.items():
        config = config.replace(path, there)
    (ROOT / "build" / "mkdocs.yml").write_text(config)
    command = [Path(sys.executable).parent / "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(  # noqa: S603
        command, cwd=ROOT / "build", stderr=subprocess.PIPE, text=True
    )
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode == 0 and "griffe:" not in done.stderr


class Page(HTMLParser):
    """The anchors of a page of the site, and what it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember an anchor or a target."""
        for name, value in attrs:
            if value and name == "id":
                self.anchors.add(value)
            elif value and name in ("href", "src"):
                self.targets.add(value)


def broken() -> list[str]:
    """Return each link and picture of the site that leads nowhere in it.

    The build checks the links between pages in their Markdown only.
    """
    pages = {path: Page(path) for path in sorted(SITE.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for target in sorted(page.targets):
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            start = SITE if url.path.startswith("/") else path.parent
            to = Path(os.path.normpath(start / unquote(url.path).lstrip("/"))) if url.path else path
            to = to / "index.html" if to.is_dir() else to
            anchor = unquote(url.fragment)
            if not to.exists() or (anchor and to in pages and anchor not in pages[to].anchors):
                found.append(f"{path.relative_to(SITE)} links to {target}")
    return found


if __name__ == "__main__":
    collect()
    sound = build()
    for fault in (faults := omitted() + broken()):
        print(f"error: {fault}", file=sys.stderr)
    sys.exit(bool(faults) or not sound)
