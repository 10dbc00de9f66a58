"""Changing shapes under torch.compile: a constant number of graphs, and indices out of range are refused."""

from __future__ import annotations

import random

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import molsaki_kernels as mk
from molsaki_kernels import StepPlan
from molsaki_kernels._native import build
from tests.helpers.tiny import one_thread  # noqa: F401

FIRST = ((2, 2, 3), (4, 3, 5))  # sequences, steps and words of the first two calls: every size changes between them
MOST_GRAPHS = (
    2  # that of the first sizes, and that of any size of at least 2: torch.compile compiles 0 and 1 on their own
)


def random_call(rng, packed, number):
    """q, k, v, a plan of 2 to 6 sequences with 2 or 3 steps and 2 to 6 words each, and cu_seqlens."""
    random_sizes = rng.randint(2, 6), rng.randint(2, 3), rng.randint(2, 6)
    N, S, W = FIRST[number] if number < len(FIRST) else random_sizes
    if packed:
        lengths = [rng.randint(6, 50) for _ in range(N)]
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
    else:
        lengths, cu = [rng.randint(30, 120)] * N, None
    B, M = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    tensors = [torch.randn(B, heads, M, 16, requires_grad=True) for heads in (4, 2, 2)]
    steps, words = [], []
    for length in lengths:
        cuts = sorted(rng.sample(range(length + 1), S + 1))
        steps.append(list(zip(cuts[:-1], cuts[1:], strict=True)))
        words.append([[token] for token in rng.sample(range(length), W)])
    return tensors, StepPlan.from_spans(steps, words), cu


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, dict(engine="sdpa"), dict(map_engine="widened"), dict(return_lse=True, head_reduction="none")],
    ids=str,
)
def test_graphs_of_random_shapes(options, packed):
    """24 numbers of sequences, lengths, steps, words and key tokens; the last ones are compared with the function."""
    torch.compiler.reset()
    rng = random.Random(1)
    graphs = {"forward": 0, "backward": 0}

    def counting(name):
        def compiler(graph, example_inputs):
            graphs[name] += 1
            return graph.forward

        return compiler

    def layer(q, k, v, plan, cu):
        out, maps, *rest = mk.stepwise_attention(q, k, v, plan, cu_seqlens=cu, **options)
        pooled = mk.pool_values(v, cu_seqlens=cu)
        return sum((x.square().sum() for x in (out, maps, pooled, *rest)), torch.zeros(()))

    backend = aot_autograd(fw_compiler=counting("forward"), bw_compiler=counting("backward"))
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for number in range(24):
        leaves, plan, cu = random_call(rng, packed, number)
        value = compiled(*leaves, plan, cu)
        grads = torch.autograd.grad(value, leaves)
        if number in (0, 23):
            expected = layer(*leaves, plan, cu)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves), rtol=1e-4, atol=1e-4)
    assert max(graphs.values()) <= MOST_GRAPHS, graphs


def test_map_alone():
    torch.compiler.reset()
    rng, graphs = random.Random(2), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(mk.stepwise_map, backend=backend, fullgraph=True)
    for packed in (False, True):
        torch.compiler.reset()
        graphs.clear()
        for number in range(12):
            (q, k, _), plan, cu = random_call(rng, packed, number)
            lse = torch.rand(q.shape[:3]) + 3
            with torch.no_grad():
                found = compiled(q, k, lse, plan, cu_seqlens=cu)
                torch.testing.assert_close(found, mk.stepwise_map(q, k, lse, plan, cu_seqlens=cu))
        assert len(graphs) <= MOST_GRAPHS


BAD_PACKED = {
    "a step beyond its sequence": ([[(0, 21)], []], [[], []], (0, 20, 40)),
    "a token beyond its sequence": ([[(0, 20)], []], [[[20]], []], (0, 20, 40)),
    "cu_seqlens beyond the total": ([[(0, 20)], []], [[[2]], []], (0, 20, 60)),
    "cu_seqlens that descends": ([[], []], [[], []], (0, 50, 40)),
    "cu_seqlens that starts late": ([[], []], [[], []], (1, 20, 40)),
}


@pytest.mark.parametrize("engine", ["native", "sdpa", "eager"])
@pytest.mark.parametrize("name", BAD_PACKED)
def test_packed_indices_out_of_range(name, engine):
    """Compiled code cannot read them when it is compiled; the graph checks them when it runs."""
    if engine == "native" and build.why_not():
        pytest.skip(build.why_not())
    torch.compiler.reset()
    steps, words, bounds = BAD_PACKED[name]
    cu = torch.tensor(bounds, dtype=torch.int32)
    q, k = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    plan = StepPlan.from_spans(steps, words)
    for options in ({}, dict(map_engine="widened")):
        compiled = torch.compile(mk.stepwise_attention, backend="aot_eager", fullgraph=True)
        with pytest.raises(RuntimeError, match="cu_seqlens: expected to rise|plan: expected indices"):
            compiled(q, k, k, plan, cu_seqlens=cu, engine=engine, **options)
    if "cu_seqlens" in name:
        pool = torch.compile(mk.pool_values, backend="aot_eager", fullgraph=True)
        with pytest.raises(RuntimeError, match="cu_seqlens: expected to rise from 0 to v's total"):
            pool(k, cu_seqlens=cu)


def test_indices_beyond_a_batch():
    torch.compiler.reset()
    compiled = torch.compile(mk.stepwise_attention, backend="aot_eager")
    q = torch.randn(2, 2, 30, 16)
    compiled(q, q, q, StepPlan.from_spans([[(0, 9)]] * 2, [[[1]]] * 2))
    for steps, words in (([[(0, 31)], []], [[], []]), ([[], []], [[], [[30]]])):
        with pytest.raises(Exception, match="expected indices within"):
            compiled(q, q, q, StepPlan.from_spans(steps, words))
