"""The one shapes file: every benchmark, table and plot measures these."""

from __future__ import annotations

import dataclasses

import torch

from molsaki_kernels import StepPlan


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
    target: float | None = None  # of forward + backward with the map over plain attention, where the spec names one

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.tokens} H{self.q_heads}/{self.kv_heads} D{self.head_dim} W{self.words} {self.dtype}"

    def flops(self, backward: bool) -> float:
        """Of causal attention alone: two products forward, five backward, half of the square."""
        products = 7 if backward else 2
        return products * self.batch * self.q_heads * self.tokens**2 * self.head_dim

    def inputs(self, device: torch.device | str, seed: int = 0) -> tuple[list[torch.Tensor], StepPlan]:
        """q, k, v that want gradients, then dout, dmaps; the plan: random cuts, words of one token anywhere."""
        g = torch.Generator().manual_seed(seed)
        heads = (self.q_heads, self.kv_heads, self.kv_heads, self.q_heads)
        dtype = getattr(torch, self.dtype)
        tensors = [torch.randn(self.batch, h, self.tokens, self.head_dim, generator=g).to(device, dtype) for h in heads]
        for x in tensors[:3]:
            x.requires_grad_()
        steps, words = [], []
        for _ in range(self.batch):
            cuts = sorted((torch.randperm(self.tokens - 1, generator=g)[: self.steps - 1] + 1).tolist())
            steps.append(list(zip([0, *cuts], [*cuts, self.tokens], strict=True)))
            words.append([[t] for t in sorted(torch.randperm(self.tokens, generator=g)[: self.words].tolist())])
        tensors.append(torch.randn(self.batch, self.steps, self.words, generator=g).to(device))
        return tensors, StepPlan.from_spans(steps, words, device=device)


CPU = [
    Shape(8, 256, 20, 5, target=1.20),
    Shape(1, 2048, 100, 15, target=1.10),
    Shape(1, 4096, 200, 30, target=1.05),
]
CPU_MORE = [
    Shape(8, 256, 20, 5, kv_heads=3),
    Shape(1, 2048, 100, 15, kv_heads=3),
    Shape(1, 2048, 100, 15, dtype="bfloat16"),
    Shape(1, 1024, 50, 10),
    Shape(1, 8192, 200, 60),
]


def cuda_grid() -> list[Shape]:
    """bf16; head_dim 64 and 128; MHA and GQA 32/8; every length with its words, and 4k tokens over all word counts."""
    lengths = [(16, 256), (16, 512), (4, 1024), (2, 2048), (1, 4096), (1, 8192), (1, 16384), (1, 32768)]
    targets = {256: 1.20, 2048: 1.10}
    shapes = []
    for kv_heads in (32, 8):
        for head_dim in (64, 128):
            common = dict(q_heads=32, kv_heads=kv_heads, head_dim=head_dim, dtype="bfloat16")
            for batch, tokens in lengths:
                words, steps = max(16, tokens // 16), max(5, tokens // 128)
                target = targets.get(tokens, 1.05 if tokens >= 4096 else None)
                shapes.append(Shape(batch, tokens, words, steps, **common, target=target))
            shapes += [Shape(1, 4096, words, 32, **common, target=1.05) for words in (16, 64, 1024, 4096)]
    shapes.append(Shape(1, 131072, 1024, 512, q_heads=8, kv_heads=8, head_dim=128, dtype="bfloat16", target=1.05))
    return shapes
