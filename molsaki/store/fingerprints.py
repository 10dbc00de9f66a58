"""Fingerprints of models, tokenizers, texts and options: the identity of a store of maps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from molsaki.functions import is_named, source
from molsaki.io import digest, hash64
from molsaki.method.layer_pairs import TEACHER_OPTIONS
from molsaki.text.spans import Spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from molsaki.batches.tokenized import TokenizerSpec
    from molsaki.config import ExtractConfig, MixtureOptions
    from molsaki.text.examples import Example
    from molsaki.training.config import DistillConfig

KEY_POLICIES = ("key_of", "key_occurrence", "max_key_words")
NOT_A_MODULE = ("regex:", "words:", "sentencex:")

# Entries of a model's config that its maps do not depend on.
NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}


def fingerprint_model(model: PreTrainedModel) -> str:
    """A digest of everything that a model's maps depend on: its config and every weight of its decoder, without the
    head.

    Offloaded weights (``device_map``) are read from where they are. The digest of a quantised model begins with
    ``quantised-``.
    """
    from accelerate.utils import align_module_device  # imported here: it takes a second, and stores do not need it

    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in NOT_THE_MODEL}
    weights = {}
    for prefix, module in model.base_model.named_modules():
        with align_module_device(module):
            for name, parameter in module.named_parameters(recurse=False):
                values = parameter.detach().reshape(-1)
                sample = values[:: max(values.numel() // 4096, 1)][:4096].to("cpu", torch.float32)
                chunks = (chunk.float().view(torch.int32) for chunk in values.split(1 << 24))
                total = sum(int(bits.sum(dtype=torch.int64)) for bits in chunks)  # exact in any order
                weights[f"{prefix}.{name}"] = [list(parameter.shape), total, sample.numpy().tobytes().hex()]
    return ("quantised-" if "quantization_config" in config else "") + digest([config, weights])


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that determines how a fast tokenizer processes a text, including its chat template."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None  # options of the last call, not of the tokenizer
    return digest([state, tokenizer.chat_template])


def fingerprint_spans(spans: Spans) -> int:
    """A 64-bit integer for a text, its steps and its key words."""
    turns = [spans.turns] if spans.turns else []
    return hash64(json.dumps([spans.text, spans.steps, spans.words, *turns]))


def fingerprint_examples(examples: Iterable[Example]) -> str:
    """A digest of the fields of a data set that its maps depend on, read one example at a time."""
    found = hashlib.blake2b(digest_size=16)
    for example in examples:
        given: list[Any] = [] if example.key_spans is None else [example.key_spans]
        given += [{"context": example.context}] if example.context else []
        found.update(json.dumps([example.id, example.question, example.rationale, example.keywords, *given]).encode())
    return found.hexdigest()


def describe(
    options: ExtractConfig | DistillConfig,
    teacher_layers: int,
    all_layers: bool,
    student_layers: int | None,
    teacher: PreTrainedModel | None,
    spec: TokenizerSpec | None,
) -> dict[str, Any]:
    """The description that a store must have to be used with these options.

    Args:
        options: the options of texts and mixtures.
        teacher_layers, student_layers: depths of the models; the student's may be None where the mixture needs none.
        all_layers: whether the store holds the maps of all layers, to be mixed when they are read.
        teacher, spec: the teacher and its tokenizer; if None, the description leaves them out.
    """
    found = describe_mixture(options, teacher_layers, all_layers, student_layers)
    found |= {name: getattr(options, name) for name in ("key", "splitter", "number_words", *KEY_POLICIES)}
    for name in ("key", "splitter"):  # the name of a function does not determine its source
        value = getattr(options, name)
        if is_named(value) and not value.startswith(NOT_A_MODULE):
            found[f"source_of_{name}"] = digest(source(name, value))
    if teacher is not None and spec is not None:
        found["teacher"] = fingerprint_model(teacher)
        found["teacher_tokenizer"] = fingerprint_tokenizer(spec.tokenizer)
        found["teacher_template"] = spec.template
    return found


def describe_mixture(
    options: MixtureOptions, teacher_layers: int, all_layers: bool, student_layers: int | None
) -> dict[str, Any]:
    """The part of `describe` that says which maps a store holds, and how they are mixed."""
    found: dict[str, Any] = {"all_layers": all_layers, "map_heads": options.map_heads}
    if not all_layers and is_named(options.mixture):
        raise ValueError(
            f"mixture: {options.mixture} needs a store of every layer (extract --all_layers), since a mixed one does "
            "not say which layers your function paired"
        )
    if all_layers:
        return found
    found["mixture"] = options.mixture
    names = TEACHER_OPTIONS.get(options.mixture)
    if names is not None:
        return found | {name: _counted(name, getattr(options, name), teacher_layers) for name in names}
    if student_layers is None:
        raise ValueError(f"--student: required: mixture={options.mixture} depends on the student's depth")
    return found | {"student_layers": student_layers, "mixture_seed": options.mixture_seed}


def _counted(name: str, value: Any, layers: int) -> Any:
    """The value of an option; numbers of layers count from the front."""
    if name == "teacher_layers":
        return [layer % layers for layer in value]
    return value % layers if name == "teacher_layer" else value
