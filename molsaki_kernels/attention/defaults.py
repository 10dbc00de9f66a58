"""The optional names of an attention engine: what an engine that does not define one gets instead."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from molsaki_kernels.attention.protocol import Engine, RequiredNames
from molsaki_kernels.spec import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    InputGradients,
    OutputGradients,
    PlanTensors,
)
from molsaki_kernels.strides import dense_strides

HEAD_DIM_MULTIPLE = 1
FUSED_MAP = None


def gradient_strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of x, or those of a tensor without gaps if x has gaps."""
    return x.stride() if x.is_contiguous() else dense_strides(x)


def folds_dlse(inputs: AttentionInputs) -> bool:
    """Return False: the backward gets dlse."""
    return False


def why_not_fused(inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors) -> str | None:
    """Not called without FUSED_MAP."""
    raise NotImplementedError


def backward_with_map(
    gradients: OutputGradients,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    options: AttentionOptions,
    plan: PlanTensors,
) -> InputGradients:
    """Not called without FUSED_MAP."""
    raise NotImplementedError


OPTIONAL: dict[str, object] = {
    "HEAD_DIM_MULTIPLE": HEAD_DIM_MULTIPLE,
    "FUSED_MAP": FUSED_MAP,
    "gradient_strides": gradient_strides,
    "folds_dlse": folds_dlse,
    "why_not_fused": why_not_fused,
    "backward_with_map": backward_with_map,
}
FUSING = ("FUSED_MAP", "why_not_fused", "backward_with_map")


def with_defaults(engine: RequiredNames) -> Engine:
    """Add the optional names that ``engine`` does not define to it, and return it.

    Raises:
        TypeError: it defines some of FUSED_MAP, why_not_fused and backward_with_map only.
        AttributeError: it lacks a name and does not take attributes.
    """
    fusing = [name for name in FUSING if defines(engine, name)]
    if fusing and len(fusing) < len(FUSING):
        raise TypeError(f"engine: expected all or none of {', '.join(FUSING)}, got {', '.join(fusing)}")
    for name, default in OPTIONAL.items():
        if not defines(engine, name):
            setattr(engine, name, default)
    return cast(Engine, engine)


def defines(engine: object, name: str) -> bool:
    """Return whether ``engine`` has the name, other than the protocol's own function, which a subclass inherits."""
    found = getattr(engine, name, None)
    inherited = getattr(Engine, name, None)
    return hasattr(engine, name) and (inherited is None or getattr(found, "__func__", found) is not inherited)
