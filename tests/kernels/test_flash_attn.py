"""Compares engine flash_attn with the oracle, on stand-ins with the parameters of both flash-attn packages."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

import molsaki_kernels as mk
from molsaki_kernels import engine_selection
from molsaki_kernels.attention import flash_attn, flex
from molsaki_kernels.ops import attention as attention_ops
from molsaki_kernels.spec import AttentionOptions, AttentionRequest
from tests.helpers import flash_attn_stand_ins as stand_ins
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.kernels.test_attention import FEATURES, PLANS, compare, inputs, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def machine(monkeypatch):
    """A function that simulates a GPU of some compute capability and the installed versions of flash-attn."""

    def simulate(major: int, *versions: int, any_call: bool = True):
        stand_ins.install(monkeypatch, *versions)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
        if any_call:  # also of CPU tensors in any dtype
            monkeypatch.setattr(flash_attn, "available", lambda: None)
            monkeypatch.setattr(flash_attn, "why_not", lambda call: None)
        flash_attn._interface.cache_clear()

    yield simulate
    flash_attn._interface.cache_clear()


MACHINES = {"2": (8, 2), "4": (9, 4), "4, without its own sinks": (8, 4)}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", MACHINES)
def test_features(machine, name, feature):
    machine(*MACHINES[name])
    for dtype in DTYPES:
        compare("flash_attn", "ragged", FEATURES[feature], dtype)
    compare("flash_attn", "ragged", FEATURES[feature], torch.bfloat16, source="maps")
    assert {name.startswith("_flash_attn_varlen") for name, _ in stand_ins.CALLS} == {
        "packed" in FEATURES[feature] and name == "2"
    }


@pytest.mark.parametrize("name", ["2", "4"])
def test_one_source_of_gradient(machine, name):
    machine(*MACHINES[name])
    for dtype in DTYPES:
        compare("flash_attn", "ragged", dict(sinks=True), dtype, source="maps")
        compare("flash_attn", "ragged", dict(sinks=True), dtype, source="out")
    taken = [given.get("dlse") is not None for function, given in stand_ins.CALLS if function == "_flash_attn_bwd"]
    assert taken == ([True, False] * 3 if name == "4" else [])


@pytest.mark.parametrize("name", ["2", "4"])
@pytest.mark.parametrize("plan_name", [name for name in PLANS if name != "ragged"])
def test_plans(machine, name, plan_name):
    machine(*MACHINES[name])
    compare("flash_attn", plan_name, {}, torch.float32)
    compare("flash_attn", plan_name, dict(packed=True, head_reduction="none", sinks=True), torch.float32)


def test_head_dim_256_on_blackwell_folds_dlse(machine):
    machine(10, 4)
    compare("flash_attn", "some empty", dict(sinks=True), torch.bfloat16, dim=256)
    assert [given["dlse"] for function, given in stand_ins.CALLS if function == "_flash_attn_bwd"] == [None]


@pytest.mark.parametrize("layout", ["bhmd", "bmhd"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["2", "4"])
def test_nothing_is_copied(machine, monkeypatch, name, packed, layout):
    """Inputs are passed without a copy, and results have the strides that the operators declare."""
    machine(*MACHINES[name])
    match_strides = attention_ops.match_strides

    def without_a_copy(x, strides):
        result = match_strides(x, strides)
        assert result.data_ptr() == x.data_ptr() and result.stride() == strides
        return result

    monkeypatch.setattr(attention_ops, "match_strides", without_a_copy)
    tensors, plan, cu = inputs("ragged", torch.bfloat16, packed=packed, layout=layout)
    run(mk.stepwise_attention, tensors, plan, cu, {}, torch.bfloat16, engine="flash_attn")
    (_, forward), (_, backward) = stand_ins.CALLS
    for given in (forward, backward):
        strides = [t[0].transpose(0, 1).stride() if packed else t.transpose(1, 2).stride() for t in tensors]
        assert [given[key].stride() for key in "qkv"] == strides
    assert all(forward[key].data_ptr() == backward[key].data_ptr() for key in "qkv")


@pytest.mark.parametrize("name, layout", [("2", "bmhd"), ("4", "bhmd"), ("2", "bhdm"), ("4", "bhdm")])
def test_triton_map_is_added_to_its_gradients(machine, monkeypatch, name, layout):
    """The interpreted map kernels add to dq and dk as they are: transposed, packed, or a slice of wider tensors."""
    machine(*MACHINES[name])
    monkeypatch.setattr(mk.api.engine_selection, "choose_map_engine", lambda engine, q, options: "triton")
    compare("flash_attn", "some empty", FEATURES["plain"], torch.float16, layout=layout)
    compare("flash_attn", "some empty", FEATURES["packed, window, sinks"], torch.float32, layout=layout)


@pytest.mark.parametrize("name", ["2", "4"])
def test_deterministic_is_passed_on(machine, name):
    machine(*MACHINES[name])
    tensors, plan, _ = inputs("some empty", torch.float32)
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        try:
            run(mk.stepwise_attention, tensors, plan, None, {}, torch.float32, engine="flash_attn")
        finally:
            torch.use_deterministic_algorithms(False)
        assert stand_ins.CALLS[-1][1]["deterministic"] is wanted


@pytest.mark.parametrize("name", ["2", "4"])
def test_single_rows_and_empty_sequences(machine, name):
    machine(*MACHINES[name])
    for lengths in ([1], [1, 0], [0, 0], []):
        q = torch.randn(1, 2, sum(lengths), 8, requires_grad=True)
        plan = mk.StepPlan.from_spans([[(0, n)] if n else [] for n in lengths], [[[0]] if n else [] for n in lengths])
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        out, maps = mk.stepwise_attention(q, q, q, plan, cu_seqlens=cu, engine="flash_attn")
        torch.testing.assert_close(out, q)
        torch.testing.assert_close(maps.sum(), torch.tensor(float(sum(lengths))))
        (out.sum() + maps.sum()).backward()
        torch.testing.assert_close(q.grad, torch.ones_like(q), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["2", "4"])
def test_compile(machine, name):
    machine(*MACHINES[name])
    (q, k, v), plan, _ = inputs("ragged", torch.float32)

    def layer(q, k, v, plan):
        out, maps = mk.stepwise_attention(q, k, v, plan, window=30, engine="flash_attn")
        return out.square().sum() + maps.square().sum()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        value = function(*leaves, plan)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


CALL = AttentionRequest(
    device=torch.device("cuda"), dtype=torch.bfloat16, batch=1, q_heads=4, kv_heads=2, length=100, head_dim=128,
    options=AttentionOptions(True, 0.1), sinks=True, packed=True, backward=True,
)  # fmt: skip
WINDOW, CAPPED = AttentionOptions(True, 0.1, window=9), AttentionOptions(True, 0.1, softcap=5.0)
HALF = torch.float16


@pytest.mark.parametrize(
    "major, versions, changes, reason",
    [
        (8, (2,), {}, None),
        (8, (2,), dict(options=WINDOW), None),
        (8, (2,), dict(options=CAPPED, head_dim=256), None),
        (8, (2,), dict(dtype=HALF, head_dim=256), "multiples of 8 up to 248"),
        (8, (2,), dict(dtype=HALF, head_dim=256, backward=False), None),
        (8, (2,), dict(head_dim=100), "multiples of 8 up to 256, not 100"),
        (8, (2,), dict(dtype=torch.float32), "bfloat16 and float16, not torch.float32"),
        (8, (2,), dict(options=AttentionOptions(True, -1.0)), "positive scale"),
        (8, (2,), dict(device=torch.device("cpu")), "not for cpu tensors"),
        (7, (2,), {}, "sm80 or later, not sm7x"),
        (8, (4,), {}, "no backward before sm90"),
        (8, (4,), dict(backward=False), None),
        (8, (4,), dict(backward=False, options=WINDOW), "no finished window on sm8x"),
        (8, (4,), dict(backward=False, head_dim=256), "up to 128, not 256"),
        (9, (4,), dict(options=WINDOW, head_dim=256, dtype=HALF), None),
        (9, (4,), dict(head_dim=264), "up to 256, not 264"),
        (9, (4,), dict(head_dim=80), "padded to an odd multiple of 16, as 80"),
        (9, (4,), dict(head_dim=72), "padded to an odd multiple of 16, as 72"),
        (9, (4,), dict(head_dim=16), "padded to an odd multiple of 16, as 16"),
        (9, (4,), dict(head_dim=80, backward=False), None),
        *((9, (4,), dict(head_dim=D), None) for D in (32, 56, 64, 88, 96, 120, 128, 144, 192)),
        (10, (4,), dict(options=CAPPED), None),
        (10, (4,), dict(head_dim=192), "up to 128, and 256, not 192"),
        (10, (4,), dict(head_dim=256), None),
        (10, (4,), dict(head_dim=256, options=CAPPED), "no backward with a softcap at head_dim 256"),
        (10, (4,), dict(head_dim=256, options=CAPPED, backward=False), None),
        (10, (4,), dict(head_dim=256, dtype=HALF), "float16 cannot be folded there"),
        (12, (4,), {}, None),
        (12, (4,), dict(options=WINDOW), "no finished window on sm12x"),
        (9, (), {}, "flash-attn-4 is not installed; flash-attn is not installed"),
    ],
)
def test_reasons_of_each_version(machine, monkeypatch, major, versions, changes, reason):
    machine(major, *versions, any_call=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = flash_attn.why_not(dataclasses.replace(CALL, **changes))
    assert found is None if reason is None else reason in found
    assert (flash_attn.available() is None) == bool(versions)


def test_no_deterministic_backward_on_sm120(machine):
    machine(12, 4, any_call=False)
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in flash_attn.why_not(CALL)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("major, chosen", [(8, 2), (9, 4), (10, 4), (12, 2)])
def test_selected_version(machine, monkeypatch, major, chosen):
    machine(major, 2, 4)
    assert flash_attn.version_of(torch.device("cuda")) == chosen
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in flash_attn.version_of(torch.device("cuda"))


@pytest.mark.parametrize(
    "capability, versions, expected",
    [
        ((9, 0), (4,), ("flash_attn", "sdpa", "triton", "eager")),
        ((9, 0), (2,), ("sdpa", "triton", "eager")),
        ((9, 0), (), ("sdpa", "triton", "eager")),
        ((8, 0), (2, 4), ("sdpa", "triton", "eager")),
        ((10, 0), (2, 4), ("sdpa", "triton", "eager")),
    ],
)
def test_auto_takes_flash_attn_4_first_on_hopper(machine, monkeypatch, capability, versions, expected):
    machine(9, *versions, any_call=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine_selection.order(CALL) == expected
    assert engine_selection.order(dataclasses.replace(CALL, device=torch.device("cpu")))[0] == "native"
    reasons = [attention_ops.ENGINES[name].why_not(dataclasses.replace(CALL, dtype=torch.float32)) for name in expected]
    assert "not torch.float32" in reasons[0] and reasons[-1] is None  # another engine serves such a call


def test_a_package_that_does_not_import(machine, monkeypatch):
    def broken(name):
        raise OSError("undefined symbol")

    machine(8, 2, any_call=False)
    monkeypatch.setattr(flash_attn.importlib, "import_module", broken)
    assert flash_attn.available() == (
        "flash-attn-4 does not import: OSError: undefined symbol; "
        "flash-attn does not import: OSError: undefined symbol"
    )  # fmt: skip


def test_a_refusal_names_the_reason():
    (q, k, v), plan, _ = inputs("some empty", torch.float32)
    with pytest.raises(ValueError, match="'flash_attn' cannot serve this call.*not installed|no GPU|not for cpu"):
        mk.stepwise_attention(q, k, v, plan, engine="flash_attn")
    assert not mk.engines()["flash_attn"].ready or torch.cuda.is_available()


@pytest.mark.parametrize("version", [2, 4])
def test_the_real_functions_accept_these_calls(machine, monkeypatch, version):
    """If a package is installed, its functions have the parameters that the stand-ins were called with."""
    machine(9, version)
    for feature in ("plain", "packed"):
        compare("flash_attn", "some empty", FEATURES[feature], torch.bfloat16)
    calls = list(stand_ins.CALLS)
    assert {name for name, _ in calls} == set(stand_ins.PARAMETERS[version])
    monkeypatch.undo()
    flash_attn._interface.cache_clear()
    module = flash_attn._interface(version)
    if isinstance(module, str):
        pytest.skip(module)
    for name, given in calls:
        function = getattr(module, name)
        found = list(inspect.signature(getattr(function, "_init_fn", function)).parameters)
        assert given.keys() <= set(found), name
        if version == 2:  # called by position
            assert list(given) == found[: len(given)], name


@pytest.mark.parametrize("major, version", [(9, 4), (8, 2), (8, 4)])
def test_engine_selection_compiles(machine, major, version):
    def query():
        return torch.zeros(1), flash_attn.available(), flash_attn.why_not(CALL), flex.available(), flex.why_not(CALL)

    machine(major, version, any_call=False)
    torch._dynamo.reset()  # code compiled for the machine before holds its constants
    expected = query()[1:]
    assert (expected[1] is None) == (version == 2 or major == 9)
    assert torch.compile(query, fullgraph=True, backend="eager")()[1:] == expected
