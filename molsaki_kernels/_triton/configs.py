"""Tile sizes of the kernels, as pure functions of architecture, dtype, head dimension and shape.

Nothing is timed at run time. ``arch`` is "sm80", "sm86" (8.6, 8.9 and 12.x: 99 KB of shared memory per block), "sm90",
"sm100", "gfx942" (64 KB) or "cpu" (Triton's interpreter). Comments give the reasons. Where one says "compiled", it
relies on the registers and spills that ``python -m molsaki_kernels.aot`` reports; "measured" is the time of the kernel
alone on an H200 (``python -m benchmarks.tile_sweep``, benchmarks/results/tiles-h200.csv). Only sm90 was measured.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from molsaki_kernels._triton.integers import cdiv, next_power_of_2

# Steps into which a tile of rows is summed at once: the smallest N of a tensor-core product. A tile of 128 rows holds
# more than 16 steps only if they average less than 8 tokens; then it takes another round.
STEP_BLOCK = 16

# Key tokens up to which the map's first backward pass keeps their positions, words and upstream gradient in registers
# for all heads of a program.
ONE_BLOCK = 32
PROLOGUE = 2
BYTES_PER_ITEM = 2.5e6  # written and read again in the time of an item of map_dk: 1.4 us on an H200

MULTIPROCESSORS = {"sm80": 108, "sm86": 84, "sm90": 132, "sm100": 148, "gfx942": 304, "cpu": 2}


@dataclasses.dataclass(frozen=True)
class MapTile:
    rows: int
    columns: int  # key tokens
    warps: int
    stages: int
    resident: int = 1  # programs that fit a multiprocessor at once (compiled)


@dataclasses.dataclass(frozen=True)
class ReduceTile:
    groups: int
    columns: int
    words: int
    warps: int


@dataclasses.dataclass(frozen=True)
class FlashTile:
    rows: int  # that a program owns: queries, or keys in the kernel of dk and dv
    columns: int  # per step of the loop: keys, or queries in the kernel of dk and dv
    key_columns: int
    warps: int
    stages: int


@functools.lru_cache
def _arch_of_device(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    if major == 8:
        return "sm80" if minor == 0 else "sm86"
    return {9: "sm90", 10: "sm100"}.get(major, "sm86")


def arch_of(tensor: Tensor) -> str:
    """The ``arch`` of the tensor's device."""
    return _arch_of_device(tensor.device.index) if tensor.is_cuda else "cpu"


def num_tiles(M: int, N: int, packed: bool, rows: int) -> int:
    """The number of tiles of the whole batch, or a bound on it where sequences are packed (see ``tiles.locate``)."""
    return M // rows + N if packed else N * cdiv(M, rows)


@functools.lru_cache
def heads_per_program(arch: str, heads: int, programs: float, resident: int = 1) -> int:
    """Heads per program of the map, chosen to fill whole waves: ``programs`` for each group of heads.

    The time is the number of waves times that of a program: its heads, and about one more for what it loads once.
    """

    def time(per_program: int) -> int:
        waves: float = programs * cdiv(heads, per_program) / (resident * MULTIPROCESSORS[arch])
        return math.ceil(waves) * (per_program + 1)

    return min(range(1, heads + 1), key=time)


@functools.lru_cache
def row_splits(
    arch: str, blocks: int, sequences: int, items: int, split_bytes: int, resident: int = 2, equal_shares: bool = True
) -> int:
    """Splits of the rows in dk of the key tokens, at most 32 (memory): those with the shortest predicted time.

    The unit of time is an item, a tile of rows of one head. A program's prologue and epilogue take about PROLOGUE of
    them; each split is written and read again.

    Args:
        blocks: of key tokens. sequences: times the key heads; each has a program per block and split. items: of a
            block that every row sees, which is the first with causality; then, in even steps, the next ones have fewer.
        split_bytes: of the results of one split.
        resident: programs that a multiprocessor holds.
        equal_shares: with causality; each program has ``items / splits``, so that later blocks use fewer splits. Else
            each block is split into ``splits``.
    """
    slots = resident * MULTIPROCESSORS[arch]
    of_block = [items * (1 - b / blocks) if equal_shares else items for b in range(blocks)]

    def time(splits: int) -> float:
        share = cdiv(items, splits)
        programs = sequences * sum(math.ceil(n / share) for n in of_block)  # without those that have no row
        longest = share + PROLOGUE
        work = sequences * sum(of_block) + programs * PROLOGUE
        filled = longest if programs <= slots else max(longest, work / slots + longest / 2)
        return filled + (splits > 1) * splits * split_bytes / BYTES_PER_ITEM

    return min(range(1, max(min(items, 32), 1) + 1), key=time)


@functools.lru_cache
def map_forward(arch: str, dtype: torch.dtype, head_dim: int, key_tokens: int) -> MapTile:
    if arch == "cpu":
        return MapTile(rows=32, columns=16, warps=4, stages=1)
    if dtype == torch.float32:
        # Full float32 products run on the vector units and hold whole operand rows in registers, so tiles are small.
        if arch == "sm86" and head_dim > 64:
            return MapTile(rows=16, columns=32, warps=8, stages=1)  # compiled: 32 rows in 4 warps spill 163 at 128
        return MapTile(rows=32, columns=32, warps=4, stages=1)
    if arch == "gfx942" or head_dim > 128:
        return MapTile(rows=32, columns=64, warps=4, stages=1 if arch in ("gfx942", "sm86") else 2)
    if arch == "sm86" and key_tokens <= 64:
        return MapTile(rows=32, columns=64, warps=4, stages=2)  # compiled: 64 rows of 64 dimensions spill 4
    # The product is P^T [columns, rows]: 64 columns fill one warpgroup's wgmma, 128 two. The paper's examples have 13
    # to 40 words. Measured: 64 x 64 in 4 warps takes 0.82 to 0.91 of the time of 64 x 128 in 8, and 0.83 of 32 x 64.
    if arch == "sm90":  # compiled: two stages spill with 128 dimensions (and take 0.95 of the time of one)
        return MapTile(rows=64, columns=64, warps=4, stages=2 if head_dim <= 64 else 1, resident=2)
    # Compiled: 64 rows with 64 columns of 128 dimensions spill under Triton 3.6; 128 columns need 8 warps.
    if key_tokens <= 64:
        stages = 1 if arch == "sm100" and head_dim > 64 else 2  # compiled: two stages spill 2 registers there
        return MapTile(rows=64 if head_dim <= 64 else 32, columns=64, warps=4, stages=stages, resident=2)
    # Compiled: two stages of 64 rows spill two registers on sm86 without a causal mask or with packing.
    rows = 64 if head_dim <= 64 else 32
    return MapTile(rows=rows, columns=128, warps=8, stages=1 if arch == "sm86" and rows == 64 else 2)


@functools.lru_cache
def map_reduce(groups: int, key_tokens: int) -> ReduceTile:
    return ReduceTile(
        groups=min(32, next_power_of_2(groups)),
        columns=32 if key_tokens <= 32 else 64,
        words=32 if key_tokens <= 32 else 64,
        warps=4,
    )


@functools.lru_cache
def map_dq(arch: str, dtype: torch.dtype, head_dim: int, key_tokens: int) -> MapTile:
    if arch == "cpu":
        return MapTile(rows=32, columns=16, warps=4, stages=1)
    if dtype == torch.float32:
        # Compiled: 8 warps of 64 dimensions spill one or two registers on sm80 and sm86.
        return MapTile(rows=16, columns=16, warps=4 if arch in ("sm80", "sm86") and head_dim <= 64 else 8, stages=1)
    # Limited by bandwidth (a read of q, a read and a write of dq) and by the latency of the gather of keys: loads run
    # ahead, and many warps are resident (16 on Hopper).
    if head_dim > 128:
        return MapTile(rows=32, columns=32, warps=4, stages=1 if arch in ("gfx942", "sm86") else 2)
    if arch == "gfx942":
        return MapTile(rows=64, columns=32, warps=4, stages=1)
    if arch in ("sm80", "sm86"):
        return MapTile(rows=64, columns=16, warps=4, stages=2)  # compiled: 32 columns leave room for two programs
    # Measured: 4 warps take 0.65 to 0.73 of the time of 8; without a pipeline 0.74 where there is one block. For more
    # blocks that was measured of map_dlse only, and predicted here: 51 us, not 57, at 1 x 4,096.
    if arch == "sm90":
        return MapTile(rows=64, columns=32, warps=4, stages=1)
    return MapTile(rows=64, columns=32, warps=8 if head_dim > 64 else 4, stages=2)


@functools.lru_cache
def map_dlse(arch: str, dtype: torch.dtype, head_dim: int, key_tokens: int) -> MapTile:
    tile = map_dq(arch, dtype, head_dim, key_tokens)
    if arch in ("cpu", "gfx942") or dtype == torch.float32 or head_dim > 128:
        return tile
    if arch in ("sm80", "sm86"):
        return dataclasses.replace(tile, columns=16 if head_dim > 64 else 32, resident=4)
    # Without the accumulator of dq there is room for 64 key tokens, but not for the loop over heads beside them.
    if key_tokens <= ONE_BLOCK:
        return dataclasses.replace(tile, columns=32, warps=4, stages=2, resident=4)
    # Measured: without a pipeline 0.64 to 0.71 of the time with one, whose loop starts by waiting for the copies.
    return dataclasses.replace(tile, columns=64, warps=4, stages=1 if arch == "sm90" else 2, resident=4)


@functools.lru_cache
def map_dk(arch: str, dtype: torch.dtype, head_dim: int, key_tokens: int) -> MapTile:
    if arch == "cpu":
        return MapTile(rows=16, columns=16, warps=4, stages=1)
    if dtype == torch.float32:
        return MapTile(rows=16, columns=16, warps=8, stages=1, resident=2)
    # The accumulator is [columns, head_dim] float32: 64 x 128 is 64 registers per thread in 4 warps.
    if head_dim > 128:
        return MapTile(rows=32, columns=64, warps=8, stages=1 if arch in ("gfx942", "sm86") else 2)
    if arch == "gfx942":
        return MapTile(rows=64 if head_dim <= 64 else 32, columns=64, warps=4, stages=1, resident=2)
    # Compiled: 64 rows leave room for half as many warps, and those of 128 dimensions spill. On Hopper 8 warps would
    # keep twice as many resident at 128 dimensions, but execute 1.6 times the instructions.
    if head_dim > 64:
        return MapTile(rows=32, columns=64, warps=4, stages=2, resident=3)
    return MapTile(rows=32, columns=64, warps=4, stages=2, resident=4 if arch == "sm90" else 2)


@functools.lru_cache
def map_dk_add(head_dim: int) -> MapTile:
    return MapTile(rows=0, columns=16 if head_dim > 128 else 32, warps=4, stages=1)


@functools.lru_cache
def flash_forward(arch: str, dtype: torch.dtype, head_dim: int, softcap: bool) -> FlashTile:
    if arch == "cpu":
        return FlashTile(rows=32, columns=16, key_columns=16, warps=4, stages=1)
    if dtype == torch.float32:
        return FlashTile(rows=32, columns=32 if head_dim <= 128 else 16, key_columns=16, warps=8, stages=1)
    if arch == "gfx942":
        return FlashTile(rows=128, columns=64 if head_dim <= 64 else 32, key_columns=32, warps=4, stages=1)
    if arch in ("sm80", "sm86"):
        # mma.sync reads both operands from registers. Compiled: fewer warps or wider tiles spill.
        if head_dim <= 64:
            return FlashTile(rows=128, columns=64, key_columns=64, warps=8, stages=2)
        if head_dim <= 128:
            return FlashTile(rows=128, columns=32, key_columns=64, warps=8, stages=2)
        return FlashTile(rows=64, columns=32, key_columns=32, warps=8, stages=1)
    if head_dim <= 64:
        # 128 x 64 in 4 warps: 64 registers per thread each for accumulator and scores. Two or three blocks fit on a
        # multiprocessor, so that one block's exponentials overlap another's products. Compiled: the softcap's
        # polynomial spills in 4 warps, and so does everything on Blackwell.
        if arch == "sm100":  # 128 key columns spill 8 registers under Triton 3.6
            return FlashTile(rows=128, columns=64, key_columns=32, warps=8, stages=3)
        if softcap:
            return FlashTile(rows=128, columns=64, key_columns=128, warps=8, stages=3)
        # 64 key columns would fill a warpgroup's wgmma, but Triton 3.6's assembler then gives the product that sums the
        # rows of a step wrong descriptors, and the map is wrong (docs/engines.md). 32 are as fast (measured).
        return FlashTile(rows=128, columns=64, key_columns=16, warps=4, stages=3)
    if head_dim <= 128:
        # 8 warps are two warpgroups of 64 rows; 128 key columns so that each has 64 of them too (64 in all spill).
        # Measured: four stages take 0.78 to 0.91 of the time of two. 128 columns would take 0.72 to 0.85, but they
        # spill under Triton 3.9.
        if arch == "sm90":
            return FlashTile(rows=128, columns=64, key_columns=128, warps=8, stages=3 if softcap else 4)
        return FlashTile(rows=128, columns=64, key_columns=32, warps=8, stages=2)  # as above
    # Compiled: 64 columns spill seven times as much.
    return FlashTile(rows=128, columns=32, key_columns=32, warps=8, stages=2)


@functools.lru_cache
def flash_dq(arch: str, dtype: torch.dtype, head_dim: int) -> FlashTile:
    if arch == "cpu":
        return FlashTile(rows=32, columns=16, key_columns=16, warps=4, stages=1)
    if dtype == torch.float32:
        small = head_dim <= 64
        return FlashTile(rows=32 if small else 16, columns=32 if small else 16, key_columns=16, warps=8, stages=1)
    if arch == "gfx942":
        return FlashTile(rows=64, columns=32, key_columns=32, warps=4, stages=1)
    if head_dim <= 64:
        if arch == "sm90":  # measured: 0.76 of the time of 128 rows in 8 warps at 16 x 256 tokens
            return FlashTile(rows=64, columns=64, key_columns=32, warps=4, stages=2)
        if arch == "sm86":  # compiled: 128 rows of 64 columns spill one or two registers under Triton 3.6
            return FlashTile(rows=64, columns=32, key_columns=32, warps=4, stages=2)
        return FlashTile(rows=128, columns=64, key_columns=32, warps=8, stages=3)
    if arch in ("sm80", "sm86"):
        return FlashTile(rows=64, columns=32, key_columns=16, warps=8, stages=2 if head_dim <= 128 else 1)
    if head_dim <= 128:  # measured: a third stage takes 0.76 to 0.86 of the time
        return FlashTile(rows=128, columns=64, key_columns=32, warps=8, stages=3 if arch == "sm90" else 2)
    return FlashTile(rows=64, columns=32, key_columns=32, warps=8, stages=2)


@functools.lru_cache
def flash_dkv(arch: str, dtype: torch.dtype, head_dim: int) -> FlashTile:
    if arch == "cpu":
        return FlashTile(rows=32, columns=16, key_columns=16, warps=4, stages=1)
    if dtype == torch.float32:
        # 8 waves leave 256 registers per AMD lane; 64 dimensions need more.
        warps = 4 if arch == "gfx942" else 8
        return FlashTile(rows=32, columns=32 if head_dim <= 64 else 16, key_columns=16, warps=warps, stages=1)
    if arch == "gfx942":
        # 32 rows at a time spill 4 registers at head_dim 128 without causality.
        return FlashTile(rows=64, columns=32 if head_dim <= 64 else 16, key_columns=16, warps=4, stages=1)
    if head_dim <= 64:
        # 64 rows at a time spill 8 bytes on sm80, where the accumulators share registers with the operands.
        columns = 32 if arch in ("sm80", "sm86") else 64
        if arch == "sm90":  # measured: 0.92 of the time of 128 rows in 8 warps at 16 x 256 tokens
            return FlashTile(rows=64, columns=64, key_columns=16, warps=4, stages=2)
        return FlashTile(rows=128, columns=columns, key_columns=16, warps=8, stages=1 if arch == "sm86" else 2)
    if head_dim <= 128:
        # dk and dv are 128 x 128 float32 each: 128 registers per thread in 8 warps. Compiled: two 128 x 64 score tiles
        # beside them (64 registers) just fit under Triton 3.6, where they take 0.79 to 0.85 of the time (measured), but
        # they spill under 3.9.
        if arch in ("sm80", "sm86"):
            return FlashTile(rows=64, columns=32, key_columns=16, warps=8, stages=2)
        return FlashTile(rows=128, columns=32, key_columns=16, warps=8, stages=3)
    return FlashTile(rows=64, columns=32 if arch in ("sm90", "sm100") else 16, key_columns=16, warps=8, stages=1)
