"""Formats measured records as tables for a terminal, with a sentence that says the result."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        ratio, low, high: median and quartiles of the ratio to what the table names.
        over_sdpa: the ratio to PyTorch's fastest SDPA, where the table has that column.
    """

    name: str
    ms: float | None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    peak_mib: float | None = None
    note: str = ""
    over_sdpa: float | None = None


def table(title: str, over: str, rows: Sequence[Row], missing: Iterable[tuple[str, str]] = ()) -> list[str]:
    """Return the lines of one table; ``over`` heads the column of ratios, ``missing`` has names and reasons."""
    width = max([len(row.name) for row in rows] + [len("contender")])
    with_sdpa = any(row.over_sdpa is not None for row in rows)
    head = f"  {'x sdpa':>7}" if with_sdpa else ""
    lines = [title, f"  {'contender':{width}}  {'ms':>9}{head}  {over:>7}  {'quartiles':>14}  {'peak MiB':>9}  note"]
    for row in rows:
        spread = _spread(row.low, row.high)
        ratio = _ratio(row.ratio)
        sdpa = f"  {_ratio(row.over_sdpa):>7}" if with_sdpa else ""
        peak = "" if row.peak_mib is None else f"{row.peak_mib:,.1f}"
        line = f"  {row.name:{width}}  {milliseconds(row.ms):>9}{sdpa}  {ratio:>7}  {spread:>14}  {peak:>9}  {row.note}"
        lines.append(line.rstrip())
    lines += [wrapped for name, reason in missing for wrapped in _wrapped(f"{name}: {reason}")]
    return lines


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _spread(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"{low:.2f} to {high:.2f}" if high < 100 else f"{low:,.0f} to {high:,.0f}"


def milliseconds(ms: float | None) -> str:
    """Return a time with three or four significant digits."""
    if ms is None:
        return ""
    return f"{ms:.3f}" if ms < 10 else f"{ms:.2f}" if ms < 100 else f"{ms:,.1f}" if ms < 1000 else f"{ms:,.0f}"


def layer_title(record: dict) -> str:
    """Return what one shape and pass measures, in words."""
    return (
        "{batch} x {tokens:,} tokens, {q_heads}/{kv_heads} heads of {head_dim}, {steps} steps x {words} words, "
        "{dtype}: ".format(**record)
        + record["pass"].replace("+", " + ")
    )


def layer_rows(records: Sequence[dict], auto: str | None) -> list[Row]:
    """Return the rows of one shape and pass; ``auto`` is the contender that ``engine="auto"`` takes."""
    rows = []
    for r in records:
        notes = []
        if r["contender"] == r["fastest_plain"]:
            notes.append("fastest plain")
        if r["contender"] == auto:
            notes.append("what auto takes")
        if r["kind"] == "map alone":
            notes.append("without attention")
        if r["calls"] < 3:
            notes.append("one call")
        rows.append(
            Row(
                r["contender"], r["median_ms"], r["over_plain"], r.get("over_plain_q1"), r.get("over_plain_q3"),
                r["peak_mib"], ", ".join(notes), r.get("over_sdpa"),
            )
        )  # fmt: skip
    return rows


def layer_sentence(records: Sequence[dict], auto: str | None) -> str | None:
    """Return one sentence on one shape and pass: ours over plain attention and over eager, and their memory."""
    named = {r["contender"]: r for r in records}
    ours = named.get(auto or "") or min(
        (r for r in records if r["kind"] == "map"), key=lambda r: r["median_ms"], default=None
    )
    if ours is None or ours["over_plain"] is None:
        return None
    parts = []
    sdpa, plain = ours.get("fastest_sdpa"), ours["fastest_plain"]
    if sdpa is not None and ours.get("over_sdpa") is not None:
        parts.append(f"{ours['over_sdpa']:.2f} of the time of plain SDPA ({sdpa.removeprefix('sdpa, ')})")
    if plain != sdpa:
        parts.append(f"{ours['over_plain']:.2f} of that of {plain}")
    eager = next((r for r in records if r["kind"] == "eager"), None)
    if eager is not None:
        parts.append(f"{ours['median_ms'] / eager['median_ms']:.2f} of eager's")
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    text = "At {batch} x {tokens:,} ({dtype}, ".format(**ours) + ours["pass"].replace("+", " + ")
    text += f") attention with its map ({ours['contender'].removeprefix('molsaki, ')}) takes {listed}"
    if eager is not None and ours["peak_mib"] is not None and eager["peak_mib"] is not None:
        text += f", with {ours['peak_mib']:,.0f} MiB at the peak instead of {eager['peak_mib']:,.0f}"
    return text + "."


def _wrapped(text: str, width: int = WIDTH) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="  not measured: ", subsequent_indent="    ")
