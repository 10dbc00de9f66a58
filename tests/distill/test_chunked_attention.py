"""Attention in chunks, as packed texts, against the eager attention of Llama 4."""

from __future__ import annotations

import pytest
import torch

import molsaki
from tests.helpers.architectures import SMALL, batch, eager, five, objective, random_model, relative

LLAMA4 = {k: v for k, v in SMALL.items() if k != "num_hidden_layers"} | dict(
    num_hidden_layers=4, attention_chunk_size=7, num_local_experts=2, interleave_moe_layer_step=2,
    no_rope_layers=[1, 1, 1, 0], intermediate_size_mlp=48, attn_temperature_tuning=False,
)  # fmt: skip


@five
@pytest.mark.parametrize("chunk", [7, 13, 64])
def test_attention_in_chunks(chunk):
    """Llama 4: three layers in chunks, one that sees everything; a step and a word cross the bounds of chunks."""
    model = random_model("Llama4", LLAMA4 | dict(attention_chunk_size=chunk), config_class="Llama4TextConfig")
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
