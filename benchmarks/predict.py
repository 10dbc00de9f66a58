"""Predicts the time of each kernel on a GPU, to compare measurements with. Nothing here was measured.

    python -m benchmarks.predict [--gpu H200] [--csv FILE] [--only TEXT] [--targets]

The time of a launch is modelled in ``roofline.py``. The tiles, groups and splits are those of
``molsaki_kernels._triton.configs``. ``--targets`` prints designs that do not exist yet beside those that do.

Every constant has its source beside it: :data:`roofline.GPUS`, the constants here and there. What the map's kernels are
compiled to is in ``compiled/now.csv``; ``compiled/dd1fa4c.csv`` is of the kernels that were timed on an H200. The first
has to be written anew, with Triton 3.6, when a kernel or its tile changes:

    python -m molsaki_kernels.aot --target cuda:80 cuda:90 --csv benchmarks/compiled/now.csv \\
        --filter '^(map_.*|fa4_preprocess)-bf16-d(64|128)(-c(64|256))?$|^map_reduce-g'

Times are those of the GPU; a slower host adds its own (compare the measured modes "eager" and "graph").
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from molsaki_kernels._triton import configs, fa4_preprocess
from molsaki_kernels._triton.lse_gradient import tile as fold_tile

from .layer import write_csv
from .roofline import COLUMN_SHARE, GPU, GPUS, Compiled, Grid, Kernel, Layer, Loop
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


def _compiled(name: str) -> dict[tuple[str, str], Compiled]:
    """Return what ``aot`` printed of the map's kernels, by target and name; see the head of this file."""
    with (Path(__file__).parent / "compiled" / f"{name}.csv").open(newline="") as file:
        return {
            (r["target"], r["name"]): Compiled(
                *(int(r[n]) for n in ("registers", "shared", "warps", "straight")),
                tuple(map(int, r["loops"].split())),
                int(r["stages"]),
            )
            for r in csv.DictReader(file)
        }


COMPILED = _compiled("now")
TIMED = _compiled("dd1fa4c")
LOADS = 1  # dependent trips to L2 in a loop without a pipeline


def timed_splits(programs: int, items: int, rows: int) -> int:
    """Return the splits of the rows in map_dk at commit dd1fa4c, of sm90: three programs per multiprocessor."""
    slots = 3 * configs.MULTIPROCESSORS["sm90"]
    return max(1, min(items, 32, max(slots // programs, min(rows // 700, 4 * slots // programs))))


class Work:
    """The bytes, FLOPs and programs of every kernel for one shape; causal, bf16, evenly spread key tokens."""

    def __init__(self, shape: Shape, gpu: GPU, preprocess: bool = False, timed: bool = False) -> None:
        """
        Args:
            preprocess: a kernel of ours replaces flash-attn 4's preprocess (MOLSAKI_FA4_PREPROCESS).
            timed: the map's kernels are those of commit dd1fa4c, which were timed on an H200, not today's.
        """
        self.table = TIMED if timed else COMPILED
        self.equal_shares = not timed  # of the rows in map_dk
        self.shape, self.gpu, self.dtype = shape, gpu, getattr(torch, shape.dtype)
        self.own_preprocess = preprocess
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
        self.width = 64 if shape.head_dim <= 64 else 128
        self.one_block = shape.words <= configs.ONE_BLOCK

    def compiled(self, name: str, tile: configs.MapTile | None = None) -> Compiled:
        """Return what a kernel was compiled to, and check that it was compiled with this tile."""
        suffix = "" if name.startswith("map_reduce") else f"-bf16-d{self.width}"
        if name == "map_partials":
            suffix += "-c64" if self.shape.words <= 64 else "-c256"
        found = self.table[self.gpu.target, name + suffix]
        made, wanted = (found.warps, found.stages), (tile and tile.warps, tile and tile.stages)
        if self.table is COMPILED and tile is not None and made != wanted:
            raise ValueError(f"{name}: compiled/now.csv has {made} warps and stages, configs has {wanted}")
        return found

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
        if self.own_preprocess and lse_gradient:
            extra = (self.preprocess(), *self.map_gradient()[1:])
        elif lse_gradient:
            extra = (self.map_dlse(), *self.map_gradient())
        else:
            extra = (self.map_fold(), *self.map_gradient())
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
        return Layer("map alone", self.map_alone(), (self.map_dq(), *self.map_gradient()[1:]))

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
        tile, groups = self._partials()
        share = self._partial_bytes(tile, groups)
        return self.partials(), self.kernel("map_reduce", 0, share + self.maps, 0, self._reduce(groups, tile.rows))

    def _partials(self) -> tuple[configs.MapTile, int]:
        """Return the tile of map_partials and the number of groups of heads."""
        s, arch = self.shape, self.gpu.arch
        tile = configs.map_forward(arch, self.dtype, s.head_dim, s.words)
        tiles, blocks = configs.num_tiles(s.tokens, s.batch, False, tile.rows), -(-s.words // tile.columns)
        per_program = configs.heads_per_program(arch, s.q_heads, tiles * (blocks + 1) / 2, tile.resident)
        return tile, -(-s.q_heads // per_program)

    def _partial_bytes(self, tile: Any, groups: int) -> float:
        s = self.shape
        slots = configs.num_tiles(s.tokens, s.batch, False, tile.rows) + s.batch * s.steps
        return groups * slots * s.words / 2 * 4  # half of the columns are hidden

    def partials(self) -> Kernel:
        s = self.shape
        tile, groups = self._partials()
        compiled = self.compiled("map_partials", tile)
        flops, keys = self._column_flops(tile.rows, tile.columns, 1), self._keys(tile)
        per_column = 2 * s.head_dim + 4 * configs.STEP_BLOCK
        again = flops / per_column / tile.columns * s.head_dim * self.size  # q per block of key tokens
        of_step, of_head = compiled.loops
        loop = Loop(
            of_head,
            loads=0 if compiled.stages > 1 else LOADS,
            flops=tile.rows * tile.columns * per_column,
            bytes=(tile.rows + tile.columns) * s.head_dim * self.size,
        )
        # A program of the tile t and the block b exists if the tile sees a token of the block; it walks its heads.
        seen = [v > b * tile.columns for v in self.visible(tile.rows) for b in range(-(-s.words // tile.columns))]
        rounds = self._rounds(tile)
        trips = tuple(float(rounds * -(-s.q_heads // groups)) for used in seen if used)
        grid = Grid(compiled, trips, groups * s.batch, loop, once=compiled.straight + rounds * of_step)
        memory = self.q + self.lse + self._partial_bytes(tile, groups)
        return self.kernel("map_partials", flops, memory, again + keys, grid)

    def _reduce(self, groups: int, rows: int) -> Grid:
        """Return a program per step and block of words: the sums of its tiles, one after the other, by groups."""
        s = self.shape
        tile = configs.map_reduce(groups, s.words)
        compiled = self.compiled("map_reduce-g1-c32" if self.one_block else "map_reduce-g32-c256")
        blocks, of_tile, of_groups = compiled.loops[:3]
        columns = -(-min(s.words, tile.words) // tile.columns)
        tiles = math.ceil(s.tokens / s.steps / rows + 0.5) * columns
        once = compiled.straight + columns * blocks + tiles * of_tile
        trips = (float(tiles * -(-groups // tile.groups)),) * (s.steps * -(-s.words // tile.words))
        return Grid(compiled, trips, s.batch, Loop(of_groups, loads=1), once)

    def _rounds(self, tile: configs.MapTile) -> int:
        """Return the blocks of steps that a tile of rows touches."""
        return max(1, math.ceil(self.shape.steps * tile.rows / self.shape.tokens / configs.STEP_BLOCK))

    def flash_forward(self) -> tuple[Kernel, ...]:
        """Return the kernel with the map in its epilogue and the reduction; for many partial sums, the map alone."""
        s = self.shape
        tile = configs.flash_forward(self.gpu.arch, self.dtype, s.head_dim, False)
        bytes_ = 2 * self.q + 2 * self.kv + self.lse
        share = self._partial_bytes(tile, s.q_heads)
        if 2 * share > self.q:
            return self._flash("flash_forward", 2 * self.product, bytes_, 0, 1.0), *self.map_alone()
        epilogue = self._column_flops(tile.rows, tile.key_columns, 1) * self.triton / COLUMN_SHARE
        return (
            self._flash("flash_forward", 2 * self.product + epilogue, bytes_ + share, self._keys(tile), 1.0),
            self.kernel("map_reduce", 0, share + self.maps, 0, self._reduce(s.q_heads, tile.rows)),
        )

    def _flash(self, name: str, flops: float, memory: float, l2: float, share: float) -> Kernel:
        """Return a kernel of engine triton, with the ramp of plain attention's."""
        return Kernel(name, flops, memory, l2, self.triton * share, launch=PLAIN_LAUNCH)

    def map_dq_add(self) -> Kernel:
        """Return the kernel that adds the map's dq to an engine's."""
        return self._dq("map_dq_add", "map_dq_add_one" if self.one_block else "map_dq_add", 3)

    def map_dq(self) -> Kernel:
        """Return the kernel that writes dq and dlse."""
        return self._dq("map_dq", "map_dq", 2)

    def _dq(self, name: str, variant: str, passes: int) -> Kernel:
        tile = configs.map_dq(self.gpu.arch, self.dtype, self.shape.head_dim, self.shape.words)
        compiled = self.compiled(variant, tile)
        return self._key_blocks(name, tile, compiled, products=2, memory=passes * self.q + 2 * self.lse)

    def map_dlse(self) -> Kernel:
        """Return the kernel that only writes dlse."""
        return self._dlse("map_dlse", False)

    def map_fold(self) -> Kernel:
        """Return dlse and its folding in one kernel: O and dO are read and written beside q."""
        return self._dlse("map_fold", True)

    def _dlse(self, name: str, fold: bool) -> Kernel:
        s, gpu = self.shape, self.gpu
        tile = configs.map_dlse(gpu.arch, self.dtype, s.head_dim, s.words)
        memory = (5 if fold else 1) * self.q + 2 * self.lse
        compiled = self.compiled(name + ("_one" if self.one_block else ""), tile)
        parts = -(-tile.rows // fold_tile(s.head_dim)[0]) if fold else 0
        of_part = compiled.loops[-1] * parts
        if not self.one_block:
            return self._key_blocks(name, tile, compiled, 1, memory, of_part)
        # What does not depend on the head is loaded once, then a program walks its heads.
        tiles = configs.num_tiles(s.tokens, s.batch, False, tile.rows)
        heads = configs.heads_per_program(gpu.arch, s.q_heads, tiles, tile.resident)
        flops = 2 * tiles * tile.rows * tile.columns * s.q_heads * s.head_dim
        loop = Loop(
            compiled.loops[1], 0, flops / tiles / s.q_heads, (tile.rows + tile.columns) * s.head_dim * self.size
        )
        once = compiled.straight + self._rounds(tile) * compiled.loops[0]
        grid = Grid(compiled, (float(heads),) * tiles, -(-s.q_heads // heads), loop, once, heads * of_part)
        return self.kernel(name, flops, memory, self._keys(tile), grid)

    def _key_blocks(
        self, name: str, tile: Any, compiled: Compiled, products: int, memory: float, streaming: float = 0.0
    ) -> Kernel:
        """Return a kernel whose programs, one per tile of rows and head, walk the blocks of visible key tokens."""
        s = self.shape
        touched, _ = self.columns(tile.rows, tile.columns)
        loop = Loop(
            compiled.loops[0],
            loads=0 if compiled.stages > 1 else LOADS,
            flops=tile.rows * tile.columns * (2 * products * s.head_dim + 4 * configs.STEP_BLOCK),
            bytes=tile.columns * s.head_dim * self.size,
        )
        rounds = self._rounds(tile)
        trips = tuple(float(rounds * -(-v // tile.columns)) for v in self.visible(tile.rows))
        grid = Grid(compiled, trips, s.batch * s.q_heads, loop, compiled.straight, streaming)
        return self.kernel(name, 2 * products * touched * s.q_heads * s.head_dim, memory, self._keys(tile), grid)

    def preprocess(self) -> Kernel:
        """Return dlse and dq in one pass over q, O and dO, less flash-attn 4's own preprocess and its zeroed dq."""
        compiled = self.compiled("fa4_preprocess")
        layout = fa4_preprocess.accumulator(self.shape.head_dim, causal=True, windowed=False)
        rows = 64 if layout is None else layout.rows
        tile = configs.MapTile(rows, fa4_preprocess.COLUMNS, warps=compiled.warps, stages=compiled.stages)
        *searches, loop = compiled.loops
        compiled = compiled._replace(straight=compiled.straight + sum(searches), loops=(loop,))
        own = 2 * self.q + 2 * self.q  # what the package's preprocess reads and zeroes anyway: O, dO, float32 dq
        memory = 3 * self.q + 2 * self.q + 2 * self.lse - own
        return self._key_blocks("preprocess", tile, compiled, 2, memory)

    def map_gradient(self) -> tuple[Kernel, ...]:
        """Return the kernels after an engine's backward; with a single split of the rows dk is added directly."""
        s = self.shape
        splits = self._splits()
        rows = s.batch * s.kv_heads * s.words * s.head_dim
        blocks = -(-s.words // configs.map_dk_add(s.head_dim).columns)
        compiled = self.compiled("map_dk_add")
        loop = Loop(compiled.loops[0], loads=2)  # a trip to memory: the parts were written a moment ago, by all
        grid = Grid(compiled, (float(splits),) * (blocks * s.kv_heads), s.batch, loop, compiled.straight, 0.0, 3)
        add = self.kernel("map_dk_add", 0, splits * rows * 4 + 2 * rows * self.size, 0, grid)
        return self.map_dq_add(), self.map_dk(), *((add,) if splits > 1 else ())

    def map_dk(self, direct: bool = True) -> Kernel:
        s = self.shape
        tile, splits = self._dk_tile(), self._splits()
        direct = direct and splits == 1
        compiled = self.compiled("map_dk_direct" if direct else "map_dk", tile)
        blocks = -(-s.words // tile.columns)
        rows = [s.tokens * (1 - b * tile.columns / s.words) for b in range(blocks)]
        walked = sum(rows) * s.batch * s.q_heads
        result = s.batch * s.kv_heads * s.words * s.head_dim * (2 * self.size if direct else 4 * splits)
        flops = 4 * walked * tile.columns * s.head_dim
        area = tile.rows * tile.columns
        loop = Loop(compiled.loops[0], flops=4 * area * s.head_dim, bytes=tile.rows * s.head_dim * self.size)
        group = s.q_heads // s.kv_heads
        items = [math.ceil(r / tile.rows) * group for r in rows]
        if self.equal_shares:
            share = math.ceil(items[0] / splits)
            trips = tuple(float(max(min(share, n - i * share), 0)) for i in range(splits) for n in items)
        else:
            trips = tuple(float(math.ceil(n / splits)) for _ in range(splits) for n in items)
        grid = Grid(compiled, trips, s.batch * s.kv_heads, loop, compiled.straight)
        return self.kernel("map_dk", flops, self.q + self.lse + result, walked * s.head_dim * self.size, grid)

    def flash_dq(self) -> Kernel:
        s = self.shape
        tile = configs.flash_dq(self.gpu.arch, self.dtype, s.head_dim)
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

    def _dk_tile(self) -> configs.MapTile:
        return configs.map_dk(self.gpu.arch, self.dtype, self.shape.head_dim, self.shape.words)

    def _splits(self) -> int:
        s, tile = self.shape, self._dk_tile()
        group, sequences = s.q_heads // s.kv_heads, s.batch * s.kv_heads
        blocks, items = -(-s.words // tile.columns), -(-s.tokens // tile.rows) * group
        if not self.equal_shares:
            return timed_splits(sequences * blocks, items, s.tokens * group)
        split_bytes = sequences * s.words * s.head_dim * 4
        return configs.row_splits(self.gpu.arch, blocks, sequences, items, split_bytes, tile.resident)


def known(shape: Shape) -> bool:
    """Return whether ``compiled/`` has the shape's kernels; those of float16 are bfloat16's."""
    return shape.dtype in ("bfloat16", "float16") and shape.head_dim <= 128


def predicted(shape: Shape, gpu: GPU | None, contender: str, kind: str, backward: bool) -> tuple[float, float] | None:
    """Return the seconds of a contender and the ratio to the fastest plain attention.

    None without a known GPU, and for a shape whose kernels are not in ``compiled/``.
    """
    if gpu is None or not known(shape):
        return None
    work = Work(shape, gpu)
    plain = work.plain().seconds(gpu, backward)
    if "own preprocess" in contender:
        work = Work(shape, gpu, preprocess=True)
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
        "engine": Work(shape, gpu).engine(False),
        "engine, dlse": Work(shape, gpu).engine(True),
        "own preprocess": Work(shape, gpu, preprocess=True).engine(True),
        "widened": Work(shape, gpu).widened(),
        "widened, equal": Work(shape, gpu).widened(equal_widths=True),
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
    parser.add_argument("--targets", action="store_true", help="print what competes for each target, and no records")
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
        costs = work.map_alone() + (work.map_fold(), *work.map_gradient())
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
