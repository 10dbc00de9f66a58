"""Captures whole layers in CUDA graphs, and compares replays with eager calls bit for bit.

Deterministic mode selects the same kernels for both, and fills new memory with NaN.
"""

import os

import pytest
import torch

from molsaki_kernels import StepPlan, stepwise_attention
from molsaki_kernels.attention import ENGINES

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms require it for cuBLAS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
DTYPE = torch.bfloat16
B, M, HQ, HKV, D = 2, 200, 4, 2, 64
LENGTHS = ((150, 0, 50, 200), (90, 60, 110, 140))  # packed
# Two plans of the same shape, for the sequences of a batch or for the longest packed ones.
PLANS = (([(0, 20), (20, 50)], [[3], [10, 11]]), ([(5, 9), (30, 50)], [[1], [40, 41]]))
ENGINES_TO_CAPTURE = ["triton", "sdpa"]


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Layer(torch.nn.Module):
    """Projections, attention with its map, and the output's projection."""

    def __init__(self, engine: str):
        super().__init__()
        self.engine = engine
        width = HQ * D
        self.qkv = torch.nn.Linear(width, (HQ + 2 * HKV) * D, bias=False, device=DEVICE, dtype=DTYPE)
        self.out = torch.nn.Linear(width, width, bias=False, device=DEVICE, dtype=DTYPE)

    def forward(self, x, plan, cu_seqlens):
        out, maps = attend(self.qkv(x).unflatten(-1, (-1, D)), plan, cu_seqlens, self.engine)
        return self.out(out.transpose(1, 2).flatten(2)), maps


def attend(qkv, plan, cu_seqlens, engine):
    """Attention of projected ``qkv (B, M, HQ + 2 HKV, D)``, and its map."""
    q, k, v = (t.transpose(1, 2) for t in qkv.split([HQ, HKV, HKV], 2))
    return stepwise_attention(q, k, v, plan, cu_seqlens=cu_seqlens, engine=engine)


def plan_of(index: int, packed: bool) -> StepPlan:
    steps, words = PLANS[index]
    used = [min(lengths) >= 50 for lengths in zip(*LENGTHS, strict=True)] if packed else [True] * B
    return StepPlan.from_spans([steps if u else [] for u in used], [words if u else [] for u in used], device=DEVICE)


def bounds_of(index: int, packed: bool):
    return torch.tensor([0, *LENGTHS[index]], device=DEVICE).cumsum(0).to(torch.int32) if packed else None


def need(engine: str) -> None:
    reason = ENGINES[engine].available()
    if reason is not None:
        pytest.skip(f"{engine}: {reason}")


def random_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)


def copy_plan(target: StepPlan, source: StepPlan) -> None:
    for name in ("steps", "tokens", "word_of_token", "step_mask", "word_mask"):
        getattr(target, name).copy_(getattr(source, name))


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("engine", ENGINES_TO_CAPTURE)
def test_a_layer_in_a_graph(engine, packed):
    """Forward and backward are captured once, and replayed on other values, plans and, if packed, lengths."""
    need(engine)
    layer = Layer(engine)
    x = torch.zeros(1 if packed else B, 2 * M if packed else M, HQ * D, device=DEVICE, dtype=DTYPE, requires_grad=True)
    plan, cu_seqlens = plan_of(0, packed), bounds_of(0, packed)
    dy, dmaps = random_like(x, 1), random_like(torch.empty(len(plan), 2, 2, device=DEVICE), 2)

    def run(x, plan, cu_seqlens):
        outputs = layer(x, plan, cu_seqlens)
        return *outputs, *torch.autograd.grad(outputs, (x, *layer.parameters()), (dy, dmaps))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(x, plan, cu_seqlens)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(x, plan, cu_seqlens)
    for seed, index in ((3, 0), (4, 1), (5, 1), (6, 0)):
        values = random_like(x, seed)
        with torch.no_grad():
            x.copy_(values)
        copy_plan(plan, plan_of(index, packed))
        if cu_seqlens is not None:
            cu_seqlens.copy_(bounds_of(index, packed))
        graph.replay()
        expected = run(values.requires_grad_(), plan_of(index, packed), bounds_of(index, packed))
        for a, b in zip(found, expected, strict=True):
            assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("engine", ENGINES_TO_CAPTURE)
def test_reduce_overhead(engine, packed):
    """``torch.compile(mode="reduce-overhead")`` captures the layer's operators; no call falls back to launches."""
    need(engine)
    torch._dynamo.reset()
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    compiled = torch.compile(attend, mode="reduce-overhead", fullgraph=True)
    shape = (1, 2 * M, HQ + 2 * HKV, D) if packed else (B, M, HQ + 2 * HKV, D)
    for seed, index in ((3, 0), (4, 0), (5, 1), (6, 1), (7, 0)):
        qkv = random_like(torch.empty(shape, device=DEVICE, dtype=DTYPE), seed).requires_grad_()
        plan, cu_seqlens = plan_of(index, packed), bounds_of(index, packed)
        results = []
        for function in (attend, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            out, maps = function(qkv, plan, cu_seqlens, engine)
            (dqkv,) = torch.autograd.grad((out, maps), qkv, (random_like(out, 1), random_like(maps, 2)))
            results.append([t.detach().clone() for t in (out, maps, dqkv)])
        for a, b in zip(*results, strict=True):
            assert b.isfinite().all() and torch.equal(a, b)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skips
