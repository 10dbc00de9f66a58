"""`capture`: which models have maps, and blocks, checkpointing, threads and wrappers."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

import molsaki
from molsaki.modeling import mask_function
from molsaki_kernels import StepPlan
from tests.helpers.architectures import (
    SMALL,
    TRANSFORMERS,
    batch,
    eager,
    five,
    make,
    objective,
    random_model,
    relative,
    softmax_in_float64,
)


@pytest.mark.parametrize("name", ["StableLm", "Nemotron"])
def test_models_that_drop_keywords(name):
    config = {key: value for key, value in SMALL.items() if key != "head_dim"}
    model = random_model(name, config)
    inputs, plan = batch()
    maps, logits = eager(model, inputs, plan)
    with molsaki.capture(model, plan, values=True) as record:
        out = model(**inputs)
    assert relative(record.maps, maps) < 1e-6
    assert relative(out.logits[inputs["attention_mask"].bool()], logits[inputs["attention_mask"].bool()]) < 1e-6
    assert record.layers == tuple(range(4)) and record.values.shape[1] == 4


@five
def test_two_calls_of_attention_per_layer():
    """DiffLlama computes each layer's scores twice, for the two halves of the values; eager returns the first ones."""
    model = random_model("DiffLlama", SMALL)
    inputs, plan = batch()
    maps, _ = eager(model, inputs, plan)
    with molsaki.capture(model, plan) as record:
        model(**inputs)
    assert record.layers == (0, 0, 1, 1, 2, 2, 3, 3)
    assert relative(record.maps[:, ::2], maps) < 1e-6
    assert relative(record.maps[:, 1::2], maps) < 1e-6


@five
def test_layers_without_attention_are_not_in_the_record():
    config = {k: v for k, v in SMALL.items() if k not in ("num_hidden_layers", "head_dim")}
    model = random_model("Lfm2", config | dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]))
    inputs, plan = batch()
    with molsaki.capture(model, plan) as record:
        model(**inputs)
    assert record.layers == (1,) and record.maps.shape[1] == 1
    longer = StepPlan.from_spans([[(0, 5)], [(0, 5)]], [[[2]], [[33]]])  # in the second sequence's padding
    with molsaki.capture(model, longer), pytest.raises(ValueError, match="29 tokens before its padding"):
        model(**inputs)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    packed = dict(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), cu_seq_lens_q=torch.tensor([0, 3, 6]).int())
    two = StepPlan.from_spans([[(0, 3)]] * 2, [[[1]]] * 2)
    with molsaki.capture(model, two), pytest.raises(ValueError, match="does not keep packed texts separate"):
        model(ids, **packed, use_cache=False)


def test_models_without_the_attention_interface_are_refused_at_once():
    _, plan = batch()
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1))
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=9, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="MambaForCausalLM has no attention layers"), molsaki.capture(mamba, plan):
        pytest.fail("entered")
    with pytest.raises(ValueError, match="Bloom.*attention by itself, not through"), molsaki.capture(bloom, plan):
        pytest.fail("entered")
    assert bloom.config._attn_implementation != "molsaki"


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_checkpointing_with_the_backward_after_the_block(name):
    model = make(name)
    inputs, plan = batch()
    with molsaki.capture(model, plan, values=True) as record:
        out = model(**inputs, use_cache=False)
    loss = objective(record.maps, out.logits, inputs["attention_mask"]) + record.values.sum()
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with molsaki.capture(model, plan, values=True) as record:
        out = model(**inputs, use_cache=False)
    with molsaki.capture(model, StepPlan.from_spans([[(0, 3)]], [[[1]]])):  # another batch before the backward
        model(inputs["input_ids"][:1], use_cache=False)
    loss = objective(record.maps, out.logits, inputs["attention_mask"]) + record.values.sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert model.config._attn_implementation != "molsaki"
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_checkpointing_by_other_means_after_the_block_is_refused():
    model = make("Llama")
    inputs, plan = batch()
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    with molsaki.capture(model, plan) as record:
        model(**inputs, use_cache=False)
        record.maps.sum().backward()
    with molsaki.capture(model, plan) as record:
        model(**inputs, use_cache=False)
    with pytest.raises(ValueError, match="call backward inside the block"):
        record.maps.sum().backward()


def test_blocks_in_blocks_and_in_threads():
    model, other = make("Llama"), make("Mistral")
    inputs, plan = batch()
    with molsaki.capture(model, plan) as record:
        with pytest.raises(ValueError, match="is in a capture block already"), molsaki.capture(model, plan):
            pytest.fail("entered")
        with molsaki.capture(other, plan) as inner:  # teacher and student
            other(**inputs)
            model(**inputs)
    assert record.maps.shape == inner.maps.shape
    expected = [record.maps, inner.maps]
    found = [None, None]

    def run(index: int, model) -> None:
        with molsaki.capture(model, plan) as record:
            model(**inputs)
        found[index] = record.maps

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((model, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_traced_end_of_the_block_leaves_no_active_record(monkeypatch):
    """A compiled graph sees no active record, but the one that it makes active stays so after the graph."""
    model = make("Llama")
    inputs, plan = batch()
    with molsaki.capture(model, plan) as record:

        def stop(*_):
            assert mask_function.active_record() is record
            with monkeypatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
                record.stop()
            assert mask_function.active_record() is None

        handle = model.register_forward_hook(stop, prepend=True)
        model(**inputs)
        handle.remove()


def test_each_part_gets_its_own_implementation_back():
    if TRANSFORMERS < 5:
        pytest.skip("transformers 4 sets one implementation for all parts")
    text = transformers.LlamaConfig(**SMALL)
    vision = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                           num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=60)
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa", "": "eager"})
    before = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    assert {"eager", "sdpa"} <= set(before)
    inputs, plan = batch()
    inputs["input_ids"] = inputs["input_ids"].clamp(max=59)
    with molsaki.capture(model, plan) as record:
        assert model.model.vision_tower.config._attn_implementation == "sdpa"
        model(**inputs)
    assert [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")] == before
    assert relative(record.maps, eager(model, inputs, plan)[0]) < 1e-6


def test_data_parallel_is_refused():
    model = make("Llama")
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        with molsaki.capture(torch.nn.DataParallel(model), batch()[1]):
            pytest.fail("entered")


def test_tokens_before_the_text_are_refused():
    """As PEFT's prompt tuning: the plan's positions are those of the text that the caller gave."""

    class Prompted(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.prompt = model, torch.nn.Parameter(torch.randn(1, 3, 32, dtype=torch.float64))

        def forward(self, input_ids, **kwargs):
            embedded = self.model.get_input_embeddings()(input_ids)
            prompt = self.prompt.expand(len(embedded), -1, -1)
            return self.model(inputs_embeds=torch.cat([prompt, embedded], 1), **kwargs)

    model, (inputs, plan) = Prompted(make("Llama")), batch()
    for call in (lambda: model(inputs["input_ids"]), lambda: model(input_ids=inputs["input_ids"])):
        with (
            molsaki.capture(model, plan),
            pytest.raises(ValueError, match="has 43 tokens where its forward was given 40"),
        ):
            call()


def test_a_wrapper_around_two_models_is_refused():
    model = make("Llama")
    both = torch.nn.ModuleDict({"student": model, "teacher": type(model)(model.config)})
    with pytest.raises(ValueError, match="around one Hugging Face model"), molsaki.capture(both, batch()[1]):
        pytest.fail("entered")


def test_models_that_share_a_config():
    model = make("Llama")
    other = type(model)(model.config).double()
    inputs, plan = batch()
    before = model.config._attn_implementation
    first, second = molsaki.capture(model, plan), molsaki.capture(other, plan)
    first.__enter__()
    record = second.__enter__()
    first.__exit__(None, None, None)
    other(**inputs)
    second.__exit__(None, None, None)
    assert record.maps.shape == (2, 4, 3, 4)
    assert model.config._attn_implementation == before


def test_a_forward_that_failed_has_no_maps():
    model = make("Llama")
    inputs, plan = batch()

    def fail(*_):
        raise RuntimeError("mine")

    with molsaki.capture(model, plan) as record:
        handle = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="mine"):
            model(**inputs)
        with pytest.raises(ValueError, match="the last forward failed"):
            record.maps
        handle.remove()
        model(**inputs)
        assert record.maps.shape == (2, 4, 3, 4)


def test_a_wrapper_that_runs_the_model_twice_is_refused():
    class Twice(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):  # takes no keywords: the record comes with the mask
            self.model(input_ids)
            return self.model(input_ids)

    model = Twice(make("Llama"))
    inputs, plan = batch()
    with molsaki.capture(model, plan), pytest.raises(ValueError, match="layer 0 ran after layer 3 in one forward"):
        model(inputs["input_ids"])


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_maps_of_each_head(name):
    """Against the weights of eager attention, and their mean is the map of the layer, with the gradient."""
    model = make(name)
    inputs, plan = batch()
    with molsaki.capture(model, plan) as record:
        model(**inputs)
    mean = record.maps
    with molsaki.capture(model, plan, values=True, map_heads="each") as record:
        model(**inputs)
    heads, layers = model.config.num_attention_heads, len(record.layers)
    assert record.maps.shape == (len(plan), layers * heads, plan.num_steps, plan.num_words)
    each = record.maps.unflatten(1, (layers, heads))
    assert relative(each.mean(2), mean) < 1e-6
    model.set_attn_implementation("eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax_in_float64)
        weights = torch.stack(model(**inputs, output_attentions=True).attentions, 1)  # (B, L, H, M, M)
    for n in range(len(plan)):
        for s, (start, stop) in enumerate(plan.steps[n][plan.step_mask[n]].tolist()):
            for w in range(int(plan.word_mask[n].sum())):
                tokens = plan.tokens[n][plan.word_of_token[n] == w]
                expected = weights[n, :, :, start:stop][..., tokens].sum((-1, -2))
                assert relative(each[n, :, :, s, w], expected) < 1e-5
    model.set_attn_implementation("molsaki")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
    found = {}
    for map_heads in ("mean", "each"):
        model.zero_grad()
        with molsaki.capture(model, plan, map_heads=map_heads) as record:
            model(**inputs)
        maps = record.maps if map_heads == "mean" else record.maps.unflatten(1, (layers, heads)).mean(2)
        (maps * weight).sum().backward()
        found[map_heads] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found["mean"].keys() == found["each"].keys()
    for parameter, gradient in found["mean"].items():
        assert relative(found["each"][parameter], gradient) < 1e-5, parameter


def test_map_heads_is_checked():
    with pytest.raises(ValueError, match='map_heads: expected "mean" or "each", got \'all\''):
        molsaki.capture(make("Llama"), batch()[1], map_heads="all").__enter__()
