"""Descriptions of the kernels for :mod:`molsaki_kernels.aot`, which compiles them without a GPU.

Each kernel's file lists its own variants in ``variants(arch)``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton

from molsaki_kernels._triton.configs import FlashTile, MapTile
from molsaki_kernels._triton.integers import next_power_of_2

# Whether a launch gives every compile-time argument an empty list of attributes, and not only strings. Seen in Triton
# 3.6 and 3.9; a wrong entry changes nothing but the cache key.
EMPTY_ATTRS_OF_CONSTEXPRS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# The types of the kernels' arguments by name; all other arguments are int32.
_TENSORS = (
    "q",
    "k",
    "v",
    "out",
    "dout",
    "dq",
    "dk",
    "dv",
    "sinks",
    "folded_out",
    "folded_dout",
    "wide",
    "dwide",
)  # in the dtype
_POINTERS = {
    "accum": "fp32",
    "block_table": "i32",
    "cu_seqlens": "i32",
    "delta": "fp32",
    "dlse": "fp32",
    "dmaps": "fp32",
    "dpooled": "fp32",
    "dpsum": "fp32",
    "dsinks": "fp64",
    "key_table": "i32",
    "lengths": "i64",
    "lse": "fp32",
    "lse_log2": "fp32",
    "maps": "fp32",
    "partial": "fp32",
    "pooled": "fp32",
    "step_of_row": "i32",
    "steps": "i64",
    "tile_table": "i32",
    "tokens": "i64",
    "word_table": "i32",
    "words": "i64",
}
_FLOATS = ("scale", "factor", "inner", "weight", "eps")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel as its launcher compiles it for one architecture.

    Attributes:
        kernel: a ``triton.JITFunction``.
        signature: type of each argument. constexprs: values of the compile-time arguments.
        attrs: by the index of the argument, which pointers and strides are multiples of 16. It has the entries of a
            launch, empty ones too, since they are part of Triton's cache key: a launch finds the compiled variant.
        wants_wgmma: the kernel should use Hopper's warp-group matrix instructions.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int
    wants_wgmma: bool

    def compile(self, target: Any) -> Any:
        """Compile for a ``GPUTarget``, without a device."""
        return triton.compile(self.source(target), target=target, options=self.options)

    def source(self, target: Any) -> Any:
        """What is compiled for a ``GPUTarget``: together with ``options`` it determines Triton's cache key."""
        attrs = self.attrs
        if target.backend == "hip":  # a launch finds that tensors have less than 2 GiB
            attrs = {(i,): a + [["tt.pointer_range", 32]] if self._is_pointer(i) else a for (i,), a in attrs.items()}
        return triton.compiler.ASTSource(self.kernel, self.signature, self.constexprs, attrs)

    def _is_pointer(self, index: int) -> bool:
        return self.signature[self.kernel.arg_names[index]].startswith("*")

    @property
    def options(self) -> dict[str, Any]:
        """The options of a launch. Triton 3.9 warns if ``enable_fp_fusion`` is its default instead of explicit."""
        fusion = triton.knobs.language.default_fp_fusion
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=fusion)


def variant(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    constexprs: dict[str, Any],
    *,
    absent: tuple[str, ...] = (),
    warps: int = 4,
    stages: int = 1,
    wants_wgmma: bool = False,
) -> Variant:
    """A variant whose arguments have the types that their names say; ``absent`` pointers are None.

    The numbers of heads are those of SmolLM2 (9 and 3 heads of 64) and of Llama 3 (32 and 8 heads of 128).
    """
    constexprs = {**constexprs, **dict.fromkeys(absent)}
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    for i, arg in enumerate(kernel.arg_names):
        if arg in constexprs:
            signature[arg] = "constexpr"
            if EMPTY_ATTRS_OF_CONSTEXPRS or isinstance(constexprs[arg], str):
                attrs[(i,)] = []
            continue
        if arg in _TENSORS:
            signature[arg] = "*" + TYPES[dtype]
        elif arg in _POINTERS:
            signature[arg] = "*" + _POINTERS[arg]
        else:
            signature[arg] = "fp32" if arg in _FLOATS else "i32"
        many_heads = arg == "heads" and constexprs.get("D", 0) >= 128
        if signature[arg][0] == "*" or arg.startswith("stride_") or many_heads:
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif signature[arg] == "i32" and not kernel.params[i].do_not_specialize:
            attrs[(i,)] = []
    return Variant(name, kernel, signature, constexprs, attrs, warps, stages, wants_wgmma)


@dataclasses.dataclass(frozen=True)
class Case:
    """The dtype, head dimension and features of an attention call."""

    dtype: torch.dtype
    head_dim: int
    feature: str = ""  # a key of FEATURES; "" has the default features
    causal: bool = True
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    packed: bool = False
    has_map: bool = True
    per_head: bool = False

    @property
    def name(self) -> str:
        return "-".join(filter(None, (TYPES[self.dtype], f"d{self.head_dim}", self.feature)))

    def variant(
        self,
        name: str,
        kernel: Any,
        tile: MapTile | FlashTile,
        constexprs: dict[str, Any],
        *,
        absent: tuple[str, ...] = (),
        wants_wgmma: bool = True,
    ) -> Variant:
        """A variant of a kernel that computes scores; pointers of features that the case does not have are None."""
        absent += () if self.packed else ("cu_seqlens",)
        absent += () if self.sinks else ("sinks", "dsinks")
        absent += () if self.has_map else ("steps", "tokens", "words", "partial", "dmaps", "step_of_row")
        score_flags = dict(
            D=self.head_dim,
            BD=next_power_of_2(self.head_dim),
            CAUSAL=self.causal,
            HAS_WINDOW=self.window,
            HAS_SOFTCAP=self.softcap,
            PACKED=self.packed,
            PRECISION="ieee",
        )
        return variant(
            name,
            kernel,
            self.dtype,
            score_flags | constexprs,
            absent=tuple(arg for arg in kernel.arg_names if arg in absent),
            warps=tile.warps,
            stages=tile.stages,
            wants_wgmma=wants_wgmma and self.dtype != torch.float32,
        )


FEATURES: dict[str, dict[str, bool]] = {
    "": {},
    "nomap": dict(has_map=False),
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


def cases() -> list[Case]:
    """The default features for every dtype and head dimension in configs, and every feature at least once."""
    chosen = [(torch.bfloat16, D, "") for D in (16, 32, 64, 80, 96, 112, 128, 256)]
    chosen += [(dtype, D, "") for dtype in (torch.float16, torch.float32) for D in (64, 128, 256)]
    chosen += [(torch.bfloat16, D, feature) for D in (64, 128) for feature in FEATURES if feature]
    chosen += [(torch.bfloat16, 256, feature) for feature in ("nomap", "gemma")]
    chosen += [(torch.float32, 64, "gptoss")]
    return [Case(dtype, D, feature, **FEATURES[feature]) for dtype, D, feature in chosen]
