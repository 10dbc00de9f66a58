"""Draws the paper's pictures: maps, layer weights over training, losses, and the attention on key words per step.

Every function takes numbers and texts, writes one file, ``path`` (png, pdf or svg, by its suffix), and returns its
path; ``title`` stands above all panels. None needs a display, and a file is either complete or absent.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molsaki.extras import require
from molsaki.io import atomic_write

try:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError:
    require("plot")
    raise

Array = np.ndarray[Any, Any]

TEACHER, STUDENT, OTHER = "#1f5a99", "#d1672c", "#d9d9d9"
WIDE = 24  # with more words, maps are drawn one above the other instead of side by side
ANNOTATED = 200  # with more cells, a map's values are not written into it
STEP_CHARS, STEP_LINES, WORD_CHARS = 30, 2, 14  # longest step (per line) and word of a label
MOST_STEPS, MOST_WORDS = 60, 120  # with more, neighbours share a row or a column, so that a picture stays readable

CURVES = {  # the panels of a run's losses, and the logged names in each; those of evaluations (eval_*) are added
    "loss": ("loss",),
    "cross-entropy": ("loss_pre", "loss_exp"),
    "attention loss": ("loss_att", "loss_att_uniform"),
    "between tasks or logits": ("loss_mmi", "loss_logits"),
    "entropy of the layer weights": ("entropy_teacher", "entropy_student"),
}


def plot_map(
    maps: Mapping[str, Array], steps: Sequence[str], words: Sequence[str], path: str | Path, title: str = ""
) -> Path:
    """Stepwise maps of one text as heatmaps on one colour scale, such as the teacher's beside the student's (Eq. 6).

    Of more than `MOST_STEPS` steps or `MOST_WORDS` words, several neighbours share a row or column, and a cell shows
    the largest of their values.

    Args:
        maps: the name of each map and its ``(S, W)`` values.
        steps, words: the texts of the S steps and the W words; long ones are shortened.

    Raises:
        ValueError: there is no map, or one is not ``(S, W)``.
    """
    S, W = len(steps), len(words)
    values = _arrays(maps, S, W)
    rows, columns = _blocks(S, MOST_STEPS), _blocks(W, MOST_WORDS)
    merged = len(rows) < S or len(columns) < W
    if merged and S and W:
        at = [start for start, _ in rows], [start for start, _ in columns]
        values = {n: np.maximum.reduceat(np.maximum.reduceat(v, at[0]), at[1], axis=1) for n, v in values.items()}
        steps, words = _step_names(steps, rows), [_word_name(words[a:b]) for a, b in columns]
        S, W = len(rows), len(columns)
    top = max((v.max(initial=0.0) for v in values.values()), default=0.0) or 1.0
    stacked = W > WIDE
    width, height = 2.8 + (0.3 if stacked else 0.42) * max(W, 4), 1.1 + 0.46 * max(S, 2)
    panels = (len(values), 1) if stacked else (1, len(values))
    labels_once = 0 if stacked else 2.4 * (len(values) - 1)
    figure = Figure(figsize=(width * panels[1] - labels_once + 0.9, height * panels[0] + 0.3), layout="constrained")
    axes = figure.subplots(*panels, squeeze=False).ravel()
    colours = ScalarMappable(Normalize(0, top), "Blues")
    for i, (ax, (name, value)) in enumerate(zip(axes, values.items(), strict=True)):
        if value.size:
            ax.imshow(value, cmap=colours.cmap, norm=colours.norm, aspect="auto", interpolation="nearest")
        else:
            ax.text(0.5, 0.5, "no key words", transform=ax.transAxes, ha="center", va="center", color="grey")
        ax.set(xlim=(-0.5, max(W, 1) - 0.5), ylim=(max(S, 1) - 0.5, -0.5))
        ax.set_title(name, parse_math=False)
        _label_words(ax, words)
        _label_steps(ax, steps if stacked or i == 0 else None, S)
        _separate_cells(ax, S, W)
        if value.size <= ANNOTATED:
            _annotate(ax, value, top)
    of = f", the largest of {rows[0][1]} x {columns[0][1]}" if merged and S and W else ""
    figure.colorbar(colours, ax=list(axes), fraction=0.04, pad=0.02, label=f"attention{of}")
    return _save(figure, path, title)


def plot_attention_by_step(
    maps: Mapping[str, Array],
    tokens: Mapping[str, Sequence[int]],
    steps: Sequence[str],
    path: str | Path,
    title: str = "",
) -> Path:
    """The share of each step's attention on key words and on all other tokens.

    The attention weights of a query add up to one, so those of a step of n tokens add up to n; the sum of the step's
    row of the map is the part on key words. Of more than `MOST_STEPS` steps, several neighbours count as one.

    Args:
        maps: the name of each map and its ``(S, W)`` values.
        tokens: for each map, the number of tokens of each of the S steps (tokenizers may differ).
        steps: the texts of the S steps.

    Raises:
        ValueError: there is no map, one has not S rows, or ``tokens`` has not S numbers for each.
    """
    S = len(steps)
    values = _arrays(maps, S)
    if set(tokens) != set(values) or any(len(counts) != S for counts in tokens.values()):
        counts = {name: len(counts) for name, counts in tokens.items()}
        raise ValueError(f"tokens: expected {S} numbers for each of {list(values)}, got {counts}")
    rows = _blocks(S, MOST_STEPS)
    if len(rows) < S:
        starts = [start for start, _ in rows]
        values = {name: np.add.reduceat(value, starts) for name, value in values.items()}
        tokens = {name: [sum(counts[a:b]) for a, b in rows] for name, counts in tokens.items()}
        steps, S = _step_names(steps, rows), len(rows)
    figure = Figure(figsize=(3.0 + 2.8 * len(values), 1.6 + 0.46 * max(S, 2)), layout="constrained")
    axes = figure.subplots(1, len(values), squeeze=False).ravel()
    for i, (ax, (name, value)) in enumerate(zip(axes, values.items(), strict=True)):
        key = np.clip(value.sum(axis=1) / np.maximum(tokens[name], 1e-9), 0, 1) * 100
        ax.barh(range(S), key, color=TEACHER, label="key words", height=0.7)
        ax.barh(range(S), 100 - key, left=key, color=OTHER, label="other tokens", height=0.7)
        for s, share in enumerate(key):
            at, align, colour = (share - 1.5, "right", "white") if share > 85 else (share + 1.5, "left", "black")
            ax.text(at, s, f"{share:.0f}%", va="center", ha=align, color=colour, fontsize=8)
        ax.set(xlim=(0, 100), ylim=(S - 0.5, -0.5), xlabel="share of the step's attention (%)")
        ax.set_title(name, parse_math=False)
        _label_steps(ax, None if i else steps, S)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _save(figure, path, title)


def plot_layer_weights(records: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> Path:
    """The layer weights of both sides over training: ``p_t`` (Eq. 4) and ``p_s`` (Eq. 5).

    Above, a heatmap of layers over training steps; below, the first and the last weights against equal ones.

    Args:
        records: one mapping per logging step, ascending: ``step`` and, for each side (``teacher``, ``student``), a
            list of one weight per layer, as in ``layer_weights.jsonl``. A side may be missing from all records.

    Raises:
        ValueError: there are no records or no weights in them, or a side's lists differ in length.
    """
    sides = {side: [r[side] for r in records if side in r] for side in ("teacher", "student")}
    sides = {side: lists for side, lists in sides.items() if lists}
    if not sides:
        raise ValueError("records: expected at least one with layer weights, got none")
    if any(len(lists) != len(records) or len(set(map(len, lists))) > 1 for lists in sides.values()):
        raise ValueError("records: expected the same sides and numbers of layers in every one")
    steps = [r["step"] for r in records]
    figure = Figure(figsize=(0.6 + 5.2 * len(sides), 6.4), layout="constrained")
    axes = figure.subplots(2, len(sides), squeeze=False, height_ratios=[3, 2])
    for (over, below), (side, lists) in zip(axes.T, sides.items(), strict=True):
        colour = TEACHER if side == "teacher" else STUDENT
        weights = np.asarray(lists, dtype=float)  # (records, L)
        L = weights.shape[1]
        image = over.imshow(weights.T, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest", origin="lower")
        over.set(title=f"{side}: weight of each layer", xlabel="training step", ylabel="layer")
        shown = range(0, len(steps), -(-len(steps) // 10))
        over.set_xticks(shown, [f"{steps[i]:g}" for i in shown])
        over.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=over, fraction=0.05, pad=0.02)

        below.axhline(1 / L, color="grey", linewidth=1, linestyle="--", label="all equal")
        if len(steps) > 1:
            below.plot(weights[0], color=colour, alpha=0.4, marker="o", markersize=3, label=f"step {steps[0]:g}")
        below.plot(weights[-1], color=colour, marker="o", markersize=4, label=f"step {steps[-1]:g}")
        below.set(xlabel="layer", ylabel="weight", ylim=(0, max(1.15 * weights[[0, -1]].max(), 1.5 / L)))
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.spines[["top", "right"]].set_visible(False)
        below.legend(frameon=False, fontsize=8)
    return _save(figure, path, title)


def plot_losses(
    log_history: Sequence[Mapping[str, Any]], curves: Mapping[str, Sequence[str]], path: str | Path, title: str = ""
) -> Path:
    """Logged numbers over training, one panel per group.

    Args:
        log_history: as in ``trainer_state.json``: mappings with ``step`` and some of the names.
        curves: the title of each panel and the names in it; a name that was never logged is left out, and so is a
            panel without names.

    Raises:
        ValueError: none of the names was logged.
    """
    series = {
        name: [(r["step"], r[name]) for r in log_history if name in r] for names in curves.values() for name in names
    }
    logged = {panel: [name for name in names if series[name]] for panel, names in curves.items()}
    panels = {panel: names for panel, names in logged.items() if names}
    if not panels:
        raise ValueError(f"log_history: expected one of {list(series)} to be logged, got none")
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(0.4 + 4.0 * columns, 3.2 * lines + 0.2), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax, (panel, names) in zip(axes, panels.items(), strict=False):
        for name in names:
            x, y = np.asarray(series[name], dtype=float).T
            ax.plot(x, y, label=name, marker="o" if len(x) < 30 else None, markersize=3)
        ax.set_title(panel, parse_math=False)
        ax.set_xlabel("training step")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if len(names) > 1 or names != [panel]:
            ax.legend(frameon=False, fontsize=8)
    return _save(figure, path, title)


def plot_differences(
    differences: Mapping[str, Mapping[str, tuple[float, float, float]]], path: str | Path, title: str = ""
) -> Path:
    """Differences of accuracy with their intervals, one panel per test and one line per comparison.

    Args:
        differences: by test and comparison, ``(difference, low, high)`` in percentage points.
    """
    methods = list(dict.fromkeys(name for panel in differences.values() for name in panel))
    figure = Figure(figsize=(1.6 + 3.2 * len(differences), 1.2 + 0.28 * len(methods)), layout="constrained")
    axes = figure.subplots(1, len(differences), squeeze=False, sharey=True)[0]
    for ax, (test, panel) in zip(axes, differences.items(), strict=True):
        ax.axvline(0, color="black", linewidth=0.8)
        for name, (mean, low, high) in panel.items():
            colour = TEACHER if low <= 0 <= high else STUDENT
            ax.plot([low, high], [methods.index(name)] * 2, color=colour)
            ax.plot(mean, methods.index(name), "o", color=colour, markersize=5)
        ax.set_yticks(range(len(methods)), methods, parse_math=False)
        ax.set(ylim=(len(methods) - 0.5, -0.5))
        ax.set_xlabel("difference, points")
        ax.set_title(test, parse_math=False)
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return _save(figure, path, title)


def plot_accuracy(
    points: Mapping[str, Mapping[int, Sequence[float]]], baseline: str | None, path: str | Path, title: str = ""
) -> Path:
    """Accuracy along the way: each method's mean over seeds, and the range of its seeds as a band.

    Args:
        points: by method and training step, the accuracies of its seeds in per cent.
        baseline: the method that every panel shows, dashed; the others are divided among panels of five.
    """
    others = [name for name in points if name != baseline] or list(points)
    groups = [others[first : first + 5] for first in range(0, len(others), 5)]
    shown = [] if baseline is None or baseline not in points else [baseline]
    columns = min(len(groups), 3)
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(0.4 + 4.4 * columns, 3.4 * lines + 0.2), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for ax in axes[len(groups) :]:
        ax.remove()
    for ax, names in zip(axes, groups, strict=False):
        for name in dict.fromkeys(names + shown):
            values = points[name]
            mean, low, high = ([f(values[step]) for step in sorted(values)] for f in (np.mean, np.min, np.max))
            look = {"color": "black", "linestyle": "--"} if name == baseline else {"marker": "o", "markersize": 3}
            (drawn,) = ax.plot(sorted(values), mean, label=name, **look)
            ax.fill_between(sorted(values), low, high, color=drawn.get_color(), alpha=0.1, linewidth=0)
        ax.set(xlabel="training step", ylabel="accuracy, %")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    return _save(figure, path, title)


def shorten(text: str, width: int, lines: int = 1) -> str:
    """A text on at most ``lines`` lines of ``width`` characters, with an ellipsis where words are left out."""
    text = " ".join(text.split())
    return textwrap.fill(text, width, max_lines=lines, placeholder=" …", break_on_hyphens=False)


def _arrays(maps: Mapping[str, Array], S: int, W: int | None = None) -> dict[str, Array]:
    """The maps as float arrays, checked to be ``(S, W)``; W is that of the first map if it is not given."""
    values = {name: np.asarray(value, dtype=float) for name, value in maps.items()}
    if not values:
        raise ValueError("maps: expected at least one, got none")
    shape = (S, next(iter(values.values())).shape[-1] if W is None else W)
    for name, value in values.items():
        if value.shape != shape:
            raise ValueError(f"maps[{name!r}]: expected (steps, words) = {shape}, got {value.shape}")
    return values


def _blocks(count: int, most: int) -> list[tuple[int, int]]:
    """``range(count)`` in at most ``most`` ranges of one length, the last one perhaps shorter."""
    size = max(-(-count // most), 1)
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _step_names(steps: Sequence[str], blocks: Sequence[tuple[int, int]]) -> list[str]:
    return [steps[a] if b - a == 1 else f"{a + 1}–{b}: {steps[a]}" for a, b in blocks]


def _word_name(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{words[0]} … {words[-1]}"


def _label_words(ax: Axes, words: Sequence[str]) -> None:
    labels = [word if len(word) <= WORD_CHARS else word[: WORD_CHARS - 1] + "…" for word in words]
    slanted = max(map(len, labels), default=0) > (4 if len(words) <= WIDE else 2)
    rotation: dict[str, Any] = dict(rotation=60, ha="right", rotation_mode="anchor") if slanted else {}
    ax.set_xticks(range(len(words)), labels, fontsize=9, parse_math=False, **rotation)
    ax.tick_params(length=0)


def _label_steps(ax: Axes, steps: Sequence[str] | None, count: int) -> None:
    """Label each row of the map with its step; no labels if ``steps`` is None: the panel to the left has them."""
    labels = [""] * count if steps is None else [shorten(step, STEP_CHARS, STEP_LINES) for step in steps]
    ax.set_yticks(range(count), labels, fontsize=8, linespacing=1.1, parse_math=False)
    ax.tick_params(axis="y", length=0)


def _separate_cells(ax: Axes, S: int, W: int) -> None:
    ax.set_xticks(np.arange(1, W) - 0.5, minor=True)
    ax.set_yticks(np.arange(1, S) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_visible(False)


def _annotate(ax: Axes, value: Array, top: float) -> None:
    for (s, w), x in np.ndenumerate(value):
        if x >= 0.005 * top:  # the rest is white
            text = f"{x:.2f}" if top < 10 else f"{x:.0f}"
            colour = "white" if x > 0.6 * top else "black"
            ax.text(w, s, text.removeprefix("0") or "0", ha="center", va="center", fontsize=7, color=colour)


def _save(figure: Figure, path: str | Path, title: str) -> Path:
    path = Path(path)
    if title:
        figure.suptitle(title, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, binary=True) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png", dpi=150)
    return path
