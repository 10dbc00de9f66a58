"""Computes the entries of ``engine_selection.MEASURED`` from the records of ``benchmarks.layer``.

    python -m benchmarks.auto_table benchmarks/results/FILE.csv [--mode eager]

Prints ``Measured(...)`` entries to paste: for each architecture, pass and head dimension, the engines from fastest to
slowest per range of lengths, by the geometric mean of ``over_plain`` over the shapes of that length. Only engines
that were measured on every one of these shapes are compared; neighbouring lengths with the same order form one entry.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from molsaki_kernels.attention import ENGINES
from molsaki_kernels.engine_selection import Measured, padded_head_dim

from .layer import read_records

PREFIX = "molsaki, "  # the names of contenders that are engines begin so


def proposed(records: Iterable[dict], source: str, mode: str = "eager") -> list[Measured]:
    """Return the entries for records of ``benchmarks.layer``; ``source`` is the name of their CSV.

    A range goes from one measured length to the next; the last one ends at twice the longest. The benchmark's shapes
    are causal and have no other feature.
    """
    ratios: dict[tuple, dict[int, dict[str, dict[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        engine = r["contender"].removeprefix(PREFIX).removesuffix(" (cuDNN)")
        if engine in ENGINES and r["contender"] != engine and r.get("mode", "eager") == mode and r["over_plain"]:
            key = r["arch"], r["pass"] == "forward+backward", padded_head_dim(r["head_dim"])
            shapes = ratios[key][r["tokens"]]
            of_shape = shapes.setdefault(r["shape"], {})
            of_shape[engine] = min(float(r["over_plain"]), of_shape.get(engine, float("inf")))
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
    """Return the engines that were measured on every shape, the fastest first."""
    shapes = list(shapes)
    common = set(shapes[0]).intersection(*shapes[1:])
    means = {name: statistics.fmean(math.log(ratios[name]) for ratios in shapes) for name in common}
    return tuple(sorted(common, key=lambda name: (means[name], name)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.auto_table", description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--mode", default="eager", choices=("eager", "graph", "compile"))
    arguments = parser.parse_args(argv)
    records = read_records(arguments.csv)
    if not records:
        parser.error(f"csv: expected records of benchmarks.layer, {arguments.csv} has none")
    if any("arch" not in record for record in records):
        parser.error(f"csv: expected a column arch, {arguments.csv} has none")
    for entry in proposed(records, arguments.csv.name, arguments.mode):
        print(f"    {entry},")


if __name__ == "__main__":
    main()
