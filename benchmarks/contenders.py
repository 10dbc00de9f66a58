"""What is measured against what: plain attentions without a map, ours with it, and eager attention with its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import molsaki_kernels as mk
from molsaki_kernels import StepPlan, reference

from .shapes import Shape


@dataclasses.dataclass(frozen=True)
class Contender:
    """``run(q, k, v, plan) -> out`` or ``(out, map)``; ``kind`` is plain, map or eager."""

    name: str
    kind: str
    run: Callable[..., Tensor | tuple[Tensor, Tensor]]


def contenders(device: torch.device, shape: Shape) -> list[Contender]:
    """All that can do ``shape`` on ``device``, the plain ones first."""
    found = [*_plain(device), *_with_map(device, shape)]
    if shape.batch * shape.q_heads * shape.tokens**2 * 4 < (2 << 30 if device.type == "cpu" else 24 << 30):
        found.append(Contender("eager with weights", "eager", _eager))
    return found


def step(contender: Contender, tensors: list[Tensor], plan: StepPlan, backward: bool) -> None:
    """One forward, or one forward and backward."""
    q, k, v, dout, dmaps = tensors
    if not backward:
        with torch.no_grad():
            contender.run(q, k, v, plan)
        return
    result = contender.run(q, k, v, plan)
    upstream = (dout, dmaps) if isinstance(result, tuple) else (dout,)
    torch.autograd.grad(result, (q, k, v), upstream)


def _plain(device: torch.device) -> list[Contender]:
    def sdpa(backend):
        def run(q, k, v, plan):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

        return run

    if device.type == "cpu":
        return [Contender("sdpa, CPU flash", "plain", sdpa(SDPBackend.FLASH_ATTENTION))]
    found = [
        Contender("sdpa, cuDNN", "plain", sdpa(SDPBackend.CUDNN_ATTENTION)),
        Contender("sdpa, aten flash", "plain", sdpa(SDPBackend.FLASH_ATTENTION)),
        Contender("FlexAttention", "plain", _flex()),
    ]
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return found

    def flash4(q, k, v, plan):
        out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return [*found, Contender("flash-attn 4", "plain", flash4)]


def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[tuple, object] = {}

    def run(q, k, v, plan):
        M = q.shape[2]
        if (M, q.device) not in masks:
            masks[M, q.device] = create_block_mask(lambda b, h, i, j: j <= i, None, None, M, M, device=q.device)
        return compiled(q, k, v, block_mask=masks[M, q.device], enable_gqa=q.shape[1] != k.shape[1])

    return run


def _with_map(device: torch.device, shape: Shape) -> list[Contender]:
    def ours(engine):
        return lambda q, k, v, plan: mk.stepwise_attention(q, k, v, plan, engine=engine)

    names = [name for name, state in mk.engines().items() if state == "ready" and name != "eager"]
    if device.type == "cpu":
        names = [name for name in names if name != "triton"]  # interpreted: not what is measured here
    return [Contender(f"molsaki, {name}", "map", ours(name)) for name in names]


def _eager(q: Tensor, k: Tensor, v: Tensor, plan: StepPlan) -> tuple[Tensor, Tensor]:
    """As a model's eager attention with ``output_attentions``: weights in the inputs' dtype, then reduced."""
    weights, _ = reference.attention_weights(q, k)
    weights = weights.to(q.dtype)
    out = weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return out, reference.reduce_weights(weights.float(), plan)
