"""Tests the computed memory of long texts against tensors of small models."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from benchmarks.memory import STUDENT, TEACHER, Model, Saved, Text, count_saved, rows

SMALL = Model("small", 2, 64, 96, 4, 2, 128, tied=True)


def test_parameters():
    assert TEACHER.parameters == 8_030_261_248 and STUDENT.parameters == 1_235_814_400  # the published models'
    config = SMALL.config(2)
    config.vocab_size = SMALL.vocabulary
    assert LlamaForCausalLM(config).num_parameters() == SMALL.parameters


def test_saved_bytes():
    """A checkpointed layer saves its input, the residual stream in float32."""
    saved = count_saved(SMALL)
    assert saved.boundary == 4 * SMALL.width
    inputs_of_linear_layers = 2 * (2 * SMALL.width + SMALL.width + SMALL.inner)  # bfloat16
    assert inputs_of_linear_layers < saved.layer < 10 * inputs_of_linear_layers
    assert torch.is_grad_enabled()


def test_records_add_up():
    found = rows([16384, 131072], "sentences", Saved(1000, 10))
    assert len(found) == 6
    for row in found:
        parts = [value for name, value in row.items() if isinstance(value, float) and name != "total"]
        assert abs(sum(parts) - row["total"]) < 1e-6
    text = Text.of(131072, "sentences")
    assert text.map_bytes == 4 * 8192 * 14563
    assert Text.of(131072, "words").map_bytes == 4 * 256 * 3000
