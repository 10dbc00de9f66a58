"""The fused kernels against the float64 oracle: every feature, ragged shapes, every gradient."""

import dataclasses

import pytest
import torch

from molsaki_kernels._triton.attention_backward import flash_backward
from molsaki_kernels._triton.attention_forward import flash_forward
from tests.helpers.kernel_cases import FAR_STRIDES, Case, check_fused, far_copy, kernels, make

FEATURES = [
    Case("default", M=111, B=2),
    Case("full", M=63, causal=False),
    Case("window", M=130, window=24),
    Case("window_of_one", M=17, window=1),
    Case("full_window", M=63, causal=False, window=9),
    Case("softcap", softcap=2.0),
    Case("sinks", sinks=True, Hq=6, Hkv=2),  # dsinks has a number a head: of two numbers an error is no estimate
    Case("scale", scale=0.3),
    Case("packed", lengths=(17, 0, 63, 1, 40)),
    Case("packed_window_softcap_sinks", lengths=(33, 50), window=20, softcap=3.0, sinks=True, Hq=6, Hkv=2),
    Case("heads", per_head=True, B=2),
    Case("heads_packed_full", per_head=True, lengths=(20, 33), causal=False),
    Case("mha", Hq=2, Hkv=2),
    Case("group_of_seven", Hq=7, Hkv=1, M=40),
    Case("transposed", layout="transposed", B=2),
    Case("slice", layout="slice", Hkv=2),
    Case("d16", D=16),
    Case("d80", D=80, M=40),
    Case("d96", D=96, M=40),
    Case("d112", D=112, M=40),
    Case("d256", D=256, M=40),
    Case("fp16", dtype=torch.float16),
    Case("fp16_all", dtype=torch.float16, lengths=(33, 50), window=20, softcap=3.0, sinks=True, D=80),
    Case("bf16", dtype=torch.bfloat16),
    Case("bf16_all", dtype=torch.bfloat16, lengths=(33, 50), window=20, softcap=3.0, sinks=True),
]
LENGTHS = [Case(f"rows_{M}", M=M) for M in (1, 17, 130)]
PLANS = [Case(f"plan_{plan}", plan=plan, M=50) for plan in ("whole", "rows", "no_steps", "no_words")]

MAP_ONLY = ("default", "window", "full", "softcap", "sinks", "packed", "heads", "fp16", "bf16", "group_of_seven")


def named(cases):
    return [pytest.param(case, id=case.name) for case in cases]


@pytest.mark.parametrize("case", named(FEATURES + LENGTHS + PLANS))
def test_results_and_gradients(case):
    check_fused(case)


@pytest.mark.parametrize("case", named([case for case in FEATURES if case.name in MAP_ONLY]))
def test_gradient_through_the_map_alone(case):
    check_fused(dataclasses.replace(case, M=min(case.M, 63), B=1), "map")


@pytest.mark.parametrize("source", ["out", "lse"])
def test_gradient_of_one_result(source):
    check_fused(Case("one_result", sinks=True, M=40, Hq=6, Hkv=2), source)


def test_no_plan_is_plain_attention():
    case = Case("plain", M=40)
    x = make(case)
    out, lse, maps = flash_forward(x.q, x.k, x.v, None, case.options())
    assert maps is None
    found = kernels(case, x, "out")
    assert torch.equal(out, found["out"]) and torch.equal(lse, found["lse"])
    grads = flash_backward(x.q, x.k, x.v, out, lse, x.dout, case.options())[:3]
    assert all(torch.equal(grad, found[name]) for grad, name in zip(grads, ("dq", "dk", "dv"), strict=True))


def test_large_partials_take_the_second_read_of_q():
    """Where the shares of all heads would be larger than q, the map is made by its own kernel."""
    check_fused(Case("unfused", plan="whole", M=70, D=16))


def test_expanded_gradient():
    case = Case("expanded", M=17)
    x = make(case)
    out, lse, _ = flash_forward(x.q, x.k, x.v, None, case.options())
    ones = torch.ones(()).expand(out.shape)
    given = flash_backward(x.q, x.k, x.v, out, lse, ones, case.options())
    copied = flash_backward(x.q, x.k, x.v, out, lse, ones.contiguous(), case.options())
    assert all(torch.equal(a, b) for a, b in zip(given[:3], copied[:3], strict=True))


def test_twice_is_bitwise_the_same():
    case = Case("twice", M=63, B=2, Hq=4, Hkv=2, sinks=True)
    x = make(case)
    first, second = kernels(case, x, "both"), kernels(case, x, "both")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("strides", FAR_STRIDES.values(), ids=FAR_STRIDES)
def test_flat_index_past_int32(tmp_path, strides):
    case = Case("int64", M=17, B=2, D=16, Hq=1, dtype=torch.float16)
    x = make(case)
    copies = {key: far_copy(getattr(x, key), strides, tmp_path) for key in ("q", "k", "v", "dout")}
    near, far = kernels(case, x, "both"), kernels(case, dataclasses.replace(x, **copies), "both")
    assert all(torch.equal(near[key], far[key]) for key in near)


@pytest.mark.parametrize("shape", [(0, 2, 8, 16), (2, 2, 0, 16)])
def test_empty_batch(shape):
    q = torch.randn(shape)
    case = Case("empty", D=16)
    out, lse, _ = flash_forward(q, q, q, None, case.options())
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert all(g.shape == q.shape for g in flash_backward(q, q, q, out, lse, out, case.options())[:3])


def test_scale_must_be_positive():
    q = torch.randn(1, 1, 8, 16)
    with pytest.raises(ValueError, match="scale"):
        flash_forward(q, q, q, None, dataclasses.replace(Case("", D=16).options(), scale=0.0))
