"""Chooses the trained part of a student (LoRA adapters, or all parameters not frozen) and sets its end token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.extras import require
from molsaki.modeling.unwrap import causal_model
from molsaki.training.config import DistillConfig


def add_adapters(model: PreTrainedModel, config: DistillConfig, peft_config: Any = None) -> PreTrainedModel:
    """The model with the adapters of a PEFT config, or with LoRA as ``lora_rank`` says; only these are trained."""
    try:
        from peft import LoraConfig, PeftConfig, get_peft_model
    except ImportError:
        require("train", "peft", by="--lora_rank, peft_config: LoRA")
        raise
    if is_peft(model):
        raise ValueError("model: expected one without adapters, since --lora_rank or peft_config adds some")
    if peft_config is not None:
        if config.lora_rank:
            raise ValueError(f"peft_config, lora_rank: expected one of them, got both (rank {config.lora_rank})")
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config: expected a peft.PeftConfig, got {type(peft_config).__name__}")
        adapted = cast(PreTrainedModel, get_peft_model(model, peft_config))
        check_adapters(adapted)
        return adapted
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
            raise ValueError(f"--freeze: {pattern!r} matches no parameter of the student")
        for parameter in found:
            parameter.requires_grad_(False)


def is_peft(model: nn.Module) -> bool:
    """True for PEFT's wrapper around a model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def check_adapters(student: nn.Module) -> None:
    """Refuse adapters that would be neither trained nor exported."""
    if getattr(student, "_hf_peft_config_loaded", False):
        raise ValueError(
            "student: expected a model without adapters or a PeftModel, got adapters that transformers has added; use "
            "PeftModel.from_pretrained(base, folder, is_trainable=True), or merge them into the model first"
        )
    for config in getattr(student, "peft_config", {}).values():
        if config.is_prompt_learning:
            raise ValueError(
                f"student: expected adapters within the layers, such as LoRA, got {config.peft_type}, whose virtual "
                "tokens have no place in the texts"
            )


def end_with(student: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the student's ``generate`` stop at the tokenizer's end token, with which the texts end.

    Other end tokens are kept if they are special tokens of the tokenizer, which no text contains.
    """
    config = causal_model(student).generation_config
    if config is not None:
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        kept = [id for id in ends if id in special and id != tokenizer.eos_token_id]
        config.eos_token_id = [tokenizer.eos_token_id, *kept] if kept else tokenizer.eos_token_id
