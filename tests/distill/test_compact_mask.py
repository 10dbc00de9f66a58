"""Masks of the attention implementation "molsaki": compact ones, explicit ones, and packed texts."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import StaticCache

import molsaki
from molsaki.modeling.compact_mask import CompactMask
from molsaki.modeling.mask_function import attention_mask
from molsaki_kernels import StepPlan
from tests.helpers.architectures import TRANSFORMERS, batch, eager, five, make, relative


def test_code_that_operates_on_a_compact_mask_gets_the_additive_mask():
    padding = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()  # as transformers passes it
    mask = attention_mask(2, 4, 4, attention_mask=padding, local_size=3, dtype=torch.float64,
                          mask_function=transformers.masking_utils.sliding_window_causal_mask_function(3))  # fmt: skip
    assert isinstance(mask, CompactMask) and mask.window == 3 and mask.lengths.tolist() == [4, 2]
    expected = transformers.masking_utils.eager_mask(
        2, 4, 4, attention_mask=padding, dtype=torch.float64,
        mask_function=transformers.masking_utils.sliding_window_causal_mask_function(3),
    )  # fmt: skip
    scores = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for operate in (
        lambda mask: scores + mask,
        lambda mask: mask + scores,
        lambda mask: mask[:, :, :2],
        lambda mask: torch.cat([mask, mask], -1),
        lambda mask: mask == 0,
        lambda mask: mask.to(torch.float32),
        lambda mask: mask.expand(2, 3, 4, 4),
        lambda mask: torch.where(mask < 0, 0.0, scores),
    ):
        assert torch.equal(operate(mask), operate(expected))
    assert (mask.shape, mask.ndim, mask.dtype) == (expected.shape, 4, expected.dtype)
    moved = mask.to(torch.device("cpu"))
    assert isinstance(moved, CompactMask) and torch.equal(moved.tensor(), expected)


@five
def test_a_pattern_of_the_models_own_that_hides_the_usual_keys():
    """Gemma 3 with images builds its masks from blocks of tokens; without an image they are the usual ones."""
    model = make("Gemma3Text")
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.Gemma3Config(text_config=model.config.to_dict(), vision_config=vision, mm_tokens_per_image=4,
                                       image_token_index=60, boi_token_index=59, eoi_token_index=58)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).double().eval()
    inputs, plan = batch()
    inputs["input_ids"] = inputs["input_ids"].clamp(max=50)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    with molsaki.capture(model, plan) as record:
        model(**inputs)
    assert relative(record.maps, eager(model, inputs, plan)[0]) < 1e-6
    inputs["token_type_ids"][0, 3:7] = 1  # tokens of an image see one another
    with molsaki.capture(model, plan), pytest.raises(ValueError, match="a mask of the model's own pattern"):
        model(**inputs)


@five
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3Text"])
def test_a_prompt_in_a_static_cache(name):
    model = make(name, torch.float32)
    ids = batch()[0]["input_ids"][:1, :14]
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    model.set_attn_implementation("molsaki")
    found = model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=30)).logits
    assert relative(found, expected) < 1e-5


WAYS = {
    "static": dict(cache_implementation="static", disable_compile=True),
    "chunked prefill": dict(prefill_chunk_size=5),
    "assisted": dict(assistant_model=None),
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
    "beams": dict(num_beams=3),
    "no cache": dict(use_cache=False),
}


@five
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GptOss"])
def test_generation(name, way):
    model, options = make(name, torch.float32), dict(WAYS[way])
    helper = make(name, torch.float32, num_hidden_layers=2, layer_types=None)
    prompt = torch.randint(3, 61, (2, 14), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    if "assistant_model" in options:
        options["assistant_model"] = helper
    batches = [slice(0, 1)] if way in ("assisted", "prompt lookup") else [slice(0, 2), slice(0, 1)]
    for rows in batches:
        found = {}
        for implementation in ("eager", "molsaki"):
            model.set_attn_implementation(implementation)
            helper.set_attn_implementation(implementation)
            found[implementation] = model.generate(
                prompt[rows], attention_mask=mask[rows], max_new_tokens=8, do_sample=False, **options
            )
        assert torch.equal(found["eager"], found["molsaki"])


def test_packed_texts_that_only_positions_tell_apart():
    model = make("Mistral")
    ids = torch.randint(3, 61, (1, 12), generator=torch.Generator().manual_seed(7))
    position = torch.cat([torch.arange(5), torch.arange(7)])[None]
    two = StepPlan.from_spans([[(0, 5)], [(0, 7)]], [[[1]], [[2]]])
    with molsaki.capture(model, two) as record:
        model(ids, position_ids=position, cu_seq_lens_q=torch.tensor([0, 5, 12]).int(), use_cache=False)
    expected = record.maps
    one = StepPlan.from_spans([[(0, 5), (5, 12)]], [[[1], [7]]])
    for keywords in ({}, {"attention_mask": torch.ones_like(ids)}, {"use_cache": False}):
        with molsaki.capture(model, two) as record:
            model(ids, position_ids=position, **keywords)
        assert torch.equal(record.maps, expected)
        with molsaki.capture(model, one), pytest.raises(ValueError, match="expected one entry for each of 2 sequences"):
            model(ids, position_ids=position, **keywords)
    for wrong in (position.repeat(2, 1), torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13]])):
        with molsaki.capture(model, one), pytest.raises(ValueError, match="position_ids: expected"):
            model(ids.repeat(len(wrong), 1), position_ids=wrong)
    padded = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 1, 1, 1, 1, 1]])  # positions at the padding say nothing
    short = StepPlan.from_spans([[(0, 7)]], [[[1]]])
    with molsaki.capture(model, short) as record:
        model(ids, position_ids=padded, attention_mask=(torch.arange(12) < 7)[None].long())
    with molsaki.capture(model, short) as alone:
        model(ids[:, :7])
    assert relative(record.maps, alone.maps) < 1e-7


def test_without_a_plan_packed_positions_keep_texts_apart():
    model = make("Llama", torch.float32)
    model.set_attn_implementation("molsaki")
    ids = torch.randint(3, 61, (1, 12), generator=torch.Generator().manual_seed(7))
    position = torch.cat([torch.arange(5), torch.arange(7)])[None]
    found = model(ids, position_ids=position, use_cache=False).logits
    assert relative(found[:, 5:], model(ids[:, 5:], use_cache=False).logits) < 1e-5


def test_bounds_of_packed_texts_are_checked():
    ids = torch.randint(3, 61, (1, 12), generator=torch.Generator().manual_seed(7))
    position = torch.cat([torch.arange(5), torch.arange(7)])[None]
    bounds = torch.tensor([0, 5, 12])
    plan = StepPlan.from_spans([[(0, 5)], [(0, 7)]], [[[1]], [[2]]])
    model = make("Llama")
    hole = (torch.arange(12) != 3)[None].long()
    model.set_attn_implementation("molsaki")
    expected = model(ids, position_ids=position, cu_seq_lens_q=bounds, use_cache=False).logits
    for attend in (None, torch.ones_like(ids)):
        packed = dict(position_ids=position, attention_mask=attend, use_cache=False)
        empty = model(ids, cu_seq_lens_q=torch.tensor([0, 5, 5, 12]), **packed).logits
        assert relative(empty, expected) < 1e-7
    for keywords, message in (
        (dict(cu_seq_lens_q=torch.tensor([0, 12]), position_ids=position), "at which position_ids start again"),
        (dict(cu_seq_lens_q=[0, 5, 12]), "cu_seq_lens_q: expected a tensor"),
        (dict(cu_seq_lens_q=bounds, attention_mask=hole), "cu_seq_lens_q: expected packed texts"),
        (dict(cu_seq_lens_q=bounds, attention_mask=(torch.arange(12) < 9)[None].long()), "no padding with packed"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, use_cache=False, **keywords)
    if TRANSFORMERS > 4:
        gpt2 = make("GPT2")
        with molsaki.capture(gpt2, plan), pytest.raises(ValueError, match="position_ids: expected positions"):
            gpt2(ids, cu_seq_lens_q=bounds, use_cache=False)
