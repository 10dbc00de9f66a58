"""Pictures of measured rows: time over tokens, overhead over key tokens, memory over tokens; whole steps as bars.

    python -m benchmarks.plots CSV... [--output-dir DIR] [--format png|svg]

One picture for each CSV, question, dtype and choice of heads, named after the CSV. What is beneath it says on what it
was measured. A CSV without the rows for a picture gives none; predictions are drawn as thin dotted lines and named so.
"""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .layer import read_rows

PASSES = ("forward", "forward+backward")
OURS = ("#d1672c", "#7b3294", "#1b9e77", "#c51b7d", "#8c510a")  # engines with the map
PLAIN = ("#1f5a99", "#5b8fc7", "#93b7dd", "#2b2b6b", "#7f7f7f")
MARKERS = {"eager": "o", "graph": "^", "compile": "s"}  # of modes; lines join "eager"
MODES = {"graph": "as a CUDA graph", "compile": "through torch.compile"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--output-dir", type=Path, help="the CSV's own folder if not given")
    parser.add_argument("--format", default="png", choices=("png", "svg"))
    arguments = parser.parse_args(argv)
    for path in arguments.csv:
        rows = read_rows(path)
        if not rows:
            parser.error(f"csv: expected rows, {path} has none")
        for made in draw(rows, arguments.output_dir or path.parent, path.stem, arguments.format):
            print(made)


def draw(rows: list[dict], folder: Path, stem: str, suffix: str = "png") -> list[Path]:
    """Every picture that the rows allow; the files made."""
    made = []
    if "quantity" in rows[0]:
        made.append(save(step_bars(rows), folder / f"{stem}.{suffix}", "A whole training step", rows))
    elif "contender" not in rows[0]:
        raise ValueError(f"rows: expected those of benchmarks.layer or benchmarks.step, got the columns {[*rows[0]]}")
    else:
        for (dtype, q_heads, kv_heads, head_dim), some in by(rows, "dtype", "q_heads", "kv_heads", "head_dim"):
            name = f"{stem}-{dtype}-H{q_heads}-{kv_heads}-D{head_dim}"
            what = f"{q_heads} query and {kv_heads} key heads of {head_dim}, {dtype}"
            for picture, title, draws in (
                ("time", "One attention layer", time_over_tokens),
                ("overhead", "What the map adds", overhead_over_key_tokens),
                ("memory", "Memory of one layer beyond its inputs", memory_over_tokens),
            ):
                figure = draws(some)
                if figure is not None:
                    made.append(save(figure, folder / f"{name}-{picture}.{suffix}", f"{title}: {what}", some))
    return made


def time_over_tokens(rows: list[dict]) -> Figure | None:
    """Milliseconds of each contender, at each length the shape whose key tokens are nearest to a sixteenth of it."""
    rows = [row for row in usual(rows) if row["kind"] != "map alone"]
    if len({row["tokens"] for row in rows}) < 2:
        return None
    figure, axes = panels(len(PASSES))
    colours = colours_of(rows)
    for ax, which in zip(axes, PASSES, strict=True):
        mine = [row for row in rows if row["pass"] == which]
        for (name,), some in by(mine, "contender"):
            line(ax, some, "median_ms", name, colours[name])
            guessed = [row for row in some if row.get("predicted_ms") is not None and mode_of(row) == "eager"]
            if guessed and guessed[0]["kind"] == "map":
                x, y = zip(*sorted((row["tokens"], row["predicted_ms"]) for row in guessed), strict=True)
                ax.plot(x, y, ":", color=colours[name], linewidth=1, label=f"{name}, predicted")
        ax.set_yscale("log")
        lengths_axis(ax, mine)
        finish(ax, which, "milliseconds")
    legend(figure, axes)
    return figure


def overhead_over_key_tokens(rows: list[dict]) -> Figure | None:
    """Percent beyond the fastest plain attention, of the fastest engine at each point; a line for each length."""
    rows = [row for row in rows if row["kind"] == "map" and row["over_plain"] and mode_of(row) == "eager"]
    if not rows:
        return None
    figure, axes = panels(len(PASSES))
    sizes = sorted({(row["tokens"], row["batch"]) for row in rows})
    colours = dict(zip(sizes, colormaps["viridis"](np.linspace(0, 0.9, len(sizes))), strict=True))
    marks = dict(zip(sorted({row["contender"] for row in rows}), itertools.cycle("o^sDv"), strict=False))
    for ax, which in zip(axes, PASSES, strict=True):
        mine = [row for row in rows if row["pass"] == which]
        fastest = [min(some, key=lambda row: row["over_plain"]) for _, some in by(mine, "shape")]
        for (tokens, batch), some in sorted(by(fastest, "tokens", "batch")):
            some = sorted(some, key=lambda row: row["words"])
            x, y = [row["words"] for row in some], [100 * (row["over_plain"] - 1) for row in some]
            ax.plot(x, y, color=colours[tokens, batch], linewidth=1.2, label=f"{batch} x {tokens:,}")
            for at, over, row in zip(x, y, some, strict=True):
                ax.plot(at, over, marks[row["contender"]], color=colours[tokens, batch], markersize=4)
        for target in sorted({row["target"] for row in mine if row.get("target")}):
            at, text = (0.01, 100 * (target - 1)), f"target {100 * (target - 1):.0f} %"
            ax.axhline(at[1], color="grey", linewidth=0.8, linestyle=(0, (1, 2)))
            ax.annotate(text, at, xycoords=("axes fraction", "data"), va="bottom", fontsize=6, color="grey")
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("key tokens of a sequence")
        ticks = sorted({row["words"] for row in mine})
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45 if len(ticks) > 6 else 0)
        ax.margins(x=0.12)
        ax.minorticks_off()
        finish(ax, which, "% beyond the fastest plain attention")
    handles = [Line2D([], [], color=colours[size], label=f"{size[1]} x {size[0]:,}") for size in sizes]
    handles += [Line2D([], [], color="grey", linestyle="none", marker=m, label=name) for name, m in marks.items()]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=7, title="batch x tokens")
    return figure


def memory_over_tokens(rows: list[dict]) -> Figure | None:
    """Peak MiB of both passes beyond the inputs."""
    rows = [row for row in usual(rows) if row.get("peak_mib") is not None and row["pass"] == PASSES[1]]
    if len({row["tokens"] for row in rows}) < 2:
        return None
    figure, (ax,) = panels(1)
    colours = colours_of(rows)
    for (name,), some in by(rows, "contender"):
        line(ax, some, "peak_mib", name, colours[name])
    ax.set_yscale("log")
    lengths_axis(ax, rows)
    finish(ax, PASSES[1], "MiB")
    legend(figure, [ax])
    return figure


def step_bars(rows: list[dict]) -> Figure:
    """Time and memory of whole training steps, rows of ``benchmarks.step``: a group of bars a student and batch."""
    quantities = {"seconds": "seconds a step", "peak MiB with weights and optimizer": "MiB at the peak"}
    shown = [name for name in quantities if any(row["quantity"] == name for row in rows)]
    if not shown:
        raise ValueError(
            f"rows: expected a quantity of {list(quantities)}, got {sorted({r['quantity'] for r in rows})}"
        )
    figure, axes = panels(len(shown))
    contenders = dict.fromkeys(row["contender"] for row in rows if row["quantity"] in shown)
    colours = dict(zip(sorted(contenders, key="eager".__eq__), itertools.cycle((*OURS, *PLAIN)), strict=False))
    colours["eager"] = "black"
    for ax, quantity in zip(axes, shown, strict=True):
        values = {(step_group(row), row["contender"]): row["value"] for row in rows if row["quantity"] == quantity}
        groups, names = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            heights = [values.get((group, name), 0) for group in groups]
            at = np.arange(len(groups)) + (i - (len(names) - 1) / 2) * width
            bars = ax.bar(at, heights, width, label=name, color=colours[name])
            ax.bar_label(bars, [f"{h:,.0f}" if h >= 100 else f"{h:.3g}" if h else "" for h in heights], fontsize=6)
        ax.set_xticks(range(len(groups)), groups)
        finish(ax, "", quantities[quantity])
    legend(figure, axes)
    return figure


def step_group(row: dict) -> str:
    compiled = ", compiled" if str(row["compiled"]) == "True" else ""
    dtype = "" if row["dtype"] == "float32" else f"\n{row['dtype']}"
    return f"{row['student']}\n{row['batch']}{compiled}{dtype}"


def usual(rows: Iterable[dict]) -> list[dict]:
    """At each batch and length, the rows of one number of words."""
    chosen = []
    for (_, tokens), some in by(rows, "batch", "tokens"):
        words = min({row["words"] for row in some}, key=lambda w: (abs(np.log2(max(w, 1) * 16 / tokens)), w))
        chosen += [row for row in some if row["words"] == words]
    return chosen


def by(rows: Iterable[dict], *keys: str) -> list[tuple[tuple, list[dict]]]:
    """The rows in groups that agree in ``keys``, in order of first appearance."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.items())


def mode_of(row: dict) -> str:
    return row.get("mode") or "eager"


def colours_of(rows: Iterable[dict]) -> dict[str, str]:
    """The same colour for a contender in all panels: warm for ours, blue for plain ones, black for eager."""
    ours, plain = itertools.cycle(OURS), itertools.cycle(PLAIN)
    choices = {"map": ours, "map alone": ours, "plain": plain, "eager": itertools.repeat("black")}
    return {name: next(choices[some[0]["kind"]]) for (name,), some in by(rows, "contender")}


def line(ax: Axes, rows: list[dict], key: str, name: str, colour: str) -> None:
    """One contender over the lengths: a line of its plain calls, a mark for each of the other modes."""
    for (mode,), some in by([{**row, "mode": mode_of(row)} for row in rows], "mode"):
        x, y = zip(*sorted((row["tokens"], row[key]) for row in some), strict=True)
        dashes = "none" if mode != "eager" else "--" if some[0]["kind"] == "plain" else "-"
        label = name if mode == "eager" else f"{name}, {MODES[mode]}"
        ax.plot(x, y, linestyle=dashes, color=colour, marker=MARKERS[mode], markersize=4, label=label,
                markerfacecolor=colour if mode == "eager" else "none")  # fmt: skip


def panels(count: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(3.2 + 4.4 * count, 4.4), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def lengths_axis(ax: Axes, rows: Iterable[dict]) -> None:
    batches = {row["tokens"]: row["batch"] for row in rows}
    ax.set_xscale("log", base=2)
    ticks = sorted(batches)
    ax.set_xticks(ticks, [f"{batches[t]} x {t:,}" for t in ticks], rotation=45, ha="right", rotation_mode="anchor")
    ax.minorticks_off()
    ax.set_xlabel("batch x tokens")


def finish(ax: Axes, title: str, unit: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_ylabel(unit)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One for all panels, beside them."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=7)


def save(figure: Figure, path: Path, title: str, rows: list[dict]) -> Path:
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(textwrap.fill(conditions(rows), 30 + int(13 * figure.get_figwidth())), fontsize=7, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def conditions(rows: Iterable[dict]) -> str:
    """What the rows were measured on, each fact once."""
    said = []
    for key, text in (
        ("device", "{}"),
        ("driver", "driver {}"),
        ("torch", "torch {}"),
        ("triton", "triton {}"),
        ("cudnn", "cuDNN {}"),
        ("dtype", "{}"),
        ("commit", "commit {}"),
        ("date", "{}"),
    ):
        values = list(dict.fromkeys(str(row[key]) for row in rows if row.get(key)))
        if values:
            said.append(text.format(" / ".join(values)))
    return "; ".join(said) + ". Medians; the contenders took turns in one run."


if __name__ == "__main__":
    main()
