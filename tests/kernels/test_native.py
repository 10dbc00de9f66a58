"""Tests the C library's map, attention and lse gradient through the public functions and the operators."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest
import torch

import molsaki_kernels as mk
from molsaki_kernels import StepPlan, reference
from molsaki_kernels._native import build
from molsaki_kernels._native.lse_gradient import fold_in_one_pass
from molsaki_kernels._native.structs import FLOAT32, TILES_BF16, VECTORS_BF16
from molsaki_kernels.attention import native as attention_native
from molsaki_kernels.attention.lse_gradient import VANISHED, fold_dlse_into_out
from molsaki_kernels.attention_map import native
from molsaki_kernels.spec import AttentionOptions
from tests.helpers.budget import assert_within_budget

needs_library = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def case(lengths, words, steps, q_heads, kv_heads, dim, packed=False, gaps=False, seed=0):
    """q, k and lse in float64, a plan with words of one to three tokens in any order, and cu_seqlens."""
    g = np.random.default_rng(seed)
    all_steps, all_words = [], []
    for length in lengths:
        cuts = sorted(g.choice(np.arange(1, length), min(steps, length) - 1, replace=False)) if length > 1 else []
        spans = list(zip([0, *cuts], [*cuts, length], strict=True))
        all_steps.append([(a + 1, b - 1) if gaps and b - a > 2 else (a, b) for a, b in spans])
        tokens = g.permutation(length)[:words].tolist()
        all_words.append([])
        while tokens:
            size = int(g.integers(1, 4))
            all_words[-1].append(tokens[:size])
            tokens = tokens[size:]
    batch, M = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
    t = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, h, M, dim, generator=t, dtype=torch.float64) for h in (q_heads, kv_heads))
    lse = torch.randn(batch, q_heads, M, generator=t, dtype=torch.float64) * 0.3 + 3
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32) if packed else None
    return (q, k, lse), StepPlan.from_spans(all_steps, all_words), cu


def results(function, tensors, plan, cu, dtype, options, **extra):
    q, k, lse = tensors
    leaves = [q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_()]
    leaves.append(lse.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
    maps = function(*leaves, plan, cu_seqlens=cu, **options, **extra)
    weight = torch.randn(maps.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    grads = torch.autograd.grad((maps.double() * weight).sum(), leaves)
    return dict(zip(("maps", "dq", "dk", "dlse"), (maps.detach(), *grads), strict=True))


CASES = {
    "rows not a multiple of a tile": (dict(lengths=[111, 95], words=20, steps=5, q_heads=4, kv_heads=2, dim=64), {}),
    "one row": (dict(lengths=[1], words=1, steps=1, q_heads=2, kv_heads=2, dim=16), {}),
    "every row a step, every token in a word": (
        dict(lengths=[130], words=130, steps=130, q_heads=3, kv_heads=1, dim=32), {}),
    "rows in no step": (dict(lengths=[300], words=100, steps=7, q_heads=6, kv_heads=3, dim=80, gaps=True), {}),
    "window": (dict(lengths=[300], words=100, steps=7, q_heads=6, kv_heads=3, dim=48, gaps=True), dict(window=37)),
    "not causal": (dict(lengths=[130, 7], words=60, steps=9, q_heads=3, kv_heads=3, dim=128), dict(causal=False)),
    "not causal, window, heads": (
        dict(lengths=[130, 7], words=60, steps=9, q_heads=3, kv_heads=3, dim=64),
        dict(causal=False, window=20, head_reduction="none")),
    "packed, heads": (
        dict(lengths=[50, 1, 200, 33], words=30, steps=6, q_heads=4, kv_heads=2, dim=64, packed=True, gaps=True),
        dict(head_reduction="none")),
    "packed, window": (
        dict(lengths=[50, 1, 200, 33], words=30, steps=6, q_heads=4, kv_heads=2, dim=64, packed=True),
        dict(window=11)),
    "more columns than a tile": (dict(lengths=[700], words=650, steps=10, q_heads=2, kv_heads=2, dim=64), {}),
    "more columns than a tile, window": (
        dict(lengths=[700], words=650, steps=10, q_heads=2, kv_heads=1, dim=16), dict(window=300)),
    "the largest head_dim": (dict(lengths=[111], words=20, steps=5, q_heads=4, kv_heads=2, dim=256), dict(scale=0.3)),
    "two panels": (dict(lengths=[111, 95], words=40, steps=5, q_heads=4, kv_heads=2, dim=128), {}),
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("largest_kept", [native.LARGEST_KEPT, 0], ids=["dq kept", "dq recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_map(monkeypatch, name, dtype, largest_kept):
    monkeypatch.setattr(native, "LARGEST_KEPT", largest_kept)
    shape, options = CASES[name]
    tensors, plan, cu = case(**shape)
    tensors = [tensors[0].to(dtype).double(), tensors[1].to(dtype).double(), tensors[2]]
    oracle = results(reference.stepwise_map, tensors, plan, cu, torch.float64, options)
    eager = results(reference.stepwise_map, tensors, plan, cu, dtype, options)
    got = results(mk.stepwise_map, tensors, plan, cu, dtype, options, engine="native")
    for key, value in got.items():
        assert_within_budget(key, value, oracle[key], eager[key])


@needs_library
@pytest.mark.parametrize("name", ["packed, heads", "more columns than a tile", "two panels"])
def test_any_number_of_threads(name):
    """Results are bitwise reproducible, and equal within rounding for any number of threads."""
    shape, options = CASES[name]
    tensors, plan, cu = case(**shape)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            found.append(results(mk.stepwise_map, tensors, plan, cu, torch.float32, options, engine="native"))
    finally:
        torch.set_num_threads(threads)
    for key in found[0]:
        assert torch.equal(found[1][key], found[2][key]), key
        torch.testing.assert_close(found[0][key], found[1][key])


@needs_library
def test_rows_in_no_step_and_tokens_in_no_word_have_no_effect():
    tensors, plan, _ = case([90, 40], 12, 4, 4, 2, 32)
    clean = results(mk.stepwise_map, tensors, plan, None, torch.float32, {}, engine="native")
    q, k, lse = (t.clone() for t in tensors)
    q[1, :, 40:], k[1, :, 40:], lse[1, :, 40:] = float("nan"), float("inf"), float("nan")
    words = set(plan.tokens[0].tolist())
    k[0, :, [t for t in range(90) if t not in words]] = float("nan")
    poisoned = results(mk.stepwise_map, (q, k, lse), plan, None, torch.float32, {}, engine="native")
    for key, value in clean.items():
        assert torch.equal(value, poisoned[key]), key


@needs_library
def test_scores_far_from_lse():
    """Keys that are not visible cause no overflow, and vanishing weights no subnormal numbers."""
    plan = StepPlan.from_spans([[(0, 40)]], [[[3], [39]]])
    q = torch.full((1, 1, 40, 16), 10.0)
    k = torch.zeros(1, 1, 40, 16)
    k[:, :, 39] = 10.0  # visible to the last row only; its score is 1,600 times the scale
    lse = torch.full((1, 1, 40), 0.0)
    lse[..., 39] = 400.0
    maps = mk.stepwise_map(q, k, lse, plan, engine="native")
    torch.testing.assert_close(maps, torch.tensor([[[36.0 - 0, 1.0]]]))


@needs_library
@pytest.mark.parametrize("reason", ["softcap", "float64", "float16", "head_dim"])
def test_auto_uses_torch_for_unsupported_inputs(reason):
    tensors, plan, _ = case([30], 5, 3, 2, 2, 8 if reason == "head_dim" else 16)
    options = dict(softcap=3.0) if reason == "softcap" else {}
    dtype = getattr(torch, reason) if reason.startswith("float") else torch.float32
    with pytest.raises(ValueError, match=f'engine: "native" cannot serve this call: .*{reason}'):
        results(mk.stepwise_map, tensors, plan, None, dtype, options, engine="native")
    auto = results(mk.stepwise_map, tensors, plan, None, dtype, options)
    expected = results(mk.stepwise_map, tensors, plan, None, dtype, options, engine="torch")
    assert all(torch.equal(auto[key], expected[key]) for key in auto)


BAD_PLANS = {
    "a token beyond its sequence": (dict(tokens=[[1, 3], [2, 25]]), "plan: expected indices within each sequence"),
    "padding on the left": (dict(word_of_token=[[-1, 0], [0, 0]]), "plan: expected tokens that ascend, padded"),
    "tokens that do not ascend": (dict(tokens=[[3, 1], [2, 5]]), "plan: expected tokens that ascend"),
    "steps that do not ascend": (
        dict(steps=[[(9, 15), (0, 9)]] * 2),
        "plan: expected steps that ascend within 20 tokens",
    ),
    "steps that overlap": (dict(steps=[[(0, 9), (8, 12)]] * 2), "plan: expected steps that ascend"),
    "a step beyond its sequence": (dict(steps=[[(0, 21)], [(0, 5)]]), "plan: expected steps that ascend within 20"),
    "a word index out of range": (dict(word_of_token=[[0, 1], [0, 0]]), "plan: expected word_of_token below 1 words"),
    "sequences that end beyond the last row": (
        dict(cu=[0, 20, 60]),
        "cu_seqlens: expected to ascend from 0 to at most 40",
    ),
    "cu_seqlens that descends": (dict(cu=[0, 30, 20]), "cu_seqlens: expected to ascend"),
    "more sequences than rows": (dict(cu=None), "plan: expected one entry for each of 1 sequences, got 2"),
}


def unchecked_plan(
    steps=((((0, 5),),) * 2), tokens=((1, 3), (2, 5)), word_of_token=((0, 0), (0, 0)), cu=(0, 20, 40)
):  # fmt: skip
    """The tensors of a plan of two sequences, without validation, and cu_seqlens."""
    return tuple(map(torch.tensor, (steps, tokens, word_of_token))), cu and torch.tensor(cu, dtype=torch.int32)


@needs_library
@pytest.mark.parametrize("name", BAD_PLANS)
def test_indices_out_of_bounds_are_refused(name):
    """The engine checks indices itself: a traced call cannot read them earlier, and a plan may be built by hand."""
    changed, message = BAD_PLANS[name]
    (q, k, lse), _, _ = case([20, 20], 5, 2, 2, 2, 16, packed=True)
    q, k, lse = q.float(), k.float(), lse.float()
    plan, cu = unchecked_plan(**changed)
    with pytest.raises(ValueError, match=message):
        torch.ops.molsaki.stepwise_map(q, k, lse, cu, True, 0.25, None, None, False, *plan, 1, "native")
    with pytest.raises(ValueError, match=message):
        torch.ops.molsaki.stepwise_attention(q, k, k, None, cu, True, 0.25, None, None, False, *plan, 1, "native", "")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype_and_device_change_nothing(dtype):
    tensors, plan, _ = case([60, 31], 12, 4, 4, 2, 32)
    expected = results(mk.stepwise_map, tensors, plan, None, torch.float32, {}, engine="native")
    _, plan, _ = case([60, 31], 12, 4, 4, 2, 32)  # a new plan, of which nothing is cached
    q, k, lse = (t.float().requires_grad_() for t in tensors)
    weight = torch.randn(expected["maps"].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            maps = mk.stepwise_map(q, k, lse, plan, engine="native")
            found = [maps, *torch.autograd.grad((maps.double() * weight).sum(), (q, k, lse))]
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected.values(), strict=True))


@needs_library
def test_nan_with_any_bit_pattern_stays_nan():
    (q, k, lse), plan, _ = case([40], 5, 1, 2, 2, 16)
    q = q.float()
    q[0, 0, 39].view(torch.int32).fill_(-1)  # all bits set
    assert mk.stepwise_map(q, k.float(), lse.float(), plan, engine="native").isnan().any()


@needs_library
@pytest.mark.parametrize("layout", ["bhmd", "bmhd"])
def test_folding_dlse_into_out(layout):
    def tensor():
        x = torch.randn(2, 50, 3, 48) if layout == "bmhd" else torch.randn(2, 3, 50, 48)
        return x.transpose(1, 2) if layout == "bmhd" else x

    out, dout, dlse = tensor(), tensor(), torch.randn(2, 3, 50)
    folded = torch.full_like(out, float("nan"))
    assert fold_in_one_pass(out, dout, dlse, folded, VANISHED)
    expected = (out.double() * dout.double()).sum(-1) - dlse
    torch.testing.assert_close((folded.double() * dout.double()).sum(-1), expected, rtol=1e-5, atol=1e-5)
    dout[1, 2, 49] = 0  # dlse cannot be folded in one pass where dout is zero
    assert not fold_in_one_pass(out, dout, dlse, folded, VANISHED)
    assert fold_dlse_into_out(out, dout, dlse)[0].isfinite().all()


def test_without_a_library(without_native):
    tensors, plan, _ = case([30], 5, 3, 2, 2, 16)
    with pytest.raises(ValueError, match='"native" cannot serve this call: switched off by a test'):
        results(mk.stepwise_map, tensors, plan, None, torch.float32, {}, engine="native")
    results(mk.stepwise_map, tensors, plan, None, torch.float32, {})


@needs_library
def test_concurrent_python_threads():
    """Each Python thread has its own workspace, so that concurrent calls do not interfere."""
    tensors, plan, _ = case([200], 40, 6, 4, 2, 64)
    expected = results(mk.stepwise_map, tensors, plan, None, torch.float32, {}, engine="native")

    def call(_):
        found = [results(mk.stepwise_map, tensors, plan, None, torch.float32, {}, engine="native") for _ in range(10)]
        return all(torch.equal(x[key], expected[key]) for x in found for key in expected)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(4)))


def test_reason_for_an_unsupported_device():
    q = torch.zeros(1, 1, 8, 64, device="meta")
    assert native.why_not(q, AttentionOptions(True, 1.0)) == "it takes CPU tensors, not meta"


ATTENTION = {
    "more rows than a block, more keys than a tile": (
        dict(lengths=[450, 193], words=40, steps=7, q_heads=4, kv_heads=2, dim=64), {}),
    "every row a step, every token in a word": (
        dict(lengths=[230], words=230, steps=230, q_heads=3, kv_heads=1, dim=32), dict(sinks=True)),
    "rows in no step": (dict(lengths=[300], words=100, steps=7, q_heads=6, kv_heads=3, dim=80, gaps=True), {}),
    "window": (dict(lengths=[500], words=100, steps=7, q_heads=6, kv_heads=3, dim=48, gaps=True), dict(window=37)),
    "window of more than a block": (
        dict(lengths=[700], words=90, steps=7, q_heads=2, kv_heads=1, dim=16), dict(window=301, sinks=True)),
    "window of two": (dict(lengths=[200], words=60, steps=5, q_heads=2, kv_heads=1, dim=16), dict(window=2)),
    "not causal": (dict(lengths=[230, 230], words=60, steps=9, q_heads=3, kv_heads=3, dim=128), dict(causal=False)),
    "not causal, window, heads": (
        dict(lengths=[330], words=60, steps=9, q_heads=3, kv_heads=3, dim=64),
        dict(causal=False, window=120, head_reduction="none")),
    "packed, heads": (
        dict(lengths=[50, 1, 400, 33], words=30, steps=6, q_heads=4, kv_heads=2, dim=64, packed=True, gaps=True),
        dict(head_reduction="none")),
    "packed, window, sinks": (
        dict(lengths=[50, 1, 250, 193], words=30, steps=6, q_heads=4, kv_heads=2, dim=64, packed=True),
        dict(window=11, sinks=True)),
    "the largest head_dim": (dict(lengths=[211], words=20, steps=5, q_heads=4, kv_heads=2, dim=256), dict(scale=0.05)),
    "softcap": (dict(lengths=[230], words=60, steps=9, q_heads=4, kv_heads=2, dim=64), dict(softcap=2.0)),
    "a large softcap, window, sinks": (
        dict(lengths=[230], words=60, steps=9, q_heads=4, kv_heads=2, dim=64),
        dict(softcap=50.0, window=40, sinks=True)),
    "a negative scale": (dict(lengths=[111], words=20, steps=5, q_heads=4, kv_heads=2, dim=96), dict(scale=-0.1)),
}  # fmt: skip


def attention_results(function, name, dtype, upstream=("out", "maps"), **extra):
    """The output, the map and the gradients of those in ``upstream``, for inputs rounded to ``extra["given"]``."""
    shape, options = ATTENTION[name]
    given = extra.pop("given", dtype)
    (q, k, _), plan, cu = case(**shape)
    options, t = dict(options), torch.Generator().manual_seed(7)
    leaves = [q, k, torch.randn(k.shape, generator=t, dtype=torch.float64)]
    if options.pop("sinks", False):
        leaves.append(torch.linspace(-1, 2, q.shape[1], dtype=torch.float64))
    leaves = [x.to(given).to(dtype).requires_grad_() for x in leaves]
    sinks = leaves[3] if len(leaves) > 3 else None
    out, maps = function(*leaves[:3], plan, sinks=sinks, cu_seqlens=cu, **options, **extra)
    found = {"out": out, "maps": maps}
    loss = sum(
        (found[key].double() * torch.randn(found[key].shape, generator=t, dtype=torch.float64)).sum()
        for key in upstream
    )
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    found |= {name: g for name, g in zip(("dq", "dk", "dv", "dsinks"), grads, strict=False) if g is not None}
    return {key: value.detach() for key, value in found.items()}


UNITS = {
    "float32": (torch.float32, FLOAT32),
    "bfloat16 by float32": (torch.bfloat16, FLOAT32),
    "bfloat16 by AVX-512 BF16": (torch.bfloat16, VECTORS_BF16),
    "bfloat16 by AMX": (torch.bfloat16, TILES_BF16),
}


@pytest.fixture
def use_unit(monkeypatch):
    """A function that has calls use a unit of :data:`UNITS`, or skips the test, and returns the dtype of inputs."""

    def use(name):
        dtype, unit = UNITS[name]
        if unit not in build.bf16_units():
            pytest.skip(f"this processor, compiler or operating system has no {name.partition(' by ')[2]}")
        monkeypatch.setattr(attention_native, "bf16_unit", lambda: unit)
        return dtype

    return use


@needs_library
@pytest.mark.parametrize("upstream", [("out", "maps"), ("out",), ("maps",)], ids="+".join)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(use_unit, name, unit, upstream):
    dtype = use_unit(unit)
    oracle = attention_results(reference.stepwise_attention, name, torch.float64, upstream, given=dtype)
    eager = attention_results(reference.stepwise_attention, name, dtype, upstream)
    got = attention_results(mk.stepwise_attention, name, dtype, upstream, engine="native")
    for key, value in oracle.items():
        assert_within_budget(f"{name}: {key}", got.pop(key), value, eager[key])
    assert not any(value.any() for value in got.values())  # dv is zero if only the map has an upstream gradient


@needs_library
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["more rows than a block, more keys than a tile", "packed, window, sinks", "window"])
def test_attention_with_any_number_of_threads(use_unit, name, unit):
    """Bitwise reproducible; with more threads than heads, a head's rows are split and their dk and dv are added."""
    dtype = use_unit(unit)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7, 7, 16):
            torch.set_num_threads(count)
            found.append(attention_results(mk.stepwise_attention, name, dtype, engine="native"))
    finally:
        torch.set_num_threads(threads)
    for key, first in found[0].items():
        assert torch.equal(found[2][key], found[3][key]), key
        for other in found[1:]:
            torch.testing.assert_close(other[key], first)


@needs_library
def test_attention_in_concurrent_python_threads():
    name = "packed, window, sinks"
    expected = attention_results(mk.stepwise_attention, name, torch.float32, engine="native")

    def call(_):
        found = [attention_results(mk.stepwise_attention, name, torch.float32, engine="native") for _ in range(5)]
        return all(torch.equal(x[key], expected[key]) for x in found for key in expected)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(4)))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_attention_under_another_default_dtype_and_device(dtype):
    name = "packed, window, sinks"
    expected = attention_results(mk.stepwise_attention, name, torch.float32, engine="native")
    shape, options = ATTENTION[name]
    (q, k, _), plan, cu = case(**shape)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    sinks = torch.linspace(-1, 2, q.shape[1], dtype=torch.float64)
    leaves = [x.float().requires_grad_() for x in (q, k, v, sinks)]
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) for x in expected.values()][:2]

    def outputs_and_gradients():
        results = mk.stepwise_attention(
            *leaves[:3], plan, sinks=leaves[3], cu_seqlens=cu, window=options["window"], engine="native"
        )
        return *results, *torch.autograd.grad(results, leaves, weights)

    usual, before = outputs_and_gradients(), torch.get_default_dtype()
    _, plan, cu = case(**shape)  # a new plan, of which nothing is cached
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            found = outputs_and_gradients()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, usual, strict=True))


@needs_library
def test_rows_in_no_sequence_are_zero():
    """The public function requires that cu_seqlens covers all rows; a traced call cannot check it."""
    q, k, v = (torch.randn(1, h, 40, 16).requires_grad_() for h in (2, 1, 1))
    sinks = torch.tensor([1000.0, 0.5], requires_grad=True)
    plan = StepPlan.from_spans([[(0, 5)]], [[[1]]])
    cu = torch.tensor([3, 20], dtype=torch.int32)
    tensors = (plan.steps, plan.tokens, plan.word_of_token, 1)
    out, lse, maps = torch.ops.molsaki.stepwise_attention(
        q, k, v, sinks, cu, True, 0.25, None, None, False, *tensors, "native", ""
    )
    inside = slice(3, 20)
    whole = [t[:, :, inside] for t in (q, k, v)]
    expected, expected_maps = mk.stepwise_attention(*whole, plan, sinks=sinks, engine="native")
    torch.testing.assert_close(out[:, :, inside], expected)
    torch.testing.assert_close(maps, expected_maps)
    *grads, dsinks = torch.autograd.grad(out.sum() + maps.sum(), (q, k, v, sinks))
    assert dsinks.isfinite().all()
    for x in (out, lse[..., None], *grads):
        assert not x[:, :, :3].any() and not x[:, :, 20:].any() and x[:, :, inside].any()


@needs_library
@pytest.mark.parametrize("unit", UNITS)
def test_attention_far_from_zero(use_unit, unit):
    """Scores in the hundreds, sinks with all or none of the weight, and scores of -1e30."""
    dtype = use_unit(unit)
    q, k, v = torch.full((1, 5, 100, 16), 10.0), torch.randn(1, 5, 100, 16) * 10, torch.randn(1, 5, 100, 16)
    q[:, 4], k[:, 4] = 1e15, -1e15
    q, k, v = (x.to(dtype) for x in (q, k, v))
    plan = StepPlan.from_spans([[(0, 100)]], [[[3], [99]]])
    sinks = torch.tensor([1e4, float("inf"), -1e4, float("-inf"), float("-inf")])
    out, maps = mk.stepwise_attention(q, k, v, plan, sinks=sinks, head_reduction="none", engine="native")
    oracle, eager = (
        reference.stepwise_attention(q.to(t), k.to(t), v.to(t), plan, sinks=sinks.to(t), head_reduction="none")
        for t in (torch.float64, dtype)
    )
    for name, got, exact, eager_value in zip(("out", "maps"), (out, maps), oracle, eager, strict=True):
        assert_within_budget(name, got[:, :4], exact[:, :4], eager_value[:, :4])
    count = torch.arange(1, 101)[:, None]  # equal scores, so large that lse equals them even in float64
    torch.testing.assert_close(out[0, 4], (v[0, 4].float().cumsum(0) / count).to(dtype))
    torch.testing.assert_close(maps[0, 4, 0], torch.stack([(1 / count[3:]).sum(), 1 / count[99, 0]]))
    assert not out[:, :2].any() and not maps[0, :2].any()


@needs_library
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("scale", [1e-3, 1e2, 1e6, 1e9])
def test_gradients_of_large_scores(use_unit, unit, scale):
    """lse is rounded by more than one there, in units of the softmax's exponent; weights are still at most 1."""
    dtype = use_unit(unit)
    t = torch.Generator().manual_seed(0)
    x = [torch.randn(1, 2, 70, 64, generator=t).to(dtype) for _ in range(4)]
    plan = StepPlan.from_spans([[(0, 30), (30, 70)]], [[[3], [40]]])

    def run(function, kind, **engine):
        leaves = [y.to(kind).requires_grad_() for y in x[:3]]
        out, maps, lse = function(*leaves, plan, scale=scale, return_lse=True, **engine)
        grads = torch.autograd.grad([out, maps], leaves, [x[3].to(kind), torch.ones_like(maps)])
        return dict(zip(("out", "maps", "lse", "dq", "dk", "dv"), (out, maps, lse, *grads), strict=True))

    oracle, eager = run(reference.stepwise_attention, torch.float64), run(reference.stepwise_attention, dtype)
    for key, value in run(mk.stepwise_attention, dtype, engine="native").items():
        if oracle[key].any():
            assert_within_budget(key, value, oracle[key], eager[key])
        else:  # dq and dk where each row's weight is on one key: the rounding of dP - delta, times scale
            assert value.abs().max() <= 1e-3 * scale, key


@needs_library
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["v, window", "q, softcap", "k of one row, softcap"])
def test_a_number_that_is_not_finite_reaches_only_what_sees_it(use_unit, name, unit):
    """Neither rows that do not see a key, nor the rows and keys that fill up a block, add a NaN to a gradient."""
    dtype = use_unit(unit)
    M = 1 if name.startswith("k") else 47
    t = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 1, M, 16, generator=t).to(dtype) for _ in range(4))
    options = dict(window=2) if name == "v, window" else dict(softcap=3.0)
    if name == "v, window":
        v[..., 20, 3] = float("nan")
    else:
        (q if name.startswith("q") else k)[..., M // 2, 3] = float("-inf")
    plan = StepPlan.from_spans([[(0, M)]], [[[0]]])
    found = []
    for function, kind, extra in (
        (reference.stepwise_attention, torch.float64, {}), (mk.stepwise_attention, dtype, {"engine": "native"})
    ):  # fmt: skip
        leaves = [x.to(kind).requires_grad_() for x in (q, k, v)]
        out, maps = function(*leaves, plan, **options, **extra)
        found.append([maps, *torch.autograd.grad([out, maps], leaves, [dout.to(kind), torch.ones_like(maps)])])
    for key, oracle, value in zip(("maps", "dq", "dk", "dv"), *found, strict=True):
        assert not (value.isnan() & ~oracle.isnan()).any(), key


@needs_library
def test_lse_of_any_layout():
    """The backward operator accepts an lse with any strides."""
    (q, k, _), _, _ = case([40, 40], 5, 2, 3, 3, 16)
    q, k = q.float(), k.float()
    plan = StepPlan.from_spans([[(0, 40)]] * 2, [[[3], [9]]] * 2)
    options = (True, 0.25, None, None, False, plan.steps, plan.tokens, plan.word_of_token, 2, "native", "")
    out, lse, maps = torch.ops.molsaki.stepwise_attention(q, k, k, None, None, *options)
    other = lse.transpose(1, 2).contiguous().transpose(1, 2)
    upstream = (torch.randn_like(out), torch.randn_like(lse), torch.randn_like(maps))
    a, b = (
        torch.ops.molsaki.stepwise_attention_backward(*upstream, out, x, q, k, k, None, None, *options)
        for x in (lse, other)
    )
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@needs_library
def test_no_sequences():
    q = torch.randn(1, 2, 40, 16)
    nothing = StepPlan.from_spans([], [])
    tensors = (nothing.steps, nothing.tokens, nothing.word_of_token, 0)
    out, lse, maps = torch.ops.molsaki.stepwise_attention(
        q, q, q, None, torch.zeros(1, dtype=torch.int32), True, 0.25, None, None, False, *tensors, "native", ""
    )
    assert maps.shape == (0, 0, 0) and not out.any() and not lse.any()


@needs_library
@pytest.mark.parametrize("unit", UNITS)
def test_a_word_that_a_step_cannot_see_has_no_weight(use_unit, unit):
    """Its entry is exactly 0, also within a block that computes it. A NaN key affects only the rows that see it."""
    dtype = use_unit(unit)
    q, k, v = (torch.randn(1, 1, 200, 16).to(dtype) for _ in range(3))
    plan = StepPlan.from_spans([[(0, 50), (50, 200)]], [[[60], [120]]])
    _, maps = mk.stepwise_attention(q, k, v, plan, engine="native")
    assert maps[0, 0].tolist() == [0, 0] and (maps[0, 1] > 0).all()
    k[..., 120, 3] = float("nan")
    out, maps = mk.stepwise_attention(q, k, v, plan, engine="native")
    assert out[:, :, 120:].isnan().all() and out[:, :, :120].isfinite().all()
    assert maps[0, 0].tolist() == [0, 0] and maps[0, 1].isnan().all()
