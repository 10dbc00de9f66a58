"""Defines the shapes of one attention layer that every benchmark, table and plot measures."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from molsaki_kernels import StepPlan


class Inputs(NamedTuple):
    """The tensors of one call: leaves that require gradients, the gradients of the results, lse for the map alone."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dmaps: Tensor
    lse: Tensor | None
    plan: StepPlan


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention layer and the plan of its map."""

    batch: int
    tokens: int
    words: int
    steps: int
    q_heads: int = 9
    kv_heads: int = 9
    head_dim: int = 64
    dtype: str = "float32"
    target: float | None = None  # limit of the time of forward + backward with the map over plain attention
    tier: int = 2  # 0: has a target that is reported; 1: shows a trend; 2: completes the grid

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.tokens} H{self.q_heads}/{self.kv_heads} D{self.head_dim} W{self.words} {self.dtype}"

    @property
    def slow_to_build(self) -> bool:
        """Return whether FlexAttention and ``torch.compile`` are measured too; each compiles for seconds per shape."""
        return self.tier == 0 and (self.words == 20 or (self.head_dim == 128 and self.q_heads == self.kv_heads))

    def flops(self, backward: bool) -> float:
        """Return those of causal attention alone: two products forward, five backward, half of the square."""
        products = 7 if backward else 2
        return products * self.batch * self.q_heads * self.tokens**2 * self.head_dim

    def traffic(self, backward: bool) -> int:
        """Return the bytes that no implementation can avoid: read every input once, write every result once.

        Forward: q, k, v in, out, lse and the map out. Backward: those, dout and dmaps in, dq, dk, dv out.
        """
        tokens, size = self.batch * self.tokens, getattr(torch, self.dtype).itemsize
        q, kv = tokens * self.q_heads * self.head_dim * size, tokens * self.kv_heads * self.head_dim * size
        lse, maps = tokens * self.q_heads * 4, self.batch * self.steps * self.words * 4
        forward = 2 * q + 2 * kv + lse + maps
        return forward + (forward + 2 * q + 2 * kv if backward else 0)

    def set_bytes(self) -> int:
        """Return the bytes of one set of :meth:`inputs`."""
        tokens, size = self.batch * self.tokens, getattr(torch, self.dtype).itemsize
        return tokens * self.head_dim * size * 2 * (self.q_heads + self.kv_heads)

    def sets(self, cache_bytes: int) -> int:
        """Return how many sets of inputs to cycle through, so that none is in a cache of that size when reused."""
        return max(1, min(-(-2 * cache_bytes // self.set_bytes()), 64)) if cache_bytes else 1

    def inputs(self, device: torch.device | str, seed: int = 0) -> Inputs:
        """Return random inputs ``(B, H, M, D)``; on CUDA in the strides of a model's projections, ``(B, M, H, D)``.

        The plan has random steps and words of one token each. ``lse`` is None; see ``contenders.with_lse``.
        """
        device = torch.device(device)
        g = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, self.dtype)

        def random(heads: int) -> Tensor:
            if device.type == "cpu":
                return torch.randn(self.batch, heads, self.tokens, self.head_dim, generator=g).to(dtype)
            on_device = torch.Generator(device).manual_seed(int(torch.randint(2**31, (), generator=g)))
            size = (self.batch, self.tokens, heads, self.head_dim)
            return torch.randn(size, generator=on_device, device=device, dtype=dtype).transpose(1, 2)

        q, k, v, dout = (random(h) for h in (self.q_heads, self.kv_heads, self.kv_heads, self.q_heads))
        for x in (q, k, v):
            x.requires_grad_()
        steps, words = [], []
        for _ in range(self.batch):
            cuts = sorted((torch.randperm(self.tokens - 1, generator=g)[: self.steps - 1] + 1).tolist())
            steps.append(list(zip([0, *cuts], [*cuts, self.tokens], strict=True)))
            words.append([[t] for t in sorted(torch.randperm(self.tokens, generator=g)[: self.words].tolist())])
        dmaps = torch.randn(self.batch, self.steps, self.words, generator=g).to(device)
        return Inputs(q, k, v, dout, dmaps, None, StepPlan.from_spans(steps, words, device=device))


CPU = [
    Shape(8, 256, 20, 5, target=1.20),
    Shape(1, 2048, 100, 15, target=1.10),
    Shape(1, 4096, 200, 30, target=1.05),
]
CPU_MORE = [
    Shape(8, 256, 20, 5, kv_heads=3),
    Shape(1, 2048, 100, 15, kv_heads=3),
    Shape(8, 256, 20, 5, dtype="bfloat16"),
    Shape(1, 2048, 100, 15, dtype="bfloat16"),
    Shape(1, 4096, 200, 30, dtype="bfloat16"),
    Shape(1, 1024, 50, 10),
    Shape(1, 8192, 200, 60),
]


LENGTHS = [(16, 256), (16, 512), (4, 1024), (2, 2048), (1, 4096), (1, 8192), (1, 16384), (1, 32768), (1, 131072)]
KEY_TOKENS = (16, 64, 256, 1024, 4096)
HEADS = [(32, 32, 128), (32, 8, 128), (32, 32, 64), (32, 8, 64)]


def cuda_grid() -> list[Shape]:
    """Return the bf16 shapes for a GPU, the most informative first.

    The paper's regime (SmolLM2's heads, the 13 to 40 words of its examples); then head_dim 128 and 64, with as many key
    heads as query heads and with a quarter of them, every length with every number of key tokens up to it. 131,072
    tokens take seconds per round; they have one number of key tokens and come last in their tier.
    """
    shapes = [Shape(16, 256, words, 5, 9, 3, 64, "bfloat16", target=1.20, tier=0) for words in (20, 13, 40)]
    for q_heads, kv_heads, head_dim in HEADS:
        for batch, tokens in LENGTHS:
            usual = max(t for t in KEY_TOKENS if t <= max(tokens // 16, 16))  # every sixteenth token or fewer
            for words in KEY_TOKENS:
                if words > tokens or (tokens > 32768 and words != usual):
                    continue
                informative = words == usual and tokens in (256, 2048, 4096, 16384)
                tier = 0 if informative else 1 if words == usual or tokens == 4096 else 2
                target = {256: 1.20, 2048: 1.10}.get(tokens, 1.05 if tokens >= 4096 else None)
                steps = max(5, tokens // 128)
                shapes.append(
                    Shape(
                        batch, tokens, words, steps, q_heads, kv_heads, head_dim, "bfloat16", target=target, tier=tier
                    )
                )
    return sorted(shapes, key=lambda s: (s.tier, s.tokens > 32768))
