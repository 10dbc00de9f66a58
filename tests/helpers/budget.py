"""The error budget: twice the error of eager attention on the same input in the same dtype, plus one rounding.

With ``MOLSAKI_ERROR_SHARES=FILE`` every comparison appends a line to a CSV: which share of its budget a result used.
The hardware runs keep it, because a GPU's arithmetic is coarser than the interpreter's and a share near 1 is worth
knowing before it is above 1. ``python -m tests.helpers.budget FILE`` prints the largest share per engine and result.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

RESULTS = ("out", "lse", "maps", "dq", "dk", "dv", "dsinks", "dlse")  # others are gradients of a model's weights
COLUMNS = ("test", "case", "result", "dtype", "share", "error", "tolerance")


def error(got: Tensor, oracle: Tensor) -> float:
    """Root-mean-square error relative to the oracle's root-mean-square; absolute where the oracle is zero."""
    difference = (got.double() - oracle).norm()
    scale = oracle.norm()
    return (difference / scale if scale > 0 else difference).item()


def assert_within_budget(name: str, got: Tensor, oracle: Tensor, eager: Tensor) -> None:
    """``got`` and ``eager`` were computed in the working dtype, ``oracle`` in float64, from the same numbers.

    ``name`` is ``"case: result"``.
    """
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    rounding = torch.finfo(got.dtype).eps
    if got.dtype == torch.float64 and eager.dtype == torch.float64:
        rounding *= 16  # the oracle has the same precision, and its own error is unknown
    found, allowed = error(got, oracle), 2 * error(eager, oracle) + rounding
    record(name, got.dtype, found, allowed)
    assert got.isfinite().all(), f"{name}: not finite"
    assert found <= allowed, f"{name}: error {found:.2e} exceeds the budget {allowed:.2e}"


def assert_zero(name: str, got: Tensor, oracle: Tensor) -> None:
    """``got`` should be zero everywhere, as dq is where one key is visible to every row.

    There eager has no error, but the kernel's result is the difference of terms of order ten: the budget is a rounding
    step of 16.
    """
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    largest = got.abs().max().item() if got.numel() else 0.0
    allowed = 16 * torch.finfo(got.dtype).eps
    record(name, got.dtype, largest, allowed)
    assert largest <= allowed, f"{name}: should be zero, {largest:.2e} exceeds {allowed:.2e}"


def record(name: str, dtype: torch.dtype, found: float, allowed: float) -> None:
    """Append a line to the CSV that ``MOLSAKI_ERROR_SHARES`` names; several processes may write to one file."""
    path = os.environ.get("MOLSAKI_ERROR_SHARES")
    if not path:
        return
    case, _, result = name.rpartition(": ")
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    share = found / allowed if allowed else float("inf")
    values = (test, case, result, str(dtype).removeprefix("torch."), f"{share:.4f}", f"{found:.3e}", f"{allowed:.3e}")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    try:  # the first process writes the header
        with open(path, "x") as file:
            file.write(",".join(COLUMNS) + "\n")
    except FileExistsError:
        pass
    with open(path, "a") as file:  # one write, so that lines of several processes do not mix
        file.write(text.getvalue())


def subject(line: dict[str, str]) -> str:
    """The engine that a comparison's case begins with, else the test's file without its decorations."""
    first = line["case"].split(" ")[0]
    if first in ("sdpa", "flash_attn", "flex", "triton", "eager", "native", "widened"):
        return first
    return Path(line["test"].split("::")[0]).stem.removeprefix("test_").removesuffix("_hardware") or "?"


def summary(lines: Iterable[dict[str, str]]) -> list[str]:
    """A line per engine, dtype and result with the number of comparisons, the largest share, and where it was."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for line in lines:
        result = line["result"] if line["result"] in RESULTS else "weights"
        groups.setdefault((subject(line), line["dtype"], result), []).append(line)
    found = []
    for key, members in sorted(groups.items()):
        # NaN counts as the largest share.
        worst = max(members, key=lambda line: (line["share"] == "nan", float(line["share"])))
        start = "{:14s} {:9s} {:28s}".format(*key)
        found.append(f"{start} {len(members):5d}  {float(worst['share']):7.3f}  {worst['case']}")
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m tests.helpers.budget FILE", file=sys.stderr)
        return 2
    with open(arguments[0], newline="") as file:
        lines = list(csv.DictReader(file))
    print("engine         dtype     result                       cases  largest share of the budget, and its case")
    print(*summary(lines), sep="\n")
    over = sum(not float(line["share"]) <= 1 for line in lines)
    print(f"{len(lines)} comparisons, {over} over the budget")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
