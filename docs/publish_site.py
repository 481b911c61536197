"""Put the site of this version beside those of others, so that readers can switch between them.

`python docs/publish_site.py FOLDER` copies build/site to FOLDER/<version> and FOLDER/latest, and
lists the version in FOLDER/versions.json, in mike's form, which the theme reads.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TO_LATEST = '<!doctype html><meta http-equiv="refresh" content="0; url=latest/">\n'


def publish(site: Path, folder: Path, version: str) -> None:
    """Add a site, or replace that of the same version; the highest version is the latest."""
    listing = folder / "versions.json"
    listed = json.loads(listing.read_text()) if listing.exists() else []
    versions = {*(each["version"] for each in listed), version}
    newest_first = sorted(versions, key=lambda each: [*map(int, each.split("."))], reverse=True)
    for name in [version, "latest"] if version == newest_first[0] else [version]:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(site, folder / name)
    entries = [
        {"version": each, "title": each, "aliases": ["latest"] if each == newest_first[0] else []}
        for each in newest_first
    ]
    listing.write_text(json.dumps(entries, indent=1) + "\n")
    (folder / "index.html").write_text(TO_LATEST)
    (folder / ".nojekyll").touch()  # so that GitHub Pages serves all files as they are


if __name__ == "__main__":
    (this,) = re.findall('^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    publish(ROOT / "build" / "site", Path(sys.argv[1]), this)
