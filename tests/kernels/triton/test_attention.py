"""The fused attention kernels against the float64 oracle: every feature, ragged shapes, every gradient."""

import dataclasses

import pytest
import torch

from molsaki_kernels._triton.attention_forward import attention_forward
from tests.helpers.kernel_cases import FAR_STRIDES, Case, check_fused, far_copy, kernels, make

FEATURES = [
    Case("default", M=111, B=2),
    Case("full", M=63, causal=False),
    Case("window", M=130, window=24),
    Case("window_of_one", M=17, window=1),
    Case("full_window", M=63, causal=False, window=9),
    Case("softcap", softcap=2.0),
    Case("sinks", sinks=True, Hq=6, Hkv=2),  # dsinks has one number per head: the error of two would be a poor estimate
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


def test_an_empty_plan_changes_nothing_but_the_map():
    case, empty = Case("with_map", M=40), Case("without_map", M=40, plan="no_steps")
    with_map, without_map = kernels(case, make(case), "out"), kernels(empty, make(empty), "out")
    assert with_map.pop("maps").any() and without_map.pop("maps").numel() == 0
    assert all(torch.equal(without_map[key], with_map[key]) for key in with_map)


def test_large_partials_take_the_second_read_of_q():
    """Where the partial sums of all heads would be larger than q, the map's own kernel computes it."""
    check_fused(Case("unfused", plan="whole", M=70, D=16))


def test_expanded_gradient():
    case = Case("expanded", M=17)
    x = make(case)
    ones = torch.ones(()).expand(x.q.shape)
    given = kernels(case, dataclasses.replace(x, dout=ones), "out")
    copied = kernels(case, dataclasses.replace(x, dout=ones.contiguous()), "out")
    assert all(torch.equal(given[key], copied[key]) for key in given)


def test_results_are_bitwise_reproducible():
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


@pytest.mark.parametrize("B, M", [(0, 8), (2, 0)])
def test_empty_batch(B, M):
    case = Case("empty", B=B, M=M, D=16, Hkv=2)
    x = make(case)
    found = kernels(case, x, "both")
    assert found["lse"].shape == x.q.shape[:3]
    assert all(found[key].shape == x.q.shape for key in ("out", "dq", "dk", "dv"))


def test_scale_must_be_positive():
    case = Case("scale", M=8, D=16, scale=0.0)
    x = make(case)
    with pytest.raises(ValueError, match="scale"):
        attention_forward(x.attention_inputs(), case.options(), x.plan_tensors())
