"""One attention layer with its map against every plain attention of this machine without one, and against eager.

    python -m benchmarks.layer [--device cpu|cuda] [--csv FILE] [--json FILE] [--seconds S] [--only TEXT] [--memory]
    python -m benchmarks.layer --csv FILE --limit 240     again and again, until the grid is complete
    python -m benchmarks.layer --expected                 what the grid takes, in calls of --limit; runs nothing
    python -m benchmarks.layer --only TEXT --profile DIR  traces and tables of torch.profiler (see profile.sh for ncu)

Prints a table as it goes and writes a row for each contender, mode, pass and shape as soon as a shape's pass is done.
A shape's pass whose rows are in the CSV already, from the same device and commit, is not measured again. ``over_plain``
is the median ratio of neighbouring calls to the fastest plain attention of the same mode; ``predicted_*`` is what
``predict.py`` expects. Modes: "eager" calls as a user does, "graph" replays a CUDA graph, so that the host's share is
gone, "compile" calls through ``torch.compile``; the last two for short shapes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from molsaki_kernels import engine_selection as auto

from .contenders import SLOW_TO_BUILD, Contender, contenders, fits_eager, step, with_lse
from .measure import captured, cuda_peak, interleaved, launches, peak_memory, profiled, ratio
from .shapes import CPU, CPU_MORE, Inputs, Shape, cuda_grid

SHORT = 16 * 512  # tokens of a batch up to which launches decide, so that graphs and torch.compile are measured too
# Seconds a bare machine takes to build what it runs: guesses for --expected and --limit, replaced by nothing measured.
BUILD_KERNELS, BUILD_FLEX, BUILD_COMPILE, SETUP = 20.0, 20.0, 3.0, 0.8


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="write the rows here, beside those that are there")
    parser.add_argument("--json", type=Path, help="write the same rows here")
    parser.add_argument("--seconds", type=float, help="of timing a shape, pass and mode (CPU: 20, CUDA: 1 or 0.4)")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds; starts nothing that would end later"
    )
    parser.add_argument("--only", default="", help="only shapes whose name holds this text")
    parser.add_argument(
        "--tier", type=int, default=2, help="0: shapes that a target is judged by, 1: and trends, 2: all"
    )
    parser.add_argument("--memory", action="store_true", help="also the peak memory on a CPU (a process a row)")
    parser.add_argument("--expected", action="store_true", help="print the order and the seconds expected")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write a trace of each contender instead of timing")
    parser.add_argument("--once", action="store_true", help="only run each contender, for a profiler from outside")
    arguments = parser.parse_args(argv)
    begin = time.monotonic()
    device = torch.device(arguments.device)
    shapes = cuda_grid() if device.type == "cuda" or arguments.expected else CPU + CPU_MORE
    chosen = [s for s in shapes if arguments.only in s.name and (s.tier <= arguments.tier or s in CPU + CPU_MORE)]
    todo = [(shape, backward) for shape in chosen for backward in (True, False)]
    if not todo:
        parser.error(f"--only: no shape's name holds {arguments.only!r}")
    if arguments.expected:
        print(*expectation(todo, arguments.seconds, arguments.limit), sep="\n")
        return 0
    torch._dynamo.config.recompile_limit = 1000  # FlexAttention is compiled for every shape; past the limit it is eager
    if arguments.once or arguments.profile:
        for shape, backward in todo:
            observe(shape, device, backward, arguments.profile)
        return 0

    machine = describe(device)
    rows = read_rows(arguments.csv)
    done = measured_already(rows, machine)
    failed: list[str] = []
    built: set = set()
    for shape, backward in todo:
        if (shape.name, pass_name(backward)) in done:
            continue
        expected = expected_seconds(shape, backward, arguments.seconds, built)
        if time.monotonic() - begin + expected > arguments.limit:
            left = sum((s.name, pass_name(b)) not in done for s, b in todo)
            print(f"--limit {arguments.limit:.0f} s: {left} of {len(todo)} left; run again with the same --csv")
            break
        built.add(build_key(shape))
        seconds = timing_seconds(shape, device, arguments.seconds)
        rows += measured(shape, device, backward, seconds, arguments.memory, machine, failed)
        done.add((shape.name, pass_name(backward)))
        for path, write in ((arguments.csv, write_csv), (arguments.json, write_json)):
            if path:
                write(path, rows)
    for said in failed:
        print(said, file=sys.stderr)
    return int(bool(failed))


def measured(
    shape: Shape,
    device: torch.device,
    backward: bool,
    seconds: float,
    memory: bool,
    machine: dict,
    failed: list[str],
) -> list[dict]:
    """The rows of one shape and pass. What of ours fails is added to ``failed``."""
    sets = make_sets(shape, device)
    rows = []
    for mode in modes(shape, device):
        calls, functions, kinds = {}, {}, {}
        for contender in contenders(device, shape):
            name, kind = contender.name, contender.kind
            if mode == "compile":
                if any(word in name for word in SLOW_TO_BUILD) or kind not in ("plain", "map"):
                    continue
                contender = compiled(contender)
            each = [lambda c=contender, x=x: step(c, x, backward) for x in sets]
            try:
                each[0]()
                functions[name] = captured(each) if mode == "graph" else in_turn(each)
            except Exception as reason:  # whatever one contender raises is not the end of the others
                said = f"{shape.name}: {name} ({mode}) cannot: {(str(reason).splitlines() or ['?'])[0]}"
                print(said)
                if kind in ("map", "map alone") and not str(reason).startswith("engine:"):
                    failed.append(said)
                continue
            calls[name], kinds[name] = each, kind
        if not functions:
            continue
        times = interleaved(functions, device, seconds, len(sets))
        plain = {name: statistics.median(times[name]) for name, kind in kinds.items() if kind == "plain"}
        fastest = min(plain, key=plain.get) if plain else None
        for name, kind in kinds.items():
            rows.append(
                {
                    **row_of(shape, backward, mode, name, kind, times[name], fastest, times.get(fastest), machine),
                    **resources(shape, device, backward, mode, name, calls[name][0], memory),
                    **machine,
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


def make_sets(shape: Shape, device: torch.device) -> list[Inputs]:
    """As many inputs as do not fit in the L2 together, so that no call finds its own there; one on a CPU."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return [with_lse(shape.inputs(device, seed)) for seed in range(shape.sets(cache))]


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """All the calls, none of whose results outlives it."""

    def run() -> None:
        for call in calls:
            call()

    return run


def modes(shape: Shape, device: torch.device) -> list[str]:
    if device.type != "cuda" or shape.batch * shape.tokens > SHORT or shape.tokens > 512:
        return ["eager"]
    return ["eager", "graph", *(["compile"] if shape.slow_to_build else [])]


def compiled(contender: Contender, backend: str = "inductor") -> Contender:
    run = torch.compile(contender.run, fullgraph=True, dynamic=False, backend=backend)
    return dataclasses.replace(contender, run=run)


def row_of(
    shape: Shape,
    backward: bool,
    mode: str,
    name: str,
    kind: str,
    times: list[float],
    fastest: str | None,
    plain_times: list[float] | None,
    machine: dict,
) -> dict:
    """What follows from the times alone."""
    median = statistics.median(times)
    expected = prediction(shape, machine["device"], name, kind, backward)
    return {
        "shape": shape.name,
        **{f: getattr(shape, f) for f in ("batch", "tokens", "q_heads", "kv_heads", "head_dim", "words", "steps")},
        "dtype": shape.dtype,
        "pass": pass_name(backward),
        "mode": mode,
        "contender": name,
        "kind": kind,
        "median_ms": round(median * 1e3, 5),
        "fastest_ms": round(min(times) * 1e3, 5),
        "calls": len(times),
        "attention_tflops": round(shape.flops(backward) / median / 1e12, 4) if kind != "map alone" else None,
        "gb_per_s": round(shape.traffic(backward) / median / 1e9, 2) if kind != "map alone" else None,
        "fastest_plain": fastest,
        "over_plain": round(ratio(times, plain_times), 4) if fastest else None,
        "target": (shape.target if backward else 1.05 if shape.target else None) if kind == "map" else None,
        "predicted_ms": round(expected[0] * 1e3, 5) if expected else None,
        "predicted_over_plain": round(expected[1], 4) if expected else None,
    }


def resources(
    shape: Shape, device: torch.device, backward: bool, mode: str, name: str, call: Callable, memory: bool
) -> dict:
    """Peak memory and launches of one call; a graph's are those of the calls it was made of."""
    peak = None
    if device.type == "cuda" and mode == "eager":
        peak = round(cuda_peak(call, device), 1)
    elif device.type == "cpu" and memory:
        peak = round(peak_memory(shape, name, backward), 1)
    return {"launches": launches(call, device) if mode != "graph" else None, "peak_mib": peak}


def prediction(shape: Shape, device: str, name: str, kind: str, backward: bool) -> tuple[float, float] | None:
    """Seconds, and times the fastest plain attention; None for a device that ``predict.py`` does not know."""
    try:
        from .predict import gpu_named, predicted
    except ImportError:  # it reads the kernels' configs, which need triton
        return None
    return predicted(shape, gpu_named(device), name, kind, backward)


def line(row: dict) -> str:
    said = f"{row['shape']:38s} {row['pass']:16s} {row['mode']:7s} {row['contender']:24s} {row['median_ms']:10.3f} ms"
    for text, key in (
        ("  x{}", "over_plain"),
        (" (target {})", "target"),
        (" (predicted {})", "predicted_over_plain"),
        ("  {} MiB", "peak_mib"),
        ("  {} launches", "launches"),
    ):
        said += text.format(row[key]) if row[key] is not None else ""
    return said


def pass_name(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


def build_key(shape: Shape) -> tuple:
    """Shapes alike in this share the compiled kernels."""
    return shape.head_dim, shape.q_heads // shape.kv_heads, shape.words > 64


def expected_seconds(shape: Shape, backward: bool, seconds: float | None, built: set) -> float:
    """Of one shape and pass on a bare H100: building, setting up, warming up and timing."""
    device = torch.device("cuda")
    total = SETUP + (0 if build_key(shape) in built else BUILD_KERNELS) + (BUILD_FLEX if shape.slow_to_build else 0)
    plain = prediction(shape, "H100", "plain", "plain", backward)
    eager = prediction(shape, "H100", "eager", "eager", backward)
    a_round = shape.sets(50 << 20) * (6 * plain[0] + (eager[0] if fits_eager(shape, device) else 0)) if plain else 0
    for mode in modes(shape, device):
        total += 4 * a_round + max(timing_seconds(shape, device, seconds), 3 * a_round)
        total += 5 * BUILD_COMPILE if mode == "compile" else 0
    return total


def timing_seconds(shape: Shape, device: torch.device, asked: float | None) -> float:
    """To spend on a shape, pass and mode."""
    if asked:
        return asked
    return 20.0 if device.type == "cpu" else 0.4 if shape.tier else 1.0


def expectation(todo: list[tuple[Shape, bool]], seconds: float | None, limit: float) -> list[str]:
    """The order, each with its seconds, and how many calls of ``limit`` that makes. Every call builds anew."""
    lines, total, calls, spent, built = [], 0.0, 1, 0.0, set()
    for shape, backward in todo:
        expected = expected_seconds(shape, backward, seconds, built)
        if spent and spent + expected > limit:
            calls, spent, built = calls + 1, 0.0, set()
            expected = expected_seconds(shape, backward, seconds, built)
        built.add(build_key(shape))
        spent, total = spent + expected, total + expected
        lines.append(f"call {calls:2d}  {spent:6.0f} s  {shape.name:38s} {pass_name(backward)}")
    lines.append(
        f"{len(todo)} shapes and passes, about {total / 60:.0f} minutes in {calls} calls (expected, not measured)"
    )
    return lines


def observe(shape: Shape, device: torch.device, backward: bool, folder: Path | None) -> None:
    """Runs every contender; with a folder, writes a trace and a table of each one's second call."""
    inputs = with_lse(shape.inputs(device))
    for contender in contenders(device, shape):
        if device.type == "cuda" and any(word in contender.name for word in SLOW_TO_BUILD):
            continue
        call = lambda c=contender: step(c, inputs, backward)  # noqa: E731
        call()
        if folder is None:
            call()
            continue
        folder.mkdir(parents=True, exist_ok=True)
        profile = profiled(call, device)
        name = re.sub(r"[^\w.-]+", "-", f"{shape.name} {pass_name(backward)} {contender.name}")
        profile.export_chrome_trace(str(folder / f"{name}.json"))
        key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60)
        (folder / f"{name}.txt").write_text(table)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> dict[str, str]:
    """Machine, versions, commit and date: what every row carries."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        triton = __import__("triton").__version__
    else:
        name, triton = f"{_processor()}, {torch.get_num_threads()} threads", ""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": name,
        "arch": auto.arch_of(device),
        "driver": _driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": triton,
        "cudnn": str(torch.backends.cudnn.version() or "") if device.type == "cuda" else "",
        "python": platform.python_version(),
        "commit": commit or os.environ.get("COMMIT", "unknown"),
        "date": datetime.date.today().isoformat(),
    }


def measured_already(rows: Iterable[dict], machine: dict) -> set[tuple[str, str]]:
    """``(shape, pass)`` of rows that this device and commit gave; they were written together, so all are there."""
    same = ("device", "commit", "torch")
    return {(row["shape"], row["pass"]) for row in rows if all(row.get(key) == machine[key] for key in same)}


def read_rows(path: Path | None) -> list[dict]:
    """A CSV's rows, numbers as numbers and nothing as None; none if there is no file."""
    if path is None or not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(key: str, text: str) -> str | float | int | None:
    if key in ("device", "arch", "driver", "torch", "triton", "cudnn", "python", "commit", "date"):
        return text
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def write_csv(path: Path, rows: list[dict]) -> None:
    columns = dict.fromkeys(key for row in rows for key in row)

    def write(file) -> None:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)

    _whole(path, write)


def write_json(path: Path, rows: list[dict]) -> None:
    _whole(path, lambda file: file.write(json.dumps(rows, indent=1) + "\n"))


def _whole(path: Path, write: Callable) -> None:
    """The file is the old one or the new one, never a part: a run may be stopped at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", newline="") as file:
        write(file)
    os.replace(part, path)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
