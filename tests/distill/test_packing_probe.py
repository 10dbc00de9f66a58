"""Which models keep packed texts separate and can share prefixes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from molsaki.modeling import packing_probe
from molsaki.modeling.packing_probe import can_pack, can_share_prefix
from molsaki.modeling.unwrap import causal_model
from tests.helpers.architectures import HEADS, SHARING, make, make_headed, skip_gpt2_before_transformers_5  # noqa: F401
from tests.helpers.tiny import one_thread  # noqa: F401


@pytest.mark.parametrize("name", SHARING)
def test_these_models_can_share_prefixes(name):
    model = make(name, torch.float32).train()
    before = model.config._attn_implementation
    assert can_share_prefix(model)
    assert model.training and model.config._attn_implementation == before


def test_a_model_that_keeps_keywords_from_its_attention_cannot():
    model = make("Llama", torch.float32)
    for layer in model.model.layers:
        inner = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, shared_prefix=None, inner=inner, **kwargs: inner(*args, **kwargs)
    assert not can_share_prefix(model)


@pytest.mark.parametrize("name", HEADS)
def test_decoders_can_pack(name):
    model = make_headed(name).train()
    assert can_pack(model)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())


def test_a_model_that_mixes_the_texts_of_a_row_cannot():
    model = make_headed("Llama")

    class Mixing(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):  # a convolution over two tokens
            return self.inner(x) + 0.1 * F.pad(x, (0, 0, 1, 0))[:, :-1]

    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)
    assert not can_pack(model)
    assert not can_share_prefix(model)


def test_a_wrapped_model():
    peft = pytest.importorskip("peft")
    model = make_headed("Llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    assert causal_model(wrapped) is model
    assert can_pack(wrapped)
    assert can_share_prefix(wrapped)


def test_a_sharded_model_has_to_be_probed_before(monkeypatch):
    model = make("Llama")
    monkeypatch.setattr(packing_probe, "_is_sharded", lambda _: True)
    with pytest.raises(ValueError, match="to be called before FSDP"):
        can_pack(model)
    monkeypatch.undo()
    assert can_pack(model)
    monkeypatch.setattr(packing_probe, "_is_sharded", lambda _: True)
    assert can_pack(model)  # known
