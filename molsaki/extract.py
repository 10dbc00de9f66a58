"""Runs the white-box teacher once over a data set and stores its maps: all that training needs of it.

No logits are computed. Texts of like length share a forward pass; a finished shard is never computed again. Processes
started by torchrun or ``accelerate launch`` take a share of the shards each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from molsaki.config import MixtureOptions
from molsaki.hooks import capture
from molsaki.mixture import MixtureOfLayers
from molsaki_kernels import StepPlan


@torch.no_grad()
def teacher_maps(teacher: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, plan: StepPlan) -> Tensor:
    """The teacher's map of every layer, ``(N, L, S, W)`` float32, for a right-padded batch; computes no logits."""
    decoder = teacher.base_model
    with capture(decoder, plan) as record:
        decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return record.maps


@torch.no_grad()
def probe(model: nn.Module, value_heads: str = "concat") -> tuple[int, int]:
    """How many attention layers a model has, and how wide its value vectors are (Eq. 5), from a forward of two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    with capture(model, StepPlan.from_spans([[(0, 2)]], [[[0]]]), values=True, value_heads=value_heads) as record:
        model(input_ids=ids, use_cache=False)
    model.train(was_training)
    _, layers, width = record.values.shape
    return layers, width


def mixture_of(options: MixtureOptions, teacher_layers: int, student_layers: int, value_width: int) -> MixtureOfLayers:
    """The mixture that a config describes, for models of these depths."""
    return MixtureOfLayers(
        teacher_layers, student_layers, value_width, kind=options.mixture, router=options.router, tau_t=options.tau_t,
        tau_s=options.tau_s, teacher_scale=options.teacher_scale, value_heads=options.value_heads,
        pooling=options.pooling, teacher_layer=options.teacher_layer, student_layer=options.student_layer,
        seed=options.mixture_seed,
    )  # fmt: skip
