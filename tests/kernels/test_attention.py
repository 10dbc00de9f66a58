"""Compares the engines native, sdpa and eager, and the native and torch maps, with the float64 oracle."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import molsaki_kernels as mk
from molsaki_kernels import StepPlan, reference
from molsaki_kernels._native import build
from molsaki_kernels.attention import eager, sdpa
from molsaki_kernels.attention_map import torch as torch_map
from molsaki_kernels.attention_map import torch_blocks
from molsaki_kernels.spec import AttentionOutputs
from tests.helpers.budget import assert_within_budget, error
from tests.helpers.compiled import assert_compiles_alike

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

FEATURES = {
    "plain": {},
    "not causal": dict(causal=False),
    "window": dict(window=33),
    "window, not causal": dict(window=20, causal=False),
    "window of two": dict(window=2),
    "softcap": dict(softcap=3.0),
    "sinks": dict(sinks=True),
    "everything": dict(sinks=True, window=17, softcap=3.0, scale=0.3),
    "scale": dict(scale=0.5),
    "heads": dict(head_reduction="none"),
    "heads, window, sinks": dict(head_reduction="none", window=9, sinks=True),
    "packed": dict(packed=True),
    "packed, window, sinks": dict(packed=True, window=12, sinks=True),
    "packed, heads, softcap": dict(packed=True, head_reduction="none", softcap=3.0),
    "packed, not causal": dict(packed=True, causal=False),
}

# Lengths of the sequences, steps and words. They include rows in no step, steps of one row, empty steps, words of
# several tokens in any order, the first token as a key word, words that no step can see, and sequences without words
# or steps.
PLANS = {
    "ragged": (
        [130, 111, 17],
        [[(0, 40), (40, 41), (50, 50), (50, 130)], [(3, 60), (60, 111)], [(0, 17)]],
        [[[0], [7, 5], [60, 61, 59], [129]], [[110], [2]], [[16, 0]]],
    ),
    "no words": ([63, 20], [[(0, 63)], [(0, 10), (10, 20)]], [[], []]),
    "no steps": ([33, 8], [[], []], [[[1]], [[2], [3]]]),
    "some empty": ([20, 20, 20], [[(0, 20)], [], [(2, 9)]], [[], [[3]], [[4], [5]]]),
}


def inputs(plan_name: str, dtype, groups=2, packed=False, sinks=False, dim=16, layout="bhmd", value_dim=None):
    """q, k, v and, if asked for, sinks in ``dtype``; the plan; and cu_seqlens, which is None unless ``packed``."""
    lengths, steps, words = PLANS[plan_name]
    g = torch.Generator().manual_seed(1)
    batch, M = (1, sum(lengths)) if packed else (len(lengths), max(lengths))

    def tensor(heads, width=dim):
        sizes = dict(b=batch, h=heads, m=M, d=width)
        x = torch.randn([sizes[name] for name in layout], generator=g, dtype=torch.float64).to(dtype)
        return x.permute([layout.index(name) for name in "bhmd"])

    Hkv = 2
    tensors = [tensor(Hkv * groups), tensor(Hkv), tensor(Hkv, value_dim or dim)]
    if sinks:
        tensors.append(torch.linspace(-1, 2, Hkv * groups, dtype=torch.float64).to(dtype))
    cu = None
    if packed:
        cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return tensors, StepPlan.from_spans(steps, words), cu


def run(function, tensors, plan, cu, options, dtype, source="both", **extra):
    """The output, the map and every gradient, computed in ``dtype``."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in tensors]
    sinks = leaves[3] if len(leaves) > 3 else None
    out, maps = function(*leaves[:3], plan, sinks=sinks, cu_seqlens=cu, **options, **extra)
    g = torch.Generator().manual_seed(2)
    dout = torch.randn(out.shape, generator=g, dtype=torch.float64)
    dmaps = torch.randn(maps.shape, generator=g, dtype=torch.float64)
    dout[..., ::3, :] = 0  # as in rows whose label is masked
    terms = {"out": (out.double() * dout).sum(), "maps": (maps.double() * dmaps).sum()}
    loss = sum(terms.values()) if source == "both" else terms[source]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return dict(zip(("out", "maps", "dq", "dk", "dv", "dsinks"), (out, maps, *grads), strict=False))


def compare(engine, plan_name, options, dtype, source="both", **shape):
    options = dict(options)
    packed, sinks = options.pop("packed", False), options.pop("sinks", False)
    tensors, plan, cu = inputs(plan_name, dtype, packed=packed, sinks=sinks, **shape)
    oracle = run(reference.stepwise_attention, tensors, plan, cu, options, torch.float64, source)
    eager_result = run(reference.stepwise_attention, tensors, plan, cu, options, dtype, source)
    got = run(mk.stepwise_attention, tensors, plan, cu, options, dtype, source, engine=engine)
    for name, value in got.items():
        if oracle[name] is None:  # the map does not depend on v
            assert value is None or not value.any(), name
        else:
            assert_within_budget(f"{name} {dtype}", value, oracle[name], eager_result[name])


REFUSED = {"sdpa": {"softcap"}}  # the options that an engine refuses


def serves(engine, options):
    return not REFUSED.get(engine, set()) & options.keys()


ENGINES = ("native", "sdpa", "eager")
CASES = [(e, f) for e in ENGINES for f in FEATURES if serves(e, FEATURES[f])]


@pytest.fixture(autouse=True)
def skip_without_native(request):
    """Skips the cases of engine native where it is not available or a fixture disables it."""
    engine = getattr(request.node, "callspec", None) and request.node.callspec.params.get("engine")
    if "cpu_map" in request.fixturenames:
        request.getfixturevalue("cpu_map")
    if engine == "native" and build.why_not():
        pytest.skip(build.why_not())


def ready_engines():
    return [name for name in ENGINES if mk.engines()[name].ready]


@pytest.mark.usefixtures("cpu_map")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("engine, feature", CASES)
def test_features(engine, feature, dtype):
    if engine == "native" and dtype not in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="'native' cannot serve .*: it takes float32 and bfloat16"):
            compare(engine, "ragged", FEATURES[feature], dtype)
        return
    compare(engine, "ragged", FEATURES[feature], dtype)


@pytest.mark.usefixtures("cpu_map")
@pytest.mark.parametrize("engine, feature", CASES)
def test_map_as_the_only_gradient(engine, feature):
    for dtype in (torch.float32, torch.bfloat16, *([] if engine == "native" else [torch.float16])):
        compare(engine, "ragged", FEATURES[feature], dtype, source="maps")


@pytest.mark.parametrize("engine", ENGINES)
def test_output_as_the_only_gradient(engine):
    compare(engine, "ragged", {}, torch.float32, source="out")


@pytest.mark.usefixtures("cpu_map")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("plan_name", [name for name in PLANS if name != "ragged"])
def test_plans(plan_name, engine, packed):
    compare(engine, plan_name, dict(packed=packed), torch.float32)
    compare(engine, plan_name, dict(packed=packed, head_reduction="none", sinks=True), torch.float32)


@pytest.mark.usefixtures("cpu_map")
@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("layout", ["bhmd", "bmhd", "bhdm"])
@pytest.mark.parametrize("dim", [16, 80])
def test_shapes(groups, layout, dim):
    for engine in ready_engines():
        compare(engine, "ragged", {}, torch.float32, groups=groups, layout=layout, dim=dim)


@pytest.mark.usefixtures("cpu_map")
def test_last_dimension_not_contiguous():
    tensors, plan, _ = inputs("ragged", torch.float32)
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    assert strided[0].stride(-1) != 1
    for engine in ready_engines():
        a = run(mk.stepwise_attention, tensors, plan, None, {}, torch.float32, engine=engine)
        b = run(mk.stepwise_attention, strided, plan, None, {}, torch.float32, engine=engine)
        for name in a:
            torch.testing.assert_close(a[name], b[name])


@pytest.mark.parametrize("largest_kept", [torch_map.LARGEST_KEPT, 0], ids=["dS kept", "dS recomputed"])
def test_blocks_of_every_size(monkeypatch, without_native, largest_kept):
    """Tiles, window blocks and row blocks are smaller than a step, so that steps cross their boundaries."""
    monkeypatch.setattr(torch_map, "LARGEST_KEPT", largest_kept)
    monkeypatch.setattr(torch_blocks, "TILE_ELEMENTS", 700)
    monkeypatch.setattr(sdpa, "WINDOW_BLOCK", 13)
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 5000)
    for feature in ("plain", "not causal", "window", "window, not causal", "packed, window, sinks", "heads", "softcap"):
        if serves("sdpa", FEATURES[feature]):
            compare("sdpa", "ragged", FEATURES[feature], torch.float32)
        compare("eager", "ragged", FEATURES[feature], torch.float32)


@pytest.mark.usefixtures("cpu_map")
@pytest.mark.parametrize("feature", FEATURES)
def test_map_from_a_given_lse(feature):
    options = dict(FEATURES[feature])
    packed, sinks = options.pop("packed", False), options.pop("sinks", False)
    for dtype in (torch.float32, torch.bfloat16):
        tensors, plan, cu = inputs("ragged", dtype, packed=packed, sinks=sinks)
        q, k = tensors[:2]
        lse = torch.randn(q.shape[:3], dtype=torch.float64).add_(4)
        given = {name: value for name, value in options.items() if name != "head_reduction"}
        results = []
        for function, kind in (
            (reference.stepwise_map, torch.float64),
            (reference.stepwise_map, dtype),
            (mk.stepwise_map, dtype),
        ):
            leaves = [q.to(kind).requires_grad_(), k.to(kind).requires_grad_()]
            leaves.append(lse.to(torch.promote_types(kind, torch.float32)).requires_grad_())
            maps = function(*leaves, plan, cu_seqlens=cu, head_reduction=options.get("head_reduction", "mean"), **given)
            weight = torch.randn(maps.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
            results.append((maps, *torch.autograd.grad((maps.double() * weight).sum(), leaves)))
        for name, oracle, eager_value, got in zip(("maps", "dq", "dk", "dlse"), *results, strict=True):
            assert_within_budget(name, got, oracle, eager_value)


@pytest.mark.usefixtures("cpu_map")
def test_lse_of_rows_in_no_step_has_no_effect():
    """Padding rows may have any lse, also -inf and NaN."""
    tensors, plan, _ = inputs("ragged", torch.float32)
    q, k, v = tensors
    _, lse = reference.attention_weights(q, k)
    expected = mk.stepwise_map(q, k, lse, plan)
    lse = lse.clone()
    lse[1, :, 111:] = float("-inf")
    lse[2, :, 17:] = float("nan")
    torch.testing.assert_close(mk.stepwise_map(q, k, lse, plan), expected, rtol=0, atol=0)


@pytest.mark.usefixtures("cpu_map")
def test_results_are_bitwise_reproducible():
    tensors, plan, _ = inputs("ragged", torch.float32)
    for engine in ready_engines():
        a, b = (run(mk.stepwise_attention, tensors, plan, None, {}, torch.float32, engine=engine) for _ in range(2))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_plan_used_twice_in_one_graph():
    (q, k, v), plan, _ = inputs("ragged", torch.float64)
    q.requires_grad_()
    out, maps = mk.stepwise_attention(q, k, v, plan)
    again, more = mk.stepwise_attention(out, k, v, plan)
    (dq,) = torch.autograd.grad(maps.sum() + 2 * more.square().sum() + again.sum(), q)
    q2 = q.detach().requires_grad_()
    out, maps = reference.stepwise_attention(q2, k, v, plan)
    again, more = reference.stepwise_attention(out, k, v, plan)
    (expected,) = torch.autograd.grad(maps.sum() + 2 * more.square().sum() + again.sum(), q2)
    assert error(dq, expected) < 1e-13


@pytest.mark.usefixtures("cpu_map")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("window, length", [(1, 40), (None, 1)])
def test_one_visible_key(engine, window, length):
    """Every weight is 1: the output is v, the map counts rows, and dq and dk are zero except for rounding."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, length, 16, generator=g).requires_grad_() for _ in range(3))
    plan = StepPlan.from_spans([[(0, length)], [(0, 0)]], [[[0]], [[0]]])
    out, maps = mk.stepwise_attention(q, k, v, plan, window=window, engine=engine)
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(maps.flatten(), torch.tensor([1.0, 0.0]))
    dout = torch.randn(out.shape, generator=g)
    dq, dk, dv = torch.autograd.grad((out * dout).sum() + maps.sum(), (q, k, v))
    torch.testing.assert_close(dv, dout)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


@pytest.mark.usefixtures("cpu_map")
def test_empty_batch_and_empty_sequence():
    plan = StepPlan.from_spans([], [])
    q = torch.zeros(0, 2, 5, 16, requires_grad=True)
    for engine in ready_engines():
        out, maps = mk.stepwise_attention(q, q, q, plan, engine=engine)
        assert out.shape == q.shape and maps.shape == (0, 0, 0)
        out.sum().backward()
        q0 = torch.zeros(2, 2, 0, 16, requires_grad=True)
        out, maps = mk.stepwise_attention(q0, q0, q0, StepPlan.from_spans([[], []], [[], []]), engine=engine)
        assert out.shape == q0.shape and maps.shape == (2, 0, 0)
        (out.sum() + maps.sum()).backward()
        cu = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
        packed = torch.randn(1, 2, 5, 16, requires_grad=True)
        plan3 = StepPlan.from_spans([[(0, 3)], [], [(0, 2)]], [[[1]], [], [[0]]])
        out, maps = mk.stepwise_attention(packed, packed, packed, plan3, cu_seqlens=cu, engine=engine)
        assert maps.shape == (3, 1, 1) and maps[1].item() == 0 and maps[0].item() > 0
        (out.sum() + maps.sum()).backward()
        assert packed.grad.isfinite().all()


def test_no_grad_and_one_input():
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    with torch.no_grad():
        out, maps = mk.stepwise_attention(q, k, v, plan)
    assert not out.requires_grad and not maps.requires_grad
    k.requires_grad_()
    _, maps = mk.stepwise_attention(q, k, v, plan)
    (dk,) = torch.autograd.grad(maps.sum(), k)
    assert dk.shape == k.shape and dk.abs().sum() > 0


@pytest.mark.usefixtures("cpu_map")
def test_gradients_after_inference_mode():
    """Workspaces kept from a call in inference mode must be writable outside of it, and no result may alias them."""
    tensors, plan, _ = inputs("ragged", torch.float32)
    with torch.inference_mode():
        mk.stepwise_attention(*tensors, plan)
    first = run(mk.stepwise_attention, tensors, plan, None, {}, torch.float32)
    kept = {name: value.clone() for name, value in first.items()}
    run(mk.stepwise_attention, [t + 1 for t in tensors], plan, None, {}, torch.float32)
    assert all(torch.equal(first[name], kept[name]) for name in kept)


@pytest.mark.usefixtures("cpu_map")
@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_only_casts_the_inputs(engine):
    """The matrix products inside the operators, forward and backward, are the same as without autocast."""
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    results = []
    for cast in (False, True):
        leaves = [t.bfloat16().requires_grad_() for t in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out, maps = mk.stepwise_attention(
                leaves[0].float() if cast else leaves[0], *leaves[1:], plan, engine=engine
            )
            (out.double().square().sum() + maps.double().square().sum()).backward()
        assert out.dtype == torch.bfloat16 and maps.dtype == torch.float32
        results.append((out, maps, *(leaf.grad for leaf in leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = mk.stepwise_attention(q.double(), k.double(), v.double(), plan)
    assert out.dtype == torch.float64


@pytest.mark.parametrize("feature", ["plain", "packed, window, sinks", "heads"])
def test_dispatched_operators_give_the_same_results(feature):
    options = dict(FEATURES[feature])
    packed, with_sinks = options.pop("packed", False), options.pop("sinks", False)
    tensors, plan, cu = inputs("ragged", torch.float32, packed=packed, sinks=with_sinks)
    direct = run(mk.stepwise_attention, tensors, plan, cu, options, torch.float32)
    seen = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
            seen.append(operator.name())
            return operator(*arguments, **(keywords or {}))

    with Recording():
        recorded = run(mk.stepwise_attention, tensors, plan, cu, options, torch.float32)
    assert {"molsaki::stepwise_attention", "molsaki::stepwise_attention_backward"} <= set(seen)
    assert all(torch.equal(direct[name], recorded[name]) for name in direct)


def test_second_derivatives_are_refused():
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    q.requires_grad_()
    lse = torch.zeros(q.shape[:3])
    for value in (mk.stepwise_attention(q, k, v, plan)[1], mk.stepwise_map(q, k, lse, plan), mk.pool_values(q)):
        for loss in (value.sum(), value.square().sum()):
            (dq,) = torch.autograd.grad(loss, q, create_graph=True)
            with pytest.raises(RuntimeError, match="no autograd formula"):
                dq.sum().backward()


@pytest.mark.usefixtures("cpu_map")
def test_checkpointing():
    (q, k, v), plan, _ = inputs("ragged", torch.float32)

    def layer(q):
        out, maps = mk.stepwise_attention(q, k, v, plan)
        return out.sum() + maps.square().sum()

    grads = []
    for reentrant in (None, False, True):
        x = q.detach().clone().requires_grad_()
        value = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
        grads.append(torch.autograd.grad(value, x)[0] if reentrant is not True else (value.backward(), x.grad)[1])
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize(
    "feature, engine",
    [
        *(
            (feature, engine)
            for feature in ("plain", "packed, window, sinks", "heads")
            for engine in ("native", "sdpa")
        ),
        ("packed, window, sinks", "triton"),
    ],
)
@pytest.mark.parametrize("cpu_map_engine", ["native", "torch"])
def test_opcheck(feature, engine, cpu_map_engine):
    if "native" in (engine, cpu_map_engine) and build.why_not():
        pytest.skip(build.why_not())
    options = dict(FEATURES[feature])
    packed, with_sinks = options.pop("packed", False), options.pop("sinks", False)
    plan_name = "some empty" if engine == "triton" else "ragged"
    tensors, plan, cu = inputs(plan_name, torch.float32, packed=packed, sinks=with_sinks)
    tensors = [t.requires_grad_() for t in tensors]
    map_engine = "triton" if engine == "triton" else cpu_map_engine
    per_head = options.get("head_reduction") == "none"
    q, k, v = tensors[:3]
    options = (True, 0.25, options.get("window"), None, per_head)
    tensors_of_plan = (plan.steps, plan.tokens, plan.word_of_token, plan.num_words)
    arguments = (q, k, v, tensors[3] if with_sinks else None, cu, *options, *tensors_of_plan, engine, map_engine)
    torch.library.opcheck(torch.ops.molsaki.stepwise_attention, arguments)
    lse = torch.randn(q.shape[:3]).requires_grad_()
    torch.library.opcheck(torch.ops.molsaki.stepwise_map, (q, k, lse, cu, *options, *tensors_of_plan, map_engine))


@pytest.mark.usefixtures("cpu_map")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch.compiler.reset()  # compiled code depends on the map engine
    (q, k, v), plan, _ = inputs("ragged", torch.float32)

    def layer(q, k, v, plan):
        out, maps = mk.stepwise_attention(q, k, v, plan, window=30)
        return out.square().sum() + maps.square().sum() + mk.pool_values(v).square().sum()

    assert_compiles_alike(layer, (q, k, v), plan, dynamic=dynamic)


def test_compile_of_bfloat16_without_gradients():
    """In this case engine "auto" checks whether the processor has AMX."""
    torch.compiler.reset()
    (q, k, v), plan, _ = inputs("ragged", torch.bfloat16)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    compiled = torch.compile(mk.stepwise_attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(compiled(q, k, v, plan), mk.stepwise_attention(q, k, v, plan), strict=True):
            assert torch.equal(a, b)


def test_fake_and_meta_tensors():
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    meta = [t.to("meta") for t in (q, k, v)]
    out, maps = mk.stepwise_attention(*meta, plan.to("meta"))
    assert out.shape == q.shape and maps.shape == (3, 4, 4) and maps.device.type == "meta"


TRITON = ["plain", "window", "softcap", "sinks", "heads", "packed, window, sinks"]


@pytest.mark.parametrize("feature", TRITON)
def test_triton_engine_through_the_public_function(feature):
    """Tests the operators around the kernels; ``tests/kernels/triton`` tests the kernels."""
    compare("triton", "some empty", FEATURES[feature], torch.float32)


def test_triton_map_on_another_engine(monkeypatch):
    """On a GPU the Triton map is combined with any engine; here it is interpreted and combined with sdpa on a CPU."""
    monkeypatch.setattr(mk.api.engine_selection, "choose_map_engine", lambda engine, q, options: "triton")
    for feature in ("plain", "packed, window, sinks"):
        compare("sdpa", "some empty", FEATURES[feature], torch.float32)


def test_triton_map_and_pooled_values():
    (q, k, v), plan, _ = inputs("some empty", torch.float32)
    _, lse = reference.attention_weights(q, k)
    results = []
    for engine in ("torch", "triton"):
        leaves = [t.clone().requires_grad_() for t in (q, k, lse, v)]
        maps = mk.stepwise_map(*leaves[:3], plan, engine=engine)
        pooled = mk.pool_values(leaves[3], torch.tensor([20, 3, 0]), engine=engine)
        value = (maps * torch.linspace(-1, 1, maps.numel()).view(maps.shape)).sum() + pooled.square().sum()
        results.append((maps, pooled, *torch.autograd.grad(value, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_engine_listing_and_selection():
    listed = mk.engines()
    assert listed["sdpa"].ready and listed["eager"].ready
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    with pytest.raises(ValueError, match="softcap"):
        mk.stepwise_attention(q, k, v, plan, softcap=3.0, engine="sdpa")
    with pytest.raises(ValueError, match="engine: expected"):
        mk.stepwise_attention(q, k, v, plan, engine="fastest")
    q, k, v = (t.double() for t in (q, k, v))
    out, _ = mk.stepwise_attention(q, k, v, plan, softcap=3.0)  # auto selects an engine with softcap
    expected, _ = mk.stepwise_attention(q, k, v, plan, softcap=3.0, engine="eager")
    assert torch.equal(out, expected)


@pytest.mark.usefixtures("cpu_map")
def test_scale_of_zero():
    """All weights are equal. Engine sdpa does not support this, so auto selects another one."""
    with pytest.raises(ValueError, match="scale of 0"):
        compare("sdpa", "ragged", dict(scale=0.0), torch.float32)
    for engine in ("auto", "eager"):
        compare(engine, "ragged", dict(scale=0.0), torch.float32)


@pytest.mark.usefixtures("cpu_map")
def test_negative_scale():
    """The CPU flash operator masks the scores before it scales them."""
    with pytest.raises(ValueError, match="scale of -0.3"):
        compare("sdpa", "ragged", dict(scale=-0.3), torch.float32)
    for engine, options in (("auto", {}), ("eager", {}), ("sdpa", dict(causal=False))):
        compare(engine, "ragged", dict(scale=-0.3) | options, torch.float32)


def test_auto_selects_sdpa_for_the_bfloat16_forward_if_only_pytorch_has_amx(monkeypatch):
    if build.why_not():
        pytest.skip(build.why_not())
    chosen = []
    monkeypatch.setattr(
        mk.api.ops,
        "run_attention",
        lambda *call: chosen.append(call[-2]) or AttentionOutputs(call[0].q, call[0].q, call[0].q),
    )
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    for faster in (True, False):
        monkeypatch.setattr(mk.api.engine_selection, "pytorch_is_faster_in_bfloat16", lambda faster=faster: faster)
        for dtype in (torch.bfloat16, torch.float32):
            for grad in (False, True):
                mk.stepwise_attention(q.to(dtype, copy=True).requires_grad_(grad), k.to(dtype), v.to(dtype), plan)
    assert chosen == ["sdpa"] + ["native"] * 7


def bad_calls():
    q, k, v = torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 8)
    plan = StepPlan.from_spans([[(0, 6)], [(0, 3)]], [[[1]], [[2]]])
    good = dict(q=q, k=k, v=v, plan=plan)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    packed = dict(q=q[:1], k=k[:1], v=v[:1], cu_seqlens=cu, plan=StepPlan.from_spans([[], []], [[], []]))
    far = StepPlan.from_spans([[(0, 7)], []], [[], []])
    return [
        (good | dict(q=q[0]), ValueError, r"q: expected a tensor \(B, Hq, M, D\), got shape \(4, 6, 8\)"),
        (good | dict(q=[1]), TypeError, "q: expected a tensor"),
        (good | dict(k=k.double()), TypeError, "k: expected q's dtype"),
        (good | dict(k=k.to("meta")), ValueError, "k: expected on q's device"),
        (good | dict(v=v[:, :, :5]), ValueError, r"v: expected \(B, Hkv, M, Dv\)"),
        (good | dict(v=v[:, :1]), ValueError, "v: expected"),
        (good | dict(q=q[:, :3]), ValueError, "q: expected a multiple of k's 2 heads"),
        (good | dict(q=q.long(), k=k.long(), v=v.long()), TypeError, "q: expected bfloat16"),
        (good | dict(scale="big"), TypeError, "scale"),
        (good | dict(window=0), ValueError, "window: expected at least 1"),
        (good | dict(window=2.5), TypeError, "window: expected an int"),
        (good | dict(softcap=-1.0), ValueError, "softcap: expected a positive"),
        (good | dict(sinks=torch.zeros(3)), ValueError, r"sinks: expected \(4,\)"),
        (good | dict(sinks=torch.zeros(4, dtype=torch.long)), TypeError, "sinks: expected a floating"),
        (good | dict(head_reduction="all"), ValueError, 'head_reduction: expected "mean" or "none"'),
        (good | dict(plan=[]), TypeError, "plan: expected a StepPlan"),
        (good | dict(plan=plan[0]), ValueError, "plan: expected one entry per sequence, got 1 where q has batch 2"),
        (good | dict(plan=far), ValueError, "sequence 0's 6 tokens, but it reaches 7"),
        (good | dict(plan=plan.to("meta")), ValueError, "plan: expected on q's device"),
        (packed | dict(cu_seqlens=cu.long()), TypeError, "cu_seqlens: expected int32"),
        (packed | dict(cu_seqlens=cu + 1), ValueError, "cu_seqlens: expected to rise from 0"),
        (packed | dict(cu_seqlens=cu[None]), ValueError, "cu_seqlens"),
        (packed | dict(q=q, k=k, v=v), ValueError, r"q: expected \(1, H, total, D\) with cu_seqlens"),
        (packed | dict(plan=far), ValueError, "sequence 0's 2 tokens"),
        (packed | dict(plan=plan[0]), ValueError, "cu_seqlens bounds 2"),
    ]


@pytest.mark.parametrize("arguments, kind, message", bad_calls())
def test_bad_input(arguments, kind, message):
    with pytest.raises(kind, match=message):
        mk.stepwise_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), arguments.pop("plan"),
                              **arguments)  # fmt: skip


def test_bad_lse_and_map_engine():
    q = torch.zeros(1, 2, 6, 8)
    plan = StepPlan.from_spans([[(0, 6)]], [[[1]]])
    for lse in (torch.zeros(1, 2, 5), torch.zeros(1, 2, 6, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="lse: expected torch.float32"):
            mk.stepwise_map(q, q, lse, plan)
    with pytest.raises(ValueError, match='engine: expected "auto"'):
        mk.stepwise_map(q, q, torch.zeros(1, 2, 6), plan, engine="cuda")
    with pytest.raises(ValueError, match='"triton" cannot serve this call: .*float64'):
        mk.stepwise_map(q.double(), q.double(), torch.zeros(1, 2, 6, dtype=torch.float64), plan, engine="triton")


def test_plan_pickles():
    _, plan, _ = inputs("ragged", torch.float32)
    again = pickle.loads(pickle.dumps(plan))
    assert torch.equal(again.tokens, plan.tokens) and again.extents == plan.extents
