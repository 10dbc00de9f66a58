"""The Triton kernels on hardware: the interpreted cases in every dtype, then real sizes up to 131,072 tokens."""

import dataclasses

import pytest
import torch

from molsaki_kernels import StepPlan
from molsaki_kernels._triton.attention_forward import attention_forward
from molsaki_kernels._triton.map_backward import map_backward
from molsaki_kernels._triton.map_forward import map_forward
from tests.helpers.hardware_cases import DTYPES, FEATURES, long_inputs, walk
from tests.helpers.kernel_cases import Case, Inputs, check, check_fused, check_map, kernels, make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def nan_filled_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(case, **changes):
    return dataclasses.replace(case, device="cuda", **changes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in FEATURES])
def test_features(case, dtype):
    check_fused(on_gpu(case, dtype=dtype))
    check_map(on_gpu(case, dtype=dtype))


@pytest.mark.parametrize("source", ["map", "out", "lse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_gradient(dtype, source):
    check_fused(Case("one_gradient", M=511, D=128, Hq=4, Hkv=2, sinks=True, dtype=dtype, device="cuda"), source)


@pytest.mark.parametrize("M", [4096, 32768])
@pytest.mark.parametrize("D", [64, 128])
def test_long(M, D):
    x = long_inputs(M, Hq=4, Hkv=2, D=D, dtype=torch.bfloat16, words=M // 20)
    torch.use_deterministic_algorithms(False)  # index_add_ of the blockwise oracle is not deterministic
    exact, eager = walk(x, torch.float64), walk(x, torch.bfloat16)
    check(f"long_{M}_{D}", kernels(Case("long", D=D), x, "both"), exact, eager)


@pytest.mark.memory
def test_131072_tokens():
    """The whole forward and backward, with every 20th token a key word; sampled rows against float64."""
    M, D = 131072, 128
    x = long_inputs(M, Hq=4, Hkv=2, D=D, dtype=torch.bfloat16, words=M // 20)
    found = kernels(Case("longest", D=D), x, "both")
    assert all(t.isfinite().all() for t in found.values())
    # Each row of the map sums to at most the number of rows of its step.
    steps = x.plan.steps[0]
    assert (found["maps"][0].sum(-1) <= (steps[:, 1] - steps[:, 0]) * 1.001).all()
    rows = torch.randint(M, (64,), generator=torch.Generator().manual_seed(0)).cuda()
    position = torch.arange(M, device="cuda")
    for h in range(4):
        scores = x.q[0, h, rows].double() @ x.k[0, h // 2].double().T * D**-0.5
        scores.masked_fill_(position > rows[:, None], float("-inf"))
        torch.testing.assert_close(found["lse"][0, h, rows].double(), scores.logsumexp(-1), atol=1e-4, rtol=1e-5)
        out = scores.softmax(-1) @ x.v[0, h // 2].double()
        torch.testing.assert_close(found["out"][0, h, rows].double(), out, atol=1e-3, rtol=2e-2)
    s = int(torch.randint(len(steps), (1,), generator=torch.Generator().manual_seed(1)))
    start, stop = steps[s].tolist()
    exact = torch.zeros(x.plan.num_words, dtype=torch.float64, device="cuda")
    for h in range(4):
        at = torch.arange(start, stop, device="cuda")
        scores = x.q[0, h, at].double() @ x.k[0, h // 2].double().T * D**-0.5
        p = scores.masked_fill(position > at[:, None], float("-inf")).softmax(-1)
        exact.index_add_(0, x.plan.word_of_token[0], p[:, x.plan.tokens[0]].sum(0) / 4)
    torch.testing.assert_close(found["maps"][0, s].double(), exact, atol=1e-6, rtol=1e-3)


@pytest.mark.memory
def test_more_than_2_31_elements():
    """q of 2.15 billion elements: the results of the last sequence of the batch are the same as alone."""
    B, M, D = 2**31 // (2048 * 128) + 8, 2048, 128
    generator = torch.Generator(device="cuda").manual_seed(0)
    last = [torch.randn((1, 1, M, D), generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    q, k, v = (torch.zeros((B, 1, M, D), device="cuda", dtype=torch.bfloat16) for _ in range(3))
    for whole, part in zip((q, k, v), last, strict=True):
        whole[-1:] = part
    plan = StepPlan.from_spans([[(0, M)]] * B, [[[3], [2000, 2001]]] * B, device="cuda")
    case = Case("huge", D=D)
    whole = Inputs(q, k, v, None, None, plan, q, torch.ones((B, 1, 2), device="cuda"), torch.empty(0))
    alone = Inputs(*last, None, None, plan[B - 1], last[0], torch.ones((1, 1, 2), device="cuda"), torch.empty(0))
    a, b = kernels(case, whole, "both"), kernels(case, alone, "both")
    assert all(torch.equal(a[key][-1:], b[key]) for key in a if key != "dk")
    torch.testing.assert_close(a["dk"][-1:], b["dk"])  # the number of splits of the rows depends on the batch


def test_results_are_bitwise_reproducible():
    x = long_inputs(4096, Hq=8, Hkv=2, D=128, dtype=torch.bfloat16, words=200)
    case = Case("twice", D=128)
    first = kernels(case, x, "both")
    for _ in range(5):
        again = kernels(case, x, "both")
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_the_map_alone_is_bitwise_the_same_twice():
    x = long_inputs(4096, Hq=8, Hkv=2, D=128, dtype=torch.bfloat16, words=200)
    options, plan = Case("twice", D=128).options(), x.plan_tensors()
    inputs = x.map_inputs(attention_forward(x.attention_inputs(), options, plan).lse)
    maps, again = (map_forward(inputs, options, plan) for _ in range(2))
    assert torch.equal(maps, again)
    for a, b in zip(*(map_backward(x.dmaps, inputs, options, plan) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_extra_memory_is_that_of_the_map():
    """At most the size of q more than flash attention without a map; here the partial sums are small compared to q."""
    case = Case("memory", D=128)
    x = long_inputs(32768, Hq=8, Hkv=2, D=128, dtype=torch.bfloat16, words=400)
    no_plan = StepPlan.from_spans([[]], [[]], device="cuda")

    def peak(inputs, source):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kernels(case, inputs, source)
        return torch.cuda.max_memory_allocated() - before

    q_bytes = x.q.numel() * x.q.element_size()
    assert peak(x, "both") - peak(dataclasses.replace(x, plan=no_plan), "out") <= q_bytes


def allow_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True


def set_fp32_precision():  # what transformers does for --tf32 true
    torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize("switch", [allow_tf32, set_fp32_precision])
def test_tf32_only_if_asked(switch):
    case = Case("tf32", M=511, D=64, device="cuda")
    check_fused(case)
    x = make(case)
    full = kernels(case, x, "both")["out"]
    before = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "none"  # inherits
    switch()
    try:
        rounded = kernels(case, x, "both")["out"]
    finally:
        torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before
    assert not torch.equal(full, rounded)
    torch.testing.assert_close(full, rounded, atol=1e-2, rtol=1e-2)
