"""Compares the records of two runs, contender by contender, with a verdict that takes their spread into account.

    python -m benchmarks compare BEFORE.csv AFTER.csv [--fail_on_slower PERCENT]

A layer's time is compared as its ratio to PyTorch's attention in the same run, where both files have it: that code is
the same in both, so that a slow period of the machine does not count as a change. Otherwise the times are compared. A
change is reported as one if it exceeds the uncertainty of both medians, 1.57 times the interquartile range over the
root of the number of calls (McGill, Tukey and Larsen 1978), and :data:`LEAST`, and if the first quartiles, which other
work on the machine disturbs less, differ in the same direction by more than :data:`LEAST`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .bench_table import layer_title, milliseconds
from .layer import read_records

LEAST = 0.05  # as a share of the time
UNKNOWN = 0.10  # half-width for records without quartiles
DRIFT = 0.10  # a larger change of the reference is reported
SLOWER_STATUS = 3  # exit status for --fail_on_slower
OURS = ("map", "map alone")


@dataclasses.dataclass(frozen=True)
class Timing:
    """A median with its uncertainty, both in the same unit."""

    median: float
    half_width: float  # as a share of the median; infinite for fewer than three calls
    low: float | None = None  # first quartile

    @classmethod
    def of(cls, median: float, q1: float | None, q3: float | None, calls: float | None) -> Timing:
        if calls is not None and calls < 3:
            return cls(median, math.inf)
        if q1 is None or q3 is None or calls is None:
            return cls(median, UNKNOWN)
        return cls(median, 1.57 * (q3 - q1) / median / math.sqrt(calls), q1)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One contender of one run: its time, and its ratio to ``control``, code that the two runs share."""

    title: str
    contender: str
    ours: bool
    ms: Timing
    ratio: Timing | None = None
    control: str | None = None
    run: str = ""
    torch: str = ""
    device: str = ""


@dataclasses.dataclass(frozen=True)
class Change:
    """``change`` is that of the time as a share; within ``noise`` it means nothing. ``by_ratio``: see the module.

    ``low`` is the change of the first quartiles, or None. ``is_reference``: others are compared by their ratio to it.
    """

    before: Measured
    after: Measured
    change: float
    noise: float
    by_ratio: bool = False
    low: float | None = None
    is_reference: bool = False

    @property
    def verdict(self) -> str:
        if self.is_reference:
            return "the reference"
        if math.isinf(self.noise):
            return "too few calls"
        agrees = self.low is None or (abs(self.low) > LEAST and (self.low > 0) == (self.change > 0))
        if abs(self.change) <= self.noise or not agrees:
            return "no change"
        return "slower" if self.change > 0 else "faster"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    add_fail_option(parser)
    arguments = parser.parse_args(argv)
    both = []
    for name in ("before", "after"):
        path = getattr(arguments, name)
        records = read_records(path)
        if not records:
            parser.error(f"{name}: expected a CSV of python -m benchmarks, layer or step, {path} has no records")
        try:
            both.append(measurements(records))
        except (KeyError, ValueError) as reason:
            parser.error(f"{name}: {path}: {reason}")
    changes = compared(*both)
    print(*report(changes, str(arguments.before)), sep="\n")
    if not changes:
        print("The files have no shape, pass and contender in common.", file=sys.stderr)
        return 1
    return status(changes, arguments.fail_on_slower)


def add_fail_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fail_on_slower", "--fail-on-slower", type=float, metavar="PERCENT",
        help=f"exit with status {SLOWER_STATUS} if one of ours is slower by more than this, beyond the noise",
    )  # fmt: skip


def measurements(records: Sequence[dict]) -> dict[tuple, Measured]:
    """Return the last measurement of each shape, pass, mode and contender, from records of a layer or of a step."""
    if "contender" not in records[0] or not {"quantity", "median_ms"} & set(records[0]):
        raise ValueError(f"expected records of a layer or a step, got the columns {', '.join(records[0])}")
    made = _of_steps(records) if "quantity" in records[0] else (_of_layer(r) for r in records)
    return dict(made)


def _of_layer(r: dict) -> tuple[tuple, Measured]:
    key = (r["shape"], r["steps"], r["pass"], r.get("mode") or "eager", r["contender"])
    ratio = None
    if r.get("over_sdpa") and r["contender"] != r["fastest_sdpa"]:
        ratio = Timing.of(r["over_sdpa"], r["over_sdpa_q1"], r["over_sdpa_q3"], r["calls"])
    ours = r["kind"] in OURS or r["contender"].startswith("molsaki")
    ms = Timing.of(r["median_ms"], r.get("q1_ms"), r.get("q3_ms"), r["calls"])
    mode = "" if key[3] == "eager" else f", {key[3]}"
    where = (layer_title(r) + mode, r["contender"], ours, ms, ratio, r.get("fastest_sdpa"))
    return key, Measured(*where, *_run(r))


def _of_steps(records: Iterable[dict]) -> Iterable[tuple[tuple, Measured]]:
    groups: dict[tuple, dict[str, dict]] = {}
    for r in records:
        facts = tuple(str(r[k]) for k in ("teacher", "student", "batch", "words", "steps", "dtype", "compiled"))
        groups.setdefault((*facts, r["contender"], r["commit"], r["date"]), {})[r["quantity"]] = r
    for (*facts, contender, _, _), found in groups.items():
        if "seconds" not in found:
            continue
        r = found["seconds"]
        value = {quantity: one["value"] for quantity, one in found.items()}
        ms = Timing.of(
            1e3 * r["value"],
            *(1e3 * value[q] if q in value else None for q in ("seconds, first quartile", "seconds, third quartile")),
            value.get("steps timed"),
        )
        ours = contender.startswith(("molsaki", "dss")) and contender != "dss, sdpa"
        compiled = ", compiled" if facts[6] == "True" else ""
        title = f"a training step of {facts[1]}, {facts[2]}, {facts[5]}{compiled}"
        yield (*facts, contender), Measured(title, contender, ours, ms, None, None, *_run(r))


def _run(r: dict) -> tuple[str, str, str]:
    return f"{r['commit']} of {r['date']}", r["torch"], r["device"]


def compared(before: dict[tuple, Measured], after: dict[tuple, Measured]) -> list[Change]:
    """Return a change for each key that both have, in the order of ``after``."""
    changes = []
    for key, new in after.items():
        old = before.get(key)
        if old is None:
            continue
        same_control = old.control == new.control is not None and old.torch == new.torch
        by_ratio = bool(same_control and old.ratio and new.ratio)
        a, b = (old.ratio, new.ratio) if by_ratio else (old.ms, new.ms)
        assert a is not None and b is not None
        low = b.low / a.low - 1 if a.low and b.low else None
        noise = max(LEAST, a.half_width + b.half_width)
        is_reference = same_control and new.contender == new.control
        changes.append(Change(old, new, b.median / a.median - 1, noise, by_ratio, low, is_reference))
    return changes


def report(changes: Sequence[Change], before: str) -> list[str]:
    """Return the lines of a table of changes."""
    if not changes:
        return []
    runs = " and ".join(dict.fromkeys(c.before.run for c in changes))
    lines = [f"Compared with {runs} ({before})"]
    for what in ("device", "torch"):
        pairs = dict.fromkeys((getattr(c.before, what), getattr(c.after, what)) for c in changes)
        lines += [f"The {what} differs: {a} before, {b} now." for a, b in pairs if a != b]
    drift = max((c.change for c in changes if c.is_reference), key=abs, default=0.0)
    if abs(drift) > DRIFT:
        lines.append(
            f"PyTorch's attention itself changed by up to {100 * drift:+.0f} %: the machine was in another state."
        )
    width = max(len(c.after.contender) for c in changes)
    title = None
    for c in changes:
        if c.after.title != title:
            title = c.after.title
            columns = f"{'before':>9}  {'now, ms':>9}  {'change':>8}  {'noise':>7}  verdict"
            lines += ["", title, f"  {'contender':{width}}  {columns}"]
        control = f" (over {c.after.control})" if c.by_ratio else ""
        times = "  ".join(f"{milliseconds(m.ms.median):>9}" for m in (c.before, c.after))
        verdict = f"{100 * c.change:+7.1f}%  {_percent(c.noise)}  {c.verdict}{control}"
        lines.append(f"  {c.after.contender:{width}}  {times}  {verdict}")
    counts = {v: sum(c.verdict == v and c.after.ours for c in changes) for v in ("faster", "slower", "no change")}
    lines += ["", "Of ours: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + "."]
    return lines


def _percent(share: float) -> str:
    return " " * 7 if math.isinf(share) else f"{100 * share:6.1f}%"


def status(changes: Iterable[Change], percent: float | None) -> int:
    """Return the exit status for ``--fail_on_slower``, and name what is slower."""
    if percent is None:
        return 0
    slower = [c for c in changes if c.after.ours and c.verdict == "slower" and 100 * c.change > percent]
    for c in slower:
        print(f"slower by {100 * c.change:.1f} %: {c.after.contender}, {c.after.title}", file=sys.stderr)
    return SLOWER_STATUS if slower else 0


def last_run(folder: Path, records: Sequence[dict], exclude: Path | None = None) -> tuple[Path, list[dict]] | None:
    """Return the newest CSV of a folder that has one of these measurements from the same device, and its records.

    File names begin with date and time.
    """
    keys, device = set(measurements(records)), (records[0]["device"], records[0].get("isa") or "")
    for path in sorted(folder.glob("*.csv"), reverse=True):
        if exclude is not None and path.resolve() == exclude.resolve():
            continue
        found = [r for r in read_records(path) if (r.get("device"), r.get("isa") or "") == device]
        if found and ("quantity" in found[0]) == ("quantity" in records[0]) and keys & set(measurements(found)):
            return path, found
    return None


if __name__ == "__main__":
    sys.exit(main())
