"""Draws one picture per question from measured records.

    python -m benchmarks.plots [CSV...] [--output-dir DIR] [--format png|svg]

Without arguments it draws the committed pictures: time over plain attention, memory, and a whole training step. The
records of ``benchmarks.layer`` give a row of panels per dtype and choice of heads. A grid that varies the number of key
tokens at one length (the GPU grid) gives a further picture of that. The line below each picture says what the records
were measured on. Predictions are thin dotted lines. A CSV may hold several measurements of one
shape; the latest is drawn.
"""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .layer import read_records

RESULTS = Path(__file__).parent / "results"
COMMITTED = tuple(RESULTS / f"{name}.csv" for name in ("layer-xeon-2core", "step-xeon-2core", "layer-h200"))
PASSES = ("forward", "forward+backward")
# Each contender has its own marker (in bars, a hatch), since not everybody can distinguish colours.
OURS = ("#d1672c", "#8f55ea", "#1fa592", "#7d1a08", "#c2408f", "#7a7300", "#2a0a12", "#525252")  # engines with the map
PLAIN = ("#1f5a99", "#5b8fc7", "#2b2b6b", "#7f7f7f", "#4f7f7f")
MARKERS = "os^DvP*Xd<>p"
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "|||")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "molsaki",
    "svg.fonttype": "none",
}
MODES = {"graph": "as a CUDA graph", "compile": "through torch.compile"}
PREDICTED = ", predicted"
PEAK = "peak MiB with weights and optimizer"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, nargs="*", help="default: the committed CSVs that the README's pictures use")
    parser.add_argument("--output-dir", type=Path, help="default: the folder plots beside the CSV")
    parser.add_argument("--format", default=["png"], nargs="+", choices=("png", "svg"))
    arguments = parser.parse_args(argv)
    for path in arguments.csv or COMMITTED:
        records = read_records(path)
        if not records:
            parser.error(f"csv: expected records of benchmarks.layer or benchmarks.step, {path} has none")
        for suffix in arguments.format:
            for picture in draw(records, arguments.output_dir or path.parent / "plots", path.stem, suffix):
                print(picture)


def draw(records: list[dict], folder: Path, stem: str, suffix: str = "png") -> list[Path]:
    """Draw every picture that the records allow, as ``folder/stem-QUESTION.suffix``; return the files."""
    records = [record for record in records if record.get("kind") != "product"]  # no attention
    if "contender" not in records[0]:
        raise ValueError(
            f"records: expected those of benchmarks.layer or benchmarks.step, got the columns {[*records[0]]}"
        )
    if "quantity" in records[0]:
        pictures: tuple[tuple[str, str, Callable], ...] = (
            ("time-and-memory", "A whole training step, float32 unless named", step_bars),
        )
    else:
        records = latest(records)
        pictures = (
            ("time", "Time of one attention layer over the fastest plain attention", time_over_plain),
            ("memory", "Peak memory of one attention layer beyond its inputs, forward + backward", memory_over_tokens),
            ("key-tokens", "Additional time for the map, fastest engine", overhead_over_key_tokens),
        )
    files = []
    with matplotlib.style.context([STYLE], after_reset=True):  # not the settings of whoever draws
        for question, title, picture in pictures:
            figure = picture(records)
            if figure is not None:
                files.append(save(figure, folder / f"{stem}-{question}.{suffix}", title, records))
    return files


def latest(records: Iterable[dict]) -> list[dict]:
    """Return, for each shape and pass, the records of the commit that was measured last: files grow at their end."""
    groups = by(records, "shape", "pass")
    return [record for _, group in groups for record in group if record["commit"] == group[-1]["commit"]]


def time_over_plain(records: list[dict]) -> Figure | None:
    """Draw each contender's time over the fastest plain attention's, over the sequence length.

    At each length it takes the shape whose number of key tokens is nearest to a sixteenth of the length.
    """
    records = [r for r in typical(records) if r["kind"] != "map alone" and r["over_plain"]]
    groups = comparable(records)
    if not groups:
        return None
    figure, axes = panels(len(groups), len(PASSES))
    colours = colours_of(records)
    markers = markers_of(records)
    for (label, group), panel_row in zip(groups, axes, strict=True):
        for ax, which in zip(panel_row, PASSES, strict=True):
            of_pass = [r for r in group if r["pass"] == which]
            for (name,), of_name in by(of_pass, "contender"):
                line(ax, of_name, "over_plain", name, colours[name], markers[name])
                predicted = [r for r in of_name if r.get("predicted_over_plain") and mode_of(r) == "eager"]
                if predicted and predicted[0]["kind"] == "map":
                    x, y = zip(*sorted((r["tokens"], r["predicted_over_plain"]) for r in predicted), strict=True)
                    ax.plot(x, y, ":", color=colours[name], linewidth=1, label=name + PREDICTED)
            ax.axhline(1, color="black", linewidth=0.8)
            ax.set_yscale("log", base=2)
            low, high = ax.get_ylim()
            ticks = [2.0**i for i in range(-2, 8) if low <= 2.0**i <= high]
            ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            lengths_axis(ax, of_pass)
            finish(ax, f"{label}, {which}", "times plain attention")
    legend(figure, axes.flat)
    return figure


def memory_over_tokens(records: list[dict]) -> Figure | None:
    """Draw the peak MiB of forward + backward beyond the inputs, over the sequence length."""
    records = [r for r in typical(records) if r.get("peak_mib") is not None and r["pass"] == PASSES[1]]
    groups = comparable(records)
    if not groups:
        return None
    figure, axes = panels(1, len(groups))
    colours = colours_of(records)
    markers = markers_of(records)
    for ax, (label, group) in zip(axes[0], groups, strict=True):
        for (name,), of_name in by(group, "contender"):
            line(ax, of_name, "peak_mib", name, colours[name], markers[name])
        ax.set_yscale("log")
        lengths_axis(ax, group)
        finish(ax, label, "MiB")
    legend(figure, axes.flat)
    return figure


def overhead_over_key_tokens(records: list[dict]) -> Figure | None:
    """Draw the percent beyond the fastest plain attention of the fastest engine; one line per length.

    None unless some length was measured with at least three numbers of key tokens.
    """
    records = [r for r in records if r["kind"] == "map" and r["over_plain"] and mode_of(r) == "eager"]
    groups = [
        (label, group)
        for label, group in by_heads(records)
        if any(len({r["words"] for r in some}) > 2 for _, some in by(group, "batch", "tokens"))
    ]
    if not groups:
        return None
    figure, axes = panels(len(groups), len(PASSES))
    sizes = sorted({(r["tokens"], r["batch"]) for r in records})
    colours = dict(zip(sizes, colormaps["viridis"](np.linspace(0, 0.9, len(sizes))), strict=True))
    markers = dict(zip(sorted({r["contender"] for r in records}), itertools.cycle(MARKERS), strict=False))
    for (label, group), panel_row in zip(groups, axes, strict=True):
        for ax, which in zip(panel_row, PASSES, strict=True):
            of_pass = [r for r in group if r["pass"] == which]
            fastest = [min(some, key=lambda r: r["over_plain"]) for _, some in by(of_pass, "shape")]
            for (tokens, batch), some in sorted(by(fastest, "tokens", "batch"), key=lambda item: item[0]):
                some = sorted(some, key=lambda r: r["words"])
                x, y = [r["words"] for r in some], [100 * (r["over_plain"] - 1) for r in some]
                ax.plot(x, y, color=colours[tokens, batch], linewidth=1.2, label=f"{batch} x {tokens:,}")
                for words, percent, record in zip(x, y, some, strict=True):
                    ax.plot(words, percent, markers[record["contender"]], color=colours[tokens, batch], markersize=4)
            for target in sorted({r["target"] for r in of_pass if r.get("target")}):
                at, text = (0.01, 100 * (target - 1)), f"target {100 * (target - 1):.0f} %"
                ax.axhline(at[1], color="grey", linewidth=0.8, linestyle=(0, (1, 2)))
                ax.annotate(text, at, xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="#555555")
            ax.axhline(0, color="black", linewidth=0.8)
            ax.set_xscale("log", base=2)
            ax.set_xlabel("key tokens per sequence")
            ticks = sorted({r["words"] for r in of_pass})
            ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45 if len(ticks) > 6 else 0)
            ax.margins(x=0.12)
            ax.minorticks_off()
            finish(ax, f"{label}, {which}", "% beyond the fastest plain attention")
    handles = [Line2D([], [], color=colours[size], label=f"{size[1]} x {size[0]:,}") for size in sizes]
    handles += [Line2D([], [], color="grey", linestyle="none", marker=m, label=name) for name, m in markers.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, title="batch x tokens")
    return figure


def step_bars(records: list[dict]) -> Figure:
    """Draw time and memory of whole training steps: one group of bars per student and batch.

    Long traces, whose bars would hide the others', are drawn if a file has nothing else.
    """
    records = [r for r in records if not r["batch"].endswith(" trace")] or records
    quantities = {"seconds": "seconds per step", PEAK: "MiB at the peak"}
    shown = [name for name in quantities if any(r["quantity"] == name for r in records)]
    if not shown:
        found = sorted({r["quantity"] for r in records})
        raise ValueError(f"records: expected a quantity of {list(quantities)}, got {found}")
    figure, axes = panels(len(shown), 1)
    contenders = dict.fromkeys(r["contender"] for r in records if r["quantity"] in shown)
    colours = dict(zip(sorted(contenders, key="eager".__eq__), itertools.cycle((*OURS, *PLAIN)), strict=False))
    colours["eager"] = "black"
    hatches = dict(zip(colours, itertools.cycle(HATCHES), strict=False))
    for ax, quantity in zip(axes[:, 0], shown, strict=True):
        values = {(step_group(r), r["contender"]): r["value"] for r in records if r["quantity"] == quantity}
        groups, names = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
        names.sort(key=list(colours).index)
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            heights = [values.get((group, name), 0) for group in groups]
            at = np.arange(len(groups)) + (i - (len(names) - 1) / 2) * width
            look = {"color": colours[name], "hatch": hatches[name], "edgecolor": "white", "linewidth": 0.5}
            bars = ax.bar(at, heights, width, label=name, **look)
            ax.bar_label(bars, [f"{h:,.0f}" if h >= 100 else f"{h:.3g}" if h else "" for h in heights], fontsize=8)
        ax.set_xticks(range(len(groups)), groups)
        finish(ax, "", quantities[quantity])
    legend(figure, axes.flat)
    return figure


def step_group(record: dict) -> str:
    compiled = ", compiled" if str(record["compiled"]) == "True" else ""
    dtype = "" if record["dtype"] == "float32" else f"\n{record['dtype']}"
    return f"{record['student']}\n{record['batch']}{compiled}{dtype}"


def typical(records: Iterable[dict]) -> list[dict]:
    """Return, for each batch and length, the records of one number of words."""
    chosen = []
    for (_, tokens), some in by(records, "batch", "tokens"):
        words = min({r["words"] for r in some}, key=lambda w: (abs(np.log2(max(w, 1) * 16 / tokens)), w))
        chosen += [r for r in some if r["words"] == words]
    return chosen


def by(records: Iterable[dict], *keys: str) -> list[tuple[tuple, list[dict]]]:
    """Group the records that agree in ``keys``, in order of first appearance."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return list(groups.items())


def by_heads(records: Iterable[dict]) -> list[tuple[str, list[dict]]]:
    """Group by dtype and heads, with a label per group."""
    groups = by(records, "dtype", "q_heads", "kv_heads", "head_dim")
    return [(f"{q}/{kv} heads of {head_dim}, {dtype}", group) for (dtype, q, kv, head_dim), group in groups]


def comparable(records: Iterable[dict]) -> list[tuple[str, list[dict]]]:
    """Return the groups of :func:`by_heads` that have at least two lengths."""
    return [(label, group) for label, group in by_heads(records) if len({r["tokens"] for r in group}) > 1]


def mode_of(record: dict) -> str:
    return record.get("mode") or "eager"


def colours_of(records: Iterable[dict]) -> dict[str, str]:
    """Choose one colour per contender for all panels: warm for ours, blue for plain ones, black for eager."""
    ours, plain = itertools.cycle(OURS), itertools.cycle(PLAIN)
    choices = {"map": ours, "map alone": ours, "plain": plain, "eager": itertools.repeat("black")}
    return {name: next(choices[some[0]["kind"]]) for (name,), some in by(records, "contender")}


def markers_of(records: Iterable[dict]) -> dict[str, str]:
    """Choose one marker per contender for all panels."""
    return dict(zip((name for (name,), _ in by(records, "contender")), itertools.cycle(MARKERS), strict=False))


def line(ax: Axes, records: list[dict], key: str, name: str, colour: str, marker: str) -> None:
    """Draw one contender over the lengths: a line for mode "eager", hollow markers for the other modes."""
    for (mode,), some in by([{**record, "mode": mode_of(record)} for record in records], "mode"):
        x, y = zip(*sorted((r["tokens"], r[key]) for r in some), strict=True)
        ax.plot(
            x,
            y,
            linestyle="none" if mode != "eager" else "--" if some[0]["kind"] == "plain" else "-",
            color=colour,
            marker=marker,
            markersize=5 if mode != "compile" else 8,
            linewidth=1.3,
            label=name if mode == "eager" else f"{name}, {MODES[mode]}",
            markerfacecolor=colour if mode == "eager" else "none",
        )


def panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(9.6, 0.7 + (3.3 if columns > 1 else 3.0) * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def lengths_axis(ax: Axes, records: Iterable[dict]) -> None:
    batches = {r["tokens"]: r["batch"] for r in records}
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
    """Add one legend for all panels, below them; predictions, which have the colours of what they predict, once."""
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    handles = {label: handle for label, handle in found.items() if not label.endswith(PREDICTED)}
    if len(handles) < len(found):
        handles["predicted"] = Line2D([], [], color="#555555", linestyle=":", linewidth=1)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, handlelength=3)


def save(figure: Figure, path: Path, title: str, records: list[dict]) -> Path:
    below = conditions(records)
    figure.suptitle(title, fontsize=11)
    lines = textwrap.wrap(below, int(14 * figure.get_figwidth()))
    for legend in figure.legends:  # the layout keeps only the legend's title, above it, free of both
        legend.set_title("\n".join([*lines, legend.get_title().get_text()]).strip(), {"size": 8})
        entries = -(-len(legend.get_texts()) // 3)
        figure.set_figheight(figure.get_figheight() + 0.16 * (entries + len(lines)))
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Title": title, "Description": below}
    metadata |= {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=150, metadata=metadata)
    return path


def conditions(records: Iterable[dict]) -> str:
    """Describe the machine and versions of the records, each fact once."""
    facts = []
    for key, text in (
        ("device", "{}"),
        ("driver", "driver {}"),
        ("torch", "torch {}"),
        ("triton", "triton {}"),
        ("cudnn", "cuDNN {}"),
        ("commit", "commit {}"),
        ("date", "{}"),
    ):
        values = list(dict.fromkeys(str(r[key]) for r in records if r.get(key)))
        if values:
            facts.append(text.format(" / ".join(values)))
    return "; ".join(facts) + ". Medians; the contenders took turns in one run."


if __name__ == "__main__":
    main()
