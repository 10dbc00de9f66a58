"""Compares every engine on a GPU with the float64 oracle: features, long sequences, and use in real programs.

The latter covers the compiler, CUDA graphs, checkpointing, streams and several devices. A case that an engine refuses
is skipped with the engine's reason, so that the list of skips shows the cases that were not covered. Half of the runs
use PyTorch's deterministic mode, which fills new memory with NaN and selects other variants of some engines.
"""

import contextlib
import dataclasses
import functools
import os

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from molsaki_kernels import stepwise_attention
from molsaki_kernels.attention import ENGINES as TABLE
from molsaki_kernels.attention import sdpa
from molsaki_kernels.spec import AttentionRequest
from tests.helpers.hardware_cases import FEATURES, long_inputs, walk
from tests.helpers.kernel_cases import Case, Inputs, check, make, oracle

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms require it for cuBLAS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
ENGINES = ["sdpa", "flash_attn", "flex", "triton", "eager"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMED = {case.name: case for case in FEATURES}
MAIN = ["default", "full", "window", "full_window", "softcap", "sinks", "packed", "everything", "heads", "transposed",
        "slice"]  # fmt: skip
SHAPES = ["rows_17", "rows_63", "group_of_seven", "d80", "d256", "plan_no_words"]
# Engine flex is compiled for every case, which takes seconds.
FLEX = {BF16: [*MAIN, "d80", "d256"], FP16: ["default"], FP32: ["default", "everything"]}
GRID = [(engine, dtype, name) for engine in ENGINES for dtype in (BF16, FP16, FP32)
        for name in (FLEX[dtype] if engine == "flex" else MAIN + SHAPES)]  # fmt: skip
CASE = Case("small batch", M=500, B=2, Hq=4, Hkv=2, D=64, dtype=BF16)


@contextlib.contextmanager
def deterministic(on: bool = True):
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def need(engine: str, case: Case, x: Inputs, backward: bool = True) -> None:
    """Skips a case that the engine refuses, with the engine's reason."""
    call = AttentionRequest(
        x.q.device, x.q.dtype, x.q.shape[0], x.q.shape[1], x.k.shape[1], x.q.shape[2], x.q.shape[3], case.options(),
        x.sinks is not None, x.cu_seqlens is not None, backward, x.v.shape[3] if case.value_dim else None,
    )  # fmt: skip
    reason = TABLE[engine].available() or TABLE[engine].why_not(call)
    if reason is not None:
        pytest.skip(f"{engine}: {reason}")


def leaves_of(x: Inputs) -> dict[str, torch.Tensor]:
    named = {"dq": x.q, "dk": x.k, "dv": x.v} | ({} if x.sinks is None else {"dsinks": x.sinks})
    return {name: t.detach().requires_grad_() for name, t in named.items()}


def forward(engine: str, case: Case, x: Inputs, leaves: dict, function=stepwise_attention):
    q, k, v, *sinks = leaves.values()
    return function(
        q, k, v, x.plan, sinks=sinks[0] if sinks else None, cu_seqlens=x.cu_seqlens, engine=engine, **case.keywords()
    )


def run(engine: str, case: Case, x: Inputs, source: str = "both", function=stepwise_attention) -> dict:
    """The output, the map, and the gradients of the results that ``source`` names."""
    leaves = leaves_of(x)
    out, maps = forward(engine, case, x, leaves, function)
    terms = {"out": (out, x.dout), "map": (maps, x.dmaps)}
    results, upstream = zip(*(terms.values() if source == "both" else [terms[source]]), strict=True)
    grads = torch.autograd.grad(results, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), "maps": maps.detach(), **dict(zip(leaves, grads, strict=True))}


def exact_and_eager(case: Case, x: Inputs, source: str) -> tuple[dict, dict]:
    both = oracle(case, x, torch.float64, source), oracle(case, x, case.dtype, source)
    return tuple({name: value for name, value in found.items() if name != "lse"} for found in both)


def compare(engine: str, case: Case, source: str = "both", modes: tuple[bool, ...] = (False, True)) -> None:
    case = dataclasses.replace(case, device=DEVICE)
    x = make(case)
    x.dout[..., ::3, :] = 0  # as in rows whose label is masked
    need(engine, case, x)
    exact, eager = exact_and_eager(case, x, source)
    for mode in modes:
        with deterministic(mode):
            need(engine, case, x)
            found = run(engine, case, x, source)
        check(f"{engine} {case.name} {case.dtype} {source} deterministic={mode}", found, exact, eager)


@pytest.mark.parametrize("engine, dtype, name", GRID, ids=str)
def test_features(engine, dtype, name):
    # These engines have one variant. The NaNs of the deterministic mode show elements that are never written.
    modes = (True,) if engine in ("flex", "triton", "eager") else (False, True)
    compare(engine, dataclasses.replace(NAMED[name], dtype=dtype), modes=modes)


@pytest.mark.parametrize("name", ["default", "packed", "everything", "heads"])
@pytest.mark.parametrize("D, value_dim", [(192, 128), (64, 128), (128, 64)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "flex"])
def test_value_widths(engine, dtype, D, value_dim, name):
    """Values wider or narrower than keys, as in multi-head latent attention."""
    modes = (True,) if engine in ("triton", "eager") else (False, True)
    compare(engine, dataclasses.replace(NAMED[name], D=D, value_dim=value_dim, dtype=dtype), modes=modes)


@pytest.mark.parametrize("source", ["map", "out"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_one_gradient(engine, dtype, source):
    if engine == "flex" and dtype != BF16:
        pytest.skip("flex: compiled per case; only bfloat16 is tested here")
    compare(engine, Case("one_gradient", M=511, D=128, Hq=4, Hkv=2, sinks=True, dtype=dtype), source)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_row_has_an_upstream_gradient(engine):
    """dO is given and zero everywhere, so that dlse cannot be folded into out."""
    case = dataclasses.replace(CASE, device=DEVICE)
    x = make(case)
    x.dout.zero_()
    need(engine, case, x)
    exact, eager = exact_and_eager(case, x, "both")
    check(f"{engine} no upstream", run(engine, case, x), exact, eager)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_layouts_of_the_upstream_gradient(engine, monkeypatch):
    """One process, one shape, dO laid out as (B, M, H, D) and as (B, H, M, D) in turns; not the deterministic mode.

    cuDNN keeps a plan for each shape and looks at the strides of q, k and v only: if dO's were those of the first call,
    the second would have wrong gradients and no error. Engine sdpa takes aten in the first call and then cuDNN.
    """
    monkeypatch.setattr(sdpa, "CUDNN_PAYS", 1.0)
    case = dataclasses.replace(CASE, M=512, device=DEVICE)
    x = make(case)
    need(engine, case, x)
    exact, eager = exact_and_eager(case, x, "both")
    heads_inside, heads_outside = x.dout.transpose(1, 2).contiguous().transpose(1, 2), x.dout.contiguous()
    for i, dout in enumerate([heads_inside, heads_inside, heads_outside, heads_outside, heads_inside, heads_outside]):
        x.dout = dout
        check(f"{engine} dO's strides {tuple(dout.stride())}, call {i}", run(engine, case, x), exact, eager)


@pytest.mark.parametrize("name", ["default", "full", "sinks", "heads", "transposed", "slice", "group_of_seven", "d80"])
def test_sdpa_on_cudnn(name, monkeypatch):
    """From the first call on; the other tests' shapes never repay a plan, so that aten serves them."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("cuDNN is taken on Hopper and later")
    monkeypatch.setattr(sdpa, "CUDNN_PAYS", 0.0)
    compare("sdpa", dataclasses.replace(NAMED[name], dtype=BF16), modes=(False,))
    assert sdpa._plans.keys


@pytest.mark.parametrize("engine", ENGINES)
def test_one_row(engine):
    """Its only weight is 1: out is v, the map is 1, and dq and dk are zero except for rounding."""
    case = Case("one_row", M=1, D=64, Hq=4, Hkv=4, dtype=BF16, device=DEVICE)
    x = make(case)
    need(engine, case, x)
    found = run(engine, case, x)
    torch.testing.assert_close(found["out"], x.v)
    torch.testing.assert_close(found["dv"], x.dout)
    assert ((found["maps"] - 1).abs() < 1e-5).sum() == 1 and found["maps"].sum() < 1.0001
    assert max(found[name].abs().max() for name in ("dq", "dk")) < 0.1


@functools.lru_cache(maxsize=1)
def long(M: int, D: int, words: int) -> tuple[Inputs, dict, dict]:
    x = long_inputs(M, Hq=2, Hkv=1, D=D, dtype=BF16, words=words, device=DEVICE)
    x.dout[..., ::3, :] = 0
    results = [walk(x, dtype) for dtype in (torch.float64, BF16)]
    return x, *({name: value for name, value in found.items() if name != "lse"} for found in results)


@pytest.mark.parametrize("M", [4096, 32768, pytest.param(131072, marks=pytest.mark.memory)])
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "eager"])
def test_long(M, engine):
    """Compares every result of every row, also at 131,072 tokens."""
    case = Case("long", D=128)
    x, exact, eager = long(M, 128, M // 20)
    need(engine, case, x)
    check(f"{engine} {M}", run(engine, case, x), exact, eager)


@pytest.mark.parametrize("engine", ENGINES)
def test_deterministic_results_are_bitwise_reproducible(engine):
    case = dataclasses.replace(CASE, M=2048, D=128, device=DEVICE)
    x = make(case)
    with deterministic():
        need(engine, case, x)
        first = run(engine, case, x)
        for _ in range(4):
            again = run(engine, case, x)
            assert all(torch.equal(first[name], again[name]) for name in first)


def prepared(engine: str, **changes) -> tuple[Case, Inputs, dict]:
    """A case, its inputs, and the results of a simple call of the engine, to which others are compared bitwise."""
    case = dataclasses.replace(CASE, device=DEVICE, **changes)
    x = make(case)
    need(engine, case, x)
    return case, x, run(engine, case, x)


def assert_same(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


PACKED = dict(lengths=(300, 0, 1, 200), B=1)


@pytest.mark.parametrize("changes", [{}, PACKED], ids=["batch", "packed"])
@pytest.mark.parametrize("engine", ENGINES)
def test_compile(engine, changes):
    with deterministic():
        case, x, expected = prepared(engine, **changes)
        torch._dynamo.reset()
        found = run(engine, case, x, function=torch.compile(stepwise_attention, fullgraph=True))
    if engine == "flex":  # compiled together with its caller, the code may differ
        exact, eager = exact_and_eager(case, x, "both")
        check("flex compiled", found, exact, eager)
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpointing(engine):
    with deterministic():
        case, x, expected = prepared(engine)
        leaves = leaves_of(x)
        q, k, v = leaves.values()
        out, maps = checkpoint(
            lambda *qkv: forward(engine, case, x, dict(zip(leaves, qkv, strict=True))), q, k, v, use_reentrant=False
        )
        grads = torch.autograd.grad((out, maps), (q, k, v), (x.dout, x.dmaps))
    assert_same({"out": out, "maps": maps, **dict(zip(leaves, grads, strict=True))}, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_side_stream(engine):
    """All work runs on the current stream: inputs are written on it after a delay, and results are read on it."""
    with deterministic():
        case, x, expected = prepared(engine)
        kept = [t.clone() for t in (x.q, x.k, x.v)]
        for t in (x.q, x.k, x.v):
            t.fill_(float("nan"))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            for t, value in zip((x.q, x.k, x.v), kept, strict=True):
                t.copy_(value)
            found = {name: value.clone() for name, value in run(engine, case, x).items()}
        torch.cuda.current_stream().wait_stream(stream)
    assert_same(found, expected)


@pytest.mark.parametrize("changes", [{}, PACKED], ids=["batch", "packed"])
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "eager"])
def test_cuda_graph(engine, changes):
    """Forward and backward are captured, and replayed on other values and, if packed, other lengths."""
    case = dataclasses.replace(CASE, device=DEVICE, **changes)
    x = make(case)
    need(engine, case, x)
    if x.cu_seqlens is not None:  # a plan that fits both the old and the new lengths
        short = make(dataclasses.replace(case, lengths=(200, 0, 1, 150)))
        x.plan, x.dmaps = short.plan, short.dmaps
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(engine, case, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(engine, case, x)
    x.q.copy_(torch.randn(x.q.shape, generator=torch.Generator().manual_seed(99)))
    if x.cu_seqlens is not None:
        x.cu_seqlens.copy_(torch.tensor([0, 250, 250, 301, 501], dtype=torch.int32))
    graph.replay()
    exact, eager = exact_and_eager(case, x, "both")
    check(f"{engine} replayed", found, exact, eager)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_device_other_than_the_current_one(engine):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with deterministic():
        case, x, expected = prepared(engine)
        case = dataclasses.replace(case, device="cuda:1")
        there = make(case)
        assert torch.cuda.current_device() == 0
        found = run(engine, case, there)
    assert all(value.device.index == 1 for value in found.values())
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_same({name: value.to("cuda:0") for name, value in found.items()}, expected)
    else:
        exact, eager = exact_and_eager(case, there, "both")
        check(f"{engine} cuda:1", found, exact, eager)


@pytest.mark.parametrize("changes", [{}, PACKED], ids=["batch", "packed"])
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "eager"])
def test_no_synchronization(engine, changes):
    """Neither the public function nor the operators nor their backward synchronize with the device."""
    case, x, _ = prepared(engine, **changes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(engine, case, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
