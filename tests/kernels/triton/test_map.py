"""The kernels of the map alone, from q, k and lse, against the float64 oracle."""

import dataclasses

import pytest
import torch
from triton.runtime import interpreter

import molsaki_kernels as mk
from molsaki_kernels import engine_selection
from molsaki_kernels._triton.map_backward import add_map_gradients, map_backward, map_dlse
from molsaki_kernels._triton.map_forward import map_forward
from tests.helpers.kernel_cases import FAR_STRIDES, Case, check_map, far_copy, make, map_kernels, map_oracle, oracle

CASES = [
    Case("default", M=130, B=2),
    Case("full", causal=False),
    Case("window", M=111, window=24),
    Case("full_window", causal=False, window=9),
    Case("softcap", softcap=2.0),
    Case("sinks", sinks=True),
    Case("scale", scale=-0.3),
    Case("packed", lengths=(17, 0, 63, 1, 40)),
    Case("heads", per_head=True, B=2),
    Case("heads_packed_window", per_head=True, lengths=(20, 33), window=12),
    Case("mha", Hq=2, Hkv=2),
    Case("group_of_seven", Hq=7, Hkv=1, M=40),
    Case("many_groups", Hq=35, Hkv=5, M=17, D=16),
    Case("transposed", layout="transposed", B=2),
    Case("slice", layout="slice", Hkv=2),
    Case("d80", D=80, M=40),
    Case("d256", D=256, M=40),
    Case("fp16", dtype=torch.float16),
    Case("bf16", dtype=torch.bfloat16, window=30, softcap=3.0),
    *(Case(f"rows_{M}", M=M) for M in (1, 17, 63)),
    *(Case(f"plan_{plan}", plan=plan, M=50) for plan in ("whole", "rows", "no_steps", "no_words")),
    Case("plan_middle", plan="middle", M=130, B=2),
]


def launches(monkeypatch) -> list[str]:
    """The names of the kernels that the interpreter runs from this call on."""
    names, run = [], interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_map_and_gradients(case):
    check_map(case)


@pytest.mark.parametrize(
    "case, launched",
    [
        (Case("add", M=40), ["map_dq_kernel", "map_dk_kernel", "map_dk_add_kernel"]),
        (Case("add_packed", lengths=(20, 33, 1, 5), per_head=True), ["map_dq_kernel", "map_dk_kernel"]),
        (Case("add_one_split", M=40, B=3, Hq=4, Hkv=4, layout="transposed"), ["map_dq_kernel", "map_dk_kernel"]),
        (Case("add_middle", M=130, B=3, Hq=2, Hkv=2, plan="middle"), ["map_dq_kernel", "map_dk_kernel"]),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_adds_to_gradients_in_place(case, launched, monkeypatch):
    """Without splits of the rows, no kernel is launched to add them."""
    x = make(case)
    lse = oracle(case, x, torch.float64, "out")["lse"].float()
    arguments = x.dmaps, x.map_inputs(lse), case.options(), x.plan_tensors()
    dq, dk, dlse = map_backward(*arguments)
    sum_q, sum_k = x.dout.clone(), torch.ones_like(x.k)
    names = launches(monkeypatch)
    add_map_gradients(*arguments, sum_q, sum_k)
    assert names == launched
    torch.testing.assert_close(sum_q, x.dout + dq)
    torch.testing.assert_close(sum_k, 1 + dk)
    torch.testing.assert_close(dlse, map_dlse(*arguments)[0])


@pytest.mark.parametrize(
    "engine, forward, backward",
    [
        pytest.param(
            "triton",
            ["flash_forward_kernel", "map_reduce_kernel"],
            ["flash_dq_kernel", "map_dk_kernel", "flash_dkv_kernel"],
            id="triton",
        ),
        pytest.param(
            "sdpa",
            ["map_partials_kernel", "map_reduce_kernel"],
            ["map_dq_kernel", "map_dq_kernel", "map_dk_kernel"],
            id="sdpa",
        ),
        pytest.param(
            None,
            ["map_partials_kernel", "map_reduce_kernel"],
            ["map_dq_kernel", "map_dk_kernel"],
            id="the map alone",
        ),
    ],
)
def test_launches_of_a_layer(engine, forward, backward, monkeypatch):
    """At the sizes of the paper, the number of launches decides the time: an additional kernel must be intended."""
    monkeypatch.setattr(engine_selection, "choose_map_engine", lambda engine, q, options: "triton")
    x = make(Case("launches", M=20, B=4))
    q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
    lse = torch.full(q.shape[:3], 3.0).requires_grad_()
    names = launches(monkeypatch)
    if engine is None:
        maps = mk.stepwise_map(q, k, lse, x.plan)
    else:
        maps = mk.stepwise_attention(q, k, v, x.plan, engine=engine)[1]
    assert names == forward
    torch.autograd.grad(maps, (q, k), x.dmaps)
    assert names == forward + backward


def test_results_are_bitwise_reproducible():
    case = Case("twice", M=63, B=2, Hq=4, Hkv=2)
    x = make(case)
    lse = torch.randn(2, 4, 63) + 4
    first, second = map_kernels(case, x, lse), map_kernels(case, x, lse)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_strided_lse_and_gradient():
    case = Case("strided", M=17)
    x = make(case)
    lse = oracle(case, x, torch.float64, "out")["lse"].float()
    padded = torch.nn.functional.pad(lse, (0, 15))[..., :17]  # as the memory-efficient operator returns it
    ones = dataclasses.replace(x, dmaps=torch.ones(()).expand(x.dmaps.shape))
    found, exact = map_kernels(case, ones, padded), map_oracle(case, ones, lse, torch.float64)
    for key in found:
        torch.testing.assert_close(found[key].double(), exact[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strides", FAR_STRIDES.values(), ids=FAR_STRIDES)
def test_flat_index_past_int32(tmp_path, strides):
    case = Case("int64", M=17, B=2, D=16, Hq=1, dtype=torch.float16)
    x = make(case)
    dq, dk = (far_copy(torch.zeros_like(t), strides, tmp_path) for t in (x.q, x.k))
    near = x.map_inputs(torch.full((2, 1, 17), 3.0))
    far = dataclasses.replace(near, **{key: far_copy(getattr(x, key), strides, tmp_path) for key in ("q", "k")})
    options, plan = case.options(), x.plan_tensors()
    assert torch.equal(map_forward(far, options, plan), map_forward(near, options, plan))
    expected = map_backward(x.dmaps, near, options, plan)
    add_map_gradients(x.dmaps, far, options, plan, dq, dk)
    assert torch.equal(dq, expected[0]) and torch.equal(dk, expected[1])
