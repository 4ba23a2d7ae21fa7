"""The benchmarks' pictures. Numbers come in, SVG files go out; knows nothing about what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

Line = tuple[Sequence[float], Sequence[float]]


def lines(
    file: Path, title: str, x: str, y: str, data: Mapping[str, Line], log_y: bool = False, log_x: bool = True
) -> None:
    """One line for each name, over an x axis whose ticks are the measured values."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y, xscale="log" if log_x else "linear")
    for name, (xs, ys) in data.items():
        axes.plot(xs, ys, marker="o", label=name)
    ticks = sorted({value for xs, _ in data.values() for value in xs})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.2 * max(value for _, ys in data.values() for value in ys))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, file)


def curves(
    file: Path, title: str, x: str, y: str, data: Mapping[str, Line], notes: Mapping[str, Sequence[str]]
) -> None:
    """One line for each name through its points, in their order, over a logarithmic x axis; a note at each point."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y, xscale="log")
    for name, (xs, ys) in data.items():
        axes.plot(xs, ys, marker="o", label=name)
        for at, note in zip(zip(xs, ys), notes[name]):
            axes.annotate(note, at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_ylim(0, 1.2 * max(value for _, ys in data.values() for value in ys))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, file)


def bars(
    file: Path, title: str, x: str, data: Mapping[str, float], notes: Mapping[str, str], log: bool = False
) -> None:
    """One bar for each name with its note behind it."""
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(data)), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x)
    drawn = axes.barh(list(data), list(data.values()))
    axes.bar_label(drawn, [notes[name] for name in data], padding=4)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(min(data.values()) / 3, max(data.values()) * 30)
    else:
        axes.set_xlim(0, max(data.values()) * 1.6)
    axes.invert_yaxis()
    _save(figure, file)


def panels(file: Path, x: str, data: Mapping[str, Mapping[str, float]]) -> None:
    """Bars in a panel for each title, one above the other, over one x axis; the first bar of each stands out."""
    figure = Figure(figsize=(7, 0.9 * len(data) + 0.36 * sum(map(len, data.values()))), layout="constrained")
    heights = [len(bars) + 1 for bars in data.values()]
    rows = figure.subplots(len(data), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (title, bars) in zip(rows, data.items()):
        colors = ["tab:blue", *["lightgray"] * (len(bars) - 1)]
        drawn = axes.barh(list(bars), list(bars.values()), color=colors)
        axes.bar_label(drawn, [f"{value:,.0f}" for value in bars.values()], padding=4)
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis()
    rows[-1].set_xlabel(x)
    rows[-1].set_xlim(0, 1.15 * max(value for bars in data.values() for value in bars.values()))
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    """The same figures give the same file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "bdh-batch"}):
        figure.savefig(file, metadata={"Date": None})
