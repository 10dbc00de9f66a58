"""Check the arguments of the public functions. No check waits for a device."""

from __future__ import annotations

import math
import warnings
from typing import TypeVar

import torch
from torch import Tensor

from molsaki_kernels.plan import StepPlan
from molsaki_kernels.spec import AttentionInputs, AttentionOptions, MapInputs

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
T = TypeVar("T")


def check_inputs(inputs: AttentionInputs | MapInputs, plan: StepPlan) -> None:
    """Check that the tensors of a call and the plan belong together.

    Raises:
        TypeError, ValueError: the message names the argument, its shape and what was expected.
    """
    q, k = inputs.q, inputs.k
    others = [("k", k, "D")]
    if isinstance(inputs, AttentionInputs):
        others.append(("v", inputs.v, "Dv"))
    if not isinstance(q, Tensor) or q.dim() != 4:
        raise _wrong_rank(q, "q", "(B, Hq, M, D)")
    if not isinstance(k, Tensor) or k.dim() != 4:
        raise _wrong_rank(k, "k", "(B, Hkv, M, D)")
    B, Hq, M, D = q.shape
    Hkv = k.shape[1]
    for name, x, width in others:
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise _wrong_rank(x, name, f"(B, Hkv, M, {width})")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected on q's device {q.device}, got {x.device}")
        if x.shape[:3] != (B, Hkv, M) or (x.shape[3] != D if x is k else x.shape[3] == 0):
            raise ValueError(
                f"{name}: expected (B, Hkv, M, {width}) with q's B, M, D, one Hkv for k and v, and Dv >= 1, "
                f"got {tuple(x.shape)} beside q {tuple(q.shape)} and k {tuple(k.shape)}"
            )
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected bfloat16, float16, float32 or float64, got {q.dtype}")
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"q: expected a multiple of k's {Hkv} heads, got {Hq} in {tuple(q.shape)}")
    if D == 0:
        raise ValueError(f"q: expected head_dim >= 1, got shape {tuple(q.shape)}")
    if inputs.cu_seqlens is not None:
        check_cu_seqlens(inputs.cu_seqlens, q, "q")
    if isinstance(inputs, MapInputs):
        _check_lse(inputs.lse, q)
    _check_plan(plan, inputs)


def check_cu_seqlens(cu_seqlens: Tensor, x: Tensor, name: str) -> None:
    """Check the type, shape and device of ``cu_seqlens`` for ``x (1, H, total, D)``."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1:
        raise _wrong_rank(cu_seqlens, "cu_seqlens", "(N + 1,) int32")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected int32, got {cu_seqlens.dtype}")
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens: expected (N + 1,) boundaries from 0 to the total, got an empty tensor")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens: expected on {name}'s device {x.device}, got {cu_seqlens.device}")
    if x.shape[0] != 1:
        raise ValueError(f"{name}: expected (1, H, total, D) with cu_seqlens, got shape {tuple(x.shape)}")


def check_bounds(bounds: tuple[int, ...], total: int, name: str) -> None:
    """Check that the values of ``cu_seqlens`` ascend from 0 to the total number of tokens."""
    if bounds[0] != 0 or bounds[-1] != total or any(b < a for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"cu_seqlens: expected to rise from 0 to {name}'s total {total}, got {list(bounds)}")


def assert_bounds(cu_seqlens: Tensor, total: int, name: str) -> None:
    """:func:`check_bounds` for a compiled call, whose values are not known yet: checked when the graph runs."""
    rises = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (cu_seqlens.diff() >= 0).all()
    torch._assert_async(rises, f"cu_seqlens: expected to rise from 0 to {name}'s total")


def on_host(cu_seqlens: Tensor) -> bool:
    """Return whether the values of ``cu_seqlens`` can be read without waiting for a device or breaking a trace."""
    return cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()


def check_sinks(sinks: Tensor, q: Tensor) -> None:
    """Check that there is one logit per query head."""
    expected = f"({q.shape[1]},), one logit per query head"
    if not isinstance(sinks, Tensor) or sinks.dim() != 1:
        raise _wrong_rank(sinks, "sinks", expected)
    if sinks.shape[0] != q.shape[1]:
        raise ValueError(f"sinks: expected {expected}, got {tuple(sinks.shape)}")
    if not sinks.is_floating_point():
        raise TypeError(f"sinks: expected a floating dtype, got {sinks.dtype}")
    if sinks.device != q.device:
        raise ValueError(f"sinks: expected on q's device {q.device}, got {sinks.device}")


def make_options(
    q: Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    head_reduction: str,
) -> AttentionOptions:
    """Check the options of a call on ``q (B, Hq, M, D)`` and fill in their defaults."""
    if scale is None:
        scale = q.shape[3] ** -0.5
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    elif not abs(scale) < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
            raise TypeError(f"window: expected an int or None, got {type(window).__name__}")
        if window < 1:
            raise ValueError(f"window: expected at least 1 key (the query itself), got {window}")
        if window >= q.shape[2]:
            window = None  # it hides no key
    if softcap is not None:
        if not 0 < softcap < math.inf:
            raise ValueError(f"softcap: expected a positive, finite number or None, got {softcap}")
        softcap = float(softcap)
    if head_reduction not in ("mean", "none"):
        raise ValueError(f'head_reduction: expected "mean" or "none", got {head_reduction!r}')
    return AttentionOptions(bool(causal), float(scale), window, softcap, head_reduction == "none")


def renamed(old: str, old_value: T, new: str, new_value: T, default: T) -> T:
    """Return the value of a keyword that was given by its old name, and warn.

    Raises:
        TypeError: both names were given.
    """
    if new_value != default:
        raise TypeError(f"{old}: expected {new}= alone, got {new}={new_value!r} and its old name {old}={old_value!r}")
    if not torch.compiler.is_compiling():  # a warning cannot be traced
        warnings.warn(f"{old}= was renamed to {new}= and will be removed", FutureWarning, stacklevel=3)
    return old_value


def _wrong_rank(x: object, name: str, shape: str) -> Exception:
    if not isinstance(x, Tensor):
        return TypeError(f"{name}: expected a tensor {shape}, got {type(x).__name__}")
    return ValueError(f"{name}: expected a tensor {shape}, got shape {tuple(x.shape)}")


def _check_lse(lse: Tensor, q: Tensor) -> None:
    if not isinstance(lse, Tensor) or lse.dim() != 3:
        raise _wrong_rank(lse, "lse", "(B, Hq, M)")
    expected = torch.promote_types(q.dtype, torch.float32)
    if lse.shape != q.shape[:3] or lse.dtype != expected or lse.device != q.device:
        raise ValueError(
            f"lse: expected {expected} {tuple(q.shape[:3])} on {q.device}, "
            f"got {lse.dtype} {tuple(lse.shape)} on {lse.device}"
        )


def _check_plan(plan: StepPlan, inputs: AttentionInputs | MapInputs) -> None:
    if not isinstance(plan, StepPlan):
        raise TypeError(f"plan: expected a StepPlan, got {type(plan).__name__}")
    q, cu_seqlens = inputs.q, inputs.cu_seqlens
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if plan.tokens.shape[0] != sequences:
        source = f"q has batch {q.shape[0]}" if cu_seqlens is None else f"cu_seqlens bounds {sequences}"
        raise ValueError(f"plan: expected one entry per sequence, got {plan.tokens.shape[0]} where {source}")
    if plan.tokens.device != q.device:
        raise ValueError(f"plan: expected on q's device {q.device}, got {plan.tokens.device}; use plan.to(...)")
    if torch.compiler.is_compiling():
        if plan.extent > q.shape[2]:
            raise ValueError(f"plan: expected indices within {q.shape[2]} tokens, but it reaches {plan.extent}")
        if cu_seqlens is not None:
            _assert_packed(plan, cu_seqlens, q.shape[2])
        return
    bounds = None
    if cu_seqlens is not None and on_host(cu_seqlens):
        bounds = inputs.bounds
        check_bounds(bounds, q.shape[2], "q")
    for n, extent in enumerate(plan.extents):
        length = q.shape[2] if bounds is None else bounds[n + 1] - bounds[n]
        if extent > length:
            raise ValueError(
                f"plan: expected indices within sequence {n}'s {length} tokens, but it reaches {extent} "
                f"(q {tuple(q.shape)})"
            )


def _assert_packed(plan: StepPlan, cu_seqlens: Tensor, total: int) -> None:
    """Check a compiled call's plan against ``cu_seqlens`` when the graph runs; its values are not known before."""
    assert_bounds(cu_seqlens, total, "q")
    lengths = cu_seqlens.diff()[:, None]
    steps_fit = ((plan.steps[..., 1] <= lengths) | (plan.steps[..., 1] <= plan.steps[..., 0])).all()
    tokens_fit = ((plan.tokens < lengths) | (plan.word_of_token < 0)).all()
    torch._assert_async(steps_fit & tokens_fit, "plan: expected indices within each sequence of cu_seqlens")
