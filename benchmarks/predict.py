"""Predicts the time of each kernel by a roofline, to compare measurements with. Nothing here was measured.

    python -m benchmarks.predict [--gpu H200] [--csv FILE] [--only TEXT]

The time of a kernel is a fixed time to start and drain plus the longest of three: its products at a share of the tensor
cores' peak, its bytes from memory, its bytes from L2. The tiles, groups and splits are those of
``molsaki_kernels._triton.configs``. The predictions depend mostly on two shares of the peak: that of the fastest plain
attention and that of a Triton kernel with pointer loads. Both are assumptions, listed in :data:`GPUS`. Times are those
of the GPU; a slower host adds its own (compare the measured modes "eager" and "graph").
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from molsaki_kernels._triton import configs

from .layer import write_csv
from .shapes import Shape, cuda_grid

PREDICTED = "prediction"


@dataclasses.dataclass(frozen=True)
class GPU:
    """Rates per second; the shares are of the peak, for head_dim 128 and long sequences."""

    name: str
    arch: str  # the name in configs
    flops: float  # dense bf16
    memory: float  # bytes, peak
    l2: float  # bytes
    cache: float  # bytes the L2 holds
    launch: float  # seconds from the start of a small kernel to that of the next, beyond its work
    plain_forward: float
    plain_backward: float
    triton: float


GPUS = {
    # Vendors' datasheets for peaks (NVIDIA H100, H200 and A100 SXM; AMD Instinct MI300X). L2: read bandwidths that
    # microbenchmarks publish (Chips and Cheese: H100 5.5 to 5.7 TB/s, MI300X's Infinity Cache 11.9), an A100's from its
    # 5,120 bytes per clock at two thirds. Plain shares: causal head_dim 128 curves of the papers of FlashAttention-3
    # (arXiv 2407.08608, figures 5 and 6: about 0.65 and 0.55 on an H100) and FlashAttention-2 (arXiv 2307.08691); for
    # the MI300X a guess. Triton's shares: a guess from its tutorial's kernel, which has no warp specialisation.
    "H200": GPU(
        "H200",
        "sm90",
        flops=989e12,
        memory=4.8e12,
        l2=5.5e12,
        cache=60e6,
        launch=3e-6,
        plain_forward=0.65,
        plain_backward=0.565,
        triton=0.465,
    ),
    "H100": GPU(
        "H100",
        "sm90",
        flops=989e12,
        memory=3.35e12,
        l2=5.5e12,
        cache=50e6,
        launch=3e-6,
        plain_forward=0.65,
        plain_backward=0.565,
        triton=0.465,
    ),
    "A100": GPU(
        "A100",
        "sm80",
        flops=312e12,
        memory=2.04e12,
        l2=4.8e12,
        cache=40e6,
        launch=3e-6,
        plain_forward=0.62,
        plain_backward=0.55,
        triton=0.5,
    ),
    "MI300X": GPU(
        "MI300X",
        "gfx942",
        flops=1307e12,
        memory=5.3e12,
        l2=11.9e12,
        cache=256e6,
        launch=6e-6,
        plain_forward=0.4,
        plain_backward=0.3,
        triton=0.3,
    ),
}
MEMORY_SHARE = 0.875  # of the peak that a large copy reaches
NARROW = {64: (0.75, 0.85)}  # head_dim -> plain and Triton against 128: as many exponentials for half of the products
RAMP = 600  # tokens: M / (M + RAMP) of the rate remains after diagonal tiles, filling and draining
COLUMN_SHARE = 0.405  # the map's own products: short loops
DKV_SHARE = 0.86  # of Triton's share: 32 rows at a time
EAGER_BYTES = (66, 174)  # per weight, forward and both passes: counted per operator, each tensor read and written
# Launches of plain attention: forward; in the backward the row sums, the kernel itself, and the conversion of dq.
PLAIN_LAUNCHES = (1, 3)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The work of one launch, and its predicted time on a GPU."""

    name: str
    flops: float
    memory: float  # bytes
    l2: float = 0.0  # bytes
    share: float = COLUMN_SHARE
    launches: int = 1

    def times(self, gpu: GPU) -> dict[str, float]:
        """Return the seconds of each possible limit."""
        return {
            "launch": self.launches * gpu.launch,
            "products": self.flops / (self.share * gpu.flops),
            "memory": self.memory / (MEMORY_SHARE * gpu.memory),
            "L2": self.l2 / gpu.l2,
        }

    def seconds(self, gpu: GPU) -> float:
        launch, *work = self.times(gpu).values()
        return launch + max(work)

    def limit(self, gpu: GPU) -> str:
        times = self.times(gpu)
        return max(times, key=times.get)


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


class Work:
    """The bytes and FLOPs of every kernel for one shape; causal, bf16, evenly spread key tokens."""

    def __init__(self, shape: Shape, gpu: GPU) -> None:
        self.shape, self.gpu, self.dtype = shape, gpu, getattr(torch, shape.dtype)
        self.size = self.dtype.itemsize
        rows = shape.batch * shape.tokens
        self.q = rows * shape.q_heads * shape.head_dim * self.size
        self.kv = rows * shape.kv_heads * shape.head_dim * self.size
        self.lse = rows * shape.q_heads * 4
        self.maps = shape.batch * shape.steps * shape.words * 4
        self.product = shape.batch * shape.q_heads * shape.tokens**2 * shape.head_dim  # half of the square
        plain, triton = NARROW.get(shape.head_dim, (1.0, 1.0))
        ramp = shape.tokens / (shape.tokens + RAMP)
        self.plain_forward, self.plain_backward = (
            share * plain * ramp for share in (gpu.plain_forward, gpu.plain_backward)
        )
        self.triton = gpu.triton * triton * ramp

    def kernel(self, name: str, flops: float, memory: float, l2: float = 0.0) -> Kernel:
        """Return one of the map's kernels. If q and the keys fit in half of the L2, it reads what the previous kernel
        left there."""
        if 4 * (self.q + self.kv) <= self.gpu.cache / 2:
            memory, l2 = 0.0, memory + l2
        return Kernel(name, flops, memory, l2)

    def plain(self) -> Layer:
        """Return the fastest attention without a map: five products backward, dq summed with atomics."""
        forward = Kernel("plain forward", 2 * self.product, 2 * self.q + 2 * self.kv, 0, self.plain_forward)
        backward = Kernel(
            "plain backward", 5 * self.product, 4 * self.q + 4 * self.kv, 0, self.plain_backward, PLAIN_LAUNCHES[1]
        )
        return Layer("fastest plain", (forward,), (backward,))

    def engine(self, lse_gradient: bool) -> Layer:
        """Return the fastest plain attention with the map's kernels, and ``fold`` unless its backward takes dlse."""
        plain = self.plain()
        name = "engine with dlse + map kernels" if lse_gradient else "engine + map kernels"
        extra = (self.map_dlse(), *(() if lse_gradient else (self.fold(),)), *self.map_gradient())
        return Layer(name, plain.forward + self.map_alone(), plain.backward + extra)

    def fused(self) -> Layer:
        forward = self.flash_forward()
        return Layer("fused", forward, (self.flash_dq(), self.map_dk(direct=False), self.flash_dkv()))

    def map_only(self) -> Layer:
        return Layer("map alone", self.map_alone(), (self.map_dlse("map_dq", 2, 2), *self.map_gradient()[1:]))

    def eager(self) -> Layer:
        """Return eager attention: bound by the passes over the weights, one launch per operator."""
        s = self.shape
        weights = s.batch * s.q_heads * s.tokens**2
        forward, both = (bytes_ * weights for bytes_ in EAGER_BYTES)
        return Layer(
            "eager",
            (Kernel("eager forward", 4 * self.product, forward, 0, self.plain_forward, 20),),
            (Kernel("eager backward", 8 * self.product, both - forward, 0, self.plain_backward, 30),),
        )

    def layers(self) -> list[Layer]:
        return [self.plain(), self.engine(False), self.engine(True), self.fused(), self.map_only(), self.eager()]

    def values(self) -> tuple[Kernel, ...]:
        """Return the pooling of values (Eq. 5), forward and backward; not part of the layers above."""
        return Kernel("values", 0, self.kv, launches=2), Kernel("values backward", 0, 2 * self.kv)

    def columns(self, rows: int, block: int) -> tuple[float, float]:
        """Return, over all tiles of the batch, the pairs of row and key column of one head that tiles of ``rows`` x
        ``block`` touch, and the columns that they read."""
        s = self.shape
        touched, read = 0, 0.0
        for tile in range(-(-s.tokens // rows)):
            visible = s.words * min((tile + 1) * rows, s.tokens) / s.tokens
            touched += rows * -(-visible // block) * block
            read += visible
        return s.batch * touched, s.batch * read

    def map_alone(self) -> tuple[Kernel, Kernel]:
        s = self.shape
        tile = configs.map_forward(self.gpu.arch, self.dtype, s.head_dim, s.words)
        tiles, blocks = configs.num_tiles(s.tokens, s.batch, False, tile.rows), -(-s.words // tile.columns)
        groups = -(-s.q_heads // configs.heads_per_program(self.gpu.arch, s.q_heads, tiles * blocks))
        share = groups * (tiles + s.batch * s.steps) * s.words / 2 * 4  # half of the columns are hidden
        flops, keys = self._column_flops(tile.rows, tile.columns, 1), self._keys(tile)
        again = flops / (2 * s.head_dim + 4 * configs.STEP_BLOCK) / tile.columns * s.head_dim * self.size  # q per block
        partials = self.kernel("map_partials", flops, self.q + self.lse + share, again + keys)
        return partials, self.kernel("map_reduce", 0, share + self.maps)

    def flash_forward(self) -> tuple[Kernel, ...]:
        """Return the kernel with the map in its epilogue and the reduction; for many partial sums, the map alone."""
        s = self.shape
        tile = configs.flash_forward(self.gpu.arch, self.dtype, s.head_dim, False)
        slots = configs.num_tiles(s.tokens, s.batch, False, tile.rows) + s.batch * s.steps
        bytes_ = 2 * self.q + 2 * self.kv + self.lse
        if s.q_heads * slots * s.words * 4 > self.q:
            return Kernel("flash_forward", 2 * self.product, bytes_, 0, self.triton), *self.map_alone()
        share = s.q_heads * slots * s.words / 2 * 4
        epilogue = self._column_flops(tile.rows, tile.key_columns, 1) * self.triton / COLUMN_SHARE
        return (
            Kernel("flash_forward", 2 * self.product + epilogue, bytes_ + share, self._keys(tile), self.triton),
            self.kernel("map_reduce", 0, share + self.maps),
        )

    def map_dlse(self, name: str = "map_dlse", products: int = 1, passes: int = 1) -> Kernel:
        tile = configs.map_dq(self.gpu.arch, self.dtype, self.shape.head_dim)
        touched, _ = self.columns(tile.rows, tile.columns)
        flops = 2 * products * touched * self.shape.q_heads * self.shape.head_dim
        return self.kernel(name, flops, passes * self.q + 2 * self.lse, self._keys(tile))

    def map_gradient(self) -> tuple[Kernel, ...]:
        """Return the kernels after an engine's backward; with a single split of the rows dk is added directly."""
        s = self.shape
        splits = self._splits()
        rows = s.batch * s.kv_heads * s.words * s.head_dim
        add = self.kernel("map_dk_add", 0, splits * rows * 4 + 2 * rows * self.size)
        return self.map_dlse("map_dq_add", 2, 3), self.map_dk(), *((add,) if splits > 1 else ())

    def map_dk(self, direct: bool = True) -> Kernel:
        s = self.shape
        tile = configs.map_dk(self.gpu.arch, self.dtype, s.head_dim, s.words)
        blocks = -(-s.words // tile.columns)
        walked = sum(s.tokens * (1 - b * tile.columns / s.words) for b in range(blocks)) * s.batch * s.q_heads
        splits = self._splits()
        result = s.batch * s.kv_heads * s.words * s.head_dim * (2 * self.size if direct and splits == 1 else 4 * splits)
        flops = 4 * walked * tile.columns * s.head_dim
        return self.kernel("map_dk", flops, self.q + self.lse + result, walked * s.head_dim * self.size)

    def fold(self) -> Kernel:
        return self.kernel("fold", 0, 4 * self.q + self.lse)

    def flash_dq(self) -> Kernel:
        s = self.shape
        tile = configs.flash_dq(self.gpu.arch, self.dtype, s.head_dim)
        touched, _ = self.columns(tile.rows, tile.key_columns)
        flops = 3 * self.product + 4 * touched * s.q_heads * s.head_dim
        return Kernel("flash_dq", flops, 4 * self.q + 2 * self.kv + 2 * self.lse, self._keys(tile), self.triton)

    def flash_dkv(self) -> Kernel:
        s = self.shape
        partial = self._splits() * s.batch * s.kv_heads * s.words * s.head_dim * 4
        bytes_ = 2 * self.q + 4 * self.kv + 2 * self.lse + partial
        return Kernel("flash_dkv", 4 * self.product, bytes_, 0, self.triton * DKV_SHARE)

    def _column_flops(self, rows: int, block: int, products: int) -> float:
        """Return FLOPs of the key columns' scores and the step sums: two products with a one-hot tile per weight."""
        touched, _ = self.columns(rows, block)
        return touched * self.shape.q_heads * (2 * products * self.shape.head_dim + 4 * configs.STEP_BLOCK)

    def _keys(self, tile: Any) -> float:
        """Return the bytes of key vectors that the row tiles of all heads gather."""
        _, read = self.columns(tile.rows, 1)
        return read * self.shape.q_heads * self.shape.head_dim * self.size

    def _splits(self) -> int:
        s = self.shape
        tile = configs.map_dk(self.gpu.arch, self.dtype, s.head_dim, s.words)
        programs = s.batch * -(-s.words // tile.columns) * s.kv_heads
        limit = -(-s.tokens // tile.rows) * (s.q_heads // s.kv_heads)
        return configs.row_splits(self.gpu.arch, programs, limit)


def gpu_named(device: str) -> GPU | None:
    """Return the GPU whose name is part of a device's name as PyTorch reports it."""
    return next((gpu for name, gpu in GPUS.items() if name in device), None)


def predicted(shape: Shape, gpu: GPU | None, contender: str, kind: str, backward: bool) -> tuple[float, float] | None:
    """Return the seconds of a contender and the ratio to the fastest plain attention; None without a known GPU."""
    if gpu is None:
        return None
    work = Work(shape, gpu)
    plain = work.plain().seconds(gpu, backward)
    if kind == "map":
        lse_gradient = "flash_attn" in contender or "flex" in contender  # of flash_attn, version 4
        layer = work.fused() if "triton" in contender else work.engine(lse_gradient)
    else:
        layer = {"plain": work.plain, "map alone": work.map_only, "eager": work.eager}[kind]()
    seconds = layer.seconds(gpu, backward)
    return seconds, seconds / plain


def table(shapes: list[Shape], gpu: GPU) -> list[dict]:
    """Return a record per implementation of a layer and, except for shapes of tier 2, per kernel."""
    records = []
    for shape in shapes:
        work = Work(shape, gpu)
        common = {"gpu": gpu.name, "label": PREDICTED, "shape": shape.name}
        kernels = {k.name: k for layer in work.layers() for k in layer.kernels(True)}
        kernels |= {k.name: k for k in work.values()}
        for k in kernels.values() if shape.tier < 2 else ():
            facts = {"pass": "", "what": "kernel", "name": k.name, **amounts([k]), "limit": k.limit(gpu)}
            predicted_ms = rounded(k.seconds(gpu) * 1e3)
            records.append(common | facts | {"predicted_ms": predicted_ms, "predicted_over_plain": "", "target": ""})
        for backward in (False, True):
            plain = work.plain().seconds(gpu, backward)
            for layer in work.layers():
                parts, seconds = layer.kernels(backward), layer.seconds(gpu, backward)
                judged = layer.name in ("engine + map kernels", "engine with dlse + map kernels", "fused")
                target = (shape.target if backward else 1.05) if judged else None
                which = "forward+backward" if backward else "forward"
                facts = {"pass": which, "what": "layer", "name": layer.name, **amounts(parts), "limit": ""}
                times = {"predicted_ms": rounded(seconds * 1e3), "predicted_over_plain": rounded(seconds / plain)}
                records.append(common | facts | times | {"target": target or ""})
    return records


def amounts(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Return the work of some kernels together."""
    return {
        "gflop": rounded(sum(k.flops for k in kernels) / 1e9),
        "memory_mb": rounded(sum(k.memory for k in kernels) / 1e6),
        "l2_mb": rounded(sum(k.l2 for k in kernels) / 1e6),
        "launches": sum(k.launches for k in kernels),
    }


def rounded(x: float) -> float:
    """Round to four digits; a prediction is not more precise."""
    return float(f"{x:.4g}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="H200", choices=GPUS)
    parser.add_argument("--csv", type=Path, help="write every record to this file")
    parser.add_argument("--only", default="", help="only shapes whose name contains this text")
    arguments = parser.parse_args(argv)
    shapes = [s for s in cuda_grid() if arguments.only in s.name]
    if not shapes:
        parser.error(f"--only: expected a part of a shape's name, got {arguments.only!r}")
    records = table(shapes, GPUS[arguments.gpu])
    print(
        f"{arguments.gpu}: {PREDICTED}, not measured. Forward + backward: milliseconds of the fastest plain attention, "
        "and the ratio of the others to that."
    )
    print(f"{'':36s}{'plain':>10s}{'engine':>9s}{'with dlse':>11s}{'fused':>8s}{'target':>8s}   longest map kernels")
    for shape in shapes:
        of_shape = [r for r in records if r["shape"] == shape.name]
        layers = {r["name"]: r for r in of_shape if r["pass"] == "forward+backward"}
        plain, *rest = layers.values()
        work = Work(shape, GPUS[arguments.gpu])
        costs = work.map_alone() + (work.map_dlse(), work.fold(), *work.map_gradient())
        costs = sorted(((k.seconds(work.gpu), k) for k in costs), key=lambda pair: -pair[0])[:3]
        print(
            f"{shape.name:36s}{plain['predicted_ms']:10.3f}"
            + "".join(f"{r['predicted_over_plain']:{w}.2f}" for r, w in zip(rest[:3], (9, 11, 8), strict=True))
            + f"{shape.target or '':>8}   "
            + ", ".join(f"{k.name} {seconds * 1e6:.0f} us ({k.limit(work.gpu)})" for seconds, k in costs)
        )
    if arguments.csv:
        write_csv(arguments.csv, records)


if __name__ == "__main__":
    main()
