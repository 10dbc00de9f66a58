"""The kernels of the map alone, from q, k and lse, against the float64 oracle."""

import dataclasses

import pytest
import torch
from triton.runtime import interpreter

import molsaki_kernels as mk
from molsaki_kernels import engine_selection
from molsaki_kernels._triton import map_backward as backward_module
from molsaki_kernels._triton.lse_gradient import fold_dlse_into_out
from molsaki_kernels._triton.map_backward import add_map_gradients, map_backward, map_dlse
from molsaki_kernels._triton.map_forward import map_forward
from molsaki_kernels.attention import sdpa
from tests.helpers.budget import assert_within_budget
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
    Case("plan_dense", plan="dense", M=50, D=16, Hq=3, Hkv=3, window=40),
    Case("plan_dense_heads", plan="dense", lengths=(20, 0, 1, 36), D=16, per_head=True),
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
    "case, splits, large",
    [
        (Case("causal", M=100, Hq=4, Hkv=2, plan="middle"), 8, True),
        (Case("dense", M=70, plan="dense"), 3, False),  # every token is a key token: later blocks have ever fewer rows
        (Case("full", M=70, causal=False), 3, False),
        (Case("window", M=70, window=20, plan="dense"), 3, False),
        (Case("packed", lengths=(40, 1, 26), plan="dense"), 3, False),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_dk_is_the_sum_over_any_number_of_splits(case, splits, large, monkeypatch):
    """With more splits than a block has rows, or than the others need, the last ones add nothing."""
    x = make(case)
    lse = oracle(case, x, torch.float64, "out")["lse"].float()
    arguments = x.dmaps, x.map_inputs(lse), case.options(), x.plan_tensors()
    expected = map_backward(*arguments)[1]
    monkeypatch.setattr(backward_module.configs, "row_splits", lambda *_: splits)
    if large:
        monkeypatch.setattr(backward_module, "LARGE", 1)
    torch.testing.assert_close(map_backward(*arguments)[1], expected)


def with_plan(case: Case, steps: list, words: list):
    """The inputs of a case with one sequence and another plan."""
    x = make(case)
    plan = mk.StepPlan.from_spans([steps], [words])
    return dataclasses.replace(x, plan=plan, dmaps=torch.randn(1, plan.num_steps, plan.num_words))


def test_splits_share_the_rows_in_steps(monkeypatch):
    """With steps in the last rows only, each split has some of them."""
    monkeypatch.setattr(backward_module.configs, "row_splits", lambda *_: 2)
    case = Case("answer", M=130)
    x = with_plan(case, [(64, 130)], [[5], [40]])
    inputs, plan = x.map_inputs(oracle(case, x, torch.float64, "out")["lse"].float()), x.plan_tensors()
    tables = backward_module.plan_tables(inputs, case.options(), plan, 32)
    for known in (tables, None):
        partial = backward_module.dk_partials(x.dmaps, inputs, case.options(), plan, tables.step_of_row, tables=known)
        assert [part.abs().sum().item() > 0 for part in partial] == [True, True]


def test_splits_of_packed_sequences_are_those_of_their_mean_length(monkeypatch):
    asked = []
    monkeypatch.setattr(backward_module.configs, "row_splits", lambda *arguments: asked.append(arguments) or 1)
    case = Case("packed", lengths=(40, 40, 40, 40))
    x = make(case)
    map_backward(x.dmaps, x.map_inputs(torch.zeros(x.q.shape[:3])), case.options(), x.plan_tensors())
    rows = backward_module.configs.map_dk("cpu", x.q.dtype, case.D, x.plan.tokens.shape[1]).rows
    ((_, blocks, sequences, items, *_, equal_shares),) = asked
    assert (sequences, items, equal_shares) == (4 * case.Hkv, -(-40 // rows) * case.Hq // case.Hkv, False)


def test_keys_that_no_row_of_a_tile_sees_are_not_read():
    """The block of key tokens of the first tile also holds one that is 8 rows after the tile, and infinite."""
    case = Case("after", M=64)
    x = with_plan(case, [(0, 64)], [[5], [40]])
    lse = oracle(case, x, torch.float64, "out")["lse"].float()
    finite = map_backward(x.dmaps, x.map_inputs(lse), case.options(), x.plan_tensors())
    x.k[:, :, 40] = float("inf")
    dq, _, dlse = map_backward(x.dmaps, x.map_inputs(lse), case.options(), x.plan_tensors())
    assert torch.equal(dq[:, :, :32], finite[0][:, :, :32]) and torch.equal(dlse[..., :32], finite[2][..., :32])


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
            ["map_dlse_kernel", "map_dq_kernel", "map_dk_kernel"],
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
    """At the sizes of the paper, the number of launches decides the time: an additional kernel must be intended.

    The plan's tables are computed once for all layers."""
    monkeypatch.setattr(engine_selection, "choose_map_engine", lambda engine, q, options: "triton")
    x = make(Case("launches", M=20, B=4))
    q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
    lse = torch.full(q.shape[:3], 3.0).requires_grad_()
    names = launches(monkeypatch)
    for layer in range(2):
        if engine is None:
            maps = mk.stepwise_map(q, k, lse, x.plan)
        else:
            maps = mk.stepwise_attention(q, k, v, x.plan, engine=engine)[1]
        tables = ["plan_tables_kernel"] if layer == 0 and engine != "triton" else []
        assert names == tables + forward
        torch.autograd.grad(maps, (q, k), x.dmaps)
        assert names == tables + forward + backward
        names.clear()


FOLD_CASES = [
    Case("fold", M=70, B=2, layout="transposed"),
    Case("fold_whole", plan="whole", M=40, dtype=torch.bfloat16),
    Case("fold_dense", plan="dense", M=40, D=16, window=30),
    Case("fold_heads", M=40, per_head=True),
    Case("fold_packed", lengths=(17, 0, 40, 1), Hq=7, dtype=torch.bfloat16),
    Case("fold_full", M=40, causal=False, softcap=2.0),
    Case("fold_middle", plan="middle", M=130, Hq=5),
    Case("fold_d80", D=80, M=20),
    *(Case(f"fold_{plan}", plan=plan, M=20) for plan in ("rows", "no_steps", "no_words")),
    Case("fold_one_row", M=1),
    Case("fold_narrow_values", M=40, B=2, D=32, value_dim=16, layout="transposed"),
    Case("fold_wide_values", lengths=(17, 0, 40, 1), D=16, value_dim=48, dtype=torch.bfloat16),
    Case("fold_no_words_wide_values", plan="no_words", M=20, D=16, value_dim=48),
]


@pytest.mark.parametrize("add", [False, True], ids=["", "with a gradient of lse"])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in FOLD_CASES])
def test_dlse_is_folded_in_the_pass_that_computes_it(case, add):
    x = make(case)
    lse = oracle(case, x, torch.float64, "out")["lse"].float()
    arguments = x.dmaps, x.map_inputs(lse), case.options(), x.plan_tensors()
    out, dout = torch.randn_like(x.dout), x.dout.clone()
    dout[:, :, ::2] = 0
    given = x.dlse if add else None
    before = x.dlse.clone()
    dlse, folded_out, folded_dout = map_dlse(*arguments, dlse=given, out=out, dout=dout)
    assert torch.equal(x.dlse, before)
    exact, eager = (map_oracle(case, x, lse, dtype)["dlse"] for dtype in (torch.float64, case.dtype))
    if add:
        exact, eager = exact + x.dlse, eager + x.dlse
    if exact.any():
        assert_within_budget("dlse", dlse, exact, eager)
    else:
        assert not dlse.any()
    wanted = fold_dlse_into_out(out, dout, dlse)
    assert torch.equal(folded_out, wanted[0]) and torch.equal(folded_dout, wanted[1])
    assert folded_out.stride() == folded_dout.stride() == out.stride()
    if not add:
        alone, nothing, _ = map_dlse(*arguments)
        assert torch.equal(alone, dlse) and nothing is None


def test_folding_into_an_out_without_a_contiguous_head_dim():
    """out has the layout of q, which may be any."""
    case = Case("fold_strided", M=40)
    x = make(case)
    lse = oracle(case, x, torch.float64, "out")["lse"].float()
    arguments = x.dmaps, x.map_inputs(lse), case.options(), x.plan_tensors()
    out, dout = torch.randn_like(x.q), x.dout.clone()
    dout[:, :, ::2] = 0
    dlse, *wanted = map_dlse(*arguments, out=out, dout=dout)
    strided = out.mT.contiguous().mT
    for found in (map_dlse(*arguments, out=strided, dout=dout)[1:], fold_dlse_into_out(strided, dout, dlse)):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("source", ["both", "map"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_an_engine_that_folds(source, sinks, monkeypatch):
    """The whole layer: the engine's backward gets O' and dO' instead of a gradient of lse."""
    monkeypatch.setattr(engine_selection, "choose_map_engine", lambda engine, q, options: "triton")
    monkeypatch.setattr(sdpa, "folds_dlse", lambda inputs: True)
    case = Case("engine_folds", M=40, B=2, sinks=sinks)
    x = make(case)
    leaves = {"dq": x.q, "dk": x.k, "dv": x.v} | ({"dsinks": x.sinks} if sinks else {})
    for t in leaves.values():
        t.requires_grad_()
    names = launches(monkeypatch)
    out, maps = mk.stepwise_attention(x.q, x.k, x.v, x.plan, engine="sdpa", sinks=x.sinks, **case.keywords())
    loss = (maps * x.dmaps).sum() + ((out * x.dout).sum() if source == "both" else 0)
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert names[-3:] == ["map_dlse_kernel", "map_dq_kernel", "map_dk_kernel"] or "map_dk_add_kernel" in names
    assert "fold_kernel" not in names
    exact, eager = (oracle(case, x, dtype, source) for dtype in (torch.float64, torch.float32))
    for key, value in found.items():
        if exact[key].any():
            assert_within_budget(key, value, exact[key], eager[key])
        else:
            assert not value.any()


def test_gradients_without_a_contiguous_head_dim():
    """Engine "eager" returns dq and dk in the layouts of q and k, which may be any."""
    case = Case("strided", M=40, D=16)
    x = make(case)
    x = dataclasses.replace(x, **{name: getattr(x, name).mT.contiguous().mT.requires_grad_() for name in ("q", "k")})
    out, maps = mk.stepwise_attention(x.q, x.k, x.v, x.plan, engine="eager", map_engine="triton", **case.keywords())
    found = torch.autograd.grad((out * x.dout).sum() + (maps * x.dmaps).sum(), (x.q, x.k))
    exact, eager = (oracle(case, x, dtype, "both") for dtype in (torch.float64, torch.float32))
    for key, value in zip(("dq", "dk"), found, strict=True):
        assert_within_budget(key, value, exact[key], eager[key])


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
