"""The teacher's maps from a forward without logits, and the depth and width that a probe finds."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from molsaki.teacher.teacher_maps import probe, teacher_maps
from molsaki_kernels import StepPlan
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.helpers.training import logged, trainer

TEACHER = tiny.model(3, seed=1)


def test_no_logits_are_computed(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the teacher's head ran")

    monkeypatch.setattr(TEACHER.lm_head, "forward", fail)
    plan = StepPlan.from_spans([[(0, 3)]], [[[0], [1]]])
    assert teacher_maps(TEACHER, torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3), plan).shape == (1, 3, 1, 2)


def test_probe():
    heads = TEACHER.config.num_attention_heads
    assert probe(TEACHER) == (3, 3, 0)
    assert probe(TEACHER, "concat") == (3, 3, 16)
    assert probe(TEACHER, "mean") == (3, 3, 8)
    assert probe(TEACHER, "concat", "each") == (3 * heads, 3, 16)
    assert probe(TEACHER, map_heads="each") == (3 * heads, 3, 0)
    assert TEACHER.training is False


def uneven() -> LlamaForCausalLM:
    """A model whose second layer has two query heads and one KV head instead of four and two."""
    model = tiny.model(2)
    config = copy.deepcopy(model.config)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 8
    attention = model.model.layers[1].self_attn = LlamaAttention(config, layer_idx=1).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return model


def test_maps_of_each_head_in_layers_with_other_numbers_of_heads():
    model = uneven()
    ids, plan = torch.arange(9)[None], StepPlan.from_spans([[(0, 4), (4, 9)]], [[[0, 2], [5]]])
    found = teacher_maps(model, ids, torch.ones_like(ids), plan, map_heads="each")
    for config in (model.config, model.model.layers[1].self_attn.config):
        config._attn_implementation = "eager"
    weights = torch.cat(model(ids, output_attentions=True).attentions, dim=1)[0]  # (4 + 2, M, M)
    assert found.shape == (1, 6, 2, 2)
    for s, (start, stop) in enumerate(((0, 4), (4, 9))):
        for w, tokens in enumerate(([0, 2], [5])):
            expected = weights[:, start:stop][..., tokens].sum((-1, -2))
            torch.testing.assert_close(found[0, :, s, w], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["last", "uniform", "single", "matched"])
@pytest.mark.parametrize("map_heads", ["mean", "each"])
def test_values_are_asked_for_only_by_a_router(tmp_path, kind, map_heads):
    """Layers whose values cannot be stacked are accepted by a mixture that does not read them."""
    units = 2 if map_heads == "mean" else 6
    assert probe(uneven(), map_heads=map_heads) == (units, 2, 0)
    options = {"map_heads": map_heads, "save_strategy": "no", "max_steps": 2}
    t = trainer(tmp_path, student=uneven(), mixture=kind, **options)
    t.train()
    assert t.model.mixture.num_student_layers == units
    assert all(value > 0 for (value,) in logged(t, "loss_att"))
    with pytest.raises(ValueError, match=r"values: the layers of this model have value vectors of different widths"):
        trainer(tmp_path / "router", student=uneven(), mixture="mixture", **options)
    trainer(tmp_path / "mean", student=uneven(), mixture="mixture", value_heads="mean", **options).train()
