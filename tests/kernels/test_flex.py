"""Compares engine flex, uncompiled on CPU tensors, with the oracle, and the blocks of its masks with dense masks.

PyTorch refuses gradients of FlexAttention on a CPU, although its dense implementation has them; the check is disabled
here. The function that is compiled for CUDA gets the same arguments.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch.nn.attention import flex_attention as flex_api
from torch.utils.checkpoint import checkpoint

import molsaki_kernels as mk
from molsaki_kernels import reference
from molsaki_kernels.attention import flex
from molsaki_kernels.spec import AttentionInputs, AttentionOptions, AttentionRequest
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.kernels.test_attention import FEATURES, PLANS, compare, inputs, run

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(flex_api, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "compiled", lambda: flex_api.flex_attention)
    monkeypatch.setattr(flex, "available", lambda: None)
    monkeypatch.setattr(flex, "why_not", lambda call: None)


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature):
    for dtype in (torch.float32, torch.bfloat16):
        compare("flex", "ragged", FEATURES[feature], dtype)
        compare("flex", "ragged", FEATURES[feature], dtype, source="maps")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("feature", ["everything", "packed, window, sinks"])
def test_other_dtypes(feature, dtype):
    compare("flex", "ragged", FEATURES[feature], dtype)


def test_output_as_the_only_gradient():
    compare("flex", "ragged", dict(sinks=True), torch.float32, source="out")


@pytest.mark.parametrize("plan_name", [name for name in PLANS if name != "ragged"])
def test_plans(plan_name):
    compare("flex", plan_name, {}, torch.float32)
    compare("flex", plan_name, dict(packed=True, head_reduction="none", sinks=True), torch.float32)


@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize("layout", ["bhmd", "bmhd"])
def test_shapes(groups, layout):
    compare("flex", "ragged", {}, torch.float32, groups=groups, layout=layout, dim=80)


def test_empty_batch_and_empty_sequence():
    for batch, length in ((0, 5), (2, 0)):
        q, sinks = torch.zeros(batch, 2, length, 8, requires_grad=True), torch.zeros(2, requires_grad=True)
        plan = mk.StepPlan.from_spans([[]] * batch, [[]] * batch)
        out, maps = mk.stepwise_attention(q, q, q, plan, sinks=sinks, engine="flex")
        assert out.shape == q.shape and maps.shape == (batch, 0, 0)
        (out.sum() + maps.sum()).backward()
        assert q.grad.shape == q.shape
    cu = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    plan = mk.StepPlan.from_spans([[(0, 3)], [], [(0, 2)]], [[[1]], [], [[0]]])
    out, maps = mk.stepwise_attention(q, q, q, plan, cu_seqlens=cu, engine="flex")
    assert maps.shape == (3, 1, 1) and maps[1].item() == 0 and maps[0].item() > 0


def test_checkpointing_and_inference_mode():
    tensors, plan, cu = inputs("ragged", torch.float32, packed=True)
    with torch.inference_mode():  # the masks that it keeps must work in a later backward
        mk.stepwise_attention(*tensors, plan[0], window=41, engine="flex")
        mk.stepwise_attention(*tensors, plan, cu_seqlens=cu, window=40, engine="flex")
    q, k, v = tensors

    def layer(q):
        out, maps = mk.stepwise_attention(q, k, v, plan, cu_seqlens=cu, window=40, engine="flex")
        again, more = mk.stepwise_attention(out, k, v, plan[0], window=41, engine="flex")
        return again.sum() + maps.square().sum() + more.sum()

    grads = []
    for function in (layer, lambda q: checkpoint(layer, q, use_reentrant=False)):
        x = q.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(x), x)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("feature", ["plain", "softcap", "packed, window, sinks"])
def test_compile(feature):
    """Forward and backward compile to one graph, as for Inductor on a CUDA machine."""
    options = dict(FEATURES[feature])
    packed, sinks = options.pop("packed", False), options.pop("sinks", False)
    tensors, plan, cu = inputs("ragged", torch.float32, packed=packed, sinks=sinks)
    compiled = torch.compile(mk.stepwise_attention, fullgraph=True, backend="aot_eager")
    a = run(mk.stepwise_attention, tensors, plan, cu, options, torch.float32, engine="flex")
    b = run(compiled, tensors, plan, cu, options, torch.float32, engine="flex")
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_compile_with_changing_numbers():
    """With a second softcap, scale or window, these numbers become symbols in the caller's graph."""
    tensors, plan, _ = inputs("ragged", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(mk.stepwise_attention, fullgraph=True, backend="aot_eager")
    for softcap, scale, window in ((3.0, 0.3, 9), (4.0, 0.4, 12)):
        options = dict(softcap=softcap, scale=scale, window=window)
        a = run(mk.stepwise_attention, tensors, plan, None, options, torch.float32, engine="eager")
        b = run(compiled, tensors, plan, None, options, torch.float32, engine="flex")
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_one_compilation_for_each_softcap(monkeypatch):
    """Compiled as by the engine, except for the backend: without symbols, and without a limit of eight compilations."""
    monkeypatch.undo()
    monkeypatch.setattr(flex_api, "_validate_device", lambda *tensors: None)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **kw: compile(function, backend="aot_eager", **kw))
    flex.compiled.cache_clear()
    torch._dynamo.reset()
    q = torch.randn(1, 2, 20, 16, requires_grad=True)
    try:
        for i in range(9):
            options = AttentionOptions(True, 0.1 + i, window=3 + i, softcap=1.0 + i)
            _, lse, _ = vars(flex.forward(AttentionInputs(q, q, q), options, None)).values()
            _, expected = reference.attention_weights(q, q, scale=0.1 + i, window=3 + i, softcap=1.0 + i)
            torch.testing.assert_close(lse, expected)
            (dq,) = torch.autograd.grad(lse.square().sum(), q)
            torch.testing.assert_close(dq, torch.autograd.grad(expected.square().sum(), q)[0], rtol=1e-4, atol=1e-4)
    finally:
        flex.compiled.cache_clear()


def dense(count, indices):
    """The blocks that a BlockMask lists: ``count (..., n)`` entries of each row of ``indices (..., n, m)``."""
    m = indices.shape[-1]
    listed = torch.arange(m) < count[..., None]
    blocks = torch.zeros(*indices.shape[:-1], m + 1, dtype=torch.bool)
    return blocks.scatter_(-1, torch.where(listed, indices, m).long(), True)[..., :m]


LENGTHS = {
    "one row": [1],
    "one block": [128],
    "ragged": [300],
    "whole blocks": [512],
    "packed": [40, 0, 88, 1, 200, 128, 55],
    "packed, whole blocks": [128, 256, 128],
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 60, 128, 129, 250])
@pytest.mark.parametrize("name", LENGTHS)
def test_blocks(name, window, causal):
    """Compared with blocks found from every pair: the full blocks are the same, and no partial block is missing."""
    lengths, M = LENGTHS[name], sum(LENGTHS[name])
    cu = torch.tensor([0, *lengths]).cumsum(0).int() if "packed" in name else None
    mask = flex._make_mask(M, causal, window, torch.device("cpu"), cu)
    if mask is None:
        assert causal is False and window is None and cu is None
        return
    expected = flex_api.create_block_mask(mask.mask_mod, None, None, M, M, device="cpu")
    assert mask.shape == expected.shape and mask.BLOCK_SIZE == expected.BLOCK_SIZE

    full = dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    partial = dense(mask.kv_num_blocks, mask.kv_indices)
    assert torch.equal(full, dense(expected.full_kv_num_blocks, expected.full_kv_indices))
    needed = dense(expected.kv_num_blocks, expected.kv_indices)
    assert not (needed & ~partial).any() and not (full & partial).any()
    if cu is None:
        assert torch.equal(partial, needed)
    assert torch.equal(dense(mask.q_num_blocks, mask.q_indices), partial.mT)
    assert torch.equal(dense(mask.full_q_num_blocks, mask.full_q_indices), full.mT)


def test_masks_are_kept_as_long_as_their_cu_seqlens():
    q = torch.zeros(1, 2, 300, 16)
    cu = torch.tensor([0, 100, 300], dtype=torch.int32)
    causal, window = AttentionOptions(True, 0.25), AttentionOptions(True, 0.25, window=9)
    gc.collect()
    before = len(flex._packed_masks)

    def mask_of(q, cu, options):
        return flex._mask(AttentionInputs(q, q, q, None, cu), options)

    mask = mask_of(q, cu, causal)
    assert mask_of(q, cu, causal) is mask and mask_of(q, cu, window) is not mask
    assert mask_of(q, cu, causal) is mask
    assert mask_of(q, cu.clone(), causal) is not mask
    cu[1] = 200  # in place: the mask of the old values must not be used
    assert mask_of(q, cu, causal) is not mask
    assert mask_of(q, cu, causal).mask_mod(0, 0, torch.tensor(150), torch.tensor(50))
    del cu
    gc.collect()
    assert len(flex._packed_masks) == before
    assert mask_of(q, None, causal) is mask_of(q + 1, None, AttentionOptions(True, 7.0))


def test_reasons_for_refusal(monkeypatch):
    monkeypatch.undo()
    call = AttentionRequest(
        device=torch.device("cuda"), dtype=torch.float32, batch=1, q_heads=2, kv_heads=1, length=9, head_dim=16,
        options=AttentionOptions(False, -1.0, 3, 2.0), sinks=True, packed=True, backward=True,
    )  # fmt: skip

    def reason(**changes):
        return flex.why_not(AttentionRequest(**(vars(call) | changes)))

    assert reason() is None
    assert "not for cpu tensors" in reason(device=torch.device("cpu"))
    assert "not torch.float64" in reason(dtype=torch.float64)
    assert "head_dim 16 and more, not 8" in reason(head_dim=8)
    (q, k, v), plan, _ = inputs("some empty", torch.float32)
    if not torch.cuda.is_available():
        assert "no GPU" in str(mk.engines()["flex"])
    with pytest.raises(ValueError, match="'flex' cannot serve this call"):
        mk.stepwise_attention(q, k, v, plan, engine="flex")
