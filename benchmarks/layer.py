"""One attention layer with its map against every plain attention of this machine without one, and against eager.

    python -m benchmarks.layer [--device cpu|cuda] [--csv FILE] [--json FILE] [--seconds S] [--only TEXT] [--memory]

Prints a table as it goes and writes a row for each contender, pass and shape. ``over_plain`` is the median ratio of
neighbouring calls to the fastest plain attention of the same run.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path

import torch

from .contenders import contenders, step
from .measure import interleaved, peak_memory, ratio
from .shapes import CPU, CPU_MORE, Shape, cuda_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--seconds", type=float, default=None, help="of timing a shape and pass (CPU: 20, CUDA: 1)")
    parser.add_argument("--only", default="", help="only shapes whose name holds this text")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of every row (a CPU process each)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    seconds = arguments.seconds or (1.0 if device.type == "cuda" else 20.0)
    shapes = cuda_grid() if device.type == "cuda" else CPU + CPU_MORE
    machine = describe(device)
    rows = []
    for shape in shapes:
        if arguments.only not in shape.name:
            continue
        for backward in (False, True):
            rows += measured(shape, device, backward, seconds, arguments.memory, machine)
            for path, write in ((arguments.csv, write_csv), (arguments.json, write_json)):
                if path:
                    write(path, rows)


def measured(
    shape: Shape, device: torch.device, backward: bool, seconds: float, memory: bool, machine: dict
) -> list[dict]:
    """The rows of one shape and pass."""
    tensors, plan = shape.inputs(device)
    able = {}
    for contender in contenders(device, shape):
        try:
            step(contender, tensors, plan, backward)
            able[contender.name] = contender
        except (RuntimeError, ValueError) as reason:
            print(f"{shape.name}: {contender.name} cannot: {str(reason).splitlines()[0]}")
    times = interleaved(
        {name: lambda c=contender: step(c, tensors, plan, backward) for name, contender in able.items()},
        device,
        seconds,
    )
    plain = {name: statistics.median(times[name]) for name, c in able.items() if c.kind == "plain"}
    fastest = min(plain, key=plain.get) if plain else None
    rows = []
    for name, contender in able.items():
        median = statistics.median(times[name])
        row = {
            "shape": shape.name,
            **{f: getattr(shape, f) for f in ("batch", "tokens", "q_heads", "kv_heads", "head_dim", "words", "steps")},
            "dtype": shape.dtype,
            "pass": "forward+backward" if backward else "forward",
            "contender": name,
            "kind": contender.kind,
            "median_ms": round(median * 1e3, 4),
            "fastest_ms": round(min(times[name]) * 1e3, 4),
            "calls": len(times[name]),
            "attention_tflops": round(shape.flops(backward) / median / 1e12, 4),
            "fastest_plain": fastest,
            "over_plain": round(ratio(times[name], times[fastest]), 4) if fastest else None,
            "target": shape.target if contender.kind == "map" and backward else None,
            "peak_mib": round(peak_memory(shape, name, backward, device), 1) if memory else None,
            **machine,
        }
        rows.append(row)
        print(
            f"{row['shape']:40s} {row['pass']:17s} {name:24s} {row['median_ms']:10.3f} ms"
            f"  x{row['over_plain']}" + (f" (target {row['target']})" if row["target"] else "")
            + (f"  {row['peak_mib']} MiB" if memory else ""),
            flush=True,
        )  # fmt: skip
    return rows


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
        "driver": _driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": commit or os.environ.get("COMMIT", "unknown"),
        "date": datetime.date.today().isoformat(),
    }


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows, indent=1) + "\n")


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
    main()
