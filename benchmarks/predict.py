"""Predicts the time of each kernel on a GPU, to compare measurements with. Nothing here was measured.

    python -m benchmarks.predict [--gpu H200] [--csv FILE] [--only TEXT] [--targets]

The time of a launch is modelled in ``roofline.py``. The tiles, groups and splits are those of
``molsaki_kernels._triton.configs``. ``--targets`` prints designs that do not exist yet beside those that do.

Every constant has its source beside it: :data:`roofline.GPUS`, the constants here and there, :data:`COMPILED`. Times
are those of the GPU; a slower host adds its own (compare the measured modes "eager" and "graph").
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from molsaki_kernels import aot
from molsaki_kernels._triton import configs

from .layer import write_csv
from .roofline import COLUMN_SHARE, GPU, GPUS, Grid, Kernel, Layer, Loop
from .shapes import Shape, cuda_grid

PREDICTED = "prediction"


# Of plain attention's time per score at head_dim 128, the share that does not shrink with the width (exponentials,
# masks): a third, so that 64-wide heads reach three quarters of the rate of 128-wide ones (both papers' figures).
PER_SCORE = 1 / 3
TRITON_NARROW = 0.85  # the same for the Triton kernels, as a rate at 64: more of their time is products
RAMP = 600  # tokens: M / (M + RAMP) of the rate remains after diagonal tiles, filling and draining
DKV_SHARE = 0.86  # of Triton's share: 32 rows at a time
EAGER_BYTES = (66, 174)  # per weight, forward and both passes: counted per operator, each tensor read and written
# Launches of plain attention: forward; in the backward the row sums, the kernel itself, and the conversion of dq. Each
# is a kernel with its own ramp and the gap before it.
PLAIN_LAUNCHES = (1, 3)
PLAIN_LAUNCH = 3e-6

# Registers per thread and bytes of shared memory of the map's kernels, the instructions of a warp in one trip of their
# loop, and the warps of a program, for which alone the instructions hold: ``python -m molsaki_kernels.aot --target
# cuda:90`` with Triton 3.6 and cuobjdump -sass, by head_dim up to 64 and up to 128. Commit c81408b; map_fold,
# map_dk_tables and map_dq_tables (see MAPS): a78a560. Other targets are taken to be alike.
COMPILED = {
    ("map_partials", 64): (253, 35072, 520, 4),
    ("map_partials", 128): (250, 50304, 500, 4),
    ("map_partials_wide", 64): (249, 51456, 520, 8),  # more than 64 key tokens
    ("map_partials_wide", 128): (255, 100608, 571, 8),
    ("map_reduce", 64): (168, 512, 150, 4),
    ("map_reduce", 128): (168, 512, 150, 4),
    ("map_dlse", 64): (96, 12288, 783, 4),
    ("map_dlse", 128): (103, 24576, 849, 4),
    ("map_dq", 64): (145, 14336, 823, 4),
    ("map_dq", 128): (213, 26624, 862, 4),
    ("map_dk", 64): (202, 41216, 1192, 4),
    ("map_dk", 128): (174, 41088, 639, 4),
    ("map_dk_add", 64): (40, 0, 60, 4),
    ("map_dk_add", 128): (64, 0, 60, 4),
    ("map_fold", 64): (145, 32768, 736, 4),
    ("map_fold", 128): (128, 57344, 778, 4),
    ("map_fold_one", 64): (128, 24832, 245, 4),  # at most 32 key tokens
    ("map_fold_one", 128): (128, 49408, 309, 4),
    ("map_dk_tables", 64): (136, 24704, 613, 4),
    ("map_dk_tables", 128): (174, 41088, 646, 4),
    ("map_dq_tables", 64): (127, 21632, 483, 4),
    ("map_dq_tables", 128): (128, 38016, 475, 8),
    # Commit f4b8eb8, the tiles that an H200 chose: of sm90 only.
    ("map_partials_one_stage", 128): (248, 34816, 494, 4),
    ("map_dq_4_warps", 128): (164, 38016, 517, 4),
}


@dataclasses.dataclass(frozen=True)
class Design:
    """How the map's kernels work; the fields are what changes between versions.

    Attributes:
        tables: the step of each row, the ranges of each tile and the key tokens come from tables, computed once per
            plan; else each program searches the plan.
        one_fold: dlse and its folding into O are one kernel.
        pipelined_dq: map_dq's gather of keys runs ahead of its use, and the map's gradient is spread over the rows by a
            product.
        full_waves: heads per program and splits of the rows fill whole waves.
        preprocess: a kernel replaces flash-attn 4's preprocess; it computes dlse and writes the map's dq as the start
            of the accumulator.
    """

    tables: bool = False
    one_fold: bool = False
    pipelined_dq: bool = False
    full_waves: bool = False
    preprocess: bool = False


class FirstTiles:
    """The tiles of commit c81408b, as far as they were changed since; the others are those of configs."""

    map_reduce = staticmethod(configs.map_reduce)
    map_dk_add, num_tiles = staticmethod(configs.map_dk_add), staticmethod(configs.num_tiles)
    flash_forward, flash_dq = staticmethod(configs.flash_forward), staticmethod(configs.flash_dq)

    @staticmethod
    def map_forward(arch: str, dtype: torch.dtype, head_dim: int, key_tokens: int) -> configs.MapTile:
        if arch != "sm90" or head_dim > 128:
            return configs.map_forward(arch, dtype, head_dim, key_tokens)
        if key_tokens <= 64:
            return configs.MapTile(rows=64 if head_dim <= 64 else 32, columns=64, warps=4, stages=2, resident=2)
        return configs.MapTile(rows=64, columns=128, warps=8, stages=2)

    @staticmethod
    def map_dk(arch: str, dtype: torch.dtype, head_dim: int, key_tokens: int) -> configs.MapTile:
        if head_dim > 128:
            return configs.MapTile(rows=32, columns=64, warps=8, stages=1 if arch == "gfx942" else 2)
        return configs.MapTile(64 if head_dim <= 64 else 32, 64, warps=4, stages=1 if arch == "gfx942" else 2)

    @staticmethod
    def row_splits(arch: str, programs: int, max_splits: int, rows: int) -> int:
        return max(1, min(max_splits, 32, -(-2 * configs.MULTIPROCESSORS[arch] // programs)))

    @staticmethod
    def map_dq(arch: str, dtype: torch.dtype, head_dim: int, key_tokens: int) -> configs.MapTile:
        return configs.MapTile(rows=64 if head_dim <= 128 else 32, columns=32, warps=4, stages=1)

    @staticmethod
    def map_dlse(arch: str, dtype: torch.dtype, head_dim: int, key_tokens: int) -> configs.MapTile:
        return FirstTiles.map_dq(arch, dtype, head_dim, key_tokens)

    @staticmethod
    def heads_per_program(arch: str, heads: int, programs: int) -> int:
        groups = min(heads, -(-4 * configs.MULTIPROCESSORS[arch] // programs))
        return -(-heads // groups)


FIRST = Design()  # commit c81408b
MAPS = Design(tables=True, one_fold=True, pipelined_dq=True, full_waves=True)
PREPROCESS = dataclasses.replace(MAPS, preprocess=True)
TODAY = MAPS


class Work:
    """The bytes, FLOPs and programs of every kernel for one shape; causal, bf16, evenly spread key tokens."""

    def __init__(self, shape: Shape, gpu: GPU, design: Design | None = None, tiles: Any = configs) -> None:
        self.shape, self.gpu, self.dtype = shape, gpu, getattr(torch, shape.dtype)
        self.design = TODAY if design is None else design
        self.tiles = FirstTiles if self.design == FIRST else tiles
        self.size = self.dtype.itemsize
        rows = shape.batch * shape.tokens
        self.q = rows * shape.q_heads * shape.head_dim * self.size
        self.kv = rows * shape.kv_heads * shape.head_dim * self.size
        self.lse = rows * shape.q_heads * 4
        self.maps = shape.batch * shape.steps * shape.words * 4
        self.scores = shape.batch * shape.q_heads * shape.tokens**2 / 2
        self.product = shape.batch * shape.q_heads * shape.tokens**2 * shape.head_dim  # half of the square
        self.ramp = shape.tokens / (shape.tokens + RAMP)
        narrow = TRITON_NARROW if shape.head_dim <= 64 else 1.0
        self.triton = gpu.triton * narrow * self.ramp
        self.bucket = 64 if shape.head_dim <= 64 else 128

    def kernel(self, name: str, flops: float, memory: float, l2: float = 0.0, grid: Grid | None = None) -> Kernel:
        """Return one of the map's kernels. If q and the keys fit in half of the L2, it reads what the previous kernel
        left there."""
        if 4 * (self.q + self.kv) <= self.gpu.cache / 2:
            memory, l2 = 0.0, memory + l2
        return Kernel(name, flops, memory, l2, grid=grid)

    def plain(self, key_dim: int | None = None, value_dim: int | None = None) -> Layer:
        """Return the fastest attention without a map: five products backward, dq summed with atomics.

        ``key_dim`` is the width of q and k, ``value_dim`` that of v and O; both are the head dimension by default.
        """
        D = self.shape.head_dim
        key_dim, value_dim = key_dim or D, value_dim or D
        q, kv = (x * (key_dim + value_dim) / (2 * D) for x in (self.q, self.kv))
        share_forward, flops_forward = self._plain(key_dim + value_dim, 2)
        share_backward, flops_backward = self._plain(3 * key_dim + 2 * value_dim, 5)
        forward, backward = (self.gpu.plain_forward * share_forward, self.gpu.plain_backward * share_backward)
        launches = PLAIN_LAUNCHES
        return Layer(
            "fastest plain",
            (Kernel("plain forward", flops_forward, 2 * q + 2 * kv, 0, forward, launches[0], launch=PLAIN_LAUNCH),),
            (Kernel("plain backward", flops_backward, 4 * q + 4 * kv, 0, backward, launches[1], launch=PLAIN_LAUNCH),),
        )

    def _plain(self, widths: int, products: int) -> tuple[float, float]:
        """Return the share of the rate at head_dim 128, and the FLOPs, of products with these widths together."""
        full = products * 128
        time = (1 - PER_SCORE) * widths / full + PER_SCORE  # of a score, in that of head_dim 128
        return self.ramp * widths / full / time, 2 * self.scores * widths

    def engine(self, lse_gradient: bool) -> Layer:
        """Return the fastest plain attention with the map's kernels, and ``fold`` unless its backward takes dlse."""
        plain = self.plain()
        name = "engine with dlse + map kernels" if lse_gradient else "engine + map kernels"
        if self.design.preprocess and lse_gradient:
            extra = (self.preprocess(), *self.map_gradient()[1:])
        elif lse_gradient:
            extra = (self.map_dlse(), *self.map_gradient())
        elif self.design.one_fold:
            extra = (self.map_fold(), *self.map_gradient())
        else:
            extra = (self.map_dlse(), self.fold(), *self.map_gradient())
        return Layer(name, plain.forward + self.map_alone(), plain.backward + extra)

    def widened(self, equal_widths: bool = False) -> Layer:
        """Return attention with v widened by a column per word; ``equal_widths``: q and k are padded to v's width.

        More words than fit beside v in 256 columns take further calls with the scores computed again.
        """
        s = self.shape
        free = 256 - s.head_dim
        forward: list[Kernel] = []
        backward: list[Kernel] = []
        column = s.batch * s.tokens * self.size
        for first in range(0, s.words, free):
            count = min(s.words - first, free)
            beside = s.head_dim if first == 0 else 0
            value_dim = -(-(beside + count) // 16) * 16
            key_dim = s.head_dim
            if equal_widths:  # as wide as the next template of PyTorch's flash attention
                value_dim = key_dim = next(w for w in (64, 96, 128, 192, 256) if w >= max(value_dim, s.head_dim))
            attention = self.plain(key_dim, value_dim)
            tag = "" if first == 0 else f" {first}"
            wide_v = column * s.kv_heads * (beside + value_dim)
            padded = column * (s.q_heads + s.kv_heads) * (s.head_dim + key_dim) if equal_widths else 0.0
            out = column * s.q_heads * 2 * beside
            forward += [
                self.kernel("widen v" + tag, 0, wide_v),
                *([self.kernel("pad q and k" + tag, 0, padded)] if padded else []),
                *(dataclasses.replace(k, name=k.name + " widened" + tag) for k in attention.forward),
                *([self.kernel("narrow out" + tag, 0, out)] if beside else []),
                self.kernel("word sums" + tag, 0, column * s.q_heads * count + self.maps),
            ]
            backward += [
                self.kernel("widen dout" + tag, 0, column * s.q_heads * (beside + value_dim)),
                *(dataclasses.replace(k, name=k.name + " widened" + tag) for k in attention.backward),
            ]
        name = "widened values, equal widths" if equal_widths else "widened values"
        return Layer(name, tuple(forward), tuple(backward))

    def fused(self) -> Layer:
        forward = self.flash_forward()
        return Layer("fused", forward, (self.flash_dq(), self.map_dk(direct=False), self.flash_dkv()))

    def map_only(self) -> Layer:
        return Layer("map alone", self.map_alone(), (self.map_dq("map_dq", 2), *self.map_gradient()[1:]))

    def eager(self) -> Layer:
        """Return eager attention: bound by the passes over the weights, one launch per operator."""
        s = self.shape
        weights = s.batch * s.q_heads * s.tokens**2
        forward, both = (bytes_ * weights for bytes_ in EAGER_BYTES)
        share = self.ramp * (1.0 if s.head_dim > 64 else 0.75)
        share_forward, share_backward = share * self.gpu.plain_forward, share * self.gpu.plain_backward
        return Layer(
            "eager",
            (Kernel("eager forward", 4 * self.product, forward, 0, share_forward, 20),),
            (Kernel("eager backward", 8 * self.product, both - forward, 0, share_backward, 30),),
        )

    def layers(self) -> list[Layer]:
        return [self.plain(), self.engine(False), self.engine(True), self.fused(), self.map_only(), self.eager()]

    def values(self) -> tuple[Kernel, ...]:
        """Return the pooling of values (Eq. 5), forward and backward; not part of the layers above."""
        return Kernel("values", 0, self.kv, launches=2), Kernel("values backward", 0, 2 * self.kv)

    def visible(self, rows: int) -> list[float]:
        """Return the key tokens that each tile of ``rows`` rows of one sequence sees."""
        s = self.shape
        return [s.words * min((t + 1) * rows, s.tokens) / s.tokens for t in range(-(-s.tokens // rows))]

    def columns(self, rows: int, block: int) -> tuple[float, float]:
        """Return, over all tiles of the batch, the pairs of row and key column of one head that tiles of ``rows`` x
        ``block`` touch, and the columns that they read."""
        visible = self.visible(rows)
        touched = sum(rows * -(-v // block) * block for v in visible)
        return self.shape.batch * touched, self.shape.batch * sum(visible)

    def map_alone(self) -> tuple[Kernel, Kernel]:
        s = self.shape
        tile = self.tiles.map_forward(self.gpu.arch, self.dtype, s.head_dim, s.words)
        tiles, blocks = self.tiles.num_tiles(s.tokens, s.batch, False, tile.rows), -(-s.words // tile.columns)
        which = "map_partials_wide" if tile.columns > 64 else "map_partials"
        if tile.stages == 1 and tile.columns == 64 and self.gpu.arch == "sm90":
            which = "map_partials_one_stage"
        compiled = COMPILED[which, self.bucket]
        # A program of the tile t and the block b exists if the tile sees a token of the block; it walks its heads.
        seen = [v > b * tile.columns for v in self.visible(tile.rows) for b in range(blocks)]
        per_program = self._heads_per_program(tiles * blocks, sum(seen) * s.batch, tile.warps, compiled)
        groups = -(-s.q_heads // per_program)
        share = groups * (tiles + s.batch * s.steps) * s.words / 2 * 4  # half of the columns are hidden
        flops, keys = self._column_flops(tile.rows, tile.columns, 1), self._keys(tile)
        again = flops / (2 * s.head_dim + 4 * configs.STEP_BLOCK) / tile.columns * s.head_dim * self.size  # q per block
        area = tile.rows * tile.columns
        loop = Loop(
            loads=0 if tile.stages > 1 else 2,
            barriers=8,
            flops=area * (2 * s.head_dim + 4 * configs.STEP_BLOCK),
            bytes=(tile.rows + tile.columns) * s.head_dim * self.size,
        )
        rounds = max(1.0, s.steps * tile.rows / s.tokens / configs.STEP_BLOCK)
        trips = tuple(rounds * s.q_heads / groups for used in seen if used)
        head = 3 if self.design.tables else 4  # (steps, step of each row, key tokens) then q and keys
        grid = Grid(compiled, tile.warps, trips, groups * s.batch, head, 1, loop)
        partials = self.kernel("map_partials", flops, self.q + self.lse + share, again + keys, grid)
        reduce = self.tiles.map_reduce(groups, s.words)
        # Per step and block of words: the plan, its tiles' partial sums one after the other, in rounds of groups.
        passes = (s.tokens / s.steps / tile.rows + 1) * -(-groups // reduce.groups)
        chains = passes * -(-min(s.words, reduce.words) // reduce.columns)
        sums = Loop(1, 1, 0.0, 0.0)
        programs = (float(chains),) * (s.steps * -(-s.words // reduce.words))
        steps = Grid(COMPILED["map_reduce", self.bucket], reduce.warps, programs, s.batch, 3, 0, sums)
        return partials, self.kernel("map_reduce", 0, share + self.maps, 0, steps)

    def _heads_per_program(self, programs: int, used: int, warps: int, compiled: tuple[int, int, int, int]) -> int:
        heads = self.shape.q_heads
        if not self.design.full_waves:
            return self.tiles.heads_per_program(self.gpu.arch, heads, programs)
        blocks, _ = aot.occupancy(aot.TARGETS[self.gpu.target], warps, *compiled[:2])
        slots = max(blocks, 1) * self.gpu.multiprocessors
        waves = {n: -(-used * -(-heads // n) // slots) * (n + 1) for n in range(1, heads + 1)}
        return min(waves, key=lambda n: waves[n])

    def flash_forward(self) -> tuple[Kernel, ...]:
        """Return the kernel with the map in its epilogue and the reduction; for many partial sums, the map alone."""
        s = self.shape
        tile = self.tiles.flash_forward(self.gpu.arch, self.dtype, s.head_dim, False)
        slots = self.tiles.num_tiles(s.tokens, s.batch, False, tile.rows) + s.batch * s.steps
        bytes_ = 2 * self.q + 2 * self.kv + self.lse
        if s.q_heads * slots * s.words * 4 > self.q:
            return self._flash("flash_forward", 2 * self.product, bytes_, 0, 1.0), *self.map_alone()
        share = s.q_heads * slots * s.words / 2 * 4
        epilogue = self._column_flops(tile.rows, tile.key_columns, 1) * self.triton / COLUMN_SHARE
        return (
            self._flash("flash_forward", 2 * self.product + epilogue, bytes_ + share, self._keys(tile), 1.0),
            self.kernel("map_reduce", 0, share + self.maps),
        )

    def _flash(self, name: str, flops: float, memory: float, l2: float, share: float) -> Kernel:
        """Return a kernel of engine triton, with the ramp of plain attention's."""
        return Kernel(name, flops, memory, l2, self.triton * share, launch=PLAIN_LAUNCH)

    def _dq_tile(self, has_dq: bool) -> Any:
        s = self.shape
        if not has_dq:
            return self.tiles.map_dlse(self.gpu.arch, self.dtype, s.head_dim, s.words)
        return self.tiles.map_dq(self.gpu.arch, self.dtype, s.head_dim, s.words)

    def map_dq(self, name: str, passes: int) -> Kernel:
        """Return map_dlse with one pass over q, or the kernel of dq with two, or three where it is added to."""
        s, has_dq, new = self.shape, passes > 1, self.design.pipelined_dq
        tile = self._dq_tile(has_dq)
        touched, _ = self.columns(tile.rows, tile.columns)
        products = 2 if has_dq else 1
        flops = 2 * products * touched * s.q_heads * s.head_dim
        area = tile.rows * tile.columns
        loop = Loop(
            loads=1 if new else 3,  # of the token, its key, the map's gradient, each from the one before
            barriers=(33 if has_dq else 13) if new else 24,
            flops=2 * products * area * s.head_dim + (4 * area * configs.STEP_BLOCK if new else 0),
            bytes=tile.columns * s.head_dim * self.size,
        )
        trips = tuple(float(-(-v // tile.columns)) for v in self.visible(tile.rows))
        searches = 1 if self.design.tables else 2 + -(-s.words // 128)
        which = "map_dq" if has_dq else "map_dlse"
        if new:
            which = "map_dq_tables" if has_dq else "map_fold" if tile.columns > 32 else "map_fold_one"
            if has_dq and self.bucket > 64 and tile.warps == 4:
                which = "map_dq_4_warps"
        memory_loads = 2 if passes > 2 else 1
        grid = Grid(COMPILED[which, self.bucket], tile.warps, trips, s.batch * s.q_heads, searches, memory_loads, loop)
        return self.kernel(name, flops, passes * self.q + 2 * self.lse, self._keys(tile), grid)

    def map_dlse(self) -> Kernel:
        return self.map_dq("map_dlse", 1)

    def map_fold(self) -> Kernel:
        """Return dlse and its folding in one kernel: O and dO are read and written beside q."""
        dlse = self.map_dlse()
        assert dlse.grid is not None
        grid = dataclasses.replace(dlse.grid, memory_loads=dlse.grid.memory_loads + 1)
        return self.kernel("map_fold", dlse.flops, 5 * self.q + 2 * self.lse, 0, grid)

    def preprocess(self) -> Kernel:
        """Return dlse and dq in one pass over q, O and dO, less flash-attn 4's own preprocess and its zeroed dq."""
        both = self.map_dq("map_dq", 2)
        assert both.grid is not None
        grid = dataclasses.replace(both.grid, memory_loads=3)
        own = 2 * self.q + 2 * self.q  # what the package's preprocess reads and zeroes anyway: O, dO, float32 dq
        return self.kernel("preprocess", both.flops, 3 * self.q + 2 * self.q + 2 * self.lse - own, 0, grid)

    def map_gradient(self) -> tuple[Kernel, ...]:
        """Return the kernels after an engine's backward; with a single split of the rows dk is added directly."""
        s = self.shape
        splits = self._splits()
        rows = s.batch * s.kv_heads * s.words * s.head_dim
        loop = Loop(1, 0, 0.0, 0.0)
        blocks = -(-s.words // self.tiles.map_dk_add(s.head_dim).columns)
        grid = Grid(COMPILED["map_dk_add", self.bucket], 4, (1.0,) * (blocks * s.kv_heads), s.batch, 2, 1, loop)
        add = self.kernel("map_dk_add", 0, splits * rows * 4 + 2 * rows * self.size, 0, grid)
        return self.map_dq("map_dq_add", 3), self.map_dk(), *((add,) if splits > 1 else ())

    def _dk(self) -> tuple[Any, tuple[int, int, int, int]]:
        """Return the tile of map_dk and how it was compiled."""
        s = self.shape
        tile = self.tiles.map_dk(self.gpu.arch, self.dtype, s.head_dim, s.words)
        return tile, COMPILED["map_dk_tables" if self.design.pipelined_dq else "map_dk", self.bucket]

    def map_dk(self, direct: bool = True) -> Kernel:
        s = self.shape
        tile, compiled = self._dk()
        blocks = -(-s.words // tile.columns)
        rows = [s.tokens * (1 - b * tile.columns / s.words) for b in range(blocks)]
        walked = sum(rows) * s.batch * s.q_heads
        splits = self._splits()
        result = s.batch * s.kv_heads * s.words * s.head_dim * (2 * self.size if direct and splits == 1 else 4 * splits)
        flops = 4 * walked * tile.columns * s.head_dim
        area = tile.rows * tile.columns
        loop = Loop(
            loads=2,  # the step of each row, then the map's gradient at it; q runs ahead
            barriers=7,
            flops=4 * area * s.head_dim,
            bytes=tile.rows * s.head_dim * self.size,
        )
        group = s.q_heads // s.kv_heads
        trips = tuple(-(-(-(-r // tile.rows) * group) // splits) * 1.0 for r in rows)
        searches = 1 if self.design.tables else 2
        grid = Grid(compiled, tile.warps, trips, s.batch * s.kv_heads * splits, 1 + searches, 1, loop)
        return self.kernel("map_dk", flops, self.q + self.lse + result, walked * s.head_dim * self.size, grid)

    def fold(self) -> Kernel:
        return self.kernel("fold", 0, 4 * self.q + self.lse)

    def flash_dq(self) -> Kernel:
        s = self.shape
        tile = self.tiles.flash_dq(self.gpu.arch, self.dtype, s.head_dim)
        touched, _ = self.columns(tile.rows, tile.key_columns)
        flops = 3 * self.product + 4 * touched * s.q_heads * s.head_dim
        return self._flash("flash_dq", flops, 4 * self.q + 2 * self.kv + 2 * self.lse, self._keys(tile), 1.0)

    def flash_dkv(self) -> Kernel:
        s = self.shape
        partial = self._splits() * s.batch * s.kv_heads * s.words * s.head_dim * 4
        bytes_ = 2 * self.q + 4 * self.kv + 2 * self.lse + partial
        return self._flash("flash_dkv", 4 * self.product, bytes_, 0, DKV_SHARE)

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
        tile, compiled = self._dk()
        programs = s.batch * -(-s.words // tile.columns) * s.kv_heads
        limit = -(-s.tokens // tile.rows) * (s.q_heads // s.kv_heads)
        rows, resident = s.tokens * (s.q_heads // s.kv_heads), ()
        if self.design.full_waves:
            resident = (aot.occupancy(aot.TARGETS[self.gpu.target], tile.warps, *compiled[:2])[0],)
        splits: int = self.tiles.row_splits(self.gpu.arch, programs, limit, rows, *resident)
        return splits


def predicted(shape: Shape, gpu: GPU | None, contender: str, kind: str, backward: bool) -> tuple[float, float] | None:
    """Return the seconds of a contender and the ratio to the fastest plain attention; None without a known GPU."""
    if gpu is None:
        return None
    work = Work(shape, gpu)
    plain = work.plain().seconds(gpu, backward)
    if "own preprocess" in contender:
        work = Work(shape, gpu, PREPROCESS)
    if kind == "map" and "widened" in contender:
        # Which engines take v wider than q and k differs by width (widened_values.py); one width is the usual case.
        layer = work.widened(equal_widths=True)
    elif kind == "map":
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


# Shapes that have a target, with it: both passes over plain attention's.
AIMS = (
    (Shape(16, 256, 20, 5, 9, 3, 64, "bfloat16"), 1.25),
    (Shape(2, 2048, 64, 16, 32, 32, 128, "bfloat16"), 1.10),
    (Shape(1, 4096, 64, 32, 32, 32, 128, "bfloat16"), 1.05),
    (Shape(1, 4096, 256, 32, 32, 32, 128, "bfloat16"), 1.07),
    (Shape(1, 8192, 256, 64, 32, 32, 128, "bfloat16"), 1.05),
    (Shape(1, 16384, 1024, 128, 32, 32, 128, "bfloat16"), 1.05),
)


def designs(shape: Shape, gpu: GPU) -> dict[str, Layer]:
    """Return the layers that compete for a shape, by the names in the table of ``--targets``."""
    return {
        "first": Work(shape, gpu, FIRST).engine(False),
        "first, dlse": Work(shape, gpu, FIRST).engine(True),
        "maps": Work(shape, gpu, MAPS).engine(False),
        "maps, dlse": Work(shape, gpu, MAPS).engine(True),
        "preprocess": Work(shape, gpu, PREPROCESS).engine(True),
        "widened": Work(shape, gpu, MAPS).widened(),
        "widened, equal": Work(shape, gpu, MAPS).widened(equal_widths=True),
    }


def print_targets() -> None:
    """Print each design against the targets, and the share of each of its kernels in plain attention's time."""
    for name in ("H200", "H100"):
        gpu = GPUS[name]
        print(f"{name}: {PREDICTED}, not measured. Forward + backward over the fastest plain attention.")
        columns = list(designs(AIMS[0][0], gpu))
        print(f"{'':36s}{'plain us':>9s}{'target':>8s}" + "".join(f"{c:>16s}" for c in columns))
        for shape, target in AIMS:
            plain = Work(shape, gpu).plain().seconds(gpu, True)
            found = designs(shape, gpu)
            ratios = "".join(f"{found[c].seconds(gpu, True) / plain:16.2f}" for c in columns)
            print(f"{shape.name:36s}{plain * 1e6:9.0f}{target:8.2f}{ratios}")
        for shape, _ in AIMS:
            plain = Work(shape, gpu).plain().seconds(gpu, True)
            for c, layer in designs(shape, gpu).items():
                parts = [(k.seconds(gpu), k.name) for k in layer.kernels(True)]
                if len(parts) > 12:  # many groups of words
                    continue
                shares = ", ".join(f"{name} {100 * seconds / plain:.1f}" for seconds, name in parts)
                print(f"  {shape.name}, {c}, percent of plain: {shares}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="H200", choices=GPUS)
    parser.add_argument("--csv", type=Path, help="write every record to this file")
    parser.add_argument("--only", default="", help="only shapes whose name contains this text")
    parser.add_argument("--targets", action="store_true", help="print designs against the targets, and no records")
    arguments = parser.parse_args(argv)
    if arguments.targets:
        print_targets()
        return
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
