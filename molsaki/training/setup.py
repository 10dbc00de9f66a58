"""Loads and checks what a training needs, from its config and from what the caller gives in place of names."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from molsaki.batches.collator import Collator
from molsaki.batches.dataset import tokenization_of
from molsaki.batches.tokenized import Tokenization, TokenizerSpec
from molsaki.method.mixture import MixtureOfLayers
from molsaki.method.objectives import Objective, objective_of
from molsaki.modeling.attention_hook import NAME
from molsaki.modeling.loading import context_length, load_both
from molsaki.modeling.packing_probe import can_pack, can_share_prefix, choose_packing
from molsaki.store.fingerprints import describe
from molsaki.store.map_store import Store
from molsaki.teacher.teacher_maps import mixture_of, probe, probe_student
from molsaki.training.config import DistillConfig
from molsaki.training.trainable import add_adapters, check_adapters, end_with, freeze

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Given:
    """What the caller has. What is None is loaded by its name in the config, where there is one."""

    student: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    teacher: PreTrainedModel | None
    teacher_tokenizer: PreTrainedTokenizerBase | None
    store: Store | None
    peft_config: Any


@dataclasses.dataclass
class Parts:
    """What a trainer is built from.

    Attributes:
        teacher: None where the objective uses none or its maps are stored.
        mixture: None where the objective uses no maps.
        vocabulary: the number of logits that belong to tokens; a model may have more.
    """

    objective: Objective
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel | None
    store: Store | None
    mixture: MixtureOfLayers | None
    tokenization: Tokenization
    collator: Collator
    vocabulary: int


def model_or_name(value: Any, argument: str, config: DistillConfig, field: str) -> PreTrainedModel | None:
    """The given model. A name is written into the config's field, by which the model is loaded."""
    if isinstance(value, (str, os.PathLike)):
        _set_name(field, os.fspath(value), config, argument)
        return None
    if value is not None and not isinstance(value, nn.Module):
        hint = "; give it as args" if isinstance(value, TrainingArguments) else ""
        raise TypeError(f"{argument}: expected a model, its name or None, got {type(value).__name__}{hint}")
    return cast("PreTrainedModel | None", value)


def store_or_folder(value: Any, config: DistillConfig) -> Store | None:
    """The given store. A folder is written into the config, by which the store is opened."""
    if isinstance(value, (str, os.PathLike)):
        _set_name("store", os.fspath(value), config)
        return None
    if value is not None and not isinstance(value, Store):
        raise TypeError(f"store: expected a Store, its folder or None, got {type(value).__name__}")
    if value is not None and config.store not in (None, str(value.folder)):
        raise ValueError(f"store, args.store: expected the same, got {str(value.folder)!r} and {config.store!r}")
    return value


def prepare(config: DistillConfig, given: Given) -> Parts:
    """Choose the objective, load the models, and choose how texts are packed and layers mixed.

    The config's objective is written into it where it was left open.

    Raises:
        ValueError, TypeError, OSError: something cannot be loaded, or two of the options or models do not fit.
    """
    if config.deepspeed:  # models are loaded whole and probed before ZeRO-3 shards them
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    objective = _choose_objective(config, given)
    if not objective.has_teacher:
        given = dataclasses.replace(given, teacher=None)
    elif given.store is None and config.store is not None:
        given = dataclasses.replace(given, store=Store(config.store))  # before a model is loaded
    student, tokenizer = _load_student(config, given)
    student_spec = TokenizerSpec(
        tokenizer, config.student_template, config.max_length or context_length(student.config)
    )
    teacher, teacher_spec = _load_teacher(config, objective, given)
    if objective.teacher_logits:
        _check_vocabulary(str(config.objective), given.store, student_spec, teacher_spec)

    packing, sharing = _choose_packing(config, objective, student)
    if objective.maps or packing:
        student.set_attn_implementation(NAME)
    mixture = None
    if objective.maps:
        mixture = _mixture(config, student, given.store, teacher, teacher_spec)
        if given.store is not None:
            teacher = None
    teacher_packing = packing and teacher is not None and can_pack(teacher)
    if teacher is not None:
        teacher.to(config.device).eval().requires_grad_(False)  # type: ignore[arg-type]
        if objective.maps or teacher_packing:
            teacher.set_attn_implementation(NAME)
    if config.deepspeed:
        set_hf_deepspeed_config(config.hf_deepspeed_config)  # type: ignore[no-untyped-call]

    cot_template = config.cot_template if objective.rationale_first else None
    return Parts(
        objective=objective,
        student=student,
        tokenizer=tokenizer,
        teacher=teacher,
        store=given.store,
        mixture=mixture,
        tokenization=tokenization_of(config, student_spec, teacher_spec, config.predict_template, cot_template),
        collator=Collator(
            student_pad=tokenizer.pad_token_id,
            teacher_pad=0 if teacher_spec is None else teacher_spec.tokenizer.pad_token_id,
            packing=packing,
            teacher_packing=teacher_packing,
            explain=objective.explain_texts,
            share_question=sharing,
        ),
        vocabulary=max(tokenizer.get_vocab().values()) + 1,
    )


def _set_name(field: str, name: str, config: DistillConfig, argument: str | None = None) -> None:
    given = getattr(config, field)
    if given not in (None, name):
        raise ValueError(
            f"{argument or field}, args.{field}: expected one of them or the same, got {name!r} and {given!r}"
        )
    setattr(config, field, name)


def _choose_objective(config: DistillConfig, given: Given) -> Objective:
    sources = {"teacher": (given.teacher, config.teacher), "store": (given.store, config.store)}
    present = [name for name, pair in sources.items() if any(one is not None for one in pair)]
    name = config.choose_objective(has_teacher=bool(present))
    objective = objective_of(name)
    if present and not objective.has_teacher and config.process_index == 0:
        logger.warning("objective: %s uses no teacher, so the %s is not used", name, " and the ".join(present))
    if config.share_question and (config.packing is False or not objective.explain_texts):
        raise ValueError(
            "share_question: expected packing and an objective of both tasks, got "
            f"packing={config.packing} and objective={name}"
        )
    return objective


def _load_student(config: DistillConfig, given: Given) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    student, tokenizer = load_both(given.student, given.tokenizer, config.student, "--student", config.student_dtype)
    check_adapters(student)
    if config.lora_rank or given.peft_config is not None:
        student = add_adapters(student, config, given.peft_config)
    freeze(student, config.freeze)
    end_with(student, tokenizer)
    return student, tokenizer


def _load_teacher(
    config: DistillConfig, objective: Objective, given: Given
) -> tuple[PreTrainedModel | None, TokenizerSpec | None]:
    """The teacher; where there is a store only one that was named, whose identity the store is compared with."""
    is_named = given.teacher is not None or config.teacher is not None
    if not objective.has_teacher or (given.store is not None and not is_named):
        return given.teacher, None
    teacher, tokenizer = load_both(
        given.teacher, given.teacher_tokenizer, config.teacher, "--teacher", config.teacher_dtype
    )
    limit = config.teacher_max_length or context_length(teacher.config)
    return teacher, TokenizerSpec(tokenizer, config.teacher_template, limit)


def _check_vocabulary(
    objective: str, store: Store | None, student: TokenizerSpec, teacher: TokenizerSpec | None
) -> None:
    if store is not None or teacher is None:
        raise ValueError(f"objective: {objective} needs a live teacher; the store holds maps, not logits")
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ValueError(
            f"objective: {objective} needs one vocabulary; the teacher's has {len(teacher.tokenizer)} tokens and the "
            f"student's {len(student.tokenizer)}, and they differ"
        )


def _choose_packing(config: DistillConfig, objective: Objective, student: PreTrainedModel) -> tuple[bool, bool]:
    """Whether the student's texts are packed, and whether both tasks then share the question."""
    packing = choose_packing(config.packing, student)
    sharing = objective.explain_texts and packing and config.share_question is not False and can_share_prefix(student)
    if config.share_question and not sharing:
        raise ValueError(
            f"--share_question: {type(student).__name__} gives different results if the shared prefix is not "
            "recomputed; use --share_question false"
        )
    return packing, sharing


def _mixture(
    config: DistillConfig,
    student: PreTrainedModel,
    store: Store | None,
    teacher: PreTrainedModel | None,
    teacher_spec: TokenizerSpec | None,
) -> MixtureOfLayers:
    student_maps, value_layers, width = probe_student(student, config)
    if store is not None:
        store.check(describe(config, store.num_layers, store.all_layers, student_maps, teacher, teacher_spec))
        maps = store.num_layers
    else:
        maps = probe(cast(PreTrainedModel, teacher), map_heads=config.map_heads)[0]
    return mixture_of(config, maps, student_maps, value_layers, width)
