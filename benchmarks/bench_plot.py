"""Draws one run of ``python -m benchmarks``: time over plain attention and peak memory of every contender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from .plots import by, colours_of, conditions, finish
from .plots import draw as draw_steps

PASSES = {"forward+backward": ("o", "full"), "forward": ("o", "none")}  # marker and its filling
PNG_DPI = 150


def draw(records: Sequence[dict], path: Path) -> list[Path]:
    """Draw the records of one run beside ``path`` as PNG and SVG; return the files."""
    records = list(records)
    if "quantity" in records[0]:
        return [f for suffix in ("png", "svg") for f in draw_steps(records, path.parent, path.stem, suffix)]
    figure = layer_figure(records)
    files = [path.with_suffix(f".{suffix}") for suffix in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=PNG_DPI)
    return files


def layer_figure(records: list[dict]) -> Figure:
    """Return a figure with a line of panels per shape: time and peak memory, one line of dots per contender."""
    shapes = by(records, "shape", "steps")
    colours = colours_of(records)
    most = max(len({r["contender"] for r in group}) for _, group in shapes)
    height = 1.1 + len(shapes) * (0.9 + 0.3 * most)
    figure = Figure(figsize=(11, height), layout="constrained")
    axes = figure.subplots(len(shapes), 2, squeeze=False)
    for (time, memory), (_, group) in zip(axes, shapes, strict=True):
        r = group[0]
        title = "{batch} x {tokens:,} tokens, {q_heads}/{kv_heads} heads of {head_dim}, {dtype}".format(**r)
        names = list(dict.fromkeys(r["contender"] for r in group))
        has_plain = any(r["over_plain"] for r in group)
        _dots(time, group, names, colours, "over_plain" if has_plain else "median_ms")
        if has_plain:
            time.axvline(1, color="black", linewidth=0.8)
        finish(time, title, "")
        time.set_xlabel("time, multiples of the fastest plain attention" if has_plain else "time, ms")
        _dots(memory, group, names, colours, "peak_mib")
        finish(memory, "peak memory beyond the inputs", "")
        memory.set_xlabel("MiB")
        memory.set_yticklabels([])
    handles = [
        Line2D([], [], color="#555555", linestyle="none", marker=marker, fillstyle=fill, label=name.replace("+", " + "))
        for name, (marker, fill) in PASSES.items()
        if any(r["pass"] == name for r in records)
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    figure.suptitle("Attention with its map against plain and eager attention", fontsize=12, x=0.01, ha="left")
    figure.supxlabel(conditions(records), fontsize=7, color="#555555")
    return figure


def _dots(ax: Axes, group: list[dict], names: list[str], colours: dict[str, str], key: str) -> None:
    """Draw one quantity: a dot per contender and pass, a bar between the quartiles, the number beside it."""
    lines = len(names)
    found = []
    for r in group:
        if r.get(key) is None:
            continue
        value, y = r[key], lines - 1 - names.index(r["contender"])
        y += 0.2 if r["pass"] == "forward+backward" else -0.2
        marker, fill = PASSES[r["pass"]]
        colour = colours[r["contender"]]
        low, high = r.get(f"{key}_q1"), r.get(f"{key}_q3")
        if low is not None and high is not None:
            ax.plot([low, high], [y, y], color=colour, linewidth=1.5, alpha=0.6)
        shown = max(value, 0.05) if key == "peak_mib" else value  # the axis is logarithmic
        ax.plot([shown], [y], marker=marker, fillstyle=fill, color=colour, markersize=5)
        text = f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if key == "peak_mib" else f"{value:.2f}"
        place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(text, (max(shown, high or shown), y), fontsize=7, color="#333333", **place)
        found.append(shown)
    ax.set_yticks(range(lines), reversed(names), fontsize=8)
    ax.set_ylim(-0.6, lines - 0.4)
    if not found:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color="#777777")
        ax.set_xticks([])
        return
    ax.set_xscale("log")
    ax.set_xlim(min(found) / 1.5, max(found) * 2.5)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(found) < 100 * min(found) else (1,)))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")
    ax.minorticks_off()
