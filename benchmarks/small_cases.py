"""Runs every Triton kernel of the project once or twice on a GPU, on shapes that end inside a tile.

python -m benchmarks.small_cases       also under compute-sanitizer
"""

from __future__ import annotations

import torch
from torch import Tensor

from molsaki_kernels import StepPlan, pool_values, stepwise_attention, stepwise_map
from molsaki_kernels._triton.lse_gradient import fold_dlse_into_out

# A multiple of 16 rows in all heads: with others, a kernel of PyTorch's flash attention (which combines splits of keys)
# writes up to 15 floats past the end of its log-sum-exp, which only memcheck sees: PyTorch allocates 512 bytes at once.
M = 132
STEPS = [[(0, 9), (9, 50), (60, M)], [(3, 4)], []]
WORDS = [[[0], [7, 8], [M - 1]], [[5], [2]], []]


def main() -> None:
    torch.manual_seed(0)
    plan = StepPlan.from_spans(STEPS, WORDS, device="cuda")
    for head_dim, options in ((64, {}), (128, dict(window=33, softcap=20.0))):
        batch(head_dim, plan, options)
    packed()
    torch.cuda.synchronize()
    print("small cases: done")


def batch(head_dim: int, plan: StepPlan, options: dict) -> None:
    """The fused kernels with sinks, the map alone, the map beside an engine that does not compute it, and the fold."""
    q, k, v = leaf(3, 4, M, head_dim), leaf(3, 2, M, head_dim), leaf(3, 2, M, head_dim)
    sinks = torch.randn(4, device="cuda", requires_grad=True)
    out, maps = stepwise_attention(q, k, v, plan, sinks=sinks, engine="triton", **options)
    differentiate(out, maps)
    lse = torch.randn(3, 4, M, device="cuda").add_(9).requires_grad_()
    stepwise_map(q, k, lse, plan, engine="triton", **options).square().sum().backward()
    fold_dlse_into_out(out.detach(), torch.randn_like(out), torch.randn(3, 4, M, device="cuda"))
    for map_engine in ("triton", "widened"):
        differentiate(*stepwise_attention(q, k, v, plan, engine="sdpa", map_engine=map_engine))


def packed() -> None:
    bounds = torch.tensor([0, M, M + 4, M + 4], dtype=torch.int32, device="cuda")
    plan = StepPlan.from_spans([STEPS[0], [(3, 4)], []], [WORDS[0], [[0], [2]], []], device="cuda")
    q, k, v = leaf(1, 4, M + 4, 64), leaf(1, 2, M + 4, 64), leaf(1, 2, M + 4, 64)
    differentiate(*stepwise_attention(q, k, v, plan, cu_seqlens=bounds, head_reduction="none", engine="triton"))
    for heads, lengths, sequences in (("concat", None, bounds), ("mean", torch.tensor([M], device="cuda"), None)):
        pool_values(v, lengths, heads=heads, cu_seqlens=sequences).square().sum().backward()


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def differentiate(out: Tensor, maps: Tensor) -> None:
    (out.float().square().sum() + maps.square().sum()).backward()


if __name__ == "__main__":
    main()
