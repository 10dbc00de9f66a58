"""Tile sizes: frozen dataclasses from pure functions of (arch, dtype, head_dim, shape). Nothing is timed at run time.

``arch`` is "sm80", "sm86" (8.6, 8.9 and 12.x: 99 KB of shared memory a block), "sm90", "sm100", "gfx942" (64 KB) or
"cpu" (Triton's interpreter). Reasons stand beside the rows; where a row says "compiled", registers and spills come from
``python -m molsaki_kernels.aot``; no row is measured on a GPU yet.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
from torch import Tensor

# Steps a row tile is summed into at once: the smallest N of a tensor-core product. A tile of 128 rows holds more than
# 16 steps only if they average less than 8 tokens; then it takes another round.
STEP_BLOCK = 16

MULTIPROCESSORS = {"sm80": 108, "sm86": 84, "sm90": 132, "sm100": 148, "gfx942": 304, "cpu": 2}


@dataclasses.dataclass(frozen=True)
class MapTile:
    rows: int
    columns: int  # key tokens
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class ReduceTile:
    groups: int
    columns: int
    words: int
    warps: int


@dataclasses.dataclass(frozen=True)
class FlashTile:
    rows: int  # what a program owns: queries, or keys in the dk and dv kernel
    columns: int  # what streams past
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
    return _arch_of_device(tensor.device.index) if tensor.is_cuda else "cpu"


def num_tiles(M: int, N: int, packed: bool, rows: int) -> int:
    """Tiles of the whole batch (see ``tiles.locate``)."""
    return M // rows + N if packed else N * triton.cdiv(M, rows)


def heads_per_program(arch: str, heads: int, programs: int) -> int:
    """Heads one program of the map walks over: as many as leave four programs a multiprocessor."""
    groups = min(heads, triton.cdiv(4 * MULTIPROCESSORS[arch], programs))
    return triton.cdiv(heads, groups)


def row_splits(arch: str, programs: int, most: int) -> int:
    """Shares of the rows in the dk of the key tokens: enough for two programs a multiprocessor, at most 32 (memory)."""
    return max(1, min(most, 32, triton.cdiv(2 * MULTIPROCESSORS[arch], programs)))


def map_forward(arch: str, dtype: torch.dtype, head_dim: int, key_tokens: int) -> MapTile:
    if arch == "cpu":
        return MapTile(rows=32, columns=16, warps=4, stages=1)
    if dtype == torch.float32:
        # Full float32 products run on the vector units and hold whole operand rows in registers: small tiles.
        return MapTile(rows=32, columns=32, warps=4, stages=1)
    if arch == "gfx942" or head_dim > 128:
        return MapTile(rows=32, columns=64, warps=4, stages=1 if arch in ("gfx942", "sm86") else 2)
    # The product is P^T [columns, rows]: 64 columns fill one warpgroup's wgmma, 128 two. The paper's examples have 13
    # to 40 words. Compiled: 64 rows beside 64 columns of 128 dims spill under Triton 3.6; 128 columns need 8 warps.
    if key_tokens <= 64:
        return MapTile(rows=64 if head_dim <= 64 else 32, columns=64, warps=4, stages=2)
    roomy = head_dim <= 64 or arch == "sm90"  # elsewhere the scores' operands are in registers too
    return MapTile(rows=64 if roomy else 32, columns=128, warps=8, stages=2)


def map_reduce(groups: int, key_tokens: int) -> ReduceTile:
    return ReduceTile(
        groups=min(32, triton.next_power_of_2(groups)),
        columns=32 if key_tokens <= 32 else 64,
        words=32 if key_tokens <= 32 else 64,
        warps=4,
    )


def map_dq(arch: str, dtype: torch.dtype, head_dim: int) -> MapTile:
    if arch == "cpu":
        return MapTile(rows=32, columns=16, warps=4, stages=1)
    if dtype == torch.float32:
        return MapTile(rows=16, columns=16, warps=8, stages=1)
    # One read of q and, at most, a read and a write of dq: bandwidth, so many small programs. 64 columns spill.
    return MapTile(rows=64 if head_dim <= 128 else 32, columns=32, warps=4, stages=1)


def map_dk(arch: str, dtype: torch.dtype, head_dim: int, key_tokens: int) -> MapTile:
    if arch == "cpu":
        return MapTile(rows=16, columns=16, warps=4, stages=1)
    if dtype == torch.float32:
        return MapTile(rows=16, columns=16, warps=8, stages=1)
    # The accumulator is [columns, head_dim] float32: 64 x 128 is 64 registers a thread in 4 warps.
    if head_dim > 128:
        return MapTile(rows=32, columns=64, warps=8, stages=1 if arch in ("gfx942", "sm86") else 2)
    # Compiled: 64 rows of 128 dims spill.
    return MapTile(rows=64 if head_dim <= 64 else 32, columns=64, warps=4, stages=1 if arch == "gfx942" else 2)


def map_dk_add(head_dim: int) -> MapTile:
    return MapTile(rows=0, columns=16 if head_dim > 128 else 32, warps=4, stages=1)


def flash_forward(arch: str, dtype: torch.dtype, head_dim: int, softcap: bool) -> FlashTile:
    if arch == "cpu":
        return FlashTile(rows=32, columns=16, key_columns=16, warps=4, stages=1)
    if dtype == torch.float32:
        return FlashTile(rows=32, columns=32 if head_dim <= 128 else 16, key_columns=16, warps=8, stages=1)
    if arch == "gfx942":
        return FlashTile(rows=128, columns=64 if head_dim <= 64 else 32, key_columns=32, warps=4, stages=1)
    if arch in ("sm80", "sm86"):
        # mma.sync takes both operands from registers. Compiled: fewer warps or wider tiles spill.
        if head_dim <= 64:
            return FlashTile(rows=128, columns=64, key_columns=64, warps=8, stages=2)
        if head_dim <= 128:
            return FlashTile(rows=128, columns=32, key_columns=64, warps=8, stages=2)
        return FlashTile(rows=64, columns=32, key_columns=32, warps=8, stages=1)
    if head_dim <= 64:
        # 128 x 64 in 4 warps: accumulator 64 and scores 64 registers a thread; two or three blocks a multiprocessor, so
        # that one's exponentials run beside another's products. Compiled: the softcap's polynomial spills in 4 warps,
        # and so does everything on Blackwell.
        if softcap or arch == "sm100":
            return FlashTile(rows=128, columns=64, key_columns=128, warps=8, stages=3)
        return FlashTile(rows=128, columns=64, key_columns=64, warps=4, stages=3)
    if head_dim <= 128:
        # 8 warps are two warpgroups of 64 rows; 128 key columns so that each has 64 of them too (64 in all spill).
        return FlashTile(rows=128, columns=64, key_columns=128, warps=8, stages=2)
    # Compiled: 64 columns spill seven times as much.
    return FlashTile(rows=128, columns=32, key_columns=32, warps=8, stages=2)


def flash_dq(arch: str, dtype: torch.dtype, head_dim: int) -> FlashTile:
    if arch == "cpu":
        return FlashTile(rows=32, columns=16, key_columns=16, warps=4, stages=1)
    if dtype == torch.float32:
        small = head_dim <= 64
        return FlashTile(rows=32 if small else 16, columns=32 if small else 16, key_columns=16, warps=8, stages=1)
    if arch == "gfx942":
        return FlashTile(rows=64, columns=32, key_columns=32, warps=4, stages=1)
    if head_dim <= 64:
        return FlashTile(rows=128, columns=64, key_columns=32, warps=8, stages=1 if arch == "sm86" else 3)
    if arch in ("sm80", "sm86"):
        return FlashTile(rows=64, columns=32, key_columns=16, warps=8, stages=2 if head_dim <= 128 else 1)
    if head_dim <= 128:
        return FlashTile(rows=128, columns=64, key_columns=32, warps=8, stages=2)
    return FlashTile(rows=64, columns=32, key_columns=32, warps=8, stages=2)


def flash_dkv(arch: str, dtype: torch.dtype, head_dim: int) -> FlashTile:
    if arch == "cpu":
        return FlashTile(rows=32, columns=16, key_columns=16, warps=4, stages=1)
    if dtype == torch.float32:
        # 8 waves leave an AMD lane 256 registers, which 64 dims overflow.
        warps = 4 if arch == "gfx942" else 8
        return FlashTile(rows=32, columns=32 if head_dim <= 64 else 16, key_columns=16, warps=warps, stages=1)
    if arch == "gfx942":
        # 32 rows at a time spill 4 registers at head_dim 128 without causality.
        return FlashTile(rows=64, columns=32 if head_dim <= 64 else 16, key_columns=16, warps=4, stages=1)
    if head_dim <= 64:
        # 64 rows at a time spill 8 bytes on sm80, where the accumulators share registers with the operands.
        columns = 32 if arch in ("sm80", "sm86") else 64
        return FlashTile(rows=128, columns=columns, key_columns=16, warps=8, stages=1 if arch == "sm86" else 2)
    if head_dim <= 128:
        # dk and dv are 128 x 128 float32 each: 128 registers a thread in 8 warps. Compiled: two 128 x 64 score tiles
        # beside them (64 registers) just fit under Triton 3.6 and spill under 3.9.
        if arch in ("sm80", "sm86"):
            return FlashTile(rows=64, columns=32, key_columns=16, warps=8, stages=2)
        return FlashTile(rows=128, columns=32, key_columns=16, warps=8, stages=3)
    return FlashTile(rows=64, columns=32 if arch in ("sm90", "sm100") else 16, key_columns=16, warps=8, stages=1)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel as the launchers compile it for some arch."""

    name: str
    kernel: object  # triton.JITFunction
    signature: dict[str, str]
    constexprs: dict
    attrs: dict  # which pointers and strides are multiples of 16, as the launcher would find
    num_warps: int
    num_stages: int
    wants_wgmma: bool

    def compile(self, target):
        """Compile for a ``GPUTarget``, without a device."""
        source = triton.compiler.ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)
        return triton.compile(source, target=target, options=dict(num_warps=self.num_warps, num_stages=self.num_stages))


_POINTERS = {
    "lse": "fp32", "delta": "fp32", "dlse": "fp32", "maps": "fp32", "dmaps": "fp32", "partial": "fp32",
    "dsinks": "fp64", "step_of_row": "i32", "cu_seqlens": "i32", "steps": "i64", "tokens": "i64", "words": "i64",
}  # fmt: skip
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_FLOATS = ("scale", "factor", "inner", "weight")
_TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "sinks")


def variant(
    name: str, kernel, dtype: torch.dtype, tile, wants_wgmma: bool, absent: tuple[str, ...], **flags
) -> Variant:  # fmt: skip
    """A variant whose arguments follow the kernels' naming; ``absent`` pointers are None."""
    signature, constexprs, attrs = {}, {}, {}
    for i, arg in enumerate(kernel.arg_names):
        if arg in flags or arg in absent:
            signature[arg] = "constexpr"
            constexprs[arg] = flags.get(arg)
            continue
        if arg in _FLOATS:
            signature[arg] = "fp32"
        elif arg in _TENSORS or arg in _POINTERS:
            signature[arg] = "*" + (_NAMES[dtype] if arg in _TENSORS else _POINTERS[arg])
        else:
            signature[arg] = "i32"
        if signature[arg][0] == "*" or arg.startswith("stride_"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    return Variant(name, kernel, signature, constexprs, attrs, tile.warps, tile.stages, wants_wgmma)


def variants(arch: str) -> list[Variant]:
    """Every variant that the configs can choose and that compiles differently enough to matter."""
    from molsaki_kernels._triton import attention_backward as flash_backward
    from molsaki_kernels._triton import attention_forward as flash_forward
    from molsaki_kernels._triton import map_backward, map_forward

    return [v for kernels in (map_forward, map_backward, flash_forward, flash_backward) for v in kernels.variants(arch)]


def cases() -> list[tuple[str, torch.dtype, int, dict[str, bool]]]:
    """``(name, dtype, head_dim, features)``: the default features on every row of the configs, every feature once."""
    default = dict(causal=True, window=False, softcap=False, sinks=False, packed=False, map=True, per_head=False)
    features = {
        "": {},
        "nomap": dict(map=False),
        "full": dict(causal=False),
        "window": dict(window=True),
        "softcap": dict(softcap=True),
        "sinks": dict(sinks=True),
        "packed": dict(packed=True),
        "perhead": dict(per_head=True),
        "gemma": dict(window=True, softcap=True, packed=True),
        "gptoss": dict(window=True, sinks=True, packed=True),
        "fullwindow": dict(causal=False, window=True),
    }
    rows = [(torch.bfloat16, D) for D in (16, 32, 64, 80, 96, 112, 128, 256)]
    rows += [(torch.float16, D) for D in (64, 128, 256)] + [(torch.float32, D) for D in (64, 128, 256)]
    chosen = [(dtype, D, "") for dtype, D in rows]
    chosen += [(torch.bfloat16, D, name) for D in (64, 128) for name in features if name]
    chosen += [(torch.bfloat16, 256, name) for name in ("nomap", "gemma")]
    chosen += [(torch.float32, 64, "gptoss")]
    return [
        ("-".join(filter(None, (_NAMES[dtype], f"d{D}", name))), dtype, D, {**default, **features[name]})
        for dtype, D, name in chosen
    ]
