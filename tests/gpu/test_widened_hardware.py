"""Compares the map by widened values on a GPU with the float64 oracle, and its use in real programs.

In PyTorch's deterministic mode engine "sdpa" uses aten's flash attention, otherwise cuDNN where it can.
"""

import dataclasses
import functools

import pytest
import torch

from molsaki_kernels import stepwise_attention
from tests.gpu.test_engines_hardware import (
    BF16,
    CASE,
    DEVICE,
    FP16,
    FP32,
    NAMED,
    PACKED,
    assert_same,
    deterministic,
    exact_and_eager,
    need,
    run,
)
from tests.helpers.kernel_cases import Case, check_widened, make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ENGINES = ["sdpa", "flash_attn", "triton"]
NAMES = ["default", "full", "window", "sinks", "packed", "everything", "heads", "transposed", "slice", "rows_17", "d80",
         "plan_whole", "plan_no_words"]  # fmt: skip
widened = functools.partial(stepwise_attention, map_engine="widened")


def compare(engine, case, source="both", modes=(False, True)):
    case = dataclasses.replace(case, device=DEVICE)
    x = make(case)
    x.dout[..., ::3, :] = 0
    need(engine, case, x)
    exact, eager = exact_and_eager(case, x, source)
    for mode in modes:
        with deterministic(mode):
            need(engine, case, x)
            found = run(engine, case, x, source, function=widened)
        name = f"{engine} widened {case.name} {case.dtype} {source} deterministic={mode}"
        check_widened(name, found, exact, eager)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_features(engine, dtype, name):
    compare(engine, dataclasses.replace(NAMED[name], dtype=dtype))


def test_float32():
    for name in ("default", "packed", "everything"):
        compare("eager", dataclasses.replace(NAMED[name], dtype=FP32), modes=(True,))


@pytest.mark.parametrize("source", ["map", "out"])
@pytest.mark.parametrize("engine", ENGINES)
def test_one_gradient(engine, source):
    compare(engine, Case("one_gradient", M=256, D=64, Hq=9, Hkv=3, B=2, dtype=BF16), source)


def prepared(engine, **changes):
    case = dataclasses.replace(CASE, device=DEVICE, **changes)
    x = make(case)
    need(engine, case, x)
    return case, x


@pytest.mark.parametrize("changes", [{}, PACKED], ids=["batch", "packed"])
@pytest.mark.parametrize("engine", ENGINES)
def test_bitwise_and_compiled(engine, changes):
    with deterministic():
        case, x = prepared(engine, **changes)
        expected = run(engine, case, x, function=widened)
        assert_same(run(engine, case, x, function=widened), expected)
        torch._dynamo.reset()
        assert_same(run(engine, case, x, function=torch.compile(widened, fullgraph=True)), expected)


@pytest.mark.parametrize("changes", [{}, PACKED], ids=["batch", "packed"])
@pytest.mark.parametrize("engine", ENGINES)
def test_cuda_graph(engine, changes):
    """Replayed on other values, another plan and, if packed, other lengths: nothing is kept from before the capture."""
    case, x = prepared(engine, **changes)
    other = make(dataclasses.replace(case, lengths=(200, 0, 1, 150)) if changes else case)
    if changes:  # a plan that fits both the old and the new lengths
        x.plan, x.dmaps = other.plan, other.dmaps
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(engine, case, x, function=widened)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(engine, case, x, function=widened)
    x.q.copy_(torch.randn(x.q.shape, generator=torch.Generator().manual_seed(99)))
    x.plan.word_of_token.copy_(x.plan.word_of_token.flip(-1).sort(-1, descending=True).values)
    if changes:
        x.cu_seqlens.copy_(torch.tensor([0, 250, 250, 301, 501], dtype=torch.int32))
    graph.replay()
    exact, eager = exact_and_eager(case, x, "both")
    check_widened(f"{engine} widened replayed", found, exact, eager)


@pytest.mark.parametrize("changes", [{}, PACKED], ids=["batch", "packed"])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_synchronization(engine, changes):
    case, x = prepared(engine, **changes)
    run(engine, case, x, function=widened)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(engine, case, x, function=widened)
    finally:
        torch.cuda.set_sync_debug_mode("default")
