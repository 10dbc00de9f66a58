"""Timing and memory of one contender against others in one run, on a CPU or a CUDA device."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .contenders import contenders, step
from .shapes import Shape


def interleaved(
    functions: dict[str, Callable[[], None]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Seconds of every call, round after round, so that a slow spell of the machine falls on all of them."""
    for function in functions.values():
        function()
        function()
    clock = _cuda_clock if device.type == "cuda" else _clock
    first = {name: clock(function) for name, function in functions.items()}
    rounds = min(max(int(seconds / sum(first.values())), 5), 200)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(clock(function))
    return times


def ratio(ours: list[float], plain: list[float]) -> float:
    """Median of the ratios of neighbouring calls: both saw the same machine."""
    return statistics.median(a / b for a, b in zip(ours, plain, strict=True))


def peak_memory(shape: Shape, name: str, backward: bool, device: torch.device) -> float:
    """MiB above the inputs at the worst moment of one call."""
    if device.type == "cuda":
        return _cuda_peak(shape, name, backward, device)
    spawn = multiprocessing.get_context("spawn")  # a process of its own: freed memory is not always given back
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_cpu_peak, shape, name, backward).result()


def _clock(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_clock(function: Callable[[], None]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _cpu_peak(shape: Shape, name: str, backward: bool) -> float:
    """In a process of its own. A small call first: libraries take their working memory then."""
    device = torch.device("cpu")
    small = Shape(1, 256, 4, 2, shape.q_heads, shape.kv_heads, shape.head_dim, shape.dtype)
    for each in (small, shape):
        tensors, plan = each.inputs(device)
        contender = next(c for c in contenders(device, each) if c.name == name)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (getrusage's never falls, even over exec)
        before = _status("VmRSS")
        step(contender, tensors, plan, backward)
    return _status("VmHWM") - before


def _status(field: str) -> float:
    """MiB that Linux reports of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _cuda_peak(shape: Shape, name: str, backward: bool, device: torch.device) -> float:
    tensors, plan = shape.inputs(device)
    contender = next(c for c in contenders(device, shape) if c.name == name)
    step(contender, tensors, plan, backward)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step(contender, tensors, plan, backward)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
