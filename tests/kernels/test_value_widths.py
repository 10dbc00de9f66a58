"""Values narrower or wider than keys: every engine against the float64 oracle, with every feature."""

from __future__ import annotations

import itertools

import pytest
import torch

import molsaki_kernels as mk
from molsaki_kernels import reference
from molsaki_kernels._native import build
from molsaki_kernels.attention import ENGINES as ALL_ENGINES
from molsaki_kernels.attention import flex, native
from molsaki_kernels.attention.protocol import as_served
from tests.helpers import flash_attn_stand_ins as stand_ins
from tests.helpers.compiled import assert_compiles_alike
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.kernels import test_widened
from tests.kernels.test_attention import ENGINES, FEATURES, PLANS, compare, inputs, serves
from tests.kernels.test_flash_attn import machine  # noqa: F401
from tests.kernels.test_sdpa_cuda import SERVED, hopper  # noqa: F401
from tests.kernels.test_widened import flex_on_a_cpu, request_of  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CASES = [(engine, feature) for engine in ENGINES for feature in FEATURES if serves(engine, FEATURES[feature])]
MAIN = ("plain", "everything", "packed, window, sinks", "heads")
WIDTHS = [(32, 16), (16, 48)]
NARROW = dict(dim=32, value_dim=16)


@pytest.fixture(autouse=True)
def skip_without_native(request):
    if "native" in request.node.name and build.why_not():
        pytest.skip(build.why_not())


def groups_of(feature):
    """With many heads the error of eager's dsinks, a vector of one number per head, is not a matter of chance."""
    return 7 if FEATURES[feature].get("sinks") else 2


@pytest.mark.parametrize("dim, value_dim", WIDTHS)
@pytest.mark.parametrize("engine, feature", CASES)
def test_features(engine, feature, dim, value_dim):
    shape = dict(dim=dim, value_dim=value_dim, groups=groups_of(feature))
    compare(engine, "ragged", FEATURES[feature], torch.float32, **shape)
    compare(engine, "ragged", FEATURES[feature], torch.bfloat16, layout="bmhd", **shape)
    if engine != "native":
        compare(engine, "ragged", FEATURES[feature], torch.float16, source="maps", layout="bhdm", **shape)


@pytest.mark.parametrize("dim, value_dim", [(12, 12), (24, 24), (5, 9), (40, 16)])
@pytest.mark.parametrize("feature", [feature for engine, feature in CASES if engine == "native"])
def test_native_pads_to_multiples_of_16(monkeypatch, feature, dim, value_dim):
    served = []
    forward = native.forward
    monkeypatch.setattr(native, "forward", lambda inputs, *rest: served.append(inputs) or forward(inputs, *rest))
    shape = dict(dim=dim, value_dim=value_dim, groups=groups_of(feature))
    compare("native", "ragged", FEATURES[feature], torch.float32, **shape)
    compare("native", "ragged", FEATURES[feature], torch.bfloat16, layout="bmhd", **shape)
    assert len(served) >= 2 and all(x.shape[3] % 16 == 0 for one in served for x in (one.q, one.k, one.v))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("plan_name", [name for name in PLANS if name != "ragged"])
@pytest.mark.parametrize("engine", ENGINES)
def test_plans(engine, plan_name, packed):
    compare(engine, plan_name, dict(packed=packed), torch.float32, **NARROW)


@pytest.mark.parametrize(
    "engine, dim, value_dim",
    [
        *itertools.product(("sdpa", "eager"), (20, 64), (1, 7, 80)),
        *itertools.product(("native",), (16, 192, 256), (64, 128, 256)),
        *itertools.product(("sdpa", "eager"), (192, 576), (128, 512)),
    ],
)
def test_any_width(engine, dim, value_dim):
    """192 and 128 are those of DeepSeek 2 and 3, 576 and 512 those of their compressed keys and values."""
    compare(engine, "some empty", {}, torch.float32, dim=dim, value_dim=value_dim, groups=1)
    compare(engine, "some empty", dict(packed=True), torch.bfloat16, dim=dim, value_dim=value_dim, groups=3)


@pytest.mark.parametrize("engine, feature", [case for case in CASES if case[1] in MAIN])
@pytest.mark.parametrize("dim, value_dim", WIDTHS)
def test_widened_features(engine, feature, dim, value_dim):
    shape = dict(dim=dim, value_dim=value_dim, groups=groups_of(feature))
    test_widened.compare(engine, "some empty", FEATURES[feature], torch.float32, **shape)
    test_widened.compare(engine, "ragged", FEATURES[feature], torch.bfloat16, source="maps", layout="bmhd", **shape)


@pytest.mark.parametrize("dim, value_dim", [(32, 16), (16, 32), (24, 5)])
@pytest.mark.parametrize("widest", [16, 32, 48])
@pytest.mark.parametrize("engine", ["sdpa", "eager"])
def test_widened_with_more_words_than_fit(monkeypatch, engine, widest, dim, value_dim):
    monkeypatch.setattr(test_widened.widened_values, "WIDEST", widest)
    for packed in (False, True):
        tensors, plan, cu = test_widened.many_words(torch.float32, packed, dim=dim, value_dim=value_dim)
        test_widened.compare_inputs(engine, tensors, plan, cu, {}, torch.float32)


@pytest.mark.parametrize("feature", ["plain", "sinks", "packed, window, sinks", "heads"])
@pytest.mark.parametrize("dim, value_dim", [(32, 20), (16, 24)])
def test_interpreted_triton(feature, dim, value_dim):
    shape = dict(dim=dim, value_dim=value_dim, groups=groups_of(feature))
    compare("triton", "some empty", FEATURES[feature], torch.float32, **shape)
    compare("triton", "some empty", FEATURES[feature], torch.bfloat16, source="maps", **shape)


@pytest.mark.parametrize("feature", MAIN)
@pytest.mark.parametrize("dim, value_dim", [(32, 16), (16, 40), (24, 7)])
def test_flex(monkeypatch, flex_on_a_cpu, feature, dim, value_dim):  # noqa: F811
    shape = dict(dim=dim, value_dim=value_dim, groups=groups_of(feature))
    assert flex.takes_value_dim(request_of(head_dim=dim), value_dim) == (value_dim >= 16)
    compare("flex", "ragged", FEATURES[feature], torch.float32, **shape)
    compare("flex", "ragged", FEATURES[feature], torch.bfloat16, source="maps", **shape)


@pytest.mark.parametrize("feature", SERVED)
@pytest.mark.parametrize("pays", [0, 1e30], ids=["cudnn", "aten"])
def test_sdpa_on_cuda(hopper, monkeypatch, feature, pays):  # noqa: F811
    """The CUDA operators' stand-ins get keys and values of one width."""
    monkeypatch.setattr("molsaki_kernels.attention.sdpa.CUDNN_PAYS", pays)
    shape = dict(groups=groups_of(feature), **NARROW)
    compare("sdpa", "ragged", FEATURES[feature], torch.bfloat16, **shape)
    compare("sdpa", "ragged", FEATURES[feature], torch.float32, source="maps", layout="bmhd", **shape)


@pytest.mark.parametrize("feature", MAIN)
@pytest.mark.parametrize("chip, version, groups, dim, value_dim, given", [
    (8, 2, 7, 32, 16, (32, 32)), (9, 4, 1, 192, 128, (192, 128)), (9, 4, 7, 192, 128, (192, 192)),
    (9, 4, 7, 64, 96, (96, 96)), (9, 4, 1, 128, 256, (256, 256)), (10, 4, 7, 64, 32, (64, 64)),
])  # fmt: skip
def test_flash_attn(machine, feature, chip, version, groups, dim, value_dim, given):  # noqa: F811
    """flash-attn gets the widths that it takes; its backward on sm90 no pair where query heads share a key head."""
    machine(chip, version)
    for dtype, source in ((torch.float32, "both"), (torch.float16, "both"), (torch.bfloat16, "maps")):
        stand_ins.CALLS.clear()
        compare("flash_attn", "some empty", FEATURES[feature], dtype, source, groups=groups, dim=dim,
                value_dim=value_dim)  # fmt: skip
        calls = [x for name, x in stand_ins.CALLS if "bwd" in name or "backward" in name]
        more = {tuple(x[n].shape[-1] - width for n, width in zip("qv", given, strict=True)) for x in calls}
        assert more <= {(0, 0), (8, 8)}  # float16 may append eight columns


def test_what_engines_get():
    def widths(name, **changes):
        served = as_served(ALL_ENGINES[name], request_of(**changes))
        return served.head_dim, served.value_dim or served.head_dim

    cpu = dict(device=torch.device("cpu"))
    for pair, of_native, of_sdpa in (((192, 128), (192, 128), (192, 192)), ((24, 16), (32, 16), (24, 24)),
                               ((16, 40), (16, 48), (40, 40)), ((12, 12), (16, 16), (12, 12))):  # fmt: skip
        given = dict(head_dim=pair[0], value_dim=None if pair[0] == pair[1] else pair[1])
        assert widths("native", **cpu, **given) == of_native
        assert widths("sdpa", **given) == widths("sdpa", **cpu, **given) == of_sdpa
        assert widths("eager", **given) == pair
        assert widths("flex", **given) == pair
        assert widths("triton", **given) == of_sdpa
    assert widths("sdpa") == (64, 64)


def test_selection_and_refusal():
    (q, k, v), plan, _ = inputs("some empty", torch.float32, dim=16, value_dim=264)
    with pytest.raises(
        ValueError, match=r"native: .* not 272 \(keys and values of 16 and 264 are padded to 272 and 272\)"
    ):
        mk.stepwise_attention(q, k, v, plan, engine="native")
    mk.stepwise_attention(q, k, v, plan)  # "auto" goes on to the next engine
    with pytest.raises(ValueError, match=r"v: expected \(B, Hkv, M, Dv\) .* Dv >= 1, got \(3, 2, 20, 0\)"):
        mk.stepwise_attention(q, k, v[..., :0], plan)
    with pytest.raises(ValueError, match=r"k: expected \(B, Hkv, M, D\)"):
        mk.stepwise_attention(q, v, v, plan)


@pytest.mark.parametrize("layout", ["bhmd", "bmhd"])
@pytest.mark.parametrize("dim, value_dim", WIDTHS)
@pytest.mark.parametrize("engine", ENGINES)
def test_layouts(engine, dim, value_dim, layout):
    """out has the layout of q, and gradients have those of their inputs; lse and map are as with v padded by hand."""
    (q, k, v), plan, _ = inputs("ragged", torch.float32, dim=dim, value_dim=value_dim, layout=layout)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, maps, lse = mk.stepwise_attention(q, k, v, plan, engine=engine, return_lse=True)
    assert out.shape == (*q.shape[:3], value_dim)
    assert out.is_contiguous() if layout == "bhmd" else out.transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad(out.sum() + maps.square().sum() + lse.sum(), (q, k, v))
    for x, dx in zip((q, k, v), grads, strict=True):
        assert dx.shape == x.shape
        assert engine == "sdpa" or dx.stride() == x.stride()
    same = mk.stepwise_attention(q, k, torch.zeros_like(k), plan, engine=engine, return_lse=True)
    torch.testing.assert_close((maps, lse), same[1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_of_lse(engine):
    tensors, plan, _ = inputs("ragged", torch.float32, **NARROW)
    found = []
    for dtype in (torch.float32, torch.float64):
        q, k, v = (x.to(dtype).requires_grad_() for x in tensors)
        if dtype == torch.float64:
            out, maps, lse = reference.stepwise_attention(q, k, v, plan, return_lse=True)
        else:
            out, maps, lse = mk.stepwise_attention(q, k, v, plan, engine=engine, return_lse=True)
        weights = torch.linspace(-1, 1, lse.numel(), dtype=dtype).view(lse.shape)
        found.append(torch.autograd.grad((lse * weights).sum() + maps.sum() + out.square().sum(), (q, k, v)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("engine", ENGINES)
def test_packed_tensors_of_rank_three(engine):
    (q, k, v), plan, cu = inputs("ragged", torch.float32, packed=True, **NARROW)
    whole = mk.stepwise_attention(q, k, v, plan, cu_seqlens=cu, engine=engine, return_lse=True)
    flat = (x[0].transpose(0, 1) for x in (q, k, v))
    out, maps, lse = mk.stepwise_attention(*flat, plan, cu_seqlens=cu, engine=engine, return_lse=True)
    assert out.shape == (258, 4, 16)
    assert (
        torch.equal(out, whole[0][0].transpose(0, 1)) and torch.equal(maps, whole[1]) and torch.equal(lse, whole[2][0])
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_empty_sequences_and_batches(engine):
    v = torch.randn(1, 2, 6, 16)
    q, k = torch.randn(1, 4, 6, 32, requires_grad=True), torch.randn(1, 2, 6, 32)
    cu = torch.tensor([0, 0, 6, 6], dtype=torch.int32)
    plan = mk.StepPlan.from_spans([[], [(0, 6)], []], [[], [[1]], []])
    out, maps = mk.stepwise_attention(q, k, v, plan, cu_seqlens=cu, engine=engine)
    wanted = reference.stepwise_attention(q, k, v, plan, cu_seqlens=cu)
    torch.testing.assert_close((out, maps), wanted)
    none = mk.StepPlan.from_spans([], [])
    out, maps = mk.stepwise_attention(q[:0], k[:0], v[:0], none, engine=engine)
    assert out.shape == (0, 4, 6, 16) and maps.shape == (0, 0, 0)
    out.sum().backward()
    one = mk.StepPlan.from_spans([[]], [[]])
    out, _ = mk.stepwise_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], one, engine=engine)
    assert out.shape == (1, 4, 0, 16)
    out, _ = mk.stepwise_attention(q, k, v, one, engine=engine, map_engine="widened")
    torch.testing.assert_close(out, reference.stepwise_attention(q, k, v, one)[0])


@pytest.mark.parametrize("map_engine", ["auto", "widened"])
@pytest.mark.parametrize("engine", ENGINES)
def test_autocast(engine, map_engine):
    (q, k, v), plan, _ = inputs("ragged", torch.float32, **NARROW)
    v.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = mk.stepwise_attention(q, k, v, plan, engine=engine, map_engine=map_engine)
        (dv,) = torch.autograd.grad(found[0].sum(), v)
    q, k, x = q.bfloat16(), k.bfloat16(), v.detach().bfloat16().requires_grad_()
    wanted = mk.stepwise_attention(q, k, x, plan, engine=engine, map_engine=map_engine)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert torch.equal(dv.bfloat16(), torch.autograd.grad(wanted[0].sum(), x)[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_opcheck(engine, packed):
    for value_dim, layout in ((16, "bhmd"), (48, "bmhd")):
        tensors, plan, cu = inputs("ragged", torch.float32, packed=packed, dim=32, value_dim=value_dim, layout=layout)
        q, k, v = (x.requires_grad_() for x in tensors)
        plan_tensors = (plan.steps, plan.tokens, plan.word_of_token, plan.num_words)
        call = (q, k, v, None, cu, True, 0.25, None, None, False, *plan_tensors, engine, "torch")
        torch.library.opcheck(torch.ops.molsaki.stepwise_attention, call)


@pytest.mark.parametrize("map_engine", ["auto", "widened"])
@pytest.mark.parametrize("engine", ENGINES)
def test_compile(engine, map_engine):
    torch.compiler.reset()
    (q, k, v), plan, _ = inputs("ragged", torch.float32, **NARROW)

    def layer(q, k, v, plan):
        out, maps = mk.stepwise_attention(q, k, v, plan, engine=engine, map_engine=map_engine, window=30)
        return out.square().sum() + maps.square().sum() + mk.pool_values(v).square().sum()

    assert_compiles_alike(layer, (q, k, v), plan, dynamic=engine == "sdpa")


def test_meta_tensors():
    (q, k, v), plan, _ = inputs("ragged", torch.float32, **NARROW)
    for map_engine in ("auto", "widened"):
        out, maps = mk.stepwise_attention(*(x.to("meta") for x in (q, k, v)), plan.to("meta"), map_engine=map_engine)
        assert out.shape == (*q.shape[:3], 16) and maps.shape == (3, 4, 4)
