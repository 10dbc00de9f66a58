"""Measures a whole training step for ``python -m benchmarks --what step``, in the records of ``benchmarks.step``."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .bench_table import Row, table
from .measure import paired
from .step import BATCHES, CUDA_BATCHES, DTYPES, OURS, Batch, Setup, default_dtype, peak_memory

CONTENDERS = ("dss", "dss, sdpa", OURS, "molsaki, live teacher", "eager")
# Contenders whose losses agree before the first update (tests/bench/test_step_benchmark.py), up to rounding.
SAME_LOSS = {"dss, sdpa": "dss", "molsaki, live teacher": "eager"}
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
SECONDS = {"quick": 10.0, "default": 40.0, "full": 120.0}  # per batch


def groups(
    arguments: argparse.Namespace, device: torch.device, machine: dict[str, str]
) -> Iterator[tuple[list[dict], list[str], list[str]]]:
    """Measure one batch after the other; yield its records, the lines of its table with a sentence, and failures."""
    dtype = {"bf16": "bfloat16", None: default_dtype(device)}.get(arguments.dtype, arguments.dtype)
    if dtype not in DTYPES:
        raise SystemExit(f"--dtype: a training step is measured in {' or '.join(DTYPES)}, got {dtype!r}")
    for name in ("heads", "head_dim"):
        if getattr(arguments, name) is not None:
            raise SystemExit(f"--{name}: a training step has the heads of --model")
    model = arguments.model or ("small" if device.type == "cpu" else "smollm2-135m")
    seconds = arguments.seconds if arguments.seconds is not None else SECONDS[arguments.size]
    for batch in batches(arguments, device):
        setup = Setup(model, model, batch, False, str(device), dtype)
        if arguments.list:
            print(f"would measure a training step of {Path(model).name}, {batch.name}, {dtype}")
            continue
        yield measured(setup, arguments, device, machine, seconds)


def batches(arguments: argparse.Namespace, device: torch.device) -> list[Batch]:
    """Return the batches of the size, or those of ``--shapes``, each with 40 % of its tokens in the question."""
    if arguments.shapes is None:
        usual = CUDA_BATCHES if device.type == "cuda" else BATCHES
        return {"quick": usual[:1], "default": [usual[0], usual[2]], "full": usual}[arguments.size]
    found = []
    for text in arguments.shapes:
        size, _, plan = text.partition(":")
        try:
            n, tokens = (int(x) for x in size.split("x"))
            steps, words = (int(x) for x in plan.split("x")) if plan else (max(5, tokens // 100), max(5, tokens // 20))
        except ValueError:
            raise SystemExit(f"--shapes: expected BATCHxTOKENS or BATCHxTOKENS:STEPSxWORDS, got {text!r}") from None
        if n < 1 or tokens < 16 or not 1 <= steps < tokens or not 1 <= words <= tokens:
            raise SystemExit(f"--shapes: expected at least 1x16 and fewer steps and words than tokens, got {text!r}")
        found.append(Batch(n, tokens, words, steps))
    return found


def measured(
    setup: Setup, arguments: argparse.Namespace, device: torch.device, machine: dict[str, str], seconds: float
) -> tuple[list[dict], list[str], list[str]]:
    """Check the losses, then time the steps in turns and measure their memory."""
    steps: dict[str, Callable[[], Tensor]] = {}
    losses: dict[str, float] = {}
    missing: list[tuple[str, str]] = []
    for name in CONTENDERS:
        if arguments.contenders is not None and not any(text in name for text in arguments.contenders):
            continue
        try:
            steps[name] = setup.step(name)
            losses[name] = steps[name]().item()
        except torch.OutOfMemoryError as reason:  # the others are still measured
            missing.append((name, str(reason).splitlines()[0]))
            steps.pop(name, None)
    failures = []
    for name, why in wrong(losses, TOLERANCE[setup.dtype]).items():
        missing.append((name, why))
        failures.append(f"{name} at {setup.batch.name}: {why}")
        del steps[name]
    title = f"A training step of {Path(setup.student).name}, batch {setup.batch.name}, {DTYPES[setup.dtype]}"
    if not steps:
        return [], [*table(title, "x dss", [], missing), ""], failures
    functions: dict[str, Callable[[], None]] = {name: lambda s=step: _discard(s) for name, step in steps.items()}
    times = paired(functions, device, seconds, [name for name in ("dss",) if name in steps])
    peaks = {} if arguments.no_memory else {name: _peak(setup, name) for name in steps}
    rows, records = [], []
    for name, found in times.items():
        row, quantities = _row(name, found, times, peaks.get(name))
        rows.append(row)
        for quantity, value in {"loss": losses[name], **quantities}.items():
            records.append(setup.record(name, quantity, value, machine))
    return records, [*table(title, "x dss", rows, missing), _sentence(setup, {r.name: r for r in rows})], failures


def wrong(losses: dict[str, float], tolerance: float) -> dict[str, str]:
    """Return what is wrong with the losses of contenders: not finite, or unlike one that computes the same."""
    found = {}
    for name, loss in losses.items():
        other = losses.get(SAME_LOSS.get(name, name), loss)
        if not math.isfinite(loss):
            found[name] = f"its loss is {loss}"
        elif not abs(loss - other) <= tolerance * abs(other):
            found[name] = f"its loss is {loss:.6g}, that of {SAME_LOSS[name]} is {other:.6g}"
    return found


def _discard(step: Callable[[], Tensor]) -> None:
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak(setup: Setup, name: str) -> tuple[float, float] | None:
    try:
        return peak_memory(setup, name)
    except (OSError, torch.OutOfMemoryError):  # there is no /proc, or not enough memory
        return None


def _row(
    name: str, found: dict[int, float], times: dict[str, dict[int, float]], peak: tuple[float, float] | None
) -> tuple[Row, dict[str, float]]:
    values = [*found.values()]
    median = statistics.median(values)
    quantities = {"seconds": median, "steps timed": float(len(values))}
    if len(values) >= 3:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        quantities |= {"seconds, first quartile": low, "seconds, third quartile": high}
    ratio = low_ratio = high_ratio = None
    if "dss" in times:
        ratios = [t / times["dss"][i] for i, t in found.items() if i in times["dss"]]
        if ratios:
            ratio = statistics.median(ratios)
            if len(ratios) >= 3:
                low_ratio, _, high_ratio = statistics.quantiles(ratios, n=4, method="inclusive")
        if ratio is not None and name != "dss":
            quantities["time over dss"] = ratio
    if "eager" in times and name != "eager":
        both = [times["eager"][i] / t for i, t in found.items() if i in times["eager"]]
        if both:
            quantities["times faster than eager"] = statistics.median(both)
    if peak is not None:
        quantities |= {"peak MiB of a step": peak[0], "peak MiB with weights and optimizer": peak[1]}
    row = Row(name, 1e3 * median, ratio, low_ratio, high_ratio, None if peak is None else peak[0])
    return row, quantities


def _sentence(setup: Setup, rows: dict[str, Row]) -> str:
    ours, eager = rows.get(OURS), rows.get("eager")
    if ours is None or ours.ms is None or ours.ratio is None:
        return ""
    text = f"At {setup.batch.name} a step with stored maps takes {ours.ratio:.2f} of the time of a step without maps"
    if eager is not None and eager.ms is not None:
        text += f" and {ours.ms / eager.ms:.2f} of that of two eager models"
        if ours.peak_mib is not None and eager.peak_mib is not None:
            text += f", with {ours.peak_mib:,.0f} MiB at the peak instead of {eager.peak_mib:,.0f}"
    return text + "."
