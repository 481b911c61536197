"""Draws the study: time against size, both logarithmic, readable on light and on dark pages."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

mpl.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small files
        "svg.hashsalt": "cidalloc",
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **{
            f"{what}color": "#7d8590"
            for what in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.", "axes.title")
        },
    }
)

LOOKS = {
    "cidalloc 64": ("#d1242f", "-", 2.6),
    "cidalloc 8": ("#e16f24", "-", 1.6),
    "cidalloc 1": ("#bf8700", "-", 1.6),
    "cidalloc 64, shuffled": ("#d1242f", "--", 1.6),
    "cidalloc 64, out=": ("#d1242f", ":", 1.6),
    "floor": ("#7d8590", ":", 1.6),
    "np.arange": ("#7d8590", ":", 1.6),
    "NumPy stack + owner": ("#2da44e", "-", 1.6),
    "pyroaring": ("#1b9e9e", "-", 1.6),
    "list + set": ("#218bff", "-", 1.6),
    "deque + set": ("#218bff", "--", 1.6),
    "heapq + set": ("#8250df", "-", 1.6),
    "full Python": ("#bf3989", "-", 1.6),
    "bitarray": ("#1b9e9e", "--", 1.6),
}
"""Colour, dash and width of each contestant; mid-tones, for both kinds of page."""

PICTURES = {
    "churn": ("Scalar churn: release a random ID, acquire one", "live IDs", "ns per pair"),
    "bulk churn": (
        "Churn in arrays of 1000 random IDs",
        "live IDs",
        "ns per pair",
    ),
    "acquire": ("Acquire so many at once", "IDs per call", "ns per ID"),
    "release": ("Release so many at once", "IDs per call", "ns per ID"),
    "expire": ("Take back all that an owner holds", "IDs of the owner", "ns per ID"),
    "occupancy 1000000": ("Scalar churn in a pool of 1 M IDs", "per cent held", "ns per pair"),
}
"""Title and axes of each picture, by the beginning of its cases' names."""


def draw(results: dict[str, Any], folder: Path) -> None:
    """Draw all pictures for which there are results."""
    for name, (title, x_label, y_label) in PICTURES.items():
        lines = _lines(results, name)
        if not lines:
            continue
        canvas = Canvas(figsize=(7.2, 4.2), layout="constrained")
        axes = canvas.subplots()
        axes.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log")
        if not name.startswith("occupancy"):
            axes.set_xscale("log")
        axes.grid(True, color="#7d8590", alpha=0.25, linewidth=0.6)
        for contestant, points in lines.items():
            _line(axes, contestant, points)
        _names(axes, lines)
        path = folder / f"{name.split(' 1')[0].replace(' ', '-')}.svg"
        canvas.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        _slim(path)


Lines = dict[str, list[tuple[int, list[float]]]]


def _lines(results: dict[str, Any], name: str) -> Lines:
    lines: Lines = {}
    for case, found in results["cases"].items():
        match = re.fullmatch(rf"{name} (\d+)", case)
        if match:
            for contestant, values in found["contestants"].items():
                if contestant in LOOKS:
                    lines.setdefault(contestant, []).append((int(match[1]), values["ns"]))
    return {contestant: sorted(points) for contestant, points in lines.items()}


def _line(axes: Axes, contestant: str, points: list[tuple[int, list[float]]]) -> None:
    colour, dash, width = LOOKS[contestant]
    x = [size for size, _ in points]
    middle = [statistics.median(values) for _, values in points]
    axes.plot(x, middle, color=colour, linestyle=dash, linewidth=width, marker=".")
    low, high = ([edge(values) for _, values in points] for edge in (min, max))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _names(axes: Axes, lines: Lines) -> None:
    # At the right end of each line, moved apart where they would overlap.
    canvas = axes.figure
    canvas.draw_without_rendering()
    ends = []
    for contestant, points in lines.items():
        x, values = points[-1]
        y = axes.transData.transform((x, statistics.median(values)))[1] * 72 / canvas.dpi
        ends.append((y, contestant))
    last = max(x for points in lines.values() for x, _ in points)
    placed = float("-inf")
    bottom = axes.transData.transform((last, axes.get_ylim()[0]))[1] * 72 / canvas.dpi
    for y, contestant in sorted(ends):
        placed = max(y, placed + 12.5)
        axes.annotate(
            contestant,
            (1.0, 0.0),
            xycoords="axes fraction",
            xytext=(2, placed - bottom),
            textcoords="offset points",
            color=LOOKS[contestant][0],
            va="center",
        )


def _slim(path: Path) -> None:
    # Two decimals are enough, and no line ends in blanks.
    text = re.sub(r"(\d+\.\d\d)\d+", r"\1", path.read_text())
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")
