"""Chooses the parameters of a student that are trained: LoRA adapters, or all that are not frozen."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from molsaki.training.config import DistillConfig


def add_lora(model: PreTrainedModel, config: DistillConfig) -> PreTrainedModel:
    """The model with LoRA adapters as the config says; only these are trained."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("--lora_rank: needs the package peft, which is not installed") from None
    targets = config.lora_targets[0] if config.lora_targets == ["all-linear"] else config.lora_targets
    alpha = cast(int, config.lora_alpha)  # PEFT takes fractions as well
    dropout, rank = config.lora_dropout, config.lora_rank
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    return cast(PreTrainedModel, get_peft_model(model, lora))  # PEFT's wrapper passes attribute access on


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude from training the parameters in whose names one of these regular expressions is found."""
    for pattern in patterns:
        found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        if not found:
            raise ValueError(f"--freeze: {pattern!r} is the name of no parameter of the student")
        for parameter in found:
            parameter.requires_grad_(False)
