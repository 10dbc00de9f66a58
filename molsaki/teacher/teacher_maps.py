"""Runs a model for its maps alone, and builds the mixture of layers that a config describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from molsaki.functions import is_named, named_function
from molsaki.method.layer_pairs import MIXTURE_NAMES, Pairing
from molsaki.method.mixture import MixtureOfLayers
from molsaki.modeling.capture import capture
from molsaki.modeling.record import Record
from molsaki.modeling.unwrap import evaluation_mode, input_device
from molsaki_kernels import StepPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from molsaki.config import MixtureOptions


@torch.no_grad()
def teacher_maps(
    teacher: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    plan: StepPlan,
    map_heads: str = "mean",
    **packed: Any,
) -> Tensor:
    """The teacher's map of every layer, ``(N, L, S, W)`` float32, for a batch, right-padded or packed; no logits.

    Args:
        teacher: a causal language model; only its decoder runs.
        input_ids, attention_mask: ``(N, M)`` right-padded, or ``(1, total)`` packed.
        plan: of the N texts.
        map_heads: as in `capture`; "each" gives the maps of all heads of all layers.
        **packed: ``position_ids`` and ``cu_seq_lens_q`` of packed texts.
    """
    return teacher_record(teacher, input_ids, attention_mask, plan, map_heads, **packed).maps


@torch.no_grad()
def teacher_record(
    teacher: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    plan: StepPlan,
    map_heads: str = "mean",
    **packed: Any,
) -> Record:
    """The record that `teacher_maps` captures: the maps and their layers."""
    decoder = teacher.base_model
    with capture(decoder, plan, map_heads=map_heads) as record:
        decoder(**{"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False} | packed)
    return record


@torch.no_grad()
def probe(model: nn.Module, value_heads: str | None = None, map_heads: str = "mean") -> tuple[int, int, int]:
    """From a forward of two tokens: the numbers of a model's maps and of its attention layers, and the width of pooled
    values (Eq. 5).

    There is one map per layer, or per head with ``map_heads="each"``. The width is 0 without ``value_heads``; layers
    whose values cannot be stacked are refused only with it.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
    plan = StepPlan.from_spans([[(0, 2)]], [[[0]]])
    values = value_heads is not None
    how = {"value_heads": value_heads or "concat", "map_heads": map_heads}
    with evaluation_mode(model), capture(model, plan, values=values, **how) as record:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return record.maps.shape[1], len(record.layers), record.values.shape[-1] if values else 0


@torch.no_grad()
def layers_with_maps(model: nn.Module) -> tuple[int, ...]:
    """The decoder layers whose attention has a map, from a forward of two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
    plan = StepPlan.from_spans([[(0, 2)]], [[[0]]])
    with evaluation_mode(model), capture(model, plan) as record:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return record.layers


def probe_student(model: nn.Module, options: MixtureOptions) -> tuple[int, int, int]:
    """`probe` of a student as the mixture needs it: only a router reads values."""
    return probe(model, options.value_heads if options.mixture == "mixture" else None, options.map_heads)


def kind_of(options: MixtureOptions) -> str | Pairing:
    """The kind of mixture that a config names, or the function of ``module:function``."""
    if options.mixture in MIXTURE_NAMES or not is_named(options.mixture):
        return options.mixture
    return named_function("mixture", options.mixture)


def mixture_of(
    options: MixtureOptions, teacher_maps: int, student_maps: int, value_layers: int, value_width: int
) -> MixtureOfLayers:
    """The mixture that a config describes, for models with these numbers of maps, see `probe`."""
    names = ("router", "tau_t", "tau_s", "teacher_scale", "value_heads", "pooling", "teacher_layer", "student_layer")
    same = {name: getattr(options, name) for name in (*names, "teacher_layers")}
    kind, seed = kind_of(options), options.mixture_seed
    return MixtureOfLayers(
        teacher_maps, student_maps, value_width, value_layers=value_layers, kind=kind, seed=seed, **same
    )
