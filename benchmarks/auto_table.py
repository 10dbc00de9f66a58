"""The rows of ``molsaki_kernels/auto.py`` that measured rows call for.

    python -m benchmarks.auto_table benchmarks/results/FILE.csv [--mode eager]

Prints ``Measured(...)`` entries to paste: for each architecture, pass and head dimension, the engines from fastest to
slowest in each stretch of lengths, by the geometric mean of ``over_plain`` over the shapes of that length. Only engines
that were measured on every one of these shapes are compared; neighbouring lengths with the same order are one entry.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from molsaki_kernels.engine_selection import Measured, padded_head_dim

from .layer import read_rows

PREFIX = "molsaki, "  # of contenders that are engines


def proposed(rows: Iterable[dict], source: str, mode: str = "eager") -> list[Measured]:
    """The entries for rows of ``benchmarks.layer``; ``source`` names the CSV they are in.

    A stretch goes from one measured length to the next; the last one ends at twice the longest. The benchmark's shapes
    are causal and have no other feature.
    """
    ratios: dict[tuple, dict[int, dict[str, dict[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["contender"].startswith(PREFIX) and row.get("mode", "eager") == mode and row["over_plain"]:
            key = row["arch"], row["pass"] == "forward+backward", padded_head_dim(row["head_dim"])
            shapes = ratios[key][row["tokens"]]
            shapes.setdefault(row["shape"], {})[row["contender"].removeprefix(PREFIX)] = float(row["over_plain"])
    found: list[Measured] = []
    for (arch, backward, head_dim), lengths in sorted(ratios.items()):
        starts = sorted(lengths)
        for start, stop in zip(starts, [*starts[1:], 2 * starts[-1]], strict=True):
            engines = ordered(lengths[start].values())
            entry = Measured(arch, backward, head_dim, (start, stop), (), engines, source)
            last = found[-1] if found else None
            if last and (last.arch, last.backward, last.head_dim, last.engines) == (arch, backward, head_dim, engines):
                found[-1] = Measured(arch, backward, head_dim, (last.tokens[0], stop), (), engines, source)
            else:
                found.append(entry)
    return found


def ordered(shapes: Iterable[dict[str, float]]) -> tuple[str, ...]:
    """The engines that every shape has, the fastest first."""
    shapes = list(shapes)
    common = set(shapes[0]).intersection(*shapes[1:])
    means = {name: statistics.fmean(math.log(ratios[name]) for ratios in shapes) for name in common}
    return tuple(sorted(common, key=lambda name: (means[name], name)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.auto_table", description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--mode", default="eager", choices=("eager", "graph", "compile"))
    arguments = parser.parse_args(argv)
    rows = read_rows(arguments.csv)
    if not rows:
        parser.error(f"csv: expected the rows of benchmarks.layer, {arguments.csv} has none")
    if any("arch" not in row for row in rows):
        parser.error(f"csv: expected a column arch, {arguments.csv} was written before there was one")
    for entry in proposed(rows, arguments.csv.name, arguments.mode):
        print(f"    {entry},")


if __name__ == "__main__":
    main()
