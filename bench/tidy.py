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
    left, last = results["left"], results["last_death"]
    ttl, grace, cooldown = results["times_s"]
    return (
        f"{results['date']}, `make drill-tidy`: {results['processes']} processes with"
        f" {results['sequences']} sequences at a time in each of the three ways; two of them have"
        f" `tidy`. For {last / 60:.0f} minutes, one process is killed and replaced every"
        f" {results['every_s']} s: {results['deaths']} deaths. ttl is {ttl:.0f} s, grace"
        f" {grace:.0f} s, and the cooldown {cooldown:.0f} s. With `tidy`, nothing of the dead is"
        f" left {results['back'] - last:.0f} s after the last death, in which a process with"
        f" `tidy` died. When all living sequences have ended, the model keeps state of"
        f" {left['random']} dead ones with random IDs, of {left['managed']} with managed IDs, and"
        f" of {left['tidied']} with `tidy`. All {results['answers']:,} answers to living"
        " sequences were right."
    )


if __name__ == "__main__":
    found = json.loads((DOCS / "tidied.json").read_text())
    draw_kept(found, DOCS / "tidied.svg")
    refresh(DOCS / "operations.md", {"tidy": words(found)})
