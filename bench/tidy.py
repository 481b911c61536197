"""Draws the drill of END for dead clients in docs/operations.md, from the results of its test.

Run it alone to draw anew: python bench/tidy.py
"""

from __future__ import annotations

import json

from pictures import draw_kept
from report import ROOT, Results, refresh

DOCS = ROOT / "docs"


def words(results: Results) -> str:
    """Say what was measured."""
    left, minutes = results["left"], results["last_death"] / 60
    return (
        f"{results['date']}, `make drill-tidy`: {results['processes']} processes with"
        f" {results['sequences']} sequences at a time in each of the three ways. For {minutes:.0f}"
        f" minutes, one of them is killed and replaced every {results['every_s']} s:"
        f" {results['deaths']} deaths. When all living sequences had ended, the model kept"
        f" state of {left['random']} dead ones with random IDs, of {left['managed']} with managed"
        f" IDs, and of {left['tidied']} with `tidy`. The last death was tidied after"
        f" {results['back'] - results['last_death']:.0f} s. All {results['answers']:,} answers to"
        " living sequences were right."
    )


if __name__ == "__main__":
    found = json.loads((DOCS / "tidied.json").read_text())
    draw_kept(found, DOCS / "tidied.svg")
    refresh(DOCS / "operations.md", {"tidy": words(found)})
