"""Which engine ``engine="auto"`` tries first: what was measured where there are rows, else the documented default.

A row of :data:`MEASURED` is made of a committed CSV by ``python -m benchmarks.auto_table`` and names it. It holds for
one architecture, one pass, one head dimension and the sequence lengths from one that was measured to the next; anything
else keeps the default order of ``attention.py``. No row is a guess.
"""

from __future__ import annotations

import dataclasses

import torch

from molsaki_kernels.spec import AttentionRequest


@dataclasses.dataclass(frozen=True)
class Measured:
    arch: str  # "sm90", "gfx942", "cpu"
    backward: bool
    head_dim: int  # the next of HEAD_DIMS from a call's on
    tokens: tuple[int, int]  # [from, to) tokens of a sequence
    features: tuple[str, ...]  # of FEATURES, those of the calls that were measured
    engines: tuple[str, ...]  # the fastest first
    source: str  # the CSV in benchmarks/results


HEAD_DIMS = (64, 128, 256)
FEATURES = ("full", "window", "softcap", "sinks", "packed")

MEASURED: tuple[Measured, ...] = ()  # no CUDA row is measured yet


def order(call: AttentionRequest, default: tuple[str, ...]) -> tuple[str, ...]:
    """The engines in the order to try: the measured ones, then the rest of ``default`` for calls they cannot do."""
    if not MEASURED:
        return default
    key = (arch_of(call.device), call.backward, padded_head_dim(call.head_dim), features(call))
    for row in MEASURED:
        if (row.arch, row.backward, row.head_dim, row.features) == key and row.tokens[0] <= call.length < row.tokens[1]:
            return row.engines + tuple(name for name in default if name not in row.engines)
    return default


def features(call: AttentionRequest) -> tuple[str, ...]:
    options = call.options
    has = (not options.causal, options.window is not None, options.softcap is not None, call.sinks, call.packed)
    return tuple(name for name, on in zip(FEATURES, has, strict=True) if on)


def padded_head_dim(head_dim: int) -> int:
    return next((D for D in HEAD_DIMS if head_dim <= D), head_dim)


@torch.compiler.assume_constant_result
def arch_of(device: torch.device) -> str:
    """As :attr:`Measured.arch`: "sm90" and so on for CUDA, AMD's name for ROCm, else the device's type."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
