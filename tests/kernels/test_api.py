"""The public functions' own arguments: lse, packed tensors of rank 3, old names, the list of engines."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
import types

import pytest
import torch

import molsaki_kernels as mk
from molsaki_kernels import engine_selection, reference
from molsaki_kernels._compile import constant_when_compiled
from molsaki_kernels.spec import AttentionInputs, AttentionOptions
from tests.helpers import flash_attn_stand_ins as stand_ins
from tests.helpers.budget import assert_within_budget
from tests.kernels.test_attention import FEATURES, inputs

ENGINES = ("native", "sdpa", "eager", "triton")


def results(function, tensors, plan, dtype, **options):
    """out, the map, lse, and the gradients of a loss that uses all three, or only lse."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in tensors]
    sinks = leaves[3] if len(leaves) > 3 else None
    found = function(*leaves[:3], plan, sinks=sinks, return_lse=True, **options)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in found]
    terms = [(x.double() * weight).sum() for x, weight in zip(found, weights, strict=True)]
    grads = torch.autograd.grad(sum(terms), leaves, retain_graph=True)
    of_lse = torch.autograd.grad(terms[2], leaves, allow_unused=True)
    assert of_lse[2] is None or not of_lse[2].any(), "lse does not depend on v"
    names = ("out", "maps", "lse", "dq", "dk", "dv", "dsinks")
    named = dict(zip(names, (*found, *grads), strict=False))
    return named | {f"{name} of lse": x for name, x in zip(("dq", "dk"), of_lse, strict=False)}


def compare_with_lse(engine, feature, dtype=torch.float32, plan="some empty"):
    options = dict(FEATURES[feature])
    packed, sinks = options.pop("packed", False), options.pop("sinks", False)
    tensors, plan, cu = inputs(plan, dtype, groups=7, packed=packed, sinks=sinks)  # 14 numbers in dsinks
    oracle, eager = (
        results(reference.stepwise_attention, tensors, plan, working, cu_seqlens=cu, **options)
        for working in (torch.float64, dtype)
    )
    got = results(mk.stepwise_attention, tensors, plan, dtype, cu_seqlens=cu, engine=engine, **options)
    assert got["lse"].dtype == torch.promote_types(dtype, torch.float32)
    for name, value in got.items():
        assert_within_budget(f"{engine} {name}", value, oracle[name], eager[name])


@pytest.mark.parametrize("feature", ["plain", "sinks", "packed, window, sinks", "heads"])
@pytest.mark.parametrize("engine", ENGINES)
def test_lse_and_its_gradient(engine, feature):
    status = mk.engines()[engine]
    if not status.ready and engine == "native":
        pytest.skip(str(status))
    compare_with_lse(engine, feature)
    if engine != "triton":
        compare_with_lse(engine, feature, torch.bfloat16, "ragged")


@pytest.mark.parametrize("version", [2, 4])
def test_lse_of_flash_attn(monkeypatch, version):
    from molsaki_kernels.attention import flash_attn

    stand_ins.install(monkeypatch, version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9 if version == 4 else 8, 0))
    monkeypatch.setattr(flash_attn, "available", lambda: None)
    monkeypatch.setattr(flash_attn, "why_not", lambda request: None)
    flash_attn._interface.cache_clear()
    try:
        compare_with_lse("flash_attn", "packed, window, sinks")
    finally:
        flash_attn._interface.cache_clear()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_lse_of_flex(monkeypatch):
    from torch.nn.attention import flex_attention as flex_api

    from molsaki_kernels.attention import flex

    monkeypatch.setattr(flex_api, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "compiled", lambda: flex_api.flex_attention)
    monkeypatch.setattr(flex, "available", lambda: None)
    monkeypatch.setattr(flex, "why_not", lambda request: None)
    compare_with_lse("flex", "packed, window, sinks")


def flat(x):
    """Packed ``(1, H, total, ...)`` as flash-attn's ``(total, H, ...)``."""
    return x.detach()[0].transpose(0, 1).contiguous().requires_grad_()


@pytest.mark.parametrize("engine", ENGINES)
def test_packed_tensors_of_rank_three(engine):
    """The same numbers as for ``(1, H, total, D)``, forward and backward, in the layout of the inputs."""
    if not mk.engines()["native"].ready and engine == "native":
        pytest.skip(str(mk.engines()["native"]))
    tensors, plan, cu = inputs("some empty", torch.float32, packed=True, sinks=True)
    sinks = tensors.pop()
    wide, thin = [t.clone().requires_grad_() for t in tensors], [flat(t) for t in tensors]
    found = []
    for leaves in (wide, thin):
        out, maps, lse = mk.stepwise_attention(
            *leaves, plan, cu_seqlens=cu, sinks=sinks, window=12, return_lse=True, engine=engine
        )
        loss = out.square().sum() + maps.square().sum() + lse.square().sum()
        found.append((out, maps, lse, *torch.autograd.grad(loss, leaves)))
    (out, maps, lse, *grads), (thin_out, thin_maps, thin_lse, *thin_grads) = found
    assert thin_out.shape == thin[0].shape and thin_lse.shape == (lse.shape[1], lse.shape[2])
    torch.testing.assert_close(thin_out, flat(out))
    torch.testing.assert_close(thin_maps, maps)
    torch.testing.assert_close(thin_lse, lse[0])
    for thin_grad, grad in zip(thin_grads, grads, strict=True):
        torch.testing.assert_close(thin_grad, flat(grad))


def test_oracle_takes_packed_tensors_of_rank_three():
    (q, k, v), plan, cu = inputs("ragged", torch.float64, packed=True)
    wide = reference.stepwise_attention(q, k, v, plan, cu_seqlens=cu, return_lse=True)
    thin = reference.stepwise_attention(flat(q), flat(k), flat(v), plan, cu_seqlens=cu, return_lse=True)
    assert torch.equal(thin[0], flat(wide[0])) and torch.equal(thin[1], wide[1]) and torch.equal(thin[2], wide[2][0])


@pytest.mark.usefixtures("cpu_map")
def test_map_and_pooling_of_packed_tensors_of_rank_three():
    (q, k, v), plan, cu = inputs("ragged", torch.float32, packed=True)
    lse = torch.randn(q.shape[:3]) + 4
    q, k, v, lse = (t.requires_grad_() for t in (q, k, v, lse))
    maps = mk.stepwise_map(q, k, lse, plan, cu_seqlens=cu)
    pooled = mk.pool_values(v, cu_seqlens=cu)
    grads = torch.autograd.grad(maps.square().sum() + pooled.square().sum(), (q, k, lse, v))
    thin = [flat(q), flat(k), lse.detach()[0].requires_grad_(), flat(v)]
    thin_maps = mk.stepwise_map(*thin[:3], plan, cu_seqlens=cu)
    thin_pooled = mk.pool_values(thin[3], cu_seqlens=cu)
    thin_grads = torch.autograd.grad(thin_maps.square().sum() + thin_pooled.square().sum(), thin)
    torch.testing.assert_close(thin_maps, maps)
    torch.testing.assert_close(thin_pooled, pooled)
    for thin_grad, grad in zip(thin_grads, grads, strict=True):
        torch.testing.assert_close(thin_grad, grad[0] if grad is grads[2] else flat(grad))


@pytest.mark.parametrize("name", ["k", "v"])
def test_tensors_of_different_ranks(name):
    (q, k, v), plan, cu = inputs("ragged", torch.float32, packed=True)
    tensors = {"q": flat(q), "k": flat(k), "v": flat(v)} | {name: dict(k=k, v=v)[name]}
    with pytest.raises(ValueError, match=rf"{name}: expected \(total, H, D\) as q has, got shape \(1, 2, 258, 16\)"):
        mk.stepwise_attention(**tensors, plan=plan, cu_seqlens=cu)


def test_rank_three_without_cu_seqlens_is_refused():
    (q, k, v), plan, _ = inputs("ragged", torch.float32, packed=True)
    with pytest.raises(ValueError, match=r"q: expected a tensor \(B, Hq, M, D\), got shape \(258, 4, 16\)"):
        mk.stepwise_attention(flat(q), flat(k), flat(v), plan)


def test_old_names_work_and_warn():
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    lse = torch.zeros(q.shape[:3])
    with pytest.warns(FutureWarning, match="heads= was renamed to head_reduction="):
        maps = mk.stepwise_attention(q, k, v, plan, heads="none")[1]
    assert torch.equal(maps, mk.stepwise_attention(q, k, v, plan, head_reduction="none")[1])
    with pytest.warns(FutureWarning, match="heads= was renamed"):
        assert mk.stepwise_map(q, k, lse, plan, heads="none").dim() == 4
    with pytest.warns(FutureWarning, match="backend= was renamed to engine="):
        maps = mk.stepwise_map(q, k, lse, plan, backend="torch")
    assert torch.equal(maps, mk.stepwise_map(q, k, lse, plan, engine="torch"))
    with pytest.warns(FutureWarning, match="backend= was renamed to engine="):
        pooled = mk.pool_values(v, backend="torch")
    assert torch.equal(pooled, mk.pool_values(v, engine="torch"))
    with pytest.raises(TypeError, match="heads: expected head_reduction= alone"):
        mk.stepwise_attention(q, k, v, plan, heads="none", head_reduction="none")
    with pytest.raises(TypeError, match="backend: expected engine= alone"):
        mk.stepwise_map(q, k, lse, plan, backend="torch", engine="torch")


def test_old_names_can_be_compiled():
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    lse = torch.zeros(q.shape[:3])

    def layer(q, k, v, lse):
        maps = mk.stepwise_attention(q, k, v, plan, heads="none")[1]
        return maps, mk.stepwise_map(q, k, lse, plan, backend="torch"), mk.pool_values(v, backend="torch")

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")(q, k, v, lse)
    with pytest.warns(FutureWarning):
        expected = layer(q, k, v, lse)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))


@pytest.mark.parametrize("engine", ["native", "sdpa", "eager"])
def test_no_query_head_gives_zero_gradients(engine):
    if not mk.engines()[engine].ready:
        pytest.skip(str(mk.engines()[engine]))
    q, k, v = (torch.randn(1, heads, 12, 16, requires_grad=True) for heads in (0, 2, 2))
    plan = mk.StepPlan.from_spans([[(0, 12)]], [[[3]]])
    out, maps = mk.stepwise_attention(q, k, v, plan, engine=engine)
    grads = torch.autograd.grad(out.sum() + maps.sum(), (q, k, v))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape] and not any(g.any() for g in grads)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("engine", ["native", "sdpa", "eager"])
def test_under_another_default_device(engine, window):
    if not mk.engines()[engine].ready:
        pytest.skip(str(mk.engines()[engine]))
    (q, k, v), plan, cu = inputs("ragged", torch.float32, packed=True)
    q, k, v = (t.requires_grad_() for t in (q, k, v))

    def layer():
        out, maps = mk.stepwise_attention(q, k, v, plan, cu_seqlens=cu, window=window, engine=engine)
        return out, maps, *torch.autograd.grad([out, maps], [q, k, v], [torch.ones_like(out), torch.ones_like(maps)])

    expected = layer()
    with torch.device("meta"):
        found = layer()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_lse_of_the_wrong_rank():
    (q, k, _), plan, cu = inputs("ragged", torch.float32, packed=True)
    with pytest.raises(ValueError, match=r"lse: expected \(Hq, total\) with packed .*, got shape \(1, 4, 258\)"):
        mk.stepwise_map(flat(q), flat(k), torch.zeros(q.shape[:3]), plan, cu_seqlens=cu)


def test_engines_are_data_and_printable():
    listed = mk.engines()
    assert set(listed) == {"triton", "native", "flash_attn", "flex", "sdpa", "eager"}
    assert listed["eager"] == mk.EngineStatus(ready=True) and str(listed["eager"]) == "ready"
    assert all(status.ready == (status.reason is None) for status in listed.values())
    lines = str(listed).splitlines()
    assert len(lines) == len(listed) and all(name in line for name, line in zip(listed, lines, strict=True))
    if not torch.cuda.is_available():
        assert not listed["flex"].ready and "no GPU" in str(listed["flex"])


@pytest.fixture
def registered(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(engine_selection, "FIRST", {})
    engines = dict(engine_selection.ENGINES)
    yield
    engine_selection.ENGINES.clear()
    engine_selection.ENGINES.update(engines)


def renamed_eager(name: str, reason: str | None = None) -> types.SimpleNamespace:
    """Engine eager under another name, which refuses every call with this reason."""
    names = {n: getattr(mk.api.ENGINES["eager"], n) for n in engine_selection.REQUIRED}
    return types.SimpleNamespace(**names | {"NAME": name, "why_not": lambda request: reason})


def test_an_engine_of_ones_own(registered):
    """It is listed, used by name, and by "auto" only on devices of ``first_on``; the last registered comes first."""
    (q, k, v), plan, _ = inputs("ragged", torch.float32)
    before = engine_selection.order(AttentionInputs(q, k, v).request(AttentionOptions(True, 0.25)))
    mine = renamed_eager("mine")
    mk.register_engine(mine)
    mk.register_engine(mine)  # the same again
    assert mk.engines()["mine"].ready
    out, maps = mk.stepwise_attention(q, k, v, plan, engine="mine")
    expected = mk.stepwise_attention(q, k, v, plan, engine="eager")
    assert out.equal(expected[0]) and maps.equal(expected[1])
    request = AttentionInputs(q, k, v).request(AttentionOptions(True, 0.25))
    assert engine_selection.choose_engine("auto", request) in before
    mk.register_engine(mine, first_on=("cpu",))
    assert engine_selection.choose_engine("auto", request) == "mine"
    mk.register_engine(renamed_eager("other"), first_on=("cpu", "cuda"))
    assert engine_selection.choose_engine("auto", request) == "other"
    mk.register_engine(renamed_eager("third", "it serves nothing"), first_on=("cpu",))
    assert engine_selection.choose_engine("auto", request) == "other"
    with pytest.raises(ValueError, match="'third' cannot serve this call .third: it serves nothing"):
        mk.stepwise_attention(q, k, v, plan, engine="third")
    mk.register_engine(mine)  # it asks for nothing any more
    assert engine_selection.FIRST == {"cpu": ("third", "other"), "cuda": ("other",)}


def test_what_is_no_engine(registered):
    engine = renamed_eager("mine")
    del engine.backward, engine.takes_value_dim
    with pytest.raises(TypeError, match=r"engine: expected takes_value_dim, backward as in .*attention\.protocol"):
        mk.register_engine(engine)
    for taken in ("eager", "auto"):
        with pytest.raises(ValueError, match=f"engine: expected a NAME that no other engine has, got '{taken}'"):
            mk.register_engine(renamed_eager(taken))
    with pytest.raises(TypeError, match="first_on: expected types of devices"):
        mk.register_engine(renamed_eager("mine"), first_on="cuda")
    assert "mine" not in mk.engines() and not engine_selection.FIRST


def calls(function) -> list[str]:
    """The functions of the package that a call runs, in order, and ``tolist`` of tensors."""
    names = []

    def record(frame, event, argument):
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("molsaki_kernels"):
            names.append(f"{module.removeprefix('molsaki_kernels.')}.{frame.f_code.co_name}")
        elif event == "c_call" and getattr(argument, "__name__", "") == "tolist":
            names.append("tolist")

    sys.setprofile(record)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("engine, forward, backward", [("native", 44, 30), ("sdpa", 61, 60)])
def test_python_work_of_a_layer(engine, forward, backward):
    """The time of a small layer is that of the Python code around it: an additional call must be intended."""
    if not mk.engines()["native"].ready:
        pytest.skip(str(mk.engines()["native"]))
    (q, k, v), plan, cu = inputs("ragged", torch.float32, packed=True)
    q.requires_grad_()
    found = []

    def run():
        found[:] = mk.stepwise_attention(q, k, v, plan, cu_seqlens=cu, engine=engine)

    run()  # what is computed once per plan
    names = calls(run)
    assert names.count("tolist") == 1 and names.count("_native.build.why_not") == 1
    assert len(names) <= forward
    ones = [torch.ones_like(x) for x in found]
    assert len(calls(lambda: torch.autograd.grad(found, q, ones))) <= backward


def test_version():
    assert mk.__version__ == importlib.metadata.version("molsaki-kernels")


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'stepwise'"):
        mk.stepwise  # noqa: B018


def test_constant_when_compiled_is_what_torch_does():
    def ours():
        return None

    def theirs():
        return None

    assert vars(constant_when_compiled(ours)) == vars(torch.compiler.assume_constant_result(theirs))
