"""Draws the pictures: maps, the attention on key words per step, layer weights and losses of a run, results of a study.

Every function takes numbers and texts, writes ``path`` (png, svg or pdf, by its suffix), and returns it. ``formats``
names further suffixes to write the same picture with, and ``title`` stands above all panels. None needs a display, a
file is either complete or absent, and the same input gives the same bytes (with the same version of matplotlib). The
text of an SVG file stays text; PNG and SVG files carry a title and a description for those who cannot see them.
"""

from __future__ import annotations

import functools
import io
import math
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast
from xml.sax.saxutils import escape

import numpy as np
import regex

from molsaki.extras import require
from molsaki.io import atomic_write

try:
    import matplotlib
    import matplotlib.style
    from matplotlib import font_manager
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap, Normalize, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import ScaledTranslation
except ImportError:
    require("plot")
    raise

Array = np.ndarray[Any, Any]
P = ParamSpec("P")
R = TypeVar("R")

TEACHER, STUDENT, OTHER = "#1f5a99", "#d1672c", "#d9d9d9"
# Lines differ in hue and in lightness, so that they can be told apart with every kind of colour blindness and in grey;
# each also has a dash pattern and a marker of its own. tests/distill/test_plots.py measures the distances.
COLOURS = (TEACHER, STUDENT, "#2a0a12", "#1fa592", "#8f55ea", "#7d1a08")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
MARKERS = ("o", "s", "^", "D", "v", "P")
MISSING = "#c4c4c4"  # a cell that is not a number

DPI = 150
PAGE = 10.0  # inches: of more, panels stand one above the other, so that letters stay readable at a page's width
DIFFERENCE_CHARS = 44  # of the name of a comparison
STEP_CHARS, STEP_LINES, WORD_CHARS = 30, 2, 14  # longest step (per line) and word of a label
LABELLED_STEPS, LABELLED_WORDS = 40, 40  # with more, a map is an overview of all cells and a cut-out with all labels
TOP_STEPS, TOP_WORDS = 16, 24  # rows and columns of the cut-out
DRAWN_STEPS, DRAWN_WORDS = 400, 1000  # with more, neighbours share a row or a column of the overview
ANNOTATED = 200  # with more cells, a map's values are not written into it

CURVES = {  # the panels of a run's losses, and the logged names in each; those of evaluations (eval_*) are added
    "loss": ("loss",),
    "cross-entropy": ("loss_pre", "loss_exp"),
    "attention loss": ("loss_att", "loss_att_uniform"),
    "overlap of both maps": ("map_overlap",),
    "between tasks or logits": ("loss_mmi", "loss_logits"),
    "entropy of the layer weights": ("entropy_teacher", "entropy_student"),
}
UNITS = {  # the vertical axis of these panels
    "loss": "weighted sum of the losses",
    "cross-entropy": "nats per token",
    "attention loss": "divergence, nats",
    "overlap of both maps": "share, 0 to 1",
    "between tasks or logits": "nats",
    "entropy of the layer weights": "nats",
}
MEANINGS = {  # of logged names
    "loss": "all",
    "loss_pre": "answer",
    "loss_exp": "rationale",
    "loss_att": "learnt layer weights",
    "loss_att_uniform": "equal layer weights",
    "loss_mmi": "between the tasks",
    "loss_logits": "to the teacher's logits",
    "entropy_teacher": "teacher",
    "entropy_student": "student",
    "map_overlap": "learnt layer weights",
}


def _styled(function: Callable[P, R]) -> Callable[P, R]:
    """Draw with matplotlib's defaults and ours, whatever the user's settings are, and fonts for all texts given."""

    @functools.wraps(function)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        ours: dict[str, Any] = {
            "font.family": ["sans-serif"],
            "font.sans-serif": _fonts(frozenset("".join(_texts([args, kwargs])))),
            "font.size": 9,
            "axes.titlesize": 10.5,
            "figure.titlesize": 11.5,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "legend.fontsize": 8.5,
            "legend.frameon": False,
            "text.parse_math": False,  # a text with dollars is not mathematics
            "svg.fonttype": "none",
            "svg.hashsalt": "molsaki",
        }
        with matplotlib.style.context([ours], after_reset=True):
            return function(*args, **kwargs)

    return styled


@_styled
def plot_map(
    maps: Mapping[str, Array],
    steps: Sequence[str],
    words: Sequence[str],
    path: str | Path,
    title: str = "",
    *,
    rows: str = "reasoning step (sentence)",
    columns: str = "key word",
    unit: str = "attention, summed over the tokens of the sentence and of the key word",
    formats: Sequence[str] = (),
) -> Path:
    """Stepwise maps of one text as heatmaps on one colour scale, such as the teacher's beside the student's (Eq. 6).

    Up to `LABELLED_STEPS` steps and `LABELLED_WORDS` words, every row and column has its text. Of a larger map there is
    an overview of all cells, and below it, with texts, the `TOP_STEPS` rows and `TOP_WORDS` columns with the largest
    sums over all maps. Of more than `DRAWN_STEPS` steps or `DRAWN_WORDS` words, several neighbours share a row or
    column of the overview, and its cell shows the largest of their values. Cells that are not a finite number are grey
    and hatched.

    Args:
        maps: the name of each map and its ``(S, W)`` values.
        steps, words: the texts of the S steps and the W words; long ones are shortened.
        rows, columns, unit: what a row, a column and a value are.

    Raises:
        ValueError: there is no map, or one is not ``(S, W)``.
    """
    S, W = len(steps), len(words)
    values = {name: np.ma.masked_invalid(value) for name, value in _arrays(maps, S, W).items()}
    top = max((float(v.max()) for v in values.values() if v.count()), default=0.0)
    is_large = S > LABELLED_STEPS or W > LABELLED_WORDS
    scale = (0, top if top > 0 else 1)
    # Most cells of a large map are far below its largest one and would all be white on a linear scale.
    norm: Normalize = PowerNorm(0.5, *scale) if is_large else Normalize(*scale)
    missing = sum(v.size - v.count() for v in values.values())
    notes = [unit + (" (square-root scale of colour)" if is_large else "")]
    if missing:
        notes.append(f"hatched or grey: not a number ({missing} cells)")
    if S and W and top <= 0 and missing < len(values) * S * W:
        notes.append("all values are 0")

    chosen_steps: Sequence[int] = range(S)
    chosen_words: Sequence[int] = range(W)
    if is_large:
        chosen_steps, chosen_words = _largest(values.values())
        merged = (-(-S // DRAWN_STEPS), -(-W // DRAWN_WORDS)) if S and W else (1, 1)
        if max(merged) > 1:
            notes.append(f"a cell of the overview: the largest of {merged[0]} x {merged[1]}")
    s, w = len(chosen_steps), len(chosen_words)
    lines = STEP_LINES if s <= TOP_STEPS and not is_large else 1
    cell = float(np.clip(7.2 / max(w, 1), 0.18, 0.6))
    panel = max(cell * w, 1.6), max((0.42 if lines > 1 else 0.22) * s, 1.1)
    labels = 2.9  # inches for the labels of the steps
    beside = not is_large and labels + len(values) * (panel[0] + 0.2) <= PAGE
    word_labels = 0.9 if max((_width(word) for word in words), default=0) * 0.075 > cell else 0.4
    heights = [panel[1]] * (1 if beside else len(values))
    if is_large:
        overview = float(np.clip(0.0175 * S, 2.4, 3.5) if S > LABELLED_STEPS else np.clip(0.25 * S, 1.1, 3.5))
        heights = [overview] * len(values) + heights
    width = max(labels + panel[0] * (len(values) if beside else 1) + 0.3, PAGE if is_large else 6.4)
    height = sum(heights) + (word_labels + 0.75) * len(heights) + 1.1
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = (1, len(values)) if beside else (len(heights), 1)
    axes = figure.subplots(*grid, squeeze=False, height_ratios=None if beside else heights).ravel()
    if is_large:
        for ax, (name, value) in zip(axes, values.items(), strict=False):
            _overview(ax, value, norm, steps, words, chosen_steps, chosen_words)
            ax.set_title(_clean(name) + f", all {S:,} x {W:,}")
            ax.set_ylabel(shorten(rows, 16, 2))
            ax.set_xlabel(columns + ", # its number in the text")
    numbered = ", # its number in the text" if w < W else ""
    of_step = [f"{i + 1}. {_visible(steps[i])}" for i in chosen_steps]
    of_word = [(f"#{i + 1} " if w < W else "") + _visible(words[i]) for i in chosen_words]
    for i, (ax, (name, value)) in enumerate(zip(axes[len(values) if is_large else 0 :], values.items(), strict=True)):
        part = value[np.ix_(chosen_steps, chosen_words)]
        _cells(ax, part, norm)
        ax.set_title(_clean(name) + (f", the {s} rows and {w} columns with the largest sums" if is_large else ""))
        _label_words(ax, of_word, cell if not beside else (width - labels) / len(values) / max(w, 1), w < W)
        ax.set_xlabel(columns + numbered)
        _label_steps(ax, of_step if i == 0 or not beside else None, s, lines)
        if i == 0 or not beside:
            ax.set_ylabel(shorten(rows, 16, 2))
        if part.size <= ANNOTATED and cell >= 0.34:
            _annotate(ax, part, norm, top)
    if S and W:
        label = shorten("; ".join(notes), int((width - labels) * 12.5), 5)
        bar = figure.colorbar(
            ScalarMappable(norm, _blues()),
            ax=list(axes),
            location="bottom",
            fraction=0.5 / height,
            pad=0.1 / height,
            aspect=45,
            label=label,
        )
        cast(Any, bar.outline).set_visible(False)
    return _save(figure, path, title, _describe_maps(values, steps, words, rows, columns, unit), formats)


@_styled
def plot_attention_by_step(
    maps: Mapping[str, Array],
    tokens: Mapping[str, Sequence[int]],
    steps: Sequence[str],
    path: str | Path,
    title: str = "",
    *,
    formats: Sequence[str] = (),
) -> Path:
    """The share of each step's attention on key words and on all other tokens.

    The attention weights of a query add up to one, so those of a step of n tokens add up to n; the sum of the step's
    row of the map is the part on key words. Of more than `LABELLED_STEPS` steps, some are labelled; of more than
    `DRAWN_STEPS`, several neighbours count as one.

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
    size = max(-(-S // DRAWN_STEPS), 1)
    starts = list(range(0, S, size))
    is_large = S > LABELLED_STEPS
    lines = STEP_LINES if S <= TOP_STEPS else 1
    height = 5.0 if is_large else max((0.42 if lines > 1 else 0.22) * S, 0.9)
    figure = Figure(figsize=(2.9 + 3.0 * len(values), 1.7 + height), layout="constrained")
    cast(Any, figure.get_layout_engine()).set(wspace=0.05)
    axes = figure.subplots(1, len(values), squeeze=False).ravel()
    described = []
    for i, (ax, (name, value)) in enumerate(zip(axes, values.items(), strict=True)):
        on_key, total = value.sum(axis=1), np.asarray(tokens[name], dtype=float)
        described.append(f"{name}: {100 * np.nansum(on_key) / max(total.sum(), 1e-9):.0f} % of all steps together")
        if S:
            on_key, total = np.add.reduceat(on_key, starts), np.add.reduceat(total, starts)
        key = np.clip(on_key / np.maximum(total, 1e-9), 0, 1) * 100
        look = {"height": 1.0 if is_large else 0.7, "linewidth": 0}
        ax.barh(range(len(key)), key, color=TEACHER, label="on key words", **look)
        ax.barh(range(len(key)), 100 - key, left=key, color=OTHER, label="on other tokens", **look)
        if not is_large:
            for s, share in enumerate(key):
                if not math.isfinite(share):
                    ax.text(1.5, s, "not a number", va="center", fontsize=8.5)
                    continue
                inside = share > 84
                at, align, colour = (share - 1.5, "right", "white") if inside else (share + 1.5, "left", "black")
                ax.text(at, s, f"{share:.0f} %", va="center", ha=align, color=colour, fontsize=8.5)
        ax.set(xlim=(0, 100), ylim=(max(len(key), 1) - 0.5, -0.5))
        ax.set_xlabel("share of the sentence's attention, %")
        ax.set_title(_clean(name))
        if is_large:
            _label_some_steps(ax, steps if i == 0 else None, S, size)
        else:
            _label_steps(ax, [f"{s + 1}. {step}" for s, step in enumerate(steps)] if i == 0 else None, S, lines)
        if i == 0:
            more = f", bars of {size} together" if size > 1 else ""
            ax.set_ylabel(shorten(f"reasoning step (sentence){more}", 16 if S < 6 else 60, 2))
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    text = f"Bars for {S} reasoning steps: the share of attention on key words. " + "; ".join(described)
    return _save(figure, path, title, text, formats)


@_styled
def plot_layer_weights(
    records: Sequence[Mapping[str, Any]], path: str | Path, title: str = "", *, formats: Sequence[str] = ()
) -> Path:
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
    figure = Figure(figsize=(0.2 + 4.6 * len(sides), 7.4), layout="constrained")
    axes = figure.subplots(2, len(sides), squeeze=False, height_ratios=[3, 2])
    described = []
    for (over, below), (side, lists) in zip(axes.T, sides.items(), strict=True):
        colour = TEACHER if side == "teacher" else STUDENT
        weights = np.ma.masked_invalid(np.asarray(lists, dtype=float))  # (records, L)
        L = weights.shape[1]
        image = over.imshow(weights.T, cmap=_blues(), vmin=0, aspect="auto", interpolation="none", origin="lower")
        over.set(title=f"{side}: weight of each layer", xlabel="training step", ylabel="layer (0 is the first)")
        shown = range(0, len(steps), -(-len(steps) // 6))
        over.set_xticks(shown, [f"{steps[i]:,g}" for i in shown])
        over.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=over, fraction=0.05, pad=0.02, label="weight; the layers of a step add up to 1")

        below.axhline(1 / L, color="#555555", linewidth=1, linestyle=(0, (1, 1.5)), label="all layers equal")
        look = {"color": colour, "linewidth": 1.2, "markersize": 4}
        if len(steps) > 1:
            first = {"marker": "o", "markerfacecolor": "white", "linestyle": "--"}
            below.plot(weights[0], label=f"step {steps[0]:,g}", **look, **first)
        below.plot(weights[-1], marker="o", label=f"step {steps[-1]:,g}", **look)
        largest = float(np.ma.filled(weights[[0, -1]].max(), 0))
        below.set(xlabel="layer (0 is the first)", ylabel="weight", ylim=(0, max(1.1 * largest, 1.5 / L)))
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.spines[["top", "right"]].set_visible(False)
        _legend(below)
        described.append(
            f"{side}: {L} layers, the largest weight at step {steps[-1]:g} is that of layer "
            f"{int(weights[-1].argmax())}, {float(weights[-1].max()):.3g}"
        )
    return _save(figure, path, title, "Layer weights over training. " + "; ".join(described), formats)


@_styled
def plot_losses(
    log_history: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Sequence[str]],
    path: str | Path,
    title: str = "",
    *,
    formats: Sequence[str] = (),
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
    columns = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    lines = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    figure = Figure(figsize=(0.4 + 3.3 * columns, (2.9 + 0.19 * most) * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.remove()
    described = []
    for ax, (panel, names) in zip(axes, panels.items(), strict=False):
        for i, name in enumerate(names):
            x, y = np.asarray(series[name], dtype=float).T
            _line(ax, x, y, i, _meaning(name))
            described.append(f"{name} from {y[0]:.4g} to {y[-1]:.4g}")
        ax.set_title(_clean(panel))
        ax.set(xlabel="training step", ylabel=UNITS.get(panel, ""))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if len(names) > 1 or names != [panel]:
            _legend(ax)
    return _save(figure, path, title, "Curves over training: " + "; ".join(described), formats)


@_styled
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
    labels = 0.07 * max((min(_width(name), DIFFERENCE_CHARS) for name in methods), default=0)
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
        ax.set_title(_clean(test))
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=TEACHER, marker="o", markerfacecolor="white", linewidth=1, label="interval contains 0"),
        Line2D([], [], color=STUDENT, marker="o", linewidth=2, label="interval excludes 0"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return _save(figure, path, title, "Differences with intervals. " + "; ".join(described), formats)


@_styled
def plot_accuracy(
    points: Mapping[str, Mapping[int, Sequence[float]]],
    baseline: str | None,
    path: str | Path,
    title: str = "",
    *,
    formats: Sequence[str] = (),
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
                (drawn,) = ax.plot(sorted(values), mean, label=_clean(name), color="black", linewidth=2, linestyle="--")
            else:
                drawn = _line(ax, sorted(values), mean, i, _clean(name))
                described.append(f"{name}: {mean[-1]:.1f} % at step {max(values)}")
            ax.fill_between(sorted(values), low, high, color=drawn.get_color(), alpha=0.1, linewidth=0)
        ax.set(xlabel="training step", ylabel="accuracy, %")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        _legend(ax)
    text = "Accuracy over training, mean over seeds; bands are the range of the seeds. " + "; ".join(described)
    return _save(figure, path, title, text, formats)


def shorten(text: str, width: int, lines: int = 1) -> str:
    """A text on at most ``lines`` lines of ``width`` columns, with an ellipsis where something is left out.

    A wide character, such as a Chinese one, takes two columns. Lines break between words, within words that are longer
    than a line, and between wide characters.
    """
    pieces: list[tuple[str, str]] = []  # what stands before a piece that is not broken, and the piece
    for word in _clean(text).split():
        clusters = regex.findall(r"\X", word)
        is_whole = _width(word) <= width and all(map(_is_narrow, clusters))
        parts = [word] if is_whole else clusters
        pieces += [(" " if i == 0 else "", part) for i, part in enumerate(parts)]
    wrapped: list[list[tuple[str, str]]] = [[]]
    for piece in pieces:
        if wrapped[-1] and _width(_joined([*wrapped[-1], piece])) > width:
            wrapped.append([])
        wrapped[-1].append(piece)
    if len(wrapped) > lines:
        left_out = wrapped[lines]
        wrapped = wrapped[:lines]
        while _width(_joined(wrapped[-1]) + left_out[0][0] + "…") > width and len(wrapped[-1]) > 1:
            left_out = [wrapped[-1].pop()]
        wrapped[-1].append((left_out[0][0], "…"))
    return "\n".join(map(_joined, wrapped))


def _joined(pieces: Sequence[tuple[str, str]]) -> str:
    return "".join(before + piece for before, piece in pieces).strip()


def _width(text: str) -> int:
    """The columns that a text takes in a font of one width: two per wide character, none per combining one."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 1 if unicodedata.east_asian_width(c) not in "WF" else 2
        for c in text
    )


def _is_narrow(cluster: str) -> bool:
    return unicodedata.east_asian_width(cluster[0]) not in "WF"


def _clean(text: str) -> str:
    """A text without the control characters that a file in XML cannot hold."""
    return "".join("�" if unicodedata.category(c) in ("Cc", "Cs", "Cn") and c not in "\t\n\r" else c for c in text)


def _visible(text: str) -> str:
    """A key word or token of spaces and line ends as signs."""
    return text if text.strip() or not text else text.replace("\r", "").replace("\n", "↵").replace(" ", "␣")


def _meaning(name: str) -> str:
    """The label of a curve: what it is, and the logged name; ``eval_SET_NAME`` has those of NAME."""
    known = next((n for n in sorted(MEANINGS, key=len, reverse=True) if name == n or name.endswith(f"_{n}")), None)
    if known is None or (name != known and not name.startswith("eval_")):
        return _clean(name)
    return ("held out: " if name != known else "") + f"{MEANINGS[known]} ({name})"


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


def _largest(values: Iterable[Any]) -> tuple[range, range] | tuple[list[int], list[int]]:
    """The rows and columns with the largest sums over all maps, ascending: at most `TOP_STEPS` and `TOP_WORDS`."""
    total = np.sum([np.ma.filled(value, 0.0) for value in values], axis=0)
    columns = np.sort(np.argsort(-total.sum(axis=0), kind="stable")[:TOP_WORDS])
    rows = np.sort(np.argsort(-total[:, columns].sum(axis=1), kind="stable")[:TOP_STEPS])
    return rows.tolist(), columns.tolist()


@functools.cache
def _blues() -> Colormap:
    """White to dark blue: its lightness falls steadily, so that it reads the same in grey and without red or green."""
    return matplotlib.colormaps["Blues"].with_extremes(bad=MISSING)


def _cells(ax: Axes, value: Any, norm: Normalize) -> None:
    """Draw each value as a cell with a white border; hatch those that are no numbers."""
    S, W = value.shape
    if not value.size:
        what = "no key words" if S else "no sentences"
        ax.text(0.5, 0.5, what, transform=ax.transAxes, ha="center", va="center", color="#555555")
    else:
        edges = np.arange(W + 1) - 0.5, np.arange(S + 1) - 0.5
        ax.pcolormesh(*edges, value, cmap=_blues(), norm=norm, edgecolors="white", linewidth=0.8)
        hatched = np.ma.masked_where(~np.ma.getmaskarray(value), np.ones((S, W)))
        if hatched.count():
            ax.pcolor(*edges, hatched, hatch="////", facecolor="none", edgecolor="#777777", linewidth=0)
    ax.set(xlim=(-0.5, max(W, 1) - 0.5), ylim=(max(S, 1) - 0.5, -0.5))
    ax.spines[:].set_visible(not value.size)
    ax.spines[:].set_color("#bbbbbb")


def _overview(
    ax: Axes,
    value: Any,
    norm: Normalize,
    steps: Sequence[str],
    words: Sequence[str],
    chosen_steps: Sequence[int],
    chosen_words: Sequence[int],
) -> None:
    """Draw all cells as one image, label some rows and columns, and mark the chosen ones at the edges."""
    S, W = value.shape
    size, width = -(-S // DRAWN_STEPS), -(-W // DRAWN_WORDS)
    if size > 1 or width > 1:
        filled = np.ma.filled(value, np.nan)
        filled = np.fmax.reduceat(np.fmax.reduceat(filled, range(0, S, size)), range(0, W, width), axis=1)
        value = np.ma.masked_invalid(filled)
    ax.imshow(
        value,
        cmap=_blues(),
        norm=norm,
        aspect="auto",
        interpolation="none",
        extent=(-0.5, -0.5 + width * value.shape[1], -0.5 + size * value.shape[0], -0.5),
    )
    ax.set(xlim=(-0.5, W - 0.5), ylim=(S - 0.5, -0.5))
    _label_some_steps(ax, steps, S)
    shown = _some(W, 9)
    ax.set_xticks(shown, [f"#{w + 1}\n{shorten(_visible(words[w]), 9)}" for w in shown])
    marks: dict[str, Any] = {"linestyle": "none", "color": STUDENT, "markersize": 3, "clip_on": False}
    if len(chosen_words) < W:
        ax.plot(chosen_words, [-0.5] * len(chosen_words), marker=11, **marks)  # a caret down, its tip at the edge
    if len(chosen_steps) < S:
        ax.plot([W - 0.5] * len(chosen_steps), chosen_steps, marker=8, **marks)  # a caret to the left
    ax.spines[:].set_color("#bbbbbb")


def _some(count: int, most: int) -> list[int]:
    """The first and further ones of ``range(count)``, whose numbers from 1 are multiples of a round step."""
    step = next(s * 10**e for e in range(10) for s in (1, 2, 5) if count // (s * 10**e) < most)
    return sorted({0, *range(step - 1, count, step)} - ({step - 1} if 1 < step <= 2 else set())) if count else []


def _label_some_steps(ax: Axes, steps: Sequence[str] | None, count: int, size: int = 1) -> None:
    """Label every n-th of many rows with its number and text; a drawn row may stand for ``size`` neighbours."""
    shown = _some(count, 11)
    labels = (
        [""] * len(shown)
        if steps is None
        else [shorten(f"{s + 1}. {_visible(steps[s])}", STEP_CHARS + 6) for s in shown]
    )
    ax.set_yticks([s // size for s in shown], labels)


def _label_words(ax: Axes, words: Sequence[str], cell: float, numbered: bool) -> None:
    """Label each column with its word, upright if the cell of ``cell`` inches is wide enough."""
    labels = [shorten(word, WORD_CHARS + 5 * numbered) for word in words]
    if max(map(_width, labels), default=0) * 0.085 < cell:
        how: dict[str, Any] = {}
    elif cell >= 0.28:
        how = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    else:
        how = {"rotation": 90}
    ax.set_xticks(range(len(words)), labels, **how)
    ax.tick_params(axis="x", length=0)


def _label_steps(ax: Axes, steps: Sequence[str] | None, count: int, lines: int) -> None:
    """Label each row of the map with its step; no labels if ``steps`` is None: the panel to the left has them."""
    width = STEP_CHARS if lines > 1 else STEP_CHARS + 6
    labels = [""] * count if steps is None else [shorten(step, width, lines) for step in steps]
    ax.set_yticks(range(count), labels, linespacing=1.05)
    ax.tick_params(axis="y", length=0)


def _annotate(ax: Axes, value: Any, norm: Normalize, top: float) -> None:
    """Write the values into the cells, white on dark; those that would be 0 are left out."""
    digits = 0 if top >= 100 else 1 if top >= 10 else 2 if top >= 0.1 else 3
    for (s, w), x in np.ndenumerate(np.ma.filled(value, 0.0)):
        text = f"{x:.{digits}f}".removeprefix("0")
        if x >= 0.005 * top and text.strip(".0"):
            light = _luminance(_blues()(norm(x))) > 0.18  # where black and white have the same contrast
            ax.text(w, s, text, ha="center", va="center", fontsize=8, color="black" if light else "white")


def _luminance(rgba: Any) -> float:
    """The relative luminance of a colour, 0 to 1, as defined by WCAG."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in map(float, rgba[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _line(ax: Axes, x: Any, y: Any, number: int, label: str) -> Line2D:
    """One of several curves, told apart by colour, dashes and markers; of many points a few have the marker."""
    every = max(len(x) // 8, 1)
    (line,) = ax.plot(
        x,
        y,
        label=label,
        color=COLOURS[number % len(COLOURS)],
        linestyle=DASHES[(number + number // len(COLOURS)) % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=4,
        linewidth=1.4,
        markevery=(number * every // 3 % every, every),
    )
    return line


def _legend(ax: Axes) -> None:
    """A legend below the panel, where it hides no curve."""
    below = ax.transAxes + ScaledTranslation(-0.05, -0.48, ax.figure.dpi_scale_trans)  # inches: below the axis's label
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=below,
        borderaxespad=0,
        borderpad=0,
        handlelength=3.2,
        labelspacing=0.3,
    )


def _describe_maps(
    values: Mapping[str, Any], steps: Sequence[str], words: Sequence[str], rows: str, columns: str, unit: str
) -> str:
    """What the picture of maps shows, in words: the sizes, and where the largest value of each map is."""
    sentences = [f"Heatmaps of {len(steps)} rows, each a {rows}, and {len(words)} columns, each a {columns}: {unit}."]
    for name, value in values.items():
        if value.count():
            s, w = divmod(int(np.ma.filled(value, -np.inf).argmax()), len(words))
            sentences.append(
                f"{name}: the largest value, {value[s, w]:.3g}, is that of row {s + 1} ({shorten(steps[s], 80)}) "
                f"and column {w + 1} ({shorten(_visible(words[w]), 30)})."
            )
    return " ".join(sentences)


def _texts(value: Any) -> Iterable[str]:
    """All texts in nested arguments."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


# Fonts for what DejaVu Sans, which comes with matplotlib, lacks; those that are installed are used, in this order.
FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB",
    "Hiragino Sans", "Yu Gothic", "Malgun Gothic", "Apple SD Gothic Neo", "Noto Sans Devanagari", "Noto Sans Bengali",
    "Noto Sans Thai", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Symbols", "Noto Sans Symbols 2",
    "Noto Sans Math", "Noto Emoji", "Symbola", "Segoe UI Symbol", "Arial Unicode MS", "Unifont",
)  # fmt: skip


@functools.lru_cache(maxsize=64)
def _fonts(characters: frozenset[str]) -> list[str]:
    """DejaVu Sans and, of the installed fonts above, those with further characters; warn of what none has."""
    families = ["DejaVu Sans"]
    ignored = ("Cc", "Cf", "Cs", "Cn", "Mn", "Zl", "Zp")
    missing = {ord(c) for c in characters if unicodedata.category(c) not in ignored}
    missing -= _codes(families[0])
    installed = set(font_manager.get_font_names()) if missing else set()
    for family in FONTS:
        if missing and family in installed and missing & (found := _codes(family)):
            families.append(family)
            missing -= found
    if missing:
        some = "".join(map(chr, sorted(missing)[:10]))
        warnings.warn(
            f"pictures: no installed font has {len(missing)} of the characters, such as {some}; PNG and PDF files show "
            "boxes in their place. Install a font such as Noto Sans CJK, or look at the SVG file in a browser",
            stacklevel=4,
        )
    return families


@functools.lru_cache(maxsize=64)
def _codes(family: str) -> frozenset[int]:
    """The code points that a font has."""
    return frozenset(font_manager.get_font(font_manager.findfont(family)).get_charmap())


def _save(figure: Figure, path: str | Path, title: str, description: str, formats: Sequence[str] = ()) -> Path:
    """Write the figure to ``path``, and with each suffix of ``formats``, without what differs from day to day."""
    path = Path(path)
    first = path.suffix.removeprefix(".") or "png"
    if title:
        figure.suptitle(_clean(title))
    name, description = _clean(title or path.stem), _clean(description)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Title": name, "Description": description, "Software": None},
        "svg": {"Title": name, "Description": description, "Date": None, "Creator": None},
        "pdf": {"Title": name, "Subject": description, "CreationDate": None, "Creator": None, "Producer": None},
    }
    for suffix in dict.fromkeys((first, *formats)):
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # `_fonts` has said so
            figure.savefig(buffer, format=suffix, dpi=DPI, metadata=metadata.get(suffix))
        data = buffer.getvalue()
        if suffix == "svg":
            data = _accessible(data.decode(), name, description).encode()
        with atomic_write(path if suffix == first else path.with_suffix(f".{suffix}"), binary=True) as file:
            file.write(data)
    return path


def _accessible(svg: str, name: str, description: str) -> str:
    """The SVG file with its title and description where screen readers look for them."""
    head, tag, rest = svg.partition("<svg ")
    inside, end, rest = rest.partition(">")
    titled = f"<title>{escape(name)}</title>"
    rest = rest.replace(f"\n {titled}", "", 1)
    return f'{head}{tag}role="img" {inside}{end}\n {titled}\n <desc>{escape(description)}</desc>{rest}'
