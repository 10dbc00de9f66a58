"""The tables of a plan: against their definitions, and when they are computed again."""

import dataclasses
import itertools

import pytest
import torch

from molsaki_kernels._triton import configs
from molsaki_kernels._triton import plan_tables as module
from molsaki_kernels._triton.plan_tables import KEY_PADDING, plan_tables
from molsaki_kernels._triton.tiles import FAR
from molsaki_kernels.spec import AttentionOptions, MapInputs
from tests.helpers.kernel_cases import Case, make

ROWS = 32
CASES = [
    Case("default", M=70, B=2),
    Case("window", M=70, window=20),
    Case("full", M=70, causal=False),
    Case("packed", lengths=(17, 0, 40, 1, 33)),
    Case("whole", plan="whole", M=50),
    Case("dense", plan="dense", lengths=(20, 36)),
    Case("no_steps", plan="no_steps", M=20),
    Case("middle", plan="middle", M=130),
]


def tables_of(case, x, **changes):
    inputs = MapInputs(x.q, x.k, torch.zeros(x.q.shape[:3]), x.cu_seqlens)
    return plan_tables(inputs, case.options(), dataclasses.replace(x.plan_tensors(), **changes), ROWS)


@pytest.fixture
def computed(monkeypatch):
    """The number of computations so far."""
    calls = []
    run = module.plan_tables_kernel

    class Counted:
        def __getitem__(self, grid):
            calls.append(grid)
            return run[grid]

    monkeypatch.setattr(module, "plan_tables_kernel", Counted())
    return calls


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_definitions(case):
    x = make(case)
    if 0 in x.plan.steps.shape:  # the launchers return before: there is no map
        x = dataclasses.replace(x, plan=dataclasses.replace(x.plan, steps=torch.zeros(len(x.plan), 1, 2).long()))
    tables = tables_of(case, x)
    bounds = [(0, case.M)] * case.B
    if x.cu_seqlens is not None:
        bounds = list(zip(x.cu_seqlens.tolist()[:-1], x.cu_seqlens.tolist()[1:], strict=True))
    seen = set()
    for n, first, begin, length, s_lo, s_hi, c_lo, c_hi in tables.tile_table.tolist():
        if length == 0:
            assert s_hi == 0 and c_hi == 0
            continue
        assert (begin, begin + length) == bounds[n]
        assert first % ROWS == 0 and first < length and (n, first) not in seen
        seen.add((n, first))
        rows = range(first, min(first + ROWS, length))
        steps = x.plan.steps[n].tolist()
        touched = [s for s, (a, b) in enumerate(steps) if any(a <= r < b for r in rows)]
        assert (s_lo, s_hi) == (touched[0], touched[-1] + 1) if touched else s_hi == 0
        b = 0 if x.cu_seqlens is not None else n
        for r in rows:
            step = next((s for s, (lo, hi) in enumerate(steps) if lo <= r < hi), -1)
            assert tables.step_of_row[b, begin + r] == step
        window = case.window or length
        words = x.plan.word_of_token[n].tolist()
        visible = [
            c
            for c, t in enumerate(x.plan.tokens[n].tolist())
            if words[c] >= 0 and any((not case.causal or t <= r) and t > r - window for r in rows)
        ]
        assert (c_lo, c_hi) == (visible[0] // 16 * 16, visible[-1] + 1) if visible and touched else c_lo >= c_hi
    assert seen == {(n, r) for n, (a, b) in enumerate(bounds) for r in range(0, b - a, ROWS)}
    C = x.plan.tokens.shape[1]
    token, word = tables.key_table.unbind(1)
    assert torch.equal(word[:, :C].long(), x.plan.word_of_token)
    assert torch.equal(token[:, :C].long(), torch.where(x.plan.word_of_token >= 0, x.plan.tokens, FAR.value))
    assert (token[:, C:] == FAR.value).all() and (word[:, C:] == -1).all()
    assert token.shape[1] % 16 == 0 and token.shape[1] >= C + KEY_PADDING.value


def test_no_block_of_key_tokens_ends_past_the_table():
    """A block begins at a key token of the plan or, with a window, up to 15 before it."""
    dtypes = (torch.bfloat16, torch.float32)
    for arch, dtype, D, C in itertools.product(configs.MULTIPROCESSORS, dtypes, (64, 128, 256), (8, 60, 300)):
        for tile in (configs.map_forward, configs.map_dlse, configs.map_dq, configs.map_dk):
            assert tile(arch, dtype, D, C).columns <= KEY_PADDING.value


def test_one_computation_for_all_layers_until_the_plan_changes(computed):
    case = Case("packed", lengths=(17, 23))
    x = make(case)
    first = tables_of(case, x)
    other = dataclasses.replace(x, q=torch.randn_like(x.q), k=torch.randn_like(x.k))  # another layer
    assert tables_of(case, other) is first and len(computed) == 1
    swapped = torch.tensor([1, 0, *range(2, x.plan.num_words), -1])  # -1: padding keeps its number
    for change in (
        lambda: x.plan.steps[0, -1].sub_(1),
        lambda: x.plan.word_of_token.copy_(swapped[x.plan.word_of_token]),
        lambda: x.plan.tokens[0, -1:].sub_(1),
        lambda: x.plan.steps.data[0, -1].sub_(1),  # no version counts it
        lambda: x.cu_seqlens.copy_(torch.tensor([0, 20, 40])),
    ):
        change()
        before = len(computed)
        tables = tables_of(case, x)
        assert len(computed) == before + 1 and tables_of(case, x) is tables
    assert tables.tile_table[0].tolist()[2:4] == [0, 20]
    another = dataclasses.replace(x, cu_seqlens=x.cu_seqlens.clone())
    assert tables_of(case, another) is not tables


@pytest.mark.parametrize("change", [dict(window=5), dict(causal=False)], ids=str)
def test_options_have_tables_of_their_own(change):
    case = Case("options", M=40)
    x = make(case)
    assert tables_of(dataclasses.replace(case, **change), x) is not tables_of(case, x)


def test_not_kept_in_an_operator_nor_for_inference_tensors(computed):
    """An operator's memory may belong to a CUDA graph; changes of an inference tensor are not seen."""
    case = Case("operator", M=40)
    x = make(case)
    assert tables_of(case, x, keep=False) is not tables_of(case, x, keep=False)
    with torch.inference_mode():
        tokens = x.plan.tokens.clone()
    assert tables_of(case, x, tokens=tokens) is not tables_of(case, x, tokens=tokens)
    assert len(computed) == 4


def test_operators_do_not_keep_tables(monkeypatch):
    seen = []
    monkeypatch.setattr(
        module._plan_cache, "cached_on_device", lambda plan, *rest: seen.append(plan.keep) or rest[-1]()
    )
    case = Case("schema", M=20)
    x = make(case)
    lse = torch.zeros(x.q.shape[:3])
    options, plan = case.options(), x.plan_tensors()
    flat = (x.q, x.k, lse, None, *dataclasses.astuple(options), plan.steps, plan.tokens, plan.word_of_token, 3)
    assert isinstance(options, AttentionOptions)
    torch.ops.molsaki.stepwise_map(*flat[:-1], plan.num_words, "triton")
    assert seen == [False]


def test_entries_of_a_plan_are_bounded(computed):
    """A cu_seqlens that is a new tensor in every layer must not fill the memory."""
    case = Case("bounded", lengths=(5, 4))
    x = make(case)
    for _ in range(module._plan_cache.MOST_ENTRIES + 3):
        tables_of(case, dataclasses.replace(x, cu_seqlens=x.cu_seqlens.clone()))
    assert len(module._plan_cache._cache[x.plan.tokens]) <= module._plan_cache.MOST_ENTRIES
