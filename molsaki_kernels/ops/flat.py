"""Between the dataclasses of ``spec.py`` and the tensors and numbers that an operator takes, and registering one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from molsaki_kernels.spec import AttentionInputs, AttentionOptions, MapInputs, PlanTensors

_OPTIONS = "bool causal, float scale, SymInt? window, float? softcap, bool per_head"
_PLAN = "Tensor steps, Tensor tokens, Tensor word_of_token, SymInt num_words"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens"
_MAP_INPUTS = "Tensor q, Tensor k, Tensor lse, Tensor? cu_seqlens"
CALL = f"{_INPUTS}, {_OPTIONS}, {_PLAN}, str engine, str map_engine"
MAP_CALL = f"{_MAP_INPUTS}, {_OPTIONS}, {_PLAN}, str engine"


def flat_inputs(inputs: AttentionInputs) -> tuple[Any, ...]:
    return inputs.q, inputs.k, inputs.v, inputs.sinks, inputs.cu_seqlens


def flat_map_inputs(inputs: MapInputs) -> tuple[Any, ...]:
    return inputs.q, inputs.k, inputs.lse, inputs.cu_seqlens


def flat_options(options: AttentionOptions) -> tuple[Any, ...]:
    return options.causal, options.scale, options.window, options.softcap, options.per_head


def flat_plan(plan: PlanTensors) -> tuple[Any, ...]:
    return plan.steps, plan.tokens, plan.word_of_token, plan.num_words


def call_of(flat: tuple[Any, ...]) -> tuple[AttentionInputs, AttentionOptions, PlanTensors, str, str]:
    """Rebuild inputs, options, plan and both engines from the arguments of an attention operator."""
    engine, map_engine = flat[14:]
    plan = plan_of(*flat[10:14])
    return AttentionInputs(*flat[:5]), AttentionOptions(*flat[5:10]), plan, engine, map_engine


def map_call_of(flat: tuple[Any, ...]) -> tuple[MapInputs, AttentionOptions, PlanTensors, str]:
    """Rebuild inputs, options, plan and engine from the arguments of a map operator."""
    return MapInputs(*flat[:4]), AttentionOptions(*flat[4:9]), plan_of(*flat[9:13]), flat[13]


def plan_of(steps: Tensor, tokens: Tensor, word_of_token: Tensor, num_words: int) -> PlanTensors:
    return PlanTensors(steps, tokens, word_of_token, num_words, keep=False)


def empty_map(q: Tensor, options: AttentionOptions, plan: PlanTensors) -> Tensor:
    """Allocate a map for q ``(B, Hq, M, D)``: ``(N, S, W)``, or ``(N, Hq, S, W)`` per head, at least float32."""
    heads = (q.shape[1],) if options.per_head else ()
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((plan.steps.shape[0], *heads, plan.steps.shape[1], plan.num_words), dtype=dtype)


def register(name: str, schema: str, function: Any, fake: Any) -> Any:
    """Register ``molsaki::name`` and its fake."""

    def checked(*flat: Any) -> Any:
        if forward_ad._current_level >= 0:  # compiled code would drop the tangents
            raise NotImplementedError(f"molsaki::{name} has no forward-mode derivative (torch.func.jvp, dual_level)")
        return fake(*flat)

    operator = torch.library.custom_op(f"molsaki::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(checked)
    return operator
