"""Runs a model for its maps alone, and builds the mixture of layers that a config describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from molsaki.modeling.capture import capture
from molsaki.modeling.unwrap import input_device
from molsaki.training.mixture import MixtureOfLayers
from molsaki_kernels import StepPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from molsaki.config import MixtureOptions


@torch.no_grad()
def teacher_maps(
    teacher: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, plan: StepPlan, **packed: Any
) -> Tensor:
    """The teacher's map of every layer, ``(N, L, S, W)`` float32, for a batch, right-padded or packed; no logits.

    Args:
        teacher: a causal language model; only its decoder runs.
        input_ids, attention_mask: ``(N, M)`` right-padded, or ``(1, total)`` packed.
        plan: of the N texts.
        **packed: ``position_ids`` and ``cu_seq_lens_q`` of packed texts.
    """
    decoder = teacher.base_model
    with capture(decoder, plan) as record:
        decoder(**{"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False} | packed)
    return record.maps


@torch.no_grad()
def probe(model: nn.Module, value_heads: str = "concat") -> tuple[int, int]:
    """The number of attention layers of a model and the width of Eq. 5's values, from a forward of two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
    was_training = model.training
    model.eval()
    with capture(model, StepPlan.from_spans([[(0, 2)]], [[[0]]]), values=True, value_heads=value_heads) as record:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    model.train(was_training)
    _, layers, width = record.values.shape
    return layers, width


def mixture_of(options: MixtureOptions, teacher_layers: int, student_layers: int, value_width: int) -> MixtureOfLayers:
    """The mixture that a config describes, for models of these depths."""
    names = ("router", "tau_t", "tau_s", "teacher_scale", "value_heads", "pooling", "teacher_layer", "student_layer")
    same = {name: getattr(options, name) for name in names}
    kind, seed = options.mixture, options.mixture_seed
    return MixtureOfLayers(teacher_layers, student_layers, value_width, kind=kind, seed=seed, **same)
