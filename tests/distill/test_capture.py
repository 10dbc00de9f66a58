"""Ways in which people run models with the attention implementation "molsaki": right, or refused by name."""

from __future__ import annotations

import functools
import os
import threading

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import molsaki
from molsaki.modeling.attention_hook import attention
from molsaki.modeling.compact_mask import CompactMask, attention_mask
from molsaki_kernels import StepPlan
from tests.helpers.architectures import SMALL, TRANSFORMERS, batch, eager, make, objective, relative

five = pytest.mark.skipif(TRANSFORMERS < 5, reason="transformers 4 has other caches and models")


# Models


@pytest.mark.parametrize("name", ["StableLm", "Nemotron"])
def test_models_that_drop_keywords(name):
    config = {key: value for key, value in SMALL.items() if key != "head_dim"}
    model = _model(name, config)
    inputs, plan = batch()
    maps, logits = eager(model, inputs, plan)
    with molsaki.capture(model, plan, values=True) as record:
        out = model(**inputs)
    assert relative(record.maps, maps) < 1e-6
    assert relative(out.logits[inputs["attention_mask"].bool()], logits[inputs["attention_mask"].bool()]) < 1e-6
    assert record.layers == tuple(range(4)) and record.values.shape[1] == 4


LLAMA4 = {k: v for k, v in SMALL.items() if k != "num_hidden_layers"} | dict(
    num_hidden_layers=4, attention_chunk_size=7, num_local_experts=2, interleave_moe_layer_step=2,
    no_rope_layers=[1, 1, 1, 0], intermediate_size_mlp=48, attn_temperature_tuning=False,
)  # fmt: skip


@five
@pytest.mark.parametrize("chunk", [7, 13, 64])
def test_attention_in_chunks(chunk):
    """Llama 4: three layers in chunks, one that sees everything; a step and a word cross the bounds of chunks."""
    model = _model("Llama4", LLAMA4 | dict(attention_chunk_size=chunk), config_class="Llama4TextConfig")
    inputs, plan = batch()
    maps, logits = eager(model, inputs, plan)
    weights = [p for name, p in model.named_parameters() if "self_attn" in name]
    real = inputs["attention_mask"]
    expected = torch.autograd.grad(objective(maps, logits, real), weights)
    with molsaki.capture(model, plan, values=True) as record:
        out = model(**inputs)
    found = torch.autograd.grad(objective(record.maps, out.logits, real), weights)
    assert relative(record.maps, maps) < 1e-6
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-5
    lengths = real.sum(1).tolist()
    packed = {
        "input_ids": torch.cat([row[:n] for row, n in zip(inputs["input_ids"], lengths, strict=True)])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32),
    }
    with molsaki.capture(model, plan, values=True) as together:
        model(**packed, use_cache=False)
    torch.testing.assert_close(together.maps, record.maps, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(together.values, record.values, rtol=1e-6, atol=1e-6)


@five
def test_two_calls_of_attention_per_layer():
    """DiffLlama computes each layer's scores twice, for the two halves of the values; eager returns the first ones."""
    model = _model("DiffLlama", SMALL)
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
    model = _model("Lfm2", config | dict(num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]))
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


# Keywords and masks of the attention function


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
    with pytest.raises(ValueError, match="step_plan: .*5 queries beside"):
        attention(module, q, k, v, None, step_plan=StepPlan.from_spans([[(0, 4)]], [[[1]]]))


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


# Caches


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


# Packed texts


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


# Checkpointing, blocks, threads


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


def test_sequence_parallelism_is_refused(monkeypatch):
    from torch.distributed.tensor.experimental import context_parallel

    model = make("Llama", torch.float32)
    inputs, plan = batch()
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    monkeypatch.setitem(os.environ, "MASTER_PORT", "0")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        with context_parallel(mesh, buffers=[inputs["input_ids"].clone()], buffer_seq_dims=[1]):
            with molsaki.capture(model, plan), pytest.raises(ValueError, match="context parallelism of PyTorch"):
                model(**inputs)
            model.set_attn_implementation("molsaki")
            with pytest.raises(ValueError, match="context parallelism of PyTorch"):
                model(**inputs)
    finally:
        torch.distributed.destroy_process_group()
    model(**inputs)

    def ulysses() -> None: ...

    ulysses.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", ulysses)
    with pytest.raises(ValueError, match="Ulysses"):
        model(**inputs)


# torch.compile


@pytest.mark.slow
@pytest.mark.parametrize(("name", "with_mask"), [("Llama", True), ("Gemma2", False)])
def test_compiled_models_have_the_same_graphs_for_all_batches(name, with_mask):
    """No graph break, no graph per layer, per number of sequences or per length; with and without padding masks."""
    layers = dict(layer_types=["sliding_attention", "full_attention"]) if name == "Gemma2" else {}
    model = make(name, torch.float32, num_hidden_layers=2, **layers)
    model.set_attn_implementation("molsaki")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for B, M in ((2, 14), (3, 17), (4, 25), (2, 30), (5, 21), (7, 15)):
        ids = torch.randint(3, 61, (B, M))
        mask = torch.ones_like(ids)
        mask[-1, M - 3 :] = 0
        words = [[1], [3, 4], [7]][: 2 + B % 2]
        plan = StepPlan.from_spans([[(0, 5), (5, M - 3)]] * B, [words] * B)
        inputs = dict(input_ids=ids, use_cache=False) | ({"attention_mask": mask} if with_mask else {})
        with molsaki.capture(compiled, plan, values=True) as record:
            logits = compiled(**inputs).logits
        with molsaki.capture(model, plan, values=True) as expected:
            torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(record.maps, expected.maps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(record.values, expected.values, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 2  # one with the first batch's sizes as constants, one for all others


@pytest.mark.slow
def test_compiled_refusals():
    model = make("Llama", torch.float32)
    model.set_attn_implementation("molsaki")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs, plan = batch()
    left = inputs | {"attention_mask": inputs["attention_mask"].flip(1), "use_cache": False}
    with molsaki.capture(compiled, plan), pytest.raises(RuntimeError, match="right-padded"):
        compiled(**left)
    real = left["attention_mask"].bool()
    found = compiled(**left).logits[real]
    model.set_attn_implementation("eager")
    assert relative(found, model(**left).logits[real]) < 1e-5
    longer = StepPlan.from_spans([[(0, 5)], [(0, 5)]], [[[2]], [[33]]])  # in the second sequence's padding
    with molsaki.capture(compiled, longer), pytest.raises(RuntimeError, match="into the padding"):
        compiled(**inputs, use_cache=False)


def _model(name: str, config: dict, dtype: torch.dtype = torch.float64, **names: str):
    torch.manual_seed(0)
    made = getattr(transformers, names.get("config_class", f"{name}Config"))(**config)
    model = getattr(transformers, f"{name}ForCausalLM")(made).to(dtype)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model.eval()


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
        (dict(cu_seq_lens_q=bounds, attention_mask=(torch.arange(12) < 9)[None].long()), "no padding beside packed"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, use_cache=False, **keywords)
    if TRANSFORMERS > 4:
        gpt2 = make("GPT2")
        with molsaki.capture(gpt2, plan), pytest.raises(ValueError, match="position_ids: expected positions"):
            gpt2(ids, cu_seq_lens_q=bounds, use_cache=False)


@pytest.mark.slow
def test_compiled_packed_texts_are_checked():
    model = make("Llama", torch.float32, num_hidden_layers=1)
    model.set_attn_implementation("molsaki")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = torch.randint(3, 61, (1, 12), generator=torch.Generator().manual_seed(7))
    position = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = dict(position_ids=position, cu_seq_lens_q=torch.tensor([0, 5, 12]).int(), use_cache=False)
    expected = model(ids, **packed).logits
    ones = torch.ones_like(ids)
    for attend in (None, ones):
        torch.testing.assert_close(compiled(ids, attention_mask=attend, **packed).logits, expected)
    with pytest.raises(RuntimeError, match="packed texts with their bounds"):
        compiled(ids, attention_mask=None, **packed | {"cu_seq_lens_q": torch.tensor([0, 7, 12]).int()})
    ones[0, 9:] = 0
    with pytest.raises(RuntimeError, match="no padding beside packed texts|packed texts with their bounds"):
        compiled(ids, attention_mask=ones, **packed)


@five
def test_cross_attention_that_does_not_say_that_it_is_causal():
    module = torch.nn.Identity()
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(attention(module, q, k, v, None)[0], expected)
    with pytest.raises(ValueError, match="attention that is not causal"):
        attention(module, q, k, v, None, step_plan=StepPlan.from_spans([[(0, 4)]], [[[1]]]))


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


def test_traced_by_jit_for_another_padding():
    model = make("Llama", torch.float32, num_hidden_layers=1)
    model.set_attn_implementation("molsaki")
    ids = batch()[0]["input_ids"][:, :12]

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits

    traced = torch.jit.trace(Logits(), (ids, torch.ones_like(ids)), check_trace=False)
    left = torch.ones_like(ids)
    left[1, :4] = 0
    assert relative(traced(ids, left)[left.bool()], Logits()(ids, left)[left.bool()]) < 1e-5
