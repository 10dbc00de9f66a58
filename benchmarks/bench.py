"""Measures this machine: attention with its map against every plain attention found here, and against eager.

    python -m benchmarks [--size quick|default|full] [--shapes 1x2048 8x256:5x20] [--dtype bfloat16] [--seconds S]
    python -m benchmarks --what step                  a whole training step instead of one layer
    python -m benchmarks --list                       the machine and what would be measured; nothing is
    python -m benchmarks compare BEFORE AFTER         two files of records

Every contender is first compared with eager attention: one whose result is wrong is not timed. Then all of them take
turns in rounds of random order. The run prints a table per shape and pass, writes its records as CSV and JSON into
``benchmarks/runs/MACHINE/``, prints what changed since the last run there, and draws the plot. How to read it:
docs/benchmarking.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import re
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from molsaki_kernels.engine_selection import choose_engine
from molsaki_kernels.spec import AttentionInputs
from molsaki_kernels.validation import make_options

from . import compare
from .bench_table import WIDTH, layer_rows, layer_sentence, layer_title, table
from .candidates import MATERIALISES, Candidate, candidates
from .check import LIMITS, Probe, Worker
from .contenders import step
from .layer import PASSES, in_turn, make_sets, pass_name, read_records, timing, write_csv, write_json
from .machine import details, folder_of, header, machine_of
from .measure import launches, paired
from .shapes import CPU, CPU_MORE, Shape, cuda_grid

RUNS = Path(__file__).parent / "runs"
SIZES = ("quick", "default", "full")
SECONDS = {"quick": 3.0, "default": 8.0, "full": 20.0}  # per shape and pass
SHAPE = re.compile(r"(\d+)x(\d+)(?::(\d+)x(\d+))?")
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda (also for ROCm), got {arguments.device!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: PyTorch finds no GPU on this machine; use --device cpu")
    if arguments.threads is not None:
        if arguments.threads < 1:
            parser.error(f"--threads: expected at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    if arguments.compare not in (None, "none"):
        try:
            compare.measurements(read_records(Path(arguments.compare)))
        except (IndexError, KeyError, ValueError):
            parser.error(f"--compare: expected a CSV of an earlier run, or none; {arguments.compare} has no records")
    torch._dynamo.config.recompile_limit = 1000  # FlexAttention compiles for every shape; beyond, it runs eagerly
    machine, more = machine_of(device), details(device)
    print(*header(machine, more), sep="\n")
    if arguments.what == "step":
        from . import bench_step  # imports transformers

        return run(arguments, machine, more, lambda: bench_step.groups(arguments, device, machine))
    shapes = shapes_of(arguments, parser, device)
    print(*absent(shapes, device, arguments), sep="\n")
    if arguments.list:
        for shape in shapes:
            print(f"would measure {shape.name}, {shape.steps} steps")
        return 0
    return run(arguments, machine, more, lambda: layer_groups(shapes, arguments, device, machine))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--what", choices=("layer", "step"), default="layer", help="one attention layer, or a whole training step")
    add("--size", choices=SIZES, default="default", help="about one, three or fifteen minutes on two CPU cores")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (also for ROCm)")
    add("--shapes", nargs="+", metavar="BxM[:SxW]", help="batch x tokens, with S steps x W words in each sequence")
    add("--heads", metavar="Q/KV", help="query and key heads of --shapes (CPU: 9/9, GPU: 32/8)")
    add("--head_dim", type=int, help="head dimension of --shapes (CPU: 64, GPU: 128)")
    add("--dtype", choices=[*LIMITS, "bf16"], help="float32 on a CPU, bfloat16 on a GPU")
    add("--passes", nargs="+", choices=PASSES, default=PASSES)
    add("--seconds", type=float, help="to time a shape and pass")
    add("--contenders", nargs="+", metavar="TEXT", help="only those whose name contains one of these texts")
    add("--threads", type=int, help="threads of PyTorch on a CPU")
    add("--model", help="of --what step: a folder, or a random Llama of benchmarks.step")
    add("--save", type=Path, metavar="CSV", help="write the records here, and a JSON file and the plot beside it")
    add("--compare", metavar="CSV", help="compare with this file instead of the last run; none: with nothing")
    compare.add_fail_option(parser)
    add("--no_memory", action="store_true", help="do not report the peak memory")
    add("--no_plot", action="store_true", help="do not draw the plot")
    add("--list", action="store_true", help="print the machine and what would be measured, and end")
    return parser


def shapes_of(arguments: argparse.Namespace, parser: argparse.ArgumentParser, device: torch.device) -> list[Shape]:
    """Return the shapes to measure: those asked for, or those of the size."""
    on_cpu = device.type == "cpu"
    dtype = {"bf16": "bfloat16"}.get(arguments.dtype, arguments.dtype)
    if arguments.shapes is None:
        for name in ("heads", "head_dim"):
            if getattr(arguments, name) is not None:
                parser.error(f"--{name}: expected together with --shapes")
        shapes = cpu_shapes(arguments.size) if on_cpu else cuda_shapes(arguments.size)
        if dtype is None:
            return shapes
        return list({s.name: s for s in (dataclasses.replace(shape, dtype=dtype) for shape in shapes)}.values())
    heads = re.fullmatch(r"(\d+)/(\d+)", arguments.heads or ("9/9" if on_cpu else "32/8"))
    if heads is None or not int(heads[2]) or int(heads[1]) % int(heads[2]):
        parser.error(f"--heads: expected Q/KV with Q a multiple of KV, such as 32/8, got {arguments.heads!r}")
    head_dim = arguments.head_dim if arguments.head_dim is not None else 64 if on_cpu else 128
    if head_dim < 1:
        parser.error(f"--head_dim: expected at least 1, got {head_dim}")
    shapes = []
    for text in arguments.shapes:
        match = SHAPE.fullmatch(text)
        if match is None:
            parser.error(
                f"--shapes: expected BATCHxTOKENS or BATCHxTOKENS:STEPSxWORDS such as 8x256:5x20, got {text!r}"
            )
        batch, tokens, steps, words = (int(x) if x else 0 for x in match.groups())
        if not batch or tokens < 2:
            parser.error(f"--shapes: expected at least 1 sequence of 2 tokens, got {text!r}")
        usual = next((s for s in (*CPU, *CPU_MORE) if (s.batch, s.tokens) == (batch, tokens)), None)
        steps = steps or (usual.steps if usual else max(min(5, tokens), tokens // 136))
        words = words or (usual.words if usual else max(min(20, tokens), tokens // 20))
        if steps > tokens or words > tokens:
            parser.error(f"--shapes: expected at most {tokens} steps and words for {tokens} tokens, got {text!r}")
        sizes = (int(heads[1]), int(heads[2]), head_dim, dtype or ("float32" if on_cpu else "bfloat16"))
        shapes.append(Shape(batch, tokens, words, steps, *sizes))
    return shapes


def cpu_shapes(size: str) -> list[Shape]:
    return {"quick": [CPU[0], Shape(1, 1024, 50, 10)], "default": CPU, "full": [*CPU, *CPU_MORE]}[size]


def cuda_shapes(size: str) -> list[Shape]:
    """Return the short examples of the paper, then Llama's heads at growing lengths; "full": all that show a trend."""
    grid = [s for s in cuda_grid() if s.tier <= 1 and s.tokens <= 32768]
    if size == "full":
        return grid
    lengths = (2048, 4096) if size == "quick" else (2048, 4096, 16384)
    llama = [s for s in grid if s.tier == 0 and (s.kv_heads, s.head_dim) == (8, 128) and s.tokens in lengths]
    return [grid[0], *llama]


def absent(shapes: Iterable[Shape], device: torch.device, arguments: argparse.Namespace) -> list[str]:
    """Return a line for each candidate that cannot run here, with the reason, and one with the names of the others."""
    reasons: dict[str, str] = {}
    present: dict[str, None] = {}
    for shape in shapes:
        for candidate in chosen(shape, device, arguments):
            if candidate.reason is not None:
                reasons.setdefault(candidate.name, candidate.reason)
            else:
                present.setdefault(candidate.name)
    lines = [f"Measured: {'; '.join(present)}"] if present else []
    missing = {name: reason for name, reason in reasons.items() if name not in present}
    width = max(map(len, missing), default=0)
    return [*lines, *(["Not measured here:"] if missing else []), *(f"  {n:{width}}  {r}" for n, r in missing.items())]


def chosen(shape: Shape, device: torch.device, arguments: argparse.Namespace) -> list[Candidate]:
    found = candidates(device, shape, slow_builds=arguments.size == "full")
    return [c for c in found if arguments.contenders is None or any(text in c.name for text in arguments.contenders)]


def run(
    arguments: argparse.Namespace,
    machine: dict[str, str],
    more: dict,
    groups: Callable[[], Iterator[tuple[list[dict], list[str], list[str]]]],
) -> int:
    """Print each group's table, save all records after each; then the sentences, what changed, and the plot.

    ``groups`` yields the records of a group, the lines of its table with a closing sentence apart, and failures.
    """
    begin = time.monotonic()
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder = RUNS / folder_of(machine)
    path = arguments.save or folder / f"{stamp}-{machine['commit']}.csv"
    records: list[dict] = []
    failures: list[str] = []
    sentences: list[str] = []
    interrupted = False
    try:
        for found, lines, faults in groups():
            *lines, sentence = lines
            print("", *lines, sep="\n", flush=True)
            failures += faults
            if not found:
                continue
            records += found
            sentences += [sentence] if sentence else []
            write_csv(path, records)
            facts = {"machine": machine | more, "records": records}
            write_json(path.with_suffix(".json"), facts)
    except KeyboardInterrupt:
        interrupted = True
        print("\nInterrupted.", file=sys.stderr)
    if not records:
        print("Nothing was measured.", file=sys.stderr)
        return INTERRUPTED if interrupted else 1
    print("", *(textwrap.fill(sentence, WIDTH) for sentence in sentences), sep="\n")
    result = report_changes(arguments, records, folder, path)
    print(f"\nRecords: {relative(path)} and {path.with_suffix('.json').name}")
    if not arguments.no_plot:
        draw(records, path)
    print(f"{time.monotonic() - begin:.0f} s")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return INTERRUPTED if interrupted else 1 if failures else result


def report_changes(arguments: argparse.Namespace, records: list[dict], folder: Path, path: Path) -> int:
    """Print what changed since the last run here, or since ``--compare``; return the status for --fail_on_slower."""
    if arguments.compare == "none":
        return 0
    if arguments.compare is not None:
        before = Path(arguments.compare), read_records(Path(arguments.compare))
    else:
        last = compare.last_run(folder, records, exclude=path)
        if last is None:
            print("\nThere is no earlier run of these shapes on this machine to compare with.")
            return 0
        before = last
    changes = compare.compared(compare.measurements(before[1]), compare.measurements(records))
    if not changes:
        print(f"\n{relative(before[0])} has none of these shapes and passes.")
        return 0
    print("", *compare.report(changes, str(relative(before[0]))), sep="\n")
    return compare.status(changes, arguments.fail_on_slower)


def draw(records: list[dict], path: Path) -> None:
    """Draw the plot beside the records, if there is matplotlib."""
    try:
        from . import bench_plot
    except ModuleNotFoundError as reason:
        if (reason.name or "").partition(".")[0] != "matplotlib":
            raise
        print('No plot: matplotlib is not installed (pip install "matplotlib>=3.9", or the extra "plot").')
        return
    for picture in bench_plot.draw(records, path):
        print(f"Plot: {relative(picture)}")


def relative(path: Path) -> Path:
    """Return the path from the working directory, if it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def layer_groups(
    shapes: Sequence[Shape], arguments: argparse.Namespace, device: torch.device, machine: dict[str, str]
) -> Iterator[tuple[list[dict], list[str], list[str]]]:
    """Measure one shape and pass after the other."""
    seconds = arguments.seconds if arguments.seconds is not None else SECONDS[arguments.size]
    if arguments.seconds is None and device.type == "cuda":
        seconds /= 5
    with Worker(device) as worker:
        for shape in shapes:
            for name in arguments.passes:
                yield measured(shape, name == PASSES[0], arguments, device, machine, worker, seconds)


def measured(
    shape: Shape,
    backward: bool,
    arguments: argparse.Namespace,
    device: torch.device,
    machine: dict[str, str],
    worker: Worker,
    seconds: float,
) -> tuple[list[dict], list[str], list[str]]:
    """Check and time one shape and pass; return its records, the lines of the table with a sentence, and failures."""
    probes: dict[str, Probe] = {}
    running: dict[str, Candidate] = {}
    missing: dict[str, str] = {}
    failures = []
    for candidate in chosen(shape, device, arguments):
        name = candidate.name
        if candidate.reason is not None:
            missing[name] = candidate.reason
            continue
        progress(f"checking {name} at {shape.name}, {pass_name(backward)}")
        found = worker.probe(shape, name, backward)
        if found.reason is None:
            probes[name], running[name] = found, candidate
            continue
        missing[name] = found.reason
        refused = found.reason.startswith("engine:")  # an engine that refuses a call says so
        if found.wrong or (candidate.kind in ("map", "map alone") and not refused):
            failures.append(f"{name} at {shape.name}, {pass_name(backward)}: {found.reason}")
    progress(f"timing {shape.name}, {pass_name(backward)}")
    times = timed(shape, backward, running, probes, device, seconds)
    progress("")
    records = make_records(shape, backward, running, probes, times, machine, arguments.no_memory, device)
    constant = {c.name for c in chosen(shape, device, arguments) if c.reason is not None}
    own = [(name, reason) for name, reason in missing.items() if name not in constant or "GiB" in reason]
    auto = auto_contender(shape, backward, device)
    title = layer_title({**vars(shape), "pass": pass_name(backward)})
    if not records:
        return [], [*table(title, "x plain", [], own), ""], failures
    lines = table(title, "x plain", layer_rows(records, auto), own)
    return records, [*lines, layer_sentence(records, auto) or ""], failures


def timed(
    shape: Shape,
    backward: bool,
    running: dict[str, Candidate],
    probes: dict[str, Probe],
    device: torch.device,
    seconds: float,
) -> dict[str, dict[int, float]]:
    """Return the seconds of a call by round, for each contender.

    A slow contender that stores all weights is timed only by the call that checked it. The others are compared with
    each other, for which the first calls of a process would not suffice.
    """
    slow = {
        name
        for name, found in probes.items()
        if name in MATERIALISES and found.seconds is not None and 3 * found.seconds > seconds
    }
    once = {name: {-1: probes[name].seconds or 0.0} for name in slow}
    fast = {name: candidate.contender for name, candidate in running.items() if name not in slow}
    if not fast:
        return once
    sets = make_sets(shape, device)
    functions = {name: in_turn([lambda c=c, x=x: step(c, x, backward) for x in sets]) for name, c in fast.items()}
    plain = [name for name in fast if running[name].kind == "plain"]
    return {**paired(functions, device, seconds, plain, len(sets)), **once}


def make_records(
    shape: Shape,
    backward: bool,
    running: dict[str, Candidate],
    probes: dict[str, Probe],
    times: dict[str, dict[int, float]],
    machine: dict[str, str],
    no_memory: bool,
    device: torch.device,
) -> list[dict]:
    """Return the records with the columns of ``benchmarks.layer``, and with quartiles, ratio to SDPA and error."""
    medians = {name: statistics.median(found.values()) for name, found in times.items()}
    plain = {name: medians[name] for name in times if running[name].kind == "plain"}
    fastest = min(plain, key=plain.__getitem__, default=None)
    fastest_sdpa = min((name for name in plain if name.startswith("sdpa")), key=plain.__getitem__, default=None)
    inputs = make_sets(shape, device)[0] if device.type == "cuda" and running else None
    records = []
    for name, candidate in running.items():
        own = times[name]
        assert candidate.contender is not None
        neighbours = None if fastest is None else (fastest, beside(own, times[fastest]))
        record = timing(shape, backward, "eager", candidate.contender, [*own.values()], neighbours, machine["device"])
        low, high = quartiles([*own.values()])
        record["launches"] = None
        if inputs is not None:
            record["launches"] = launches(lambda c=candidate.contender: step(c, inputs, backward), device)
        peak = None if no_memory else probes[name].peak_mib
        record["peak_mib"] = None if peak is None else round(peak, 1)
        record["q1_ms"], record["q3_ms"] = (round(x * 1e3, 5) if x is not None else None for x in (low, high))
        for column, reference in (("plain", fastest), ("sdpa", fastest_sdpa)):
            ratios = None if reference is None else [
                a / b for a, b in zip(own.values(), beside(own, times[reference]), strict=True)
            ]  # fmt: skip
            record[f"fastest_{column}"] = reference
            record[f"over_{column}"] = None if ratios is None else round(statistics.median(ratios), 4)
            low, high = (None, None) if ratios is None else quartiles(ratios)
            for key, value in (("q1", low), ("q3", high)):
                record[f"over_{column}_{key}"] = None if value is None else round(value, 4)
        error = probes[name].error
        record["error"] = None if error is None else float(f"{error:.2e}")
        records.append(record | machine)
    return records


def beside(own: dict[int, float], other: dict[int, float]) -> list[float]:
    """Return the other's time in each round of ``own``; its median for rounds that it took no part in."""
    usual = statistics.median(other.values())
    return [other.get(i, usual) for i in own]


def quartiles(values: list[float]) -> tuple[float | None, float | None]:
    """Return the first and third quartile; None for fewer than three values."""
    if len(values) < 3:
        return None, None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def auto_contender(shape: Shape, backward: bool, device: torch.device) -> str:
    """Return the name of the contender that ``engine="auto"`` takes for a shape."""
    size = (shape.batch, shape.q_heads, shape.tokens, shape.head_dim)
    dtype = getattr(torch, shape.dtype)
    q = torch.empty(1, device=device, dtype=dtype).expand(size)
    k = torch.empty(1, device=device, dtype=dtype).expand(size[0], shape.kv_heads, *size[2:])
    if backward:
        q, k = (x.detach().requires_grad_() for x in (q, k))
    options = make_options(q, causal=True, scale=None, window=None, softcap=None, head_reduction="mean")
    return f"molsaki, {choose_engine('auto', AttentionInputs(q, k, k).request(options))}"


def progress(text: str) -> None:
    """Show the current activity on a terminal; the next text replaces it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:100]}", end="", file=sys.stderr, flush=True)
