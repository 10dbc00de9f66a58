"""Draws the results of a study: differences with their intervals, and accuracy over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from molsaki.plotting import style
from molsaki.plotting.labels import clean, shorten, width_of
from molsaki.plotting.style import STUDENT, TEACHER, legend, line, styled

# isort: split
# After style, which names the extra to install where matplotlib is missing.
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

DIFFERENCE_CHARS = 44  # of the name of a comparison


@styled
def plot_differences(
    differences: Mapping[str, Mapping[str, tuple[float, float, float]]],
    path: str | Path,
    title: str = "",
    *,
    formats: Sequence[str] = (),
) -> Path:
    """Differences of accuracy with their intervals, one panel per test and one line per comparison.

    Args:
        differences: by test and comparison, ``(difference, low, high)`` in percentage points.
    """
    methods = list(dict.fromkeys(name for panel in differences.values() for name in panel))
    columns = min(len(differences), 3)
    lines = -(-len(differences) // columns)
    labels = 0.07 * max((min(width_of(name), DIFFERENCE_CHARS) for name in methods), default=0)
    size = (0.4 + labels + 2.5 * columns, (1.0 + 0.26 * len(methods)) * lines + 0.6)
    figure = Figure(figsize=(max(size[0], 5.5), size[1]), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True, sharex=True).ravel()
    for ax in axes[len(differences) :]:
        ax.remove()
    described = []
    for ax, (test, panel) in zip(axes, differences.items(), strict=False):
        ax.axvline(0, color="black", linewidth=0.8)
        for name, (mean, low, high) in panel.items():
            contains = low <= 0 <= high
            colour, face = (TEACHER, "white") if contains else (STUDENT, STUDENT)
            ax.plot([low, high], [methods.index(name)] * 2, color=colour, linewidth=1 if contains else 2)
            ax.plot(mean, methods.index(name), "o", color=colour, markerfacecolor=face, markersize=5)
            described.append(f"{test}, {name}: {mean:+.2f} ({low:+.2f} to {high:+.2f})")
        ax.set_yticks(range(len(methods)), [shorten(name, DIFFERENCE_CHARS) for name in methods])
        ax.set(ylim=(len(methods) - 0.5, -0.5))
        ax.set_xlabel("difference, percentage points")
        ax.set_title(clean(test))
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=TEACHER, marker="o", markerfacecolor="white", linewidth=1, label="interval contains 0"),
        Line2D([], [], color=STUDENT, marker="o", linewidth=2, label="interval excludes 0"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return style.save(figure, path, title, "Differences with intervals. " + "; ".join(described), formats)


@styled
def plot_accuracy(
    points: Mapping[str, Mapping[int, Sequence[float]]],
    baseline: str | None,
    path: str | Path,
    title: str = "",
    *,
    formats: Sequence[str] = (),
) -> Path:
    """Accuracy during training: each method's mean over seeds, and the range of its seeds as a band.

    Args:
        points: by method and training step, the accuracies of its seeds in per cent.
        baseline: the method that every panel shows, dashed; the others are divided among panels of five.
    """
    others = [name for name in points if name != baseline] or list(points)
    groups = [others[first : first + 5] for first in range(0, len(others), 5)]
    shown = [] if baseline is None or baseline not in points else [baseline]
    columns = min(len(groups), 3)
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(0.6 + (3.2 if columns > 1 else 5.0) * columns, 4.3 * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for ax in axes[len(groups) :]:
        ax.remove()
    described = []
    for ax, names in zip(axes, groups, strict=False):
        for i, name in enumerate(dict.fromkeys(names + shown)):
            values = points[name]
            mean, low, high = ([f(values[step]) for step in sorted(values)] for f in (np.mean, np.min, np.max))
            if name == baseline:
                (drawn,) = ax.plot(sorted(values), mean, label=clean(name), color="black", linewidth=2, linestyle="--")
            else:
                drawn = line(ax, sorted(values), mean, i, clean(name))
                described.append(f"{name}: {mean[-1]:.1f} % at step {max(values)}")
            ax.fill_between(sorted(values), low, high, color=drawn.get_color(), alpha=0.1, linewidth=0)
        ax.set(xlabel="training step", ylabel="accuracy, %")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        legend(ax)
    text = "Accuracy over training, mean over seeds; bands are the range of the seeds. " + "; ".join(described)
    return style.save(figure, path, title, text, formats)
