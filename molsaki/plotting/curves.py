"""Draws a run: its losses and the weights of its layers over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molsaki.plotting import style
from molsaki.plotting.labels import clean
from molsaki.plotting.style import STUDENT, TEACHER, blues, legend, line, styled

# isort: split
# After style, which names the extra to install where matplotlib is missing.
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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


@styled
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
        image = over.imshow(weights.T, cmap=blues(), vmin=0, aspect="auto", interpolation="none", origin="lower")
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
        legend(below)
        described.append(
            f"{side}: {L} layers, the largest weight at step {steps[-1]:g} is that of layer "
            f"{int(weights[-1].argmax())}, {float(weights[-1].max()):.3g}"
        )
    return style.save(figure, path, title, "Layer weights over training. " + "; ".join(described), formats)


@styled
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
            line(ax, x, y, i, _meaning(name))
            described.append(f"{name} from {y[0]:.4g} to {y[-1]:.4g}")
        ax.set_title(clean(panel))
        ax.set(xlabel="training step", ylabel=UNITS.get(panel, ""))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if len(names) > 1 or names != [panel]:
            legend(ax)
    return style.save(figure, path, title, "Curves over training: " + "; ".join(described), formats)


def _meaning(name: str) -> str:
    """The label of a curve: what it is, and the logged name; ``eval_SET_NAME`` has those of NAME."""
    known = next((n for n in sorted(MEANINGS, key=len, reverse=True) if name == n or name.endswith(f"_{n}")), None)
    if known is None or (name != known and not name.startswith("eval_")):
        return clean(name)
    return ("held out: " if name != known else "") + f"{MEANINGS[known]} ({name})"
