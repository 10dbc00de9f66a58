"""Measures one attention layer with its map against every plain attention of this machine, and against eager.

    python -m benchmarks.layer [--device cpu|cuda] [--csv FILE] [--json FILE] [--seconds S] [--only TEXT...] [--memory]
    python -m benchmarks.layer --csv FILE --limit 240     repeat until it reports that nothing is left
    python -m benchmarks.layer --expected                 print the expected time of the grid; run nothing
    python -m benchmarks.layer --only TEXT --profile DIR  traces and tables of torch.profiler (see profile.sh for ncu)
    python -m benchmarks.layer --only TEXT --kernels FILE the time of every kernel beside its prediction, as a CSV

A plain attention is one without a map. On a CPU a matrix product takes turns with the attentions: processors change
their clock, and comparing ``attention_tflops`` of both shows which share of the machine's rate attention reaches. The
program prints a table and writes one record per shape, pass, mode and contender, after each pass of a shape. It skips a
shape and pass that the CSV already holds from the same device and commit. ``over_plain`` is the median ratio of
neighbouring calls to the fastest plain attention of the same mode; ``predicted_*`` is the expectation of
``predict.py``. Mode "eager" calls as a user does, "graph" replays a CUDA graph, which removes the host's share,
"compile" uses ``torch.compile``; the last two are measured for short shapes only.
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
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO

import torch

from molsaki_kernels.engine_selection import arch_of

from .contenders import (
    PRODUCT,
    PRODUCT_SIZE,
    SLOW_TO_BUILD,
    Contender,
    contenders,
    fits_eager,
    matrix_product,
    step,
    with_lse,
)
from .measure import captured, cuda_peak, interleaved, launches, peak_memory, profiled, ratio
from .shapes import CPU, CPU_MORE, Inputs, Shape, cuda_grid

MODES = ("eager", "graph", "compile")
PASSES = ("forward+backward", "forward")
SHORT = 16 * 512  # up to this many tokens per batch launch time dominates; graphs and torch.compile are measured too
# Seconds that a fresh machine needs to compile: guesses, used by --expected and --limit only.
BUILD_KERNELS, BUILD_FLEX, BUILD_COMPILE, SETUP = 20.0, 20.0, 3.0, 0.8


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="append the records to this file")
    parser.add_argument("--json", type=Path, help="write the same records to this file")
    parser.add_argument("--seconds", type=float, help="to time a shape, pass and mode (CPU: 20, CUDA: 1 or 0.4)")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds; start nothing that would end later")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only shapes whose name contains one of these texts, in this order",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only contenders whose name contains one of these texts",
    )
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which compiles for seconds")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="only these modes")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, help="only these passes")
    parser.add_argument(
        "--tier", type=int, default=2, help="0: shapes that have a target, 1: and those that show a trend, 2: all"
    )
    parser.add_argument("--compiled", action="store_true", help="for --limit: expect no time to compile our kernels")
    parser.add_argument("--memory", action="store_true", help="also the peak memory on a CPU (one process per record)")
    parser.add_argument("--expected", action="store_true", help="print the order and the expected seconds")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="write a trace of each contender instead of timing it"
    )
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="append the time of each kernel to this CSV")
    parser.add_argument("--once", action="store_true", help="only run each contender, for an external profiler")
    arguments = parser.parse_args(argv)
    begin = time.monotonic()
    device = torch.device(arguments.device)
    shapes = cuda_grid() if device.type == "cuda" or arguments.expected else CPU + CPU_MORE
    shapes = [s for s in shapes if s.tier <= arguments.tier or s in CPU + CPU_MORE]
    chosen = dict.fromkeys(shape for text in arguments.only for shape in shapes if text in shape.name)
    todo = [(shape, name == PASSES[0]) for shape in chosen for name in PASSES if name in arguments.passes]
    for text in arguments.only:
        if not any(text in shape.name for shape in shapes):
            parser.error(f"--only: expected a part of a shape's name, got {text!r}")

    def select(shape: Shape) -> list[Contender]:
        every = contenders(device, shape) + ([matrix_product(shape)] if device.type == "cpu" else [])
        found = [c for c in every if any(text in c.name for text in arguments.contenders)]
        return [c for c in found if not (arguments.no_flex and any(word in c.name for word in SLOW_TO_BUILD))]

    if arguments.expected:
        print(*expectation(todo, arguments.seconds, arguments.limit), sep="\n")
        return 0
    torch._dynamo.config.recompile_limit = (
        1000  # FlexAttention compiles for every shape; beyond the limit it runs eagerly
    )
    if arguments.once or arguments.profile:
        for shape, backward in todo:
            observe(shape, device, backward, arguments.profile, select(shape))
        return 0
    if arguments.kernels:
        for shape in chosen:
            times = kernel_times(shape, device, select(shape))
            write_csv(arguments.kernels, read_records(arguments.kernels) + times)
        return 0

    machine = describe(device)
    records = read_records(arguments.csv)
    done = measured_already(records, machine)
    failed: list[str] = []
    built = {build_key(shape) for shape in chosen} if arguments.compiled else set()
    for shape, backward in todo:
        if (shape.name, pass_name(backward)) in done:
            continue
        expected = expected_seconds(shape, backward, arguments.seconds, built, not arguments.no_flex, arguments.modes)
        if time.monotonic() - begin + expected > arguments.limit:
            left = sum((s.name, pass_name(b)) not in done for s, b in todo)
            print(f"--limit {arguments.limit:.0f} s: {left} of {len(todo)} left; run again with the same --csv")
            break
        built.add(build_key(shape))
        seconds = timing_seconds(shape, device, arguments.seconds)
        chosen_modes = [mode for mode in modes(shape, device) if mode in arguments.modes]
        records += measured(
            shape,
            device,
            backward,
            seconds,
            machine,
            failed,
            memory=arguments.memory,
            chosen=select(shape),
            chosen_modes=chosen_modes,
        )
        done.add((shape.name, pass_name(backward)))
        for path, write in ((arguments.csv, write_csv), (arguments.json, write_json)):
            if path:
                write(path, records)
    for message in failed:
        print(message, file=sys.stderr)
    return int(bool(failed))


def measured(
    shape: Shape,
    device: torch.device,
    backward: bool,
    seconds: float,
    machine: dict,
    failed: list[str],
    *,
    memory: bool = False,
    chosen: list[Contender] | None = None,
    chosen_modes: Sequence[str] | None = None,
) -> list[dict]:
    """Measure one shape and pass; return its records and append a message per failure of our own code to ``failed``."""
    sets = make_sets(shape, device)
    records = []
    for mode in modes(shape, device) if chosen_modes is None else chosen_modes:
        calls, functions, running = {}, {}, {}
        for contender in contenders(device, shape) if chosen is None else chosen:
            name, kind = contender.name, contender.kind
            if mode == "compile":
                if any(word in name for word in SLOW_TO_BUILD) or kind not in ("plain", "map"):
                    continue
                contender = compiled(contender)
            each = [lambda c=contender, x=x: step(c, x, backward) for x in sets]
            try:
                each[0]()
                functions[name] = captured(each) if mode == "graph" else in_turn(each)
            except Exception as reason:  # the other contenders are still measured
                message = f"{shape.name}: {name} ({mode}) cannot: {(str(reason).splitlines() or ['?'])[0]}"
                print(message)
                if kind in ("map", "map alone") and not str(reason).startswith("engine:"):
                    failed.append(message)
                continue
            calls[name], running[name] = each, contender
        if not functions:
            continue
        times = interleaved(functions, device, seconds, len(sets))
        medians = {name: statistics.median(times[name]) for name, c in running.items() if c.kind == "plain"}
        fastest = min(medians, key=medians.get) if medians else None
        plain = (fastest, times[fastest]) if fastest else None
        for name, contender in running.items():
            records.append(
                {
                    **timing(shape, backward, mode, contender, times[name], plain, machine["device"]),
                    **resources(shape, device, backward, mode, name, calls[name][0], memory),
                    **machine,
                }
            )
            print(line(records[-1]), flush=True)
    return records


def make_sets(shape: Shape, device: torch.device) -> list[Inputs]:
    """Return more inputs than fit in the L2 together, so that no call finds its own there; on a CPU one set."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return [with_lse(shape.inputs(device, seed)) for seed in range(shape.sets(cache))]


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """Return a function that makes all the calls; no result outlives its call."""

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


def timing(
    shape: Shape,
    backward: bool,
    mode: str,
    contender: Contender,
    times: list[float],
    plain: tuple[str, list[float]] | None,
    device: str,
) -> dict:
    """Return the part of a record that follows from the times; ``plain``: the fastest plain attention and its times."""
    median, kind = statistics.median(times), contender.kind
    expected = prediction(shape, device, contender.name, kind, backward)
    flops = 2 * PRODUCT_SIZE**3 if kind == "product" else shape.flops(backward)
    no_attention = kind in ("map alone", "product")
    return {
        "shape": shape.name,
        **{f: getattr(shape, f) for f in ("batch", "tokens", "q_heads", "kv_heads", "head_dim", "words", "steps")},
        "dtype": shape.dtype,
        "pass": pass_name(backward),
        "mode": mode,
        "contender": contender.name,
        "kind": kind,
        "median_ms": round(median * 1e3, 5),
        "fastest_ms": round(min(times) * 1e3, 5),
        "calls": len(times),
        "attention_tflops": round(flops / median / 1e12, 4) if kind != "map alone" else None,
        "gb_per_s": round(shape.traffic(backward) / median / 1e9, 2) if not no_attention else None,
        "fastest_plain": plain[0] if plain else None,
        "over_plain": round(ratio(times, plain[1]), 4) if plain else None,
        "target": (shape.target if backward else 1.05 if shape.target else None) if kind == "map" else None,
        "predicted_ms": round(expected[0] * 1e3, 5) if expected else None,
        "predicted_over_plain": round(expected[1], 4) if expected else None,
    }


def resources(
    shape: Shape, device: torch.device, backward: bool, mode: str, name: str, call: Callable, memory: bool
) -> dict:
    """Return peak memory and launches of one call; memory is not measured of a graph."""
    peak = None
    if device.type == "cuda" and mode == "eager":
        peak = round(cuda_peak(call, device), 1)
    elif device.type == "cpu" and memory and name != PRODUCT:
        peak = round(peak_memory(shape, name, backward), 1)
    return {"launches": launches(call, device) if mode != "graph" else None, "peak_mib": peak}


def prediction(shape: Shape, device: str, name: str, kind: str, backward: bool) -> tuple[float, float] | None:
    """Return seconds, and the ratio to the fastest plain attention; None for what ``predict.py`` does not know."""
    try:
        from .predict import predicted
        from .roofline import gpu_named
    except ImportError:  # it reads the configs of the Triton kernels
        return None
    return predicted(shape, gpu_named(device), name, kind, backward)


def line(record: dict) -> str:
    text = "{shape:38s} {pass:16s} {mode:7s} {contender:24s} {median_ms:10.3f} ms".format(**record)
    for part, key in (
        ("  x{}", "over_plain"),
        (" (target {})", "target"),
        (" (predicted {})", "predicted_over_plain"),
        ("  {} MiB", "peak_mib"),
        ("  {} launches", "launches"),
    ):
        text += part.format(record[key]) if record[key] is not None else ""
    return text


def pass_name(backward: bool) -> str:
    return PASSES[0] if backward else PASSES[1]


def build_key(shape: Shape) -> tuple:
    """Return the properties that determine which compiled kernels a shape needs."""
    return shape.head_dim, shape.q_heads // shape.kv_heads, shape.words > 64


def expected_seconds(
    shape: Shape,
    backward: bool,
    seconds: float | None,
    built: set,
    flex: bool = True,
    some_modes: Sequence[str] = MODES,
) -> float:
    """Estimate one shape and pass on a fresh H100: compiling, setting up, warming up and timing."""
    device = torch.device("cuda")
    build_flex = BUILD_FLEX if flex and shape.slow_to_build else 0
    total = SETUP + (0 if build_key(shape) in built else BUILD_KERNELS) + build_flex
    plain = prediction(shape, "H100", "plain", "plain", backward)
    eager = prediction(shape, "H100", "eager", "eager", backward)
    per_round = shape.sets(50 << 20) * (6 * plain[0] + (eager[0] if fits_eager(shape, device) else 0)) if plain else 0
    for mode in modes(shape, device):
        if mode in some_modes:
            total += 4 * per_round + max(timing_seconds(shape, device, seconds), 3 * per_round)
            total += 5 * BUILD_COMPILE if mode == "compile" else 0
    return total


def timing_seconds(shape: Shape, device: torch.device, asked: float | None) -> float:
    """Return the seconds to spend on a shape, pass and mode."""
    if asked:
        return asked
    return 20.0 if device.type == "cpu" else 0.4 if shape.tier else 1.0


def expectation(todo: list[tuple[Shape, bool]], seconds: float | None, limit: float) -> list[str]:
    """List the order with expected seconds, and the number of calls of ``limit`` seconds; every call compiles anew."""
    lines: list[str] = []
    total, calls, spent = 0.0, 1, 0.0
    built: set[tuple] = set()
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


def observe(shape: Shape, device: torch.device, backward: bool, folder: Path | None, chosen: list[Contender]) -> None:
    """Run every contender; with a folder, write a trace and a table of each contender's second call."""
    inputs = with_lse(shape.inputs(device))
    for contender in chosen:
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


def kernel_times(shape: Shape, device: torch.device, chosen: list[Contender], calls: int = 5) -> list[dict]:
    """Return a record per launch of one forward and backward of each contender: its kernel, its time, the prediction.

    The time is the median of several profiled calls; ``position`` counts the launches of a call.
    """
    inputs, machine, records = with_lse(shape.inputs(device)), describe(device), []
    for contender in chosen:
        call = lambda c=contender: step(c, inputs, True)  # noqa: E731
        try:
            for _ in range(2):
                call()
            launches = [kernels_of(profiled(call, device).events()) for _ in range(calls)]
        except Exception as reason:  # the other contenders are still measured
            print(f"{shape.name}: {contender.name} cannot: {(str(reason).splitlines() or ['?'])[0]}")
            continue
        usual = statistics.mode(tuple(name for name, _ in each) for each in launches)
        same = [each for each in launches if tuple(name for name, _ in each) == usual]
        expected = predicted_kernels(shape, machine["device"], contender.name)
        for position, name in enumerate(usual):
            seconds = statistics.median(each[position][1] for each in same)
            found = stage(name, usual[:position])
            if found == "map_dlse" and "sdpa" in contender.name:  # whose dlse is folded in the same kernel
                found = "map_fold"
            prediction_of_it = expected.get(found)
            records.append({
                "shape": shape.name, "contender": contender.name, "position": position, "kernel": name[:100],
                "us": round(seconds * 1e6, 2),
                "predicted_us": None if prediction_of_it is None else round(prediction_of_it * 1e6, 2),
                **machine,
            })  # fmt: skip
            print(
                "{shape:30s} {contender:18s} {us:9.1f} us  (predicted {predicted_us})  {kernel}".format(**records[-1])
            )
    return records


def kernels_of(events: Iterable) -> list[tuple[str, float]]:
    """Return name and seconds of what ran on the device, in order."""
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    return [(e.name, e.device_time / 1e6) for e in sorted(on_device, key=lambda e: e.time_range.start)]


def stage(name: str, before: Sequence[str]) -> str:
    """Return the name in ``predict.py`` of a launch, whose kernel may be launched for another purpose before."""
    if name == "map_dq_kernel":  # first for the gradient of lse, if that has no kernel of its own
        return "map_dq_add" if {name, "map_dlse_kernel"} & set(before) else "map_dlse"
    return {"add_tiles_kernel": "map_reduce"}.get(name, name.removesuffix("_kernel"))


def predicted_kernels(shape: Shape, device: str, contender: str) -> dict[str, float]:
    """Return the predicted seconds of each of the project's kernels; empty for what ``predict.py`` does not know."""
    try:
        from .predict import Work, known
        from .roofline import gpu_named
    except ImportError:  # it reads the configs of the Triton kernels
        return {}
    gpu = gpu_named(device)
    if gpu is None or not known(shape):
        return {}
    return {k.name: k.seconds(gpu) for made in Work(shape, gpu).layers() for k in made.kernels(True)}


def describe(device: torch.device) -> dict[str, str]:
    """Return machine, versions, commit and date, which are part of every record."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        triton = __import__("triton").__version__
    else:
        name, triton = f"{_processor()}, {torch.get_num_threads()} threads", ""
    commit = os.environ.get("COMMIT", "")  # of a copy without its history
    if not commit and shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "device": name,
        "arch": arch_of(device),
        "driver": _driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": triton,
        "cudnn": str(torch.backends.cudnn.version() or "") if device.type == "cuda" else "",
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def measured_already(records: Iterable[dict], machine: dict) -> set[tuple[str, str]]:
    """Return each ``(shape, pass)`` that was measured on this device at this commit; a pass is written whole."""
    same = ("device", "commit", "torch")
    return {(r["shape"], r["pass"]) for r in records if all(r.get(key) == machine[key] for key in same)}


def read_records(path: Path | None) -> list[dict]:
    """Read a CSV, numbers as numbers and empty fields as None; an empty list if there is no file."""
    if path is None or not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: _value(key, text) for key, text in record.items()} for record in csv.DictReader(file)]


def _value(key: str, text: str) -> str | float | int | None:
    if key in ("device", "arch", "driver", "torch", "triton", "cudnn", "python", "commit", "date", "isa"):
        return text
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def write_csv(path: Path, records: list[dict]) -> None:
    columns = dict.fromkeys(key for record in records for key in record)

    def write(file: TextIO) -> None:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(records)

    _replace(path, write)


def write_json(path: Path, records: list[dict] | dict) -> None:
    _replace(path, lambda file: file.write(json.dumps(records, indent=1) + "\n"))


def _replace(path: Path, write: Callable[[TextIO], object]) -> None:
    """Write beside the file and rename, so that a run that is stopped leaves the old file or the new one whole."""
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
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
