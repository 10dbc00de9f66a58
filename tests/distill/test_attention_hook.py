"""The attention implementation "molsaki" on real architectures, against their own eager attention."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import molsaki
from molsaki.modeling.attention_hook import attention
from molsaki_kernels import StepPlan, ops
from molsaki_kernels._native import build
from molsaki_kernels.reference import pool_values
from tests.helpers.architectures import (  # noqa: F401
    ARCHITECTURES,
    TRANSFORMERS,
    batch,
    eager,
    five,
    make,
    objective,
    relative,
    skip_gpt2_before_transformers_5,
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_maps_and_weight_gradients_equal_eager(name):
    model = make(name)
    inputs, plan = batch()
    maps, logits = eager(model, inputs, plan)
    expected = torch.autograd.grad(objective(maps, logits, inputs["attention_mask"]), list(model.parameters()),
                                   allow_unused=True)  # fmt: skip
    with molsaki.capture(model, plan) as record:
        out = model(**inputs)
    got = torch.autograd.grad(objective(record.maps, out.logits, inputs["attention_mask"]), list(model.parameters()),
                              allow_unused=True)  # fmt: skip
    assert record.maps.shape == (2, model.config.num_hidden_layers, 3, 4)
    assert relative(record.maps, maps) < 1e-7  # norms and rotary embeddings are float32 on both sides
    real = inputs["attention_mask"].bool()
    assert relative(out.logits[real], logits[real]) < 1e-6
    for (parameter, _), a, b in zip(model.named_parameters(), got, expected, strict=True):
        assert (a is None) == (b is None), parameter
        if b is not None and b.norm() > 1e-9:
            assert relative(a, b) < 1e-6, parameter
    assert model.config._attn_implementation == "eager"


def gradients(model, record, out, inputs):
    loss = objective(record.maps, out.logits, inputs["attention_mask"])
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2", "GptOss"])
def test_gradient_checkpointing_changes_nothing(name):
    model = make(name)
    inputs, plan = batch()
    with molsaki.capture(model, plan, values=True) as record:
        out = model(**inputs, use_cache=False)
        expected_maps, expected = record.maps, gradients(model, record, out, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with molsaki.capture(model, plan, values=True) as record:
        out = model(**inputs, use_cache=False)
        got = gradients(model, record, out, inputs)
        assert record.maps.shape == expected_maps.shape  # the second run of the layers left no trace
        assert record.values.shape[1] == model.config.num_hidden_layers
    torch.testing.assert_close(record.maps, expected_maps, rtol=0, atol=0)
    for a, b in zip(got, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32_goes_through_the_native_engine(monkeypatch, name):
    """Heads of 16, as the engine takes them: maps and weight gradients off by at most twice what eager's are."""
    if build.why_not():
        pytest.skip(build.why_not())
    wide = (
        dict(n_embd=64)
        if name == "GPT2"
        else dict(hidden_size=64, **({"head_dim": 16} if "head_dim" in ARCHITECTURES[name] else {}))
    )
    model = make(name, torch.float32, **wide)
    exact = copy.deepcopy(model).double()
    if name == "GptOss" and TRANSFORMERS > 4:
        exact.set_experts_implementation("eager")
    inputs, plan = batch()
    run, engines = ops.run_attention, []
    monkeypatch.setattr(ops, "run_attention", lambda *call: engines.append(call[-2]) or run(*call))

    def results(model, by_hand):
        if by_hand:
            maps, logits = eager(model, inputs, plan)
        else:
            with molsaki.capture(model, plan) as record:
                logits = model(**inputs).logits
            maps = record.maps
        grads = torch.autograd.grad(objective(maps, logits, inputs["attention_mask"]), list(model.parameters()),
                                    allow_unused=True)  # fmt: skip
        return [maps, *(g for g in grads if g is not None)]

    oracle, by_eager, ours = results(exact, True), results(model, True), results(model, False)
    assert engines == ["native"] * model.config.num_hidden_layers
    assert relative(ours[0], oracle[0]) <= 2 * relative(by_eager[0], oracle[0]) + 2**-23
    errors = [torch.tensor([relative(a, b) for a, b in zip(x[1:], oracle[1:], strict=True)]) for x in (ours, by_eager)]
    assert errors[0].norm() <= 2 * errors[1].norm() + 2**-23


def test_reentrant_checkpointing_is_refused():
    model = make("Llama")
    inputs, plan = batch()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model.train()
    with molsaki.capture(model, plan), pytest.raises(ValueError, match="use_reentrant"):
        model(**inputs, use_cache=False)
    assert model.config._attn_implementation != "molsaki"


def test_maps_come_back_as_attentions():
    model = make("Llama")
    inputs, plan = batch()
    with molsaki.capture(model, plan) as record:
        model(**inputs)
    model.set_attn_implementation("molsaki")
    out = model(**inputs, step_plan=plan, output_attentions=True)
    assert len(out.attentions) == model.config.num_hidden_layers
    torch.testing.assert_close(torch.stack(out.attentions, 1), record.maps, rtol=0, atol=0)
    assert model(**inputs).attentions is None


def test_values_are_pooled_without_padding():
    model = make("Llama")
    inputs, plan = batch()
    seen = []
    handles = [
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, out: seen.append(out))
        for layer in model.model.layers
    ]
    with molsaki.capture(model, plan, values=True) as record:
        model(**inputs)
    for handle in handles:
        handle.remove()
    lengths = inputs["attention_mask"].sum(1)
    for layer, value in enumerate(seen):
        expected = pool_values(value.unflatten(-1, (2, 8)).transpose(1, 2), lengths)
        torch.testing.assert_close(record.values[:, layer], expected)
    with molsaki.capture(model, plan, values=True, value_heads="mean", pooling="mean") as record:
        model(**inputs)
    expected = pool_values(seen[0].unflatten(-1, (2, 8)).transpose(1, 2), lengths, heads="mean", pooling="mean")
    torch.testing.assert_close(record.values[:, 0], expected)
    with molsaki.capture(model, plan) as record:
        model(**inputs)
        with pytest.raises(ValueError, match="values=True"):
            record.values


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_is_that_of_eager(name):
    model = make(name, torch.float32)
    prompt = torch.randint(3, 61, (2, 14), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0  # left padding, as generation wants it
    for rows in (slice(0, 2), slice(0, 1)):  # a padded batch, and one without any padding
        arguments = dict(attention_mask=mask[rows], max_new_tokens=8, do_sample=False, use_cache=True)
        model.set_attn_implementation("eager")
        expected = model.generate(prompt[rows], **arguments)
        model.set_attn_implementation("molsaki")
        assert torch.equal(model.generate(prompt[rows], **arguments), expected)


def test_packed_sequences_equal_separate_ones():
    model = make("Mistral")
    inputs, plan = batch()
    with molsaki.capture(model, plan, values=True) as record:
        model(**inputs)
    expected = record.maps.detach(), record.values.detach()
    lengths = inputs["attention_mask"].sum(1).tolist()
    ids = torch.cat([row[:n] for row, n in zip(inputs["input_ids"], lengths, strict=True)])[None]
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    with molsaki.capture(model, plan, values=True) as record:
        model(input_ids=ids, position_ids=position, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds,
              max_length_q=max(lengths), max_length_k=max(lengths), use_cache=False)  # fmt: skip
    torch.testing.assert_close(record.maps, expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(record.values, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["GPT2", "GptOss"])
def test_dropout_drops_the_output_and_not_the_map(name):
    field = "attn_pdrop" if name == "GPT2" else "attention_dropout"
    model = make(name, torch.float32, **{field: 0.5})
    inputs, plan = batch()
    with molsaki.capture(model, plan) as record:
        still = model(**inputs).logits
        expected = record.maps
        model.train()
        torch.manual_seed(0)
        dropped = model(**inputs).logits
    torch.testing.assert_close(record.maps[:, 0], expected[:, 0])  # the first layer's input has seen no dropout
    assert not torch.allclose(dropped, still, atol=1e-3)


def test_dropout_keeps_packed_texts_apart():
    model = make("GptOss", torch.float32, attention_dropout=0.5).train()
    bounds = torch.tensor([0, 9, 16], dtype=torch.int32)
    ids = torch.randint(3, 61, (1, 16), generator=torch.Generator().manual_seed(5))
    other = torch.cat([ids[:, :9].flip(1), ids[:, 9:]], 1)
    position = torch.cat([torch.arange(9), torch.arange(7)])[None]
    outs = []
    for row in (ids, other):
        torch.manual_seed(0)
        with molsaki.capture(model, StepPlan.from_spans([[(0, 4)]] * 2, [[[1]]] * 2)):
            outs.append(model(row, position_ids=position, cu_seq_lens_q=bounds, use_cache=False).logits)
    torch.testing.assert_close(outs[0][:, 9:], outs[1][:, 9:])
    assert not torch.allclose(outs[0][:, :9], outs[1][:, :9], atol=1e-2)


def test_autocast_and_bfloat16():
    model = make("Llama", torch.float32)
    inputs, plan = batch()
    with molsaki.capture(model, plan) as record:
        model(**inputs)
    expected = record.maps
    with torch.autocast("cpu", torch.bfloat16), molsaki.capture(model, plan, values=True) as record:
        model(**inputs)
    assert record.maps.dtype == record.values.dtype == torch.float32
    assert relative(record.maps, expected) < 0.05  # eight bits of mantissa through four layers


def test_left_padding_with_a_plan_is_refused():
    model = make("Llama")
    inputs, plan = batch()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with molsaki.capture(model, plan), pytest.raises(ValueError, match="right-padded"):
        model(**inputs)
    assert model.config._attn_implementation != "molsaki"


def test_a_cache_with_a_plan_is_refused():
    model = make("Llama")
    inputs, plan = batch()
    cache = model(input_ids=inputs["input_ids"], use_cache=True).past_key_values
    with molsaki.capture(model, plan), pytest.raises(ValueError, match="step_plan"):
        model(input_ids=inputs["input_ids"], past_key_values=cache)


def test_missing_plan():
    model = make("Llama")
    inputs, _ = batch()
    model.set_attn_implementation("molsaki")
    with pytest.raises(ValueError, match="step_plan: expected a StepPlan"):
        model(**inputs, output_attentions=True)


def test_plan_of_another_batch():
    model = make("Llama")
    inputs, plan = batch()
    with molsaki.capture(model, plan[0]), pytest.raises(ValueError, match="step_plan|plan: expected one entry"):
        model(**inputs)
    longer = StepPlan.from_spans([[(0, 5)], [(0, 5)]], [[[2]], [[33]]])  # in the second sequence's padding
    with molsaki.capture(model, longer), pytest.raises(ValueError, match="29 tokens before its padding"):
        model(**inputs)
    beyond = StepPlan.from_spans([[(0, 5)], [(0, 5)]], [[[2]], [[44]]])
    with molsaki.capture(model, beyond), pytest.raises(ValueError, match="reaches 45"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(TypeError, match="plan: expected a StepPlan"), molsaki.capture(model, [[(0, 5)]]):
        pass
    with pytest.raises(TypeError, match="model: expected a Hugging Face model"):
        with molsaki.capture(torch.nn.Linear(2, 2), plan):
            pass


def test_implementation_is_restored_after_an_exception():
    model = make("Llama")
    model.set_attn_implementation("eager")
    inputs, plan = batch()
    with pytest.raises(RuntimeError, match="mine"), molsaki.capture(model, plan) as record:
        model(**inputs)
        raise RuntimeError("mine")
    assert model.config._attn_implementation == "eager"
    before = record.maps.clone()
    model(**inputs)  # no hook is left behind
    assert torch.equal(record.maps, before)


def test_record_before_any_forward():
    model = make("Llama")
    with molsaki.capture(model, batch()[1]) as record, pytest.raises(ValueError, match="no forward"):
        record.maps


def test_capture_through_a_wrapper():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    model = make("Llama")
    inputs, plan = batch()
    with molsaki.capture(model, plan) as record:
        model(**inputs)
    with molsaki.capture(Wrapper(model), plan) as wrapped:
        Wrapper(model)(**inputs)  # another wrapper: nothing is captured through a module that was not named
        with pytest.raises(ValueError, match="no forward"):
            wrapped.maps
    wrapper = Wrapper(model)
    with molsaki.capture(wrapper, plan) as wrapped:
        wrapper(**inputs)
    assert torch.equal(wrapped.maps, record.maps)


def test_a_real_causality():
    """The first step, one token, attends to itself alone; no later token leaks in."""
    model = make("Llama")
    inputs, _ = batch()
    plan = StepPlan.from_spans([[(0, 1), (1, 40)]] * 2, [[[0], [20]]] * 2)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with molsaki.capture(model, plan) as record:
        model(**inputs)
    torch.testing.assert_close(record.maps[..., 0, 0], torch.ones(2, 4, dtype=torch.float64))
    assert (record.maps[..., 0, 1] == 0).all()


def test_unknown_keywords_are_refused():
    model = make("Llama", torch.float32)
    inputs, plan = batch()
    model.set_attn_implementation("molsaki")
    for name in ("indices", "block_indices", "anything_new"):
        with pytest.raises(ValueError, match=f"^{name}: the attention implementation"):
            model(**inputs, **{name: torch.zeros(1)})
        with molsaki.capture(model, plan), pytest.raises(ValueError, match=f"^{name}: "):
            model(**inputs, **{name: torch.zeros(1)})
        model(**inputs, **{name: None})


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_position_bias_and_masks_mean_what_they_mean_in_sdpa(is_causal, mask):
    if TRANSFORMERS < 5:
        pytest.skip("transformers 4 has no position_bias")
    module = torch.nn.Identity()
    module.is_causal, module.num_key_value_groups = is_causal, 2
    q, k, v = (torch.randn(2, heads, 9, 8, dtype=torch.float64) for heads in (4, 2, 2))
    bias = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    given = None if mask is None else torch.rand(2, 1, 9, 9) > 0.3
    if mask is not None:
        given |= torch.eye(9, dtype=torch.bool)
    if mask == "float":
        given = torch.where(given, q.new_zeros(()), torch.finfo(q.dtype).min)
    for position_bias in (None, bias):
        expected, _ = sdpa_attention_forward(module, q, k, v, given, position_bias=position_bias)
        found, _ = attention(module, q, k, v, given, position_bias=position_bias)
        torch.testing.assert_close(found, expected)
    plan = StepPlan.from_spans([[(0, 4)]] * 2, [[[1]]] * 2)
    with pytest.raises(ValueError, match="step_plan: .*position_bias"):
        attention(module, q, k, v, given, position_bias=bias, step_plan=plan)


def test_a_mask_of_none_beside_a_static_cache_is_causal():
    module = torch.nn.Identity()
    module.is_causal, module.num_key_value_groups = True, 1
    q, k, v = (torch.randn(1, 2, n, 8) for n in (5, 9, 9))
    expected, _ = attention(module, q, k[:, :, :5], v[:, :, :5], None)
    torch.testing.assert_close(attention(module, q, k, v, None)[0], expected)
    with pytest.raises(ValueError, match="step_plan: .*5 queries with"):
        attention(module, q, k, v, None, step_plan=StepPlan.from_spans([[(0, 4)]], [[[1]]]))


@five
def test_cross_attention_that_does_not_say_that_it_is_causal():
    module = torch.nn.Identity()
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(attention(module, q, k, v, None)[0], expected)
    with pytest.raises(ValueError, match="attention that is not causal"):
        attention(module, q, k, v, None, step_plan=StepPlan.from_spans([[(0, 4)]], [[[1]]]))
