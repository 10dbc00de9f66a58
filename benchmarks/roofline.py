"""The model of ``predict.py``: how long a launch takes on a GPU, from its work and its programs.

The time of a launch is a fixed time to start and drain, plus the longest of: its products at a share of the tensor
cores' peak, its bytes from memory, its bytes from L2, and the time that its programs need on the multiprocessors. The
last one is the sum of the waves: programs that fit on the GPU at once (registers and shared memory, as ``aot.py``
reports them) run side by side. Each takes as long as its warps need to execute their instructions one after the other,
or as the multiprocessor needs for those of all resident programs, whichever is longer.

Both rates were measured on an H200 (``results/ncu-h200.csv``, "Warp Cycles Per Issued Instruction"): two warps per
scheduler execute an instruction each in 5.1 cycles, and four in 9.5, so that a scheduler issues at most 0.42 per cycle.
With them, and without any constant that was fitted, the times of the 329 tiles of ``results/tiles-h200.csv`` are
predicted within a factor of 1.8, four of five within 1.25 (a test).
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from typing import NamedTuple

from molsaki_kernels import aot
from molsaki_kernels._triton import configs


@dataclasses.dataclass(frozen=True)
class GPU:
    """Rates per second, times in seconds; the shares are of the peak, for head_dim 128 and long sequences."""

    name: str
    arch: str  # the name in configs
    target: str  # the name in aot
    flops: float  # dense bf16
    memory: float  # bytes, peak
    l2: float  # bytes
    cache: float  # bytes the L2 holds
    launch: float  # from the start of a small kernel to that of the next, beyond its work
    plain_forward: float
    plain_backward: float
    triton: float
    clock: float  # cycles, those at which the peak holds
    issue: float  # instructions per cycle and multiprocessor, of all its warps, in loops with products
    stall: float  # cycles from an instruction of a warp to its next
    port: float  # bytes per cycle from L2 to one multiprocessor
    l2_trip: float  # a load that hits L2, until its value is used
    memory_trip: float  # the same from memory

    @property
    def multiprocessors(self) -> int:
        return configs.MULTIPROCESSORS[self.arch]


GPUS = {
    # Vendors' datasheets for peaks (H100, H200 and A100 SXM). L2: read bandwidths that microbenchmarks publish (Chips
    # and Cheese: H100 5.5 to 5.7 TB/s), an A100's from its 5,120 bytes per clock at two thirds. Latencies from the same
    # and from "Dissecting the NVIDIA Hopper Architecture" (arXiv 2402.13499): about 270 cycles for L2 and 600 for
    # memory on an idle H100, rounded up; 64 bytes per cycle arrive from L2. Instructions: measured on an H200, see
    # above; those of the others are taken to be the same. A launch: 1.5 us, the duration that profilers report of an
    # empty kernel. Plain shares on Hopper, for causal bf16 with 48 heads of 128 and batch 4:
    # FlashAttention-3 reaches 667 TFLOP/s forward and 444 backward at 4,096 tokens (tritonbench#1267); with fewer
    # heads, less: 600 and 440. On an A100: the paper of FlashAttention-2 (arXiv 2307.08691).
    # Triton's shares: a guess from its tutorial's kernel, which has no warp specialisation.
    "H200": GPU(
        "H200",
        "sm90",
        "cuda:90",
        flops=989e12,
        memory=4.8e12,
        l2=5.5e12,
        cache=60e6,
        launch=1.5e-6,
        plain_forward=0.695,
        plain_backward=0.51,
        triton=0.465,
        clock=1.83e9,
        issue=1.68,
        stall=5.1,
        port=64,
        l2_trip=0.16e-6,
        memory_trip=0.35e-6,
    ),
    "H100": GPU(
        "H100",
        "sm90",
        "cuda:90",
        flops=989e12,
        memory=3.35e12,
        l2=5.5e12,
        cache=50e6,
        launch=1.5e-6,
        plain_forward=0.695,
        plain_backward=0.51,
        triton=0.465,
        clock=1.83e9,
        issue=1.68,
        stall=5.1,
        port=64,
        l2_trip=0.16e-6,
        memory_trip=0.35e-6,
    ),
    "A100": GPU(
        "A100",
        "sm80",
        "cuda:80",
        flops=312e12,
        memory=2.04e12,
        l2=4.8e12,
        cache=40e6,
        launch=1.5e-6,
        plain_forward=0.62,
        plain_backward=0.55,
        triton=0.5,
        clock=1.41e9,
        issue=1.68,
        stall=5.1,
        port=64,
        l2_trip=0.16e-6,
        memory_trip=0.4e-6,
    ),
}
MEMORY_SHARE = 0.875  # of the peak that a large copy reaches
COLUMN_SHARE = 0.405  # the map's own products: short loops
LOOP_SHARE = 0.65  # of the peak that products reach while they run: that of Triton's long matrix products
PEAK_ISSUE = 4  # instructions per cycle and multiprocessor, which loops without products reach


class Compiled(NamedTuple):
    """What a kernel was compiled to, see ``aot.py``."""

    registers: int  # per thread
    shared: int  # bytes
    warps: int
    straight: int  # instructions of a warp outside of all loops
    loops: tuple[int, ...]  # and in one trip of each loop
    stages: int  # of the pipeline


@dataclasses.dataclass(frozen=True)
class Loop:
    """One trip of a program's main loop."""

    instructions: float  # of a warp
    loads: int = 0  # dependent trips to L2; 0 where the pipeline's cp.async run ahead
    flops: float = 0.0
    bytes: float = 0.0  # from L2


@dataclasses.dataclass(frozen=True)
class Grid:
    """The programs of a launch."""

    compiled: Compiled
    trips: tuple[float, ...]  # of the main loop, in order of launch; those of one head
    heads: int  # how often the launch repeats them
    loop: Loop
    once: float  # instructions of a warp beside those of the main loop
    streaming: float = 0.0  # more of them, in loops without products
    memory_loads: float = 2  # dependent trips to memory, before and after the loop: tables, then rows

    @property
    def bytes(self) -> float:
        return sum(self.trips) * self.heads * self.loop.bytes

    def seconds(self, gpu: GPU) -> float:
        """The time of all programs, of which as many run side by side as registers and shared memory allow."""
        compiled, loop = self.compiled, self.loop
        blocks = max(aot.occupancy(aot.TARGETS[gpu.target], compiled.warps, *compiled[:2])[0], 1)
        resident = min(blocks, -(-len(self.trips) * self.heads // gpu.multiprocessors))
        shared = max(loop.flops * gpu.multiprocessors / (LOOP_SHARE * gpu.flops), loop.bytes / (gpu.port * gpu.clock))

        def duration(trips: float) -> float:
            inner = self.once + trips * loop.instructions
            chain = (inner + self.streaming) * gpu.stall / gpu.clock
            chain += trips * loop.loads * gpu.l2_trip + self.memory_loads * gpu.memory_trip
            issued = compiled.warps * (inner / gpu.issue + self.streaming / PEAK_ISSUE) / gpu.clock
            return max(chain, resident * issued, resident * trips * shared)

        durations = {trips: duration(trips) for trips in set(self.trips)}
        return makespan(tuple(durations[n] for n in self.trips), self.heads, gpu.multiprocessors * blocks)


@functools.lru_cache(maxsize=4096)
def makespan(durations: tuple[float, ...], repeats: int, slots: int) -> float:
    """The time until ``slots`` workers, each of which takes the next program when it is free, have done all."""
    count = len(durations) * repeats
    if count <= slots:
        return max(durations)
    if count > 2 * slots:
        return sum(durations) * repeats / slots + max(durations) / 2
    free = [0.0] * slots
    for _ in range(repeats):
        for duration in durations:
            heapq.heapreplace(free, free[0] + duration)
    return max(free)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The work of one launch, and its predicted time on a GPU."""

    name: str
    flops: float
    memory: float  # bytes
    l2: float = 0.0  # bytes
    share: float = COLUMN_SHARE
    launches: int = 1
    grid: Grid | None = None
    launch: float | None = None  # seconds, instead of the GPU's

    def times(self, gpu: GPU) -> dict[str, float]:
        """Return the seconds of each possible limit."""
        return {
            "launch": self.launches * (gpu.launch if self.launch is None else self.launch),
            "products": self.flops / (self.share * gpu.flops),
            "memory": self.memory / (MEMORY_SHARE * gpu.memory),
            "L2": max(self.l2, self.grid.bytes if self.grid else 0.0) / gpu.l2,
            "programs": 0.0 if self.grid is None else self.grid.seconds(gpu),
        }

    def seconds(self, gpu: GPU) -> float:
        launch, *work = self.times(gpu).values()
        return launch + max(work)

    def limit(self, gpu: GPU) -> str:
        times = self.times(gpu)
        return max(times, key=lambda name: times[name])


@dataclasses.dataclass(frozen=True)
class Layer:
    """One implementation of a layer: its kernels, forward and backward."""

    name: str
    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]

    def seconds(self, gpu: GPU, backward: bool) -> float:
        return sum(k.seconds(gpu) for k in self.kernels(backward))

    def kernels(self, backward: bool) -> tuple[Kernel, ...]:
        return self.forward + (self.backward if backward else ())


def gpu_named(device: str) -> GPU | None:
    """Return the GPU whose name is part of a device's name as PyTorch reports it."""
    return next((gpu for name, gpu in GPUS.items() if name in device), None)
