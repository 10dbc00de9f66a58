"""Measures time, memory and launches of contenders in one run, on a CPU or a CUDA device."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import torch

from .contenders import MAP_ALONE, contenders, step, with_lse
from .shapes import Shape

MIN_ROUNDS, MAX_ROUNDS = 5, 200
BACK_TO_BACK = 8e-3  # seconds of calls between two events on CUDA, so that the host can run ahead as in a training step


def interleaved(
    functions: dict[str, Callable[[], None]], device: torch.device, seconds: float, calls: int = 1
) -> dict[str, list[float]]:
    """Time the functions in turns, so that a slow period of the machine affects all of them; return seconds per call.

    On CUDA a function is called several times in a row without a pause: its time is the host's or the device's,
    whichever is longer. A call on an idle device would add the host's time until the first launch.

    Args:
        seconds: approximate total; from MIN_ROUNDS to MAX_ROUNDS rounds.
        calls: number of calls that one function makes, one per set of inputs; each time is divided by it.
    """
    clock = cuda_clock if device.type == "cuda" else _clock
    for function in functions.values():
        if clock(function) < seconds / 4:  # a longer call needs no second warm-up
            function()
    first = {name: clock(function) for name, function in functions.items()}
    calls_of = dict.fromkeys(functions, calls)
    if device.type == "cuda":
        for name, time_of_one in first.items():
            repeats = max(1, min(16, round(BACK_TO_BACK / max(time_of_one, 1e-9))))
            functions = functions | {name: repeated(functions[name], repeats)}
            calls_of[name] = repeats * calls
            first[name] *= repeats
    rounds = rounds_in(seconds, sum(first.values()))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(clock(function) / calls_of[name])
    return times


def paired(
    functions: dict[str, Callable[[], None]],
    device: torch.device,
    seconds: float,
    references: Collection[str] = (),
    calls: int = 1,
) -> dict[str, dict[int, float]]:
    """Time the functions in rounds, in a new order each; return the seconds of one call by round, for each function.

    Unlike :func:`interleaved` it lets a slow function take part in fewer rounds, so that it does not limit the number
    of measurements of the others: each gets an equal share of ``seconds``, and MIN_ROUNDS (or 3) to MAX_ROUNDS rounds.
    Of the references, those that are at most one and a half times as slow as the fastest take part in every round. The
    ratio of any function to one of them is then that of calls of the same round.

    Args:
        calls: number of calls that one function makes, one per set of inputs; each time is divided by it.
    """
    clock = cuda_clock if device.type == "cuda" else _clock
    for function in functions.values():
        if clock(function) < seconds / 8:  # a longer call needs no second warm-up
            function()
    first = {name: clock(function) for name, function in functions.items()}
    calls_of = dict.fromkeys(functions, calls)
    if device.type == "cuda":  # as in interleaved: so that the host can run ahead
        for name, time_of_one in first.items():
            repeats = max(1, min(16, round(BACK_TO_BACK / max(time_of_one, 1e-9))))
            functions = functions | {name: repeated(functions[name], repeats)}
            calls_of[name] = repeats * calls
            first[name] *= repeats
    count = {name: rounds_in(seconds / len(functions), time_of_one) for name, time_of_one in first.items()}
    known = {name: first[name] / calls_of[name] for name in references if name in first}
    fastest = [name for name, time_of_one in known.items() if time_of_one <= 1.5 * min(known.values())]
    rounds = max(count[name] for name in fastest or functions)
    count = {name: rounds if name in fastest else min(n, rounds) for name, n in count.items()}
    order, shuffle = list(functions), random.Random(0).shuffle
    times: dict[str, dict[int, float]] = {name: {} for name in functions}
    for i in range(rounds):
        shuffle(order)
        for name in order:
            if i * count[name] // rounds != (i + 1) * count[name] // rounds:  # spread over the rounds
                times[name][i] = clock(functions[name]) / calls_of[name]
    return times


def repeated(function: Callable[[], None], repeats: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(repeats):
            function()

    return run


def rounds_in(seconds: float, per_round: float) -> int:
    """Return the number of rounds; three where five would take more than five times ``seconds``."""
    least = MIN_ROUNDS if MIN_ROUNDS * per_round <= 5 * seconds else 3
    return min(max(int(seconds / max(per_round, 1e-9)), least), MAX_ROUNDS)


def captured(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """Capture all the calls in one CUDA graph, after warming up on another stream; return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Count the kernels, copies and fills that one call starts on a CUDA device; None on a CPU."""
    if device.type != "cuda":
        return None
    return count_launches(profiled(call, device).events())


def count_launches(events: Iterable) -> int:
    """Count the events of a profile that ran on the device itself; an annotation is not a launch."""
    return sum(e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation for e in events)


def profiled(call: Callable[[], object], device: torch.device) -> torch.profiler.profile:
    """Profile one call, which has run before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return profile


def ratio(ours: list[float], plain: list[float]) -> float:
    """Return the median of the ratios of neighbouring calls, which ran under the same conditions."""
    return statistics.median(a / b for a, b in zip(ours, plain, strict=True))


def peak_memory(shape: Shape, name: str, backward: bool) -> float:
    """Return the peak MiB beyond the inputs of one call on a CPU, in a process of its own."""
    spawn = multiprocessing.get_context("spawn")  # in this process freed memory may not have been returned
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_cpu_peak, shape, name, backward).result()


def cuda_peak(call: Callable[[], object], device: torch.device) -> float:
    """Return the peak MiB beyond what is allocated already of one call, which has run before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _clock(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def cuda_clock(function: Callable[[], None]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _cpu_peak(shape: Shape, name: str, backward: bool) -> float:
    """Run in a process of its own: a small call first, in which libraries allocate their working memory."""
    device = torch.device("cpu")
    small = Shape(1, 256, 4, 2, shape.q_heads, shape.kv_heads, shape.head_dim, shape.dtype)
    for each in (small, shape):
        inputs = with_lse(each.inputs(device)) if name == MAP_ALONE else each.inputs(device)
        contender = next(c for c in contenders(device, each) if c.name == name)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (getrusage cannot, not even with exec)
        before = memory_status("VmRSS")
        step(contender, inputs, backward)
    return memory_status("VmHWM") - before


@contextlib.contextmanager
def without_malloc_reserve() -> Iterator[None]:
    """Make glibc return freed tensors in processes started inside; by default it sometimes keeps 100 MiB or more."""
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(1 << 18)
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def memory_status(field: str) -> float:
    """Return the MiB that Linux reports for a field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
