"""Draws the results of the benchmarks, readable on light and on dark pages."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

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
    "sortedcontainers + set": ("#8250df", "--", 1.6),
    "intbitset": ("#1b9e9e", ":", 1.6),
    "deque + set": ("#218bff", "--", 1.6),
    "heapq + set": ("#8250df", "-", 1.6),
    "full Python": ("#bf3989", "-", 1.6),
    "bitarray": ("#1b9e9e", "--", 1.6),
}
"""Colour, dash and width of each contestant; mid-tones, for both kinds of page."""

WORKERS = {1: ("#d1242f", "o"), 8: ("#8250df", "s"), 64: ("#218bff", "D")}
"""Colour and marker of each number of threads or tasks."""

KINDS = {
    "cidalloc": ("#d1242f", "o"),
    "takes IDs back, does less": ("#218bff", "s"),
    "only makes numbers, keeps none": ("#7d8590", "D"),
}
"""Colour and marker of each kind of peer."""

KEPT = {
    "living sequences": "#7d8590",
    "random IDs": "#d1242f",
    "cidalloc": "#218bff",
    "cidalloc with tidy": "#2da44e",
}
"""Colour of each line of the drill of END for dead clients."""

ZONES = ("#d1242f", "#218bff", "#2da44e")
"""Colours of the zones of a simulated fleet."""

FEW_TICKS = (0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30)
MANY_TICKS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.7, 2)
"""Where the axes of ratios have numbers: for a large range, and for a small one."""

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
    """Draw the study: time against size, both logarithmic, as far as there are results."""
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
        ends = {
            each: (statistics.median(points[-1][1]), LOOKS[each][0])
            for each, points in lines.items()
        }
        _names(axes, ends)
        _save(canvas, folder / f"{name.split(' 1')[0].replace(' ', '-')}.svg")


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


def _names(axes: Axes, ends: dict[str, tuple[float, str]]) -> None:
    # At the right end of each line, moved apart where they would overlap.
    canvas = axes.figure
    canvas.draw_without_rendering()

    def points(value: float) -> float:
        return float(axes.transData.transform((1.0, value))[1]) * 72 / canvas.dpi

    placed, bottom = float("-inf"), points(axes.get_ylim()[0])
    for name, (value, colour) in sorted(ends.items(), key=lambda each: each[1][0]):
        placed = max(points(value), placed + 12.5)
        axes.annotate(
            name,
            (1.0, 0.0),
            xycoords="axes fraction",
            xytext=(2, placed - bottom),
            textcoords="offset points",
            color=colour,
            va="center",
        )


def draw_peers(found: dict[str, tuple[str, Any, Any]], path: Path) -> None:
    """Draw the time and the memory of the allocator and its peers, with their spread.

    Args:
        found: the kind of each, and a `report.Figure` of its time and of its memory, or None.
        path: the picture.
    """
    if not found:
        return
    kinds = list(KINDS)
    order = sorted(found, key=lambda name: (kinds.index(found[name][0]), found[name][1].middle))
    canvas = Canvas(figsize=(8.6, 1.6 + 0.3 * len(order)), layout="constrained")
    panels = canvas.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    titles = ("time, divided by cidalloc's", "bytes per held ID, in long use")
    for at, (axes, title) in enumerate(zip(panels, titles, strict=True), 1):
        for place, name in enumerate(order):
            colour, marker = KINDS[found[name][0]]
            each = found[name][at]
            if each is not None:
                axes.hlines(place, each.low, each.high, color=colour, alpha=0.35, linewidth=4)
                axes.plot(each.middle, place, marker, color=colour, markersize=6)
                axes.annotate(
                    f"{each.middle:.2g}" if each.middle < 10 else f"{each.middle:.0f}",
                    (each.high, place),
                    xytext=(6, 0),
                    textcoords="offset points",
                    color=colour,
                    fontsize=9,
                    va="center",
                )
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.set_title(title, fontsize=11)
        axes.grid(True, axis="x", color="#7d8590", alpha=0.25, linewidth=0.6)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    panels[0].axvline(1.0, color="#7d8590", linewidth=1.2)
    panels[0].set_yticks(range(len(order)), order)
    panels[0].set_ylim(len(order) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=kind)
        for kind, (colour, marker) in KINDS.items()
    ]
    canvas.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    canvas.suptitle("An ID acquired and released, or a number made: left is better", fontsize=12)
    _save(canvas, path)


def draw_ratios(
    found: dict[str, dict[str, dict[int, Any]]], goals: dict[str, float], path: Path
) -> None:
    """Draw ratios to plain tritonclient, with their spread.

    Args:
        found: a `report.Figure` for each case, each kind and each number of workers.
        goals: the limit of each kind.
        path: the picture.
    """
    canvas = Canvas(figsize=(8.6, 1.4 + 0.42 * len(found)), layout="constrained")
    panels = canvas.subplots(1, len(goals), sharex=True, sharey=True)
    for axes, (kind, goal) in zip(panels, goals.items(), strict=True):
        axes.axvspan(0.01, goal, color="#2da44e", alpha=0.12, linewidth=0)
        axes.axvline(1.0, color="#7d8590", linewidth=1.2)
        axes.axvline(goal, color="#2da44e", linewidth=1.2, linestyle="--")
        for step, (workers, (colour, marker)) in enumerate(WORKERS.items()):
            figures = [by[kind][workers] for by in found.values()]
            y = [place + 0.24 * (step - 1) for place in range(len(figures))]
            low, high = [each.low for each in figures], [each.high for each in figures]
            axes.hlines(y, low, high, color=colour, alpha=0.35, linewidth=4)
            axes.plot([each.middle for each in figures], y, marker, color=colour, markersize=6)
        axes.set_title(f"{'CPU time' if kind == 'cpu' else kind} (goal ≤ {goal:.2f})", fontsize=11)
        axes.set_xscale("log")
        axes.grid(True, axis="x", color="#7d8590", alpha=0.25, linewidth=0.6)
    figures = [each for by in found.values() for kind in goals for each in by[kind].values()]
    least, most = (
        min(each.low for each in figures) * 0.95,
        max(each.high for each in figures) * 1.05,
    )
    ticks = [tick for tick in (FEW_TICKS if most > 2 else MANY_TICKS) if least <= tick <= most]
    panels[0].set_xlim(least, most)
    panels[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].set_xticks([], minor=True)
    panels[0].set_yticks(range(len(found)), list(found))
    panels[0].set_ylim(len(found) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=f"{workers} at once")
        for workers, (colour, marker) in WORKERS.items()
    ]
    canvas.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    canvas.suptitle("This client divided by plain tritonclient: left is better", fontsize=12)
    _save(canvas, path)


def draw_kept(results: dict[str, Any], path: Path) -> None:
    """Draw the drill of END for dead clients: of how many sequences models keep state."""
    times, *counts = zip(*results["samples"], strict=True)
    minutes = [each / 60 for each in times]
    canvas = Canvas(figsize=(8.6, 4.2), layout="constrained")
    axes = canvas.subplots()
    axes.set(
        title="Sequences of which the model keeps state, while clients are killed", xlabel="minutes"
    )
    axes.grid(True, color="#7d8590", alpha=0.25, linewidth=0.6)
    ends = {}
    for (name, colour), values in zip(KEPT.items(), counts, strict=True):
        axes.plot(minutes, values, color=colour, linewidth=2)
        ends[f"{name}: {values[-1]}"] = values[-1], colour
    axes.fill_between(minutes, counts[0], color=KEPT["living sequences"], alpha=0.3, linewidth=0)
    last = results["last_death"] / 60
    axes.axvline(last, color="#7d8590", linewidth=1.2, linestyle="--")
    axes.annotate(
        "the last death",
        (last, 0.3),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
    )
    axes.set_xlim(0, minutes[-1])
    axes.set_ylim(0)
    _names(axes, ends)
    _save(canvas, path)


def draw_zones(run: dict[str, Any], path: Path) -> None:
    """Draw a simulated fleet: sequences on a server of each zone, and requests to managers."""
    canvas = Canvas(figsize=(8.6, 5.4), layout="constrained")
    upper, lower = canvas.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    samples = run["samples"]
    times = [each["at"] for each in samples]
    low, high = ([each[edge] for each in samples] for edge in ("low", "high"))
    band = {"color": "#7d8590", "alpha": 0.2, "linewidth": 0}
    upper.fill_between(times, low, high, label="98 of 100 servers", **band)
    for zone, colour in enumerate(ZONES):
        loads = [each["zones"][zone] for each in samples]
        upper.plot(times, loads, color=colour, linewidth=2, label=f"zone {zone + 1}")
    upper.set(title=f"Sequences on a server: {run['servers']} servers, {run['clients']:,} clients")
    upper.legend(loc="upper left", frameon=False, ncols=4)
    for name, colour in (("most", "#8250df"), ("requests", "#218bff"), ("renewals", "#2da44e")):
        lower.plot(times, [each[name] for each in samples], color=colour, linewidth=1.6)
    lower.legend(
        ["all requests, the busiest server", "all requests, mean", "heartbeats, mean"],
        loc="upper right",
        frameon=False,
    )
    lower.set(title="Requests to a manager each second", xlabel="seconds")
    for name, began in run["began"].items():
        for axes in (upper, lower):
            axes.axvline(began, color="#7d8590", linewidth=0.8, linestyle="--")
        upper.annotate(
            name,
            (began, 0.0),
            xycoords=upper.get_xaxis_transform(),
            xytext=(3, 4),
            textcoords="offset points",
            fontsize=9,
        )
    for axes in (upper, lower):
        axes.grid(True, color="#7d8590", alpha=0.25, linewidth=0.6)
        axes.set_xlim(0, times[-1])
        axes.set_ylim(0)
    upper.set_ylim(0, 1.15 * max(high))
    _save(canvas, path)


def _save(canvas: Canvas, path: Path) -> None:
    canvas.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    # Two decimals are enough, and no line ends in blanks.
    text = re.sub(r"(\d+\.\d\d)\d+", r"\1", path.read_text())
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")
