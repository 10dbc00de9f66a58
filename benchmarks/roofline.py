"""The model of ``predict.py``: how long a launch takes on a GPU, from its work and its programs.

The time of a launch is a fixed time to start and drain, plus the longest of: its products at a share of the tensor
cores' peak, its bytes from memory, its bytes from L2, and the time that its programs need on the multiprocessors. The
last one is the sum of the waves: programs that fit on the GPU at once (registers and shared memory, as ``aot.py``
reports them) run side by side, and each takes as long as its chain of dependent loads, barriers and products, or as its
share of the multiprocessor's throughput, whichever is longer.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq

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
    issue: float  # instructions per cycle and multiprocessor, of warps
    port: float  # bytes per cycle from L2 to one multiprocessor
    l2_trip: float  # a load that hits L2, until its value is used
    memory_trip: float  # the same from memory

    @property
    def multiprocessors(self) -> int:
        return configs.MULTIPROCESSORS[self.arch]


GPUS = {
    # Vendors' datasheets for peaks (NVIDIA H100, H200 and A100 SXM; AMD Instinct MI300X). L2: read bandwidths that
    # microbenchmarks publish (Chips and Cheese: H100 5.5 to 5.7 TB/s, MI300X's Infinity Cache 11.9), an A100's from its
    # 5,120 bytes per clock at two thirds. Latencies from the same and from "Dissecting the NVIDIA Hopper Architecture"
    # (arXiv 2402.13499): about 270 cycles for L2 and 600 for memory on an idle H100, rounded up; every scheduler issues
    # one instruction per cycle, and 64 bytes per cycle arrive from L2. A launch: 1.5 us, the duration that profilers
    # report of an empty kernel. Plain shares on Hopper, for causal bf16 with 48 heads of 128 and batch 4:
    # FlashAttention-3 reaches 667 TFLOP/s forward and 444 backward at 4,096 tokens (tritonbench#1267); with fewer
    # heads, less: 600 and 440. On an A100: the paper of FlashAttention-2 (arXiv 2307.08691); for the MI300X a guess.
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
        issue=4,
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
        issue=4,
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
        issue=4,
        port=64,
        l2_trip=0.16e-6,
        memory_trip=0.4e-6,
    ),
    "MI300X": GPU(
        "MI300X",
        "gfx942",
        "hip:gfx942",
        flops=1307e12,
        memory=5.3e12,
        l2=11.9e12,
        cache=256e6,
        launch=4e-6,
        plain_forward=0.4,
        plain_backward=0.3,
        triton=0.3,
        clock=2.1e9,
        issue=4,
        port=64,
        l2_trip=0.25e-6,
        memory_trip=0.7e-6,
    ),
}
MEMORY_SHARE = 0.875  # of the peak that a large copy reaches
COLUMN_SHARE = 0.405  # the map's own products: short loops
LOOP_SHARE = 0.65  # of the peak that products reach while they run: that of Triton's long matrix products
BARRIER = 27  # cycles of a barrier of 4 to 8 warps
ONCE_BARRIERS = 4  # per search in the plan before the loop (counted in the PTX)
ONCE_INSTRUCTIONS = 150  # per warp and search


@dataclasses.dataclass(frozen=True)
class Loop:
    """One trip of a program's loop."""

    loads: int  # dependent trips to L2; 0 where the pipeline's cp.async run ahead
    barriers: int
    flops: float
    bytes: float  # from L2


@dataclasses.dataclass(frozen=True)
class Grid:
    """The programs of a launch."""

    compiled: tuple[int, int, int, int]  # a value of COMPILED
    warps: int
    trips: tuple[float, ...]  # of the loop, in order of launch; those of one head
    heads: int  # how often the launch repeats them
    searches: int  # in the plan, before the loop; each is a dependent trip to L2
    memory_loads: int  # dependent trips to memory, before and after it
    loop: Loop

    @property
    def bytes(self) -> float:
        return sum(self.trips) * self.heads * self.loop.bytes

    def seconds(self, gpu: GPU) -> float:
        """The time of all programs, of which as many run side by side as registers and shared memory allow.

        A trip takes as long as its chain of loads, barriers and products, or as the multiprocessor needs for the trips
        of all resident programs.
        """
        blocks = max(aot.occupancy(aot.TARGETS[gpu.target], self.warps, *self.compiled[:2])[0], 1)
        resident = min(blocks, -(-len(self.trips) * self.heads // gpu.multiprocessors))
        products = self.loop.flops * gpu.multiprocessors / (LOOP_SHARE * gpu.flops)
        issue = self.warps / gpu.issue / gpu.clock  # of an instruction
        chain = self.loop.loads * gpu.l2_trip + self.loop.barriers * BARRIER / gpu.clock + products
        instructions = self.compiled[2] * issue
        shared = max(products, instructions, self.loop.bytes / (gpu.port * gpu.clock))
        trip = max(chain, resident * shared)
        once = self.searches * (gpu.l2_trip + ONCE_BARRIERS * BARRIER / gpu.clock)
        once = max(once, resident * self.searches * ONCE_INSTRUCTIONS * issue) + self.memory_loads * gpu.memory_trip
        return makespan(tuple(once + n * trip for n in self.trips), self.heads, gpu.multiprocessors * blocks)


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
