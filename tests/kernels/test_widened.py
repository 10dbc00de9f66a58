"""Compares the map by widened values with the float64 oracle, through the public function and with every engine.

The masses are columns of the attention's output, so in a half precision they are rounded as the output is: the map's
budget has the output's rounding, not that of the float32 in which the masses are summed.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch.nn.attention import flex_attention as flex_api
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import molsaki_kernels as mk
from molsaki_kernels import StepPlan, ops, reference, widened_values
from molsaki_kernels._native import build
from molsaki_kernels.attention import ENGINES, flash_attn, flex, sdpa
from molsaki_kernels.spec import AttentionOptions, AttentionRequest
from tests.helpers import flash_attn_stand_ins as stand_ins
from tests.helpers.budget import assert_within_budget, error
from tests.helpers.compiled import assert_compiles_alike
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.kernels.test_attention import DTYPES, FEATURES, PLANS, inputs, run, serves
from tests.kernels.test_flash_attn import MACHINES, machine  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU_ENGINES = ("native", "sdpa", "eager")
widened = functools.partial(mk.stepwise_attention, map_engine="widened")


@pytest.fixture(autouse=True)
def skip_without_native(request):
    if "native" in request.node.name and build.why_not():
        pytest.skip(build.why_not())


@pytest.fixture
def flex_on_a_cpu(monkeypatch):
    monkeypatch.setattr(flex_api, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "compiled", lambda: flex_api.flex_attention)
    monkeypatch.setattr(flex, "available", lambda: None)
    monkeypatch.setattr(flex, "why_not", lambda call: None)


def check(got, oracle, eager, dtype):
    for name, value in got.items():
        if oracle[name] is None:  # the map does not depend on v
            assert value is None or not value.any(), name
        elif name == "maps" and dtype in (torch.bfloat16, torch.float16):
            # The weights and their sums are rounded once each: together at most eps / 4, half a unit in the last place.
            allowed = 2 * error(eager[name], oracle[name]) + torch.finfo(dtype).eps / 4
            assert error(value, oracle[name]) <= allowed, (
                f"maps {dtype}: {error(value, oracle[name]):.2e}, {allowed:.2e}"
            )
        else:
            assert_within_budget(f"{name} {dtype}", value, oracle[name], eager[name])


def compare(engine, plan_name, options, dtype, source="both", **shape):
    options = dict(options)
    packed, sinks = options.pop("packed", False), options.pop("sinks", False)
    tensors, plan, cu = inputs(plan_name, dtype, packed=packed, sinks=sinks, **shape)
    compare_inputs(engine, tensors, plan, cu, options, dtype, source)


def compare_inputs(engine, tensors, plan, cu, options, dtype, source="both"):
    oracle = run(reference.stepwise_attention, tensors, plan, cu, options, torch.float64, source)
    eager = run(reference.stepwise_attention, tensors, plan, cu, options, dtype, source)
    check(run(widened, tensors, plan, cu, options, dtype, source, engine=engine), oracle, eager, dtype)


CASES = [(e, f) for e in CPU_ENGINES for f in FEATURES if serves(e, FEATURES[f])]


@pytest.mark.parametrize("engine, feature", CASES)
def test_features(engine, feature):
    for dtype in DTYPES:
        if engine != "native" or dtype in (torch.float32, torch.bfloat16):
            compare(engine, "ragged", FEATURES[feature], dtype)
            compare(engine, "ragged", FEATURES[feature], dtype, source="maps")


@pytest.mark.parametrize("feature", FEATURES)
def test_flex(flex_on_a_cpu, feature):
    compare("flex", "ragged", FEATURES[feature], torch.float32)
    compare("flex", "ragged", FEATURES[feature], torch.bfloat16, source="maps")


def test_flex_in_float16(flex_on_a_cpu):
    compare("flex", "ragged", FEATURES["everything"], torch.float16)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", MACHINES)
def test_flash_attn(machine, name, feature):  # noqa: F811
    machine(*MACHINES[name])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compare("flash_attn", "ragged", FEATURES[feature], dtype)
    compare("flash_attn", "ragged", FEATURES[feature], torch.bfloat16, source="maps")
    shapes = {(given["q"].shape[-1], given["v"].shape[-1]) for _, given in stand_ins.CALLS}
    assert shapes == {(24, 24)}
    assert all(given.get("dlse") is None for _, given in stand_ins.CALLS)


@pytest.mark.parametrize("packed", [False, True])
def test_flash_attn_4_with_values_wider_than_keys(machine, monkeypatch, packed):  # noqa: F811
    monkeypatch.setattr(widened_values, "WIDEST", 128)
    machine(9, 4)
    tensors, plan, cu = many_words(torch.bfloat16, packed, groups=1, dim=64)
    compare_inputs("flash_attn", tensors, plan, cu, {}, torch.bfloat16)
    assert {(given["q"].shape[-1], given["v"].shape[-1]) for _, given in stand_ins.CALLS} == {(64, 128)}


@pytest.mark.parametrize("feature", ["plain", "packed, window, sinks"])
def test_interpreted_triton(feature):
    compare("triton", "some empty", FEATURES[feature], torch.float32)


@pytest.mark.parametrize("source", ["out", "maps"])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_one_source_of_gradient(engine, source):
    compare(engine, "ragged", dict(sinks=True), torch.float32, source=source)
    compare(engine, "ragged", dict(sinks=True, head_reduction="none"), torch.bfloat16, source=source)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("plan_name", [name for name in PLANS if name != "ragged"])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_plans(engine, plan_name, packed):
    compare(engine, plan_name, dict(packed=packed), torch.float32)
    compare(engine, plan_name, dict(packed=packed, head_reduction="none", sinks=True), torch.float32)


@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize("layout", ["bhmd", "bmhd"])
@pytest.mark.parametrize("dim", [16, 80])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_shapes(engine, dim, layout, groups):
    compare(engine, "ragged", {}, torch.float32, groups=groups, layout=layout, dim=dim)


def many_words(dtype, packed=False, sinks=False, **shape):
    """Every token a word, some of two tokens, so that the words need several calls at a WIDEST of 32."""
    tensors, _, cu = inputs("ragged", dtype, packed=packed, sinks=sinks, **shape)
    lengths, steps, _ = PLANS["ragged"]
    words = [[[0, n - 1], *([t] for t in range(1, n - 1))] for n in lengths]
    return tensors, StepPlan.from_spans(steps, words), cu


@pytest.mark.parametrize("widest", [16, 32, 256])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_more_words_than_fit(monkeypatch, engine, widest):
    """A WIDEST of 16 leaves no column beside v."""
    monkeypatch.setattr(widened_values, "WIDEST", widest)
    monkeypatch.setattr(widened_values, "NARROWER", (widest,))
    for options in ({}, dict(packed=True, sinks=True, head_reduction="none", window=33)):
        options = dict(options)
        packed, sinks = options.pop("packed", False), options.pop("sinks", False)
        for dtype in (torch.float32, torch.bfloat16):
            tensors, plan, cu = many_words(dtype, packed, sinks)
            compare_inputs(engine, tensors, plan, cu, options, dtype)
            compare_inputs(engine, tensors, plan, cu, options, dtype, source="maps")


def request_of(**changes):
    call = AttentionRequest(torch.device("cuda"), torch.bfloat16, 2, 9, 3, 256, 64, AttentionOptions(True, 0.125),
                            sinks=False, packed=False, backward=True)  # fmt: skip
    return dataclasses.replace(call, **changes)


def test_widths(machine):  # noqa: F811
    def widths(engine, words, **changes):
        found = widened_values.widths(engine, request_of(**changes), words)
        return found.key_dim, found.groups

    assert widths(sdpa, 20) == (88, ((64, 0, 20, 88),))
    assert widths(sdpa, 64) == (128, ((64, 0, 64, 128),))
    assert widths(sdpa, 500) == (256, ((64, 0, 192, 256), (0, 192, 256, 256), (0, 448, 52, 256)))
    assert widths(sdpa, 500, dtype=torch.float16)[1][:2] == ((64, 0, 184, 248), (0, 184, 248, 248))
    assert widths(sdpa, 20, head_dim=256) == (256, ((256, 0, 0, 256), (0, 0, 20, 256)))
    assert widths(sdpa, 20, head_dim=300, device=torch.device("cpu")) == (300, ((300, 0, 0, 300), (0, 0, 20, 300)))
    assert widths(ENGINES["native"], 20, device=torch.device("cpu")) == (64, ((64, 0, 20, 96),))
    assert widths(ENGINES["eager"], 500)[0] == 64
    assert widths(ENGINES["eager"], 500)[1][-1] == (0, 448, 52, 56)
    assert widths(flex, 20) == (64, ((64, 0, 20, 88),))
    machine(9, 4, any_call=False)
    assert widths(flash_attn, 64) == (128, ((64, 0, 64, 128),))
    assert widths(flash_attn, 64, kv_heads=9) == (64, ((64, 0, 64, 128),))
    assert widths(flash_attn, 20, kv_heads=9) == (88, ((64, 0, 20, 88),))
    machine(10, 4, any_call=False)
    assert widths(flash_attn, 20) == (88, ((64, 0, 20, 88),))
    assert widths(flash_attn, 100) == (256, ((64, 0, 100, 256),))
    assert widths(flash_attn, 100, dtype=torch.float16)[1] == ((64, 0, 64, 128), (0, 64, 36, 128))
    machine(12, 4, any_call=False)
    assert widths(flash_attn, 100)[1] == ((64, 0, 64, 128), (0, 64, 36, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("terms", ["lse", "lse, maps", "lse, maps, out"])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_gradient_through_lse(engine, terms, dtype):
    if engine == "native" and dtype == torch.float16:
        pytest.skip("native takes float32 and bfloat16")
    # With few heads the error of eager's dsinks, a vector of one number per head, is a matter of chance.
    tensors, plan, _ = inputs("ragged", dtype, groups=7, sinks=True)
    results = []
    for function, kind in (
        (functools.partial(widened, engine=engine), dtype),
        (reference.stepwise_attention, torch.float64),
        (reference.stepwise_attention, dtype),
    ):
        leaves = [t.to(kind).requires_grad_() for t in tensors]
        out, maps, lse = function(*leaves[:3], plan, sinks=leaves[3], return_lse=True)
        g = torch.Generator().manual_seed(3)
        loss = 0
        for name, value in (("lse", lse), ("maps", maps), ("out", out)):
            weight = torch.randn(value.shape, generator=g, dtype=torch.float64)
            loss = loss + (value.double() * weight).sum() if name in terms else loss
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append((lse, *grads))
    for name, got, oracle, eager in zip(("lse", "dq", "dk", "dv", "dsinks"), *results, strict=True):
        if oracle.any():
            assert_within_budget(name, got, oracle, eager)
        else:
            assert got.double().abs().max() < 1e-18, name  # a trace of folding dlse into O where dO' vanishes


def gradients_of_a_scaled_loss(function, dtype, kind, size, **extra):
    tensors, plan, _ = inputs("ragged", dtype)
    leaves = [t.to(kind).requires_grad_() for t in tensors]
    _, maps = function(*leaves, plan, **extra)
    dmaps = torch.randn(maps.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * size
    return torch.autograd.grad((maps.double() * dmaps).sum(), leaves[:2])


@pytest.mark.parametrize(
    "dtype, sizes",
    [(torch.bfloat16, (2.0**-60, 2.0**60)), (torch.float16, (2.0**-16, 2.0**-8, 2.0**15))],
    ids=["bf16", "fp16"],
)
@pytest.mark.parametrize("engine", ["sdpa", "eager"])
def test_the_size_of_the_loss(engine, dtype, sizes):
    """The map's gradient passes through dO' in the output's dtype, which holds what the eager gradient holds."""
    for size in sizes:
        results = (
            gradients_of_a_scaled_loss(widened, dtype, dtype, size, engine=engine),
            gradients_of_a_scaled_loss(reference.stepwise_attention, dtype, torch.float64, size),
            gradients_of_a_scaled_loss(reference.stepwise_attention, dtype, dtype, size),
        )
        for name, got, exact, eager in zip(("dq", "dk"), *results, strict=True):
            assert_within_budget(f"{name} {size}", got, exact, eager)


@pytest.mark.parametrize("options", [{}, dict(packed=True, head_reduction="none", sinks=True)], ids=["batch", "packed"])
def test_interpreted_kernels(monkeypatch, options):
    """The sums and dO' by the Triton kernels, as on a GPU."""
    monkeypatch.setattr(widened_values, "_uses_kernels", lambda wide: True)
    for source in ("both", "maps", "out"):
        compare("sdpa", "some empty", options, torch.float32, source=source)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_autocast_only_casts_the_inputs(engine):
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    results = []
    for cast in (False, True):
        leaves = [t.bfloat16().requires_grad_() for t in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out, maps = widened(leaves[0].float() if cast else leaves[0], *leaves[1:], plan, engine=engine)
            (out.double().square().sum() + maps.double().square().sum()).backward()
        assert out.dtype == torch.bfloat16 and maps.dtype == torch.float32
        results.append((out, maps, *(leaf.grad for leaf in leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("engine, dynamic", [("sdpa", False), ("eager", True), ("native", False)])
def test_compile(engine, dynamic):
    torch.compiler.reset()
    (q, k, v), plan, _ = inputs("ragged", torch.float32)

    def layer(q, k, v, plan):
        out, maps = widened(q, k, v, plan, window=30, engine=engine)
        return out.square().sum() + maps.square().sum()

    assert_compiles_alike(layer, (q, k, v), plan, dynamic=dynamic)


@pytest.mark.parametrize("packed", [False, True])
def test_compile_flex(flex_on_a_cpu, packed):
    tensors, plan, cu = inputs("ragged", torch.float32, packed=packed)
    compiled = torch.compile(widened, fullgraph=True, backend="aot_eager")
    a = run(widened, tensors, plan, cu, {}, torch.float32, engine="flex")
    b = run(compiled, tensors, plan, cu, {}, torch.float32, engine="flex")
    for name in a:
        torch.testing.assert_close(a[name], b[name])


@pytest.mark.parametrize("feature", ["plain", "packed, window, sinks", "heads"])
def test_dispatched_operators_give_the_same_results(feature):
    options = dict(FEATURES[feature])
    packed, sinks = options.pop("packed", False), options.pop("sinks", False)
    tensors, plan, cu = inputs("ragged", torch.float32, packed=packed, sinks=sinks)
    direct = run(widened, tensors, plan, cu, options, torch.float32, engine="sdpa")
    seen = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
            seen.append(operator.name())
            return operator(*arguments, **(keywords or {}))

    with Recording():
        recorded = run(widened, tensors, plan, cu, options, torch.float32, engine="sdpa")
    assert {"molsaki::split_widened", "molsaki::split_widened_backward"} <= set(seen)
    assert all(torch.equal(direct[name], recorded[name]) for name in direct)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_opcheck(per_head, packed):
    _, plan, cu = inputs("ragged", torch.float32, packed=packed)
    B, M = (1, 258) if packed else (3, 130)
    wide = torch.randn(B, M, 4, 24).transpose(1, 2) if per_head else torch.randn(B, 4, M, 24)
    arguments = (wide.requires_grad_(), 16, 4, cu, plan.steps, per_head)
    torch.library.opcheck(torch.ops.molsaki.split_widened, arguments)


def test_fake_and_meta_tensors():
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    out, maps = widened(*(t.to("meta") for t in (q, k, v)), plan.to("meta"), engine="eager")
    assert out.shape == q.shape and maps.shape == (3, 4, 4) and maps.device.type == "meta"


def test_second_derivatives_are_refused():
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    q.requires_grad_()
    for loss in (widened(q, k, v, plan)[1].sum(), widened(q, k, v, plan)[1].square().sum()):
        (dq,) = torch.autograd.grad(loss, q, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            dq.sum().backward()


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_checkpointing_and_inference_mode(engine):
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    with torch.inference_mode():
        widened(q, k, v, plan, engine=engine)

    def layer(q):
        out, maps = widened(q, k, v, plan, engine=engine)
        return out.sum() + maps.square().sum()

    grads = []
    for function in (layer, lambda q: checkpoint(layer, q, use_reentrant=False)):
        x = q.detach().clone().requires_grad_()
        grads.append(torch.autograd.grad(function(x), x)[0])
    assert torch.equal(*grads)


def test_empty_batch_and_empty_sequence():
    for engine in CPU_ENGINES:
        q = torch.zeros(0, 2, 5, 16, requires_grad=True)
        out, maps = widened(q, q, q, StepPlan.from_spans([], []), engine=engine)
        assert out.shape == q.shape and maps.shape == (0, 0, 0)
        cu = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
        packed = torch.randn(1, 2, 5, 16, requires_grad=True)
        plan = StepPlan.from_spans([[(0, 3)], [], [(0, 2)]], [[[1]], [], [[0]]])
        out, maps = widened(packed, packed, packed, plan, cu_seqlens=cu, engine=engine)
        assert maps.shape == (3, 1, 1) and maps[1].item() == 0 and maps[0].item() > 0
        (out.sum() + maps.sum()).backward()
        assert packed.grad.isfinite().all()


def test_bitwise_reproducible():
    tensors, plan, _ = inputs("ragged", torch.bfloat16)
    for engine in CPU_ENGINES:
        a, b = (run(widened, tensors, plan, None, {}, torch.bfloat16, engine=engine) for _ in range(2))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_columns_are_computed_once_per_plan(monkeypatch):
    computed = []
    make = widened_values._columns
    monkeypatch.setattr(widened_values, "_columns", lambda *call: computed.append(call) or make(*call))
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    for _ in range(3):
        out, maps = widened(q, k, v, plan, engine="sdpa")
    assert len(computed) == 1
    expected = reference.stepwise_attention(q, k, v, plan)[1]
    torch.testing.assert_close(maps, expected)
    plan.tokens[0, 0] = 1  # changed in place
    torch.testing.assert_close(widened(q, k, v, plan, engine="sdpa")[1], reference.stepwise_attention(q, k, v, plan)[1])
    assert len(computed) == 2
    packed, plan, cu = inputs("ragged", torch.float32, packed=True)
    for _ in range(2):
        widened(*packed, plan, cu_seqlens=cu, engine="sdpa")
    assert len(computed) == 3
    widened(*packed, plan, cu_seqlens=cu.clone(), engine="sdpa")
    assert len(computed) == 4


@pytest.mark.parametrize("packed", [False, True])
def test_step_of_row(packed):
    _, plan, cu = inputs("ragged", torch.float32, packed=packed)
    x = torch.empty(1, 1, 258, 1) if packed else torch.empty(3, 1, 130, 1)
    found = widened_values.step_of_row(plan.steps, cu, x)
    starts = [0, 130, 241] if packed else [0, 0, 0]
    S = plan.num_steps
    expected = torch.full(found.shape, 3 * S if packed else S)
    for n, row in enumerate(plan.steps.tolist()):
        for s, (a, b) in enumerate(row):
            expected[0 if packed else n, a + starts[n] : b + starts[n]] = n * S + s if packed else s
    assert torch.equal(found, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_segments_of_packed_sequences_at_once(monkeypatch, packed):
    """As on a GPU, where the bounds of packed sequences are not known on the host."""
    _, plan, cu = inputs("ragged", torch.float32, packed=packed)
    wide = torch.randn((1, 2, 258, 24) if packed else (3, 2, 130, 24), dtype=torch.float64)
    for per_head in (False, True):
        expected = widened_values.split(wide, 16, 4, cu, plan.steps, per_head)[1]
        with monkeypatch.context() as patch:
            patch.setattr(
                widened_values,
                "_segments",
                lambda steps, cu, x: [(slice(0, x.shape[2]), *widened_values._flat_steps(steps, cu))],
            )
            found = widened_values.split(wide, 16, 4, cu, plan.steps, per_head)[1]
        torch.testing.assert_close(found, expected)


def test_selection(monkeypatch):
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    with pytest.raises(
        ValueError, match='map_engine: expected "auto" or one of "widened", "triton", "native", "torch"'
    ):
        mk.stepwise_attention(q, k, v, plan, map_engine="wide")
    with pytest.raises(ValueError, match="map_engine: 'triton' cannot serve this call"):
        mk.stepwise_attention(q.double(), k.double(), v.double(), plan, engine="eager", map_engine="triton")
    if not build.why_not():
        with pytest.raises(
            ValueError, match="'native' cannot serve .*: it computes the map itself, without map_engine"
        ):
            mk.stepwise_attention(q, k, v, plan, engine="native", map_engine="torch")
    chosen = []
    run_attention = ops.run_attention
    monkeypatch.setattr(ops, "run_attention", lambda *call: chosen.append(call[-2:]) or run_attention(*call))
    mk.stepwise_attention(q, k, v, plan, map_engine="torch")
    mk.stepwise_attention(q, k, v, plan, engine="sdpa", map_engine="widened")
    assert chosen[:2] == [("sdpa", "torch"), ("sdpa", "widened")]
