"""Refuses context and sequence parallelism, where a process would attend to its own part of each sequence only."""

from __future__ import annotations

import torch


def refuse_sequence_parallelism() -> None:
    """Raise a ValueError under PyTorch's or accelerate's context parallelism, or DeepSpeed's Ulysses."""
    from accelerate.state import AcceleratorState
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # late, as in mask_function.py

    kind = None
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if str(getattr(sdpa, "__module__", "")).startswith("torch.distributed"):  # PyTorch replaces it inside the context
        kind = "context parallelism of PyTorch"
    config = AcceleratorState._shared_state.get("parallelism_config")
    if config is not None and (config.cp_enabled or config.sp_enabled):
        kind = "context or sequence parallelism of accelerate (parallelism_config)"
    functions = (ALL_ATTENTION_FUNCTIONS.get(name) for name in ALL_ATTENTION_FUNCTIONS)
    if any(str(getattr(function, "__module__", "")).startswith("deepspeed") for function in functions):
        kind = "sequence parallelism of DeepSpeed (Ulysses)"
    if kind is not None:
        raise ValueError(
            f'attention: expected whole sequences in every process, found {kind}, which "molsaki" does not support'
        )
