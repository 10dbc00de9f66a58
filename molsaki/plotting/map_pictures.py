"""Draws maps as heatmaps, and the share of attention that each step puts on key words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from molsaki.plotting import style
from molsaki.plotting.labels import clean, shorten, visible, width_of
from molsaki.plotting.style import OTHER, STUDENT, TEACHER, blues, styled

# isort: split
# After style, which names the extra to install where matplotlib is missing.
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]
PAGE = 10.0  # inches: wider pictures stack their panels, so that letters stay readable at a page's width
STEP_CHARS, STEP_LINES, WORD_CHARS = 30, 2, 14  # longest step (per line) and word of a label
LABELLED_STEPS, LABELLED_WORDS = 40, 40  # with more, a map is an overview of all cells and a cut-out with all labels
TOP_STEPS, TOP_WORDS = 16, 24  # rows and columns of the cut-out
DRAWN_STEPS, DRAWN_WORDS = 400, 1000  # with more, neighbours share a row or a column of the overview
ANNOTATED = 200  # with more cells, a map's values are not written into it


@styled
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

    Up to `LABELLED_STEPS` steps and `LABELLED_WORDS` words, every row and column has its text. A larger map has an
    overview of all cells and, below it, with texts, the `TOP_STEPS` rows and `TOP_WORDS` columns with the largest
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
    word_labels = 0.9 if max((width_of(word) for word in words), default=0) * 0.075 > cell else 0.4
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
            ax.set_title(clean(name) + f", all {S:,} x {W:,}")
            ax.set_ylabel(shorten(rows, 16, 2))
            ax.set_xlabel(columns + ", # its number in the text")
    numbered = ", # its number in the text" if w < W else ""
    of_step = [f"{i + 1}. {visible(steps[i])}" for i in chosen_steps]
    of_word = [(f"#{i + 1} " if w < W else "") + visible(words[i]) for i in chosen_words]
    for i, (ax, (name, value)) in enumerate(zip(axes[len(values) if is_large else 0 :], values.items(), strict=True)):
        part = value[np.ix_(chosen_steps, chosen_words)]
        _cells(ax, part, norm)
        ax.set_title(clean(name) + (f", the {s} rows and {w} columns with the largest sums" if is_large else ""))
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
            ScalarMappable(norm, blues()),
            ax=list(axes),
            location="bottom",
            fraction=0.5 / height,
            pad=0.1 / height,
            aspect=45,
            label=label,
        )
        cast(Any, bar.outline).set_visible(False)
    return style.save(figure, path, title, _describe_maps(values, steps, words, rows, columns, unit), formats)


@styled
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
        ax.set_title(clean(name))
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
    return style.save(figure, path, title, text, formats)


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


def _cells(ax: Axes, value: Any, norm: Normalize) -> None:
    """Draw each value as a cell with a white border; hatch those that are no numbers."""
    S, W = value.shape
    if not value.size:
        what = "no key words" if S else "no sentences"
        ax.text(0.5, 0.5, what, transform=ax.transAxes, ha="center", va="center", color="#555555")
    else:
        edges = np.arange(W + 1) - 0.5, np.arange(S + 1) - 0.5
        ax.pcolormesh(*edges, value, cmap=blues(), norm=norm, edgecolors="white", linewidth=0.8)
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
        cmap=blues(),
        norm=norm,
        aspect="auto",
        interpolation="none",
        extent=(-0.5, -0.5 + width * value.shape[1], -0.5 + size * value.shape[0], -0.5),
    )
    ax.set(xlim=(-0.5, W - 0.5), ylim=(S - 0.5, -0.5))
    _label_some_steps(ax, steps, S)
    shown = _some(W, 9)
    ax.set_xticks(shown, [f"#{w + 1}\n{shorten(visible(words[w]), 9)}" for w in shown])
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
        else [shorten(f"{s + 1}. {visible(steps[s])}", STEP_CHARS + 6) for s in shown]
    )
    ax.set_yticks([s // size for s in shown], labels)


def _label_words(ax: Axes, words: Sequence[str], cell: float, numbered: bool) -> None:
    """Label each column with its word, upright if the cell of ``cell`` inches is wide enough."""
    labels = [shorten(word, WORD_CHARS + 5 * numbered) for word in words]
    if max(map(width_of, labels), default=0) * 0.085 < cell:
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
            light = _luminance(blues()(norm(x))) > 0.18  # where black and white have the same contrast
            ax.text(w, s, text, ha="center", va="center", fontsize=8, color="black" if light else "white")


def _luminance(rgba: Any) -> float:
    """The relative luminance of a colour, 0 to 1, as defined by WCAG."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in map(float, rgba[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


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
                f"and column {w + 1} ({shorten(visible(words[w]), 30)})."
            )
    return " ".join(sentences)
