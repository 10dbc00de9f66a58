"""Runs the white-box teacher once over a data set and stores its maps: all that training needs of it.

No logits are computed. Texts of like length share a forward pass; a finished shard is never computed again. Of several
processes, started by torchrun, ``accelerate launch`` or by hand, each takes the next shard that nobody has; they do not
talk to each other, and the others make what a lost one left.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from molsaki.config import ExtractConfig, MixtureOptions, TextOptions, require
from molsaki.data import Example, LeftOut, Side, all_left_out, cut, read_examples, spans_of
from molsaki.hooks import NAME, capture
from molsaki.mixture import MixtureOfLayers
from molsaki.models import check_tokenizer, context_length, load_model, load_tokenizer
from molsaki.store import Entry, Store, StoreWriter, fingerprint_model, fingerprint_spans, fingerprint_tokenizer
from molsaki.tokens import Encoded
from molsaki_kernels import StepPlan


def extract(
    config: ExtractConfig, teacher: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict:
    """Store the teacher's maps of a data set; continues an unfinished store, and leaves a finished one alone.

    Args:
        config: what to extract and how.
        teacher, tokenizer: used in place of loading ``config.teacher``.

    Returns:
        What was done: ``examples``, ``left_out`` by reason, ``bytes_per_example`` of the whole store;
        ``shards_written``, ``tokens`` and ``tokens_per_second`` of this process.

    Raises:
        ValueError, TypeError, OSError: a flag, file or field is not as described, or the store is of something else.
    """
    require(config, "data_files", "store")
    examples = read_examples(config.data_files)[: config.limit]
    rank = int(os.environ.get("RANK", 0))
    if teacher is None:
        require(config, "teacher")
        device_map = config.device_map
        if device_map is None and config.quantize != "none" and torch.cuda.is_available():
            device_map = {"": _local_device()}
        teacher = load_model(config.teacher, "--teacher", config.dtype, device_map, config.quantize)
        tokenizer = load_tokenizer(config.teacher, "--teacher")
    check_tokenizer(tokenizer, "--teacher")
    if config.device_map is None and config.quantize == "none" and torch.cuda.is_available():
        teacher.to(_local_device())
    teacher.eval().set_attn_implementation(NAME)

    layers, _ = probe(teacher.base_model)
    side = Side(tokenizer, config.teacher_template, config.teacher_max_length or context_length(teacher.config))
    sides, student_layers = [side], None
    if config.student is not None:
        student = AutoConfig.from_pretrained(config.student)
        student_layers = student.get_text_config().num_hidden_layers
        if config.too_long == "cut":
            limit = config.max_length or context_length(student)
            sides.append(Side(load_tokenizer(config.student, "--student"), config.student_template, limit))
    description = describe(config, layers, config.all_layers, student_layers, teacher, side)
    writer = StoreWriter(
        config.store, description | {"num_layers": layers, "data": _fingerprint_data(examples)}, len(examples),
        config.shard_size,
    )  # fmt: skip
    mixture = None if config.all_layers else mixture_of(config, layers, student_layers or 1, 1)

    missing = writer.missing()
    written, tokens, seconds, start = 0, 0, 0.0, time.perf_counter()
    total = sum(len(writer.examples_of(shard)) for shard in missing)
    with tqdm(total=total, unit="example", desc="extract", disable=rank != 0) as bar:
        for shard in writer.claim(missing):
            bar.update(max(missing.index(shard) * config.shard_size - bar.n, 0))  # what other processes took
            entries: dict[int, Entry] = {}
            texts: list[tuple[int, Encoded]] = []
            for number in writer.examples_of(shard):
                example = examples[number]
                try:
                    spans, encoded, _ = cut(example, config, sides)
                    entries[number] = Entry(example.id, fingerprint_spans(spans))
                    texts.append((number, encoded[0]))
                except LeftOut as reason:
                    text = fingerprint_spans(spans_of(example, config))
                    entries[number] = Entry(example.id, text, reason=str(reason))
                    bar.update()
            for batch in _batches(texts, config.batch_tokens):
                found = _run(teacher, mixture, [encoded for _, encoded in batch], tokenizer.pad_token_id)
                for (number, _), maps, weights in zip(batch, *found, strict=True):
                    entries[number] = entries[number]._replace(maps=maps, weights=weights)
                tokens += sum(len(encoded.input_ids) for _, encoded in batch)
                seconds = time.perf_counter() - start
                bar.update(len(batch))
                bar.set_postfix_str(f"{tokens / seconds:.0f} tokens/s here")
            writer.write(shard, [entries[number] for number in writer.examples_of(shard)])
            written += 1
        bar.update(total - bar.n)
    writer.finish()
    store = Store(config.store)
    if sum(store.left_out.values()) == len(examples):
        raise ValueError(all_left_out(collections.Counter(store.left_out)))
    result = {"store": config.store, "examples": len(examples), "left_out": store.left_out}
    result |= {"bytes_per_example": store.num_bytes / len(examples), "shards_written": written, "tokens": tokens}
    return result | ({"tokens_per_second": tokens / seconds} if tokens else {})


def _local_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def _batches(texts: list[tuple[int, Encoded]], batch_tokens: int) -> Iterator[list[tuple[int, Encoded]]]:
    """Texts of like length together, the longest first, at most ``batch_tokens`` with padding (or one text)."""
    batch: list[tuple[int, Encoded]] = []
    for text in sorted(texts, key=lambda item: -len(item[1].input_ids)):
        if batch and (len(batch) + 1) * len(batch[0][1].input_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _run(
    teacher: PreTrainedModel, mixture: MixtureOfLayers | None, texts: Sequence[Encoded], pad: int
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each text's maps, ``(K, S, W)`` or ``(Lt, S, W)`` without a mixture, and weights ``(K, Lt)`` or None."""
    lengths = torch.tensor([len(text.input_ids) for text in texts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.full(mask.shape, pad)
    input_ids[mask] = torch.tensor([id for text in texts for id in text.input_ids])
    device = _device(teacher)
    plan = StepPlan.from_spans([text.steps for text in texts], [text.words for text in texts]).to(device)
    maps = teacher_maps(teacher, input_ids.to(device), mask.long().to(device), plan)
    weights: list[Tensor | None] = [None] * len(texts)
    if mixture is not None:
        mixed, maps = mixture.to(maps.device).teacher(maps, plan.to(maps.device))
        weights = list(mixed)
    return [m[:, : len(t.steps), : len(t.words)] for m, t in zip(maps.cpu(), texts, strict=True)], weights


def describe(
    options: TextOptions | MixtureOptions,
    teacher_layers: int,
    all_layers: bool,
    student_layers: int | None,
    teacher: PreTrainedModel | None,
    side: Side | None,
) -> dict:
    """What a store has to be of to be used with these options; the teacher's part only where it is given."""
    found = {"all_layers": all_layers} | {name: getattr(options, name) for name in ("key", "splitter", "number_words")}
    if teacher is not None:
        found["teacher"] = fingerprint_model(teacher)
        found["teacher_tokenizer"] = fingerprint_tokenizer(side.tokenizer)
        found["teacher_template"] = side.template
    if not all_layers:
        found["mixture"] = options.mixture
        if options.mixture == "mixture":
            found |= {"tau_t": options.tau_t, "teacher_scale": options.teacher_scale}
        elif options.mixture == "single":
            found["teacher_layer"] = options.teacher_layer % teacher_layers
        elif options.mixture != "last":
            if student_layers is None:
                raise ValueError(f"--student: required: mixture={options.mixture} depends on how deep the student is")
            found |= {"student_layers": student_layers, "mixture_seed": options.mixture_seed}
    return found


def _fingerprint_data(examples: Sequence[Example]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(json.dumps([example.id, example.question, example.rationale, example.keywords]).encode())
    return digest.hexdigest()


@torch.no_grad()
def teacher_maps(
    teacher: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, plan: StepPlan, **packed
) -> Tensor:
    """The teacher's map of every layer, ``(N, L, S, W)`` float32, for a batch, right-padded or packed; no logits."""
    decoder = teacher.base_model
    with capture(decoder, plan) as record:
        decoder(**{"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False} | packed)
    return record.maps


@torch.no_grad()
def probe(model: nn.Module, value_heads: str = "concat") -> tuple[int, int]:
    """How many attention layers a model has, and how wide Eq. 5's values are, from a forward of two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=_device(model))
    was_training = model.training
    model.eval()
    with capture(model, StepPlan.from_spans([[(0, 2)]], [[[0]]]), values=True, value_heads=value_heads) as record:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    model.train(was_training)
    _, layers, width = record.values.shape
    return layers, width


def _device(model: nn.Module) -> torch.device:
    """Where a model takes its input; weights that a ``device_map`` left elsewhere are brought there when they run."""
    first = next(m for m in model.modules() if next(m.parameters(recurse=False), None) is not None)
    hook = getattr(first, "_hf_hook", None)
    return next(first.parameters(recurse=False)).device if hook is None else torch.device(hook.execution_device)


def mixture_of(options: MixtureOptions, teacher_layers: int, student_layers: int, value_width: int) -> MixtureOfLayers:
    """The mixture that a config describes, for models of these depths."""
    return MixtureOfLayers(
        teacher_layers, student_layers, value_width, kind=options.mixture, router=options.router, tau_t=options.tau_t,
        tau_s=options.tau_s, teacher_scale=options.teacher_scale, value_heads=options.value_heads,
        pooling=options.pooling, teacher_layer=options.teacher_layer, student_layer=options.student_layer,
        seed=options.mixture_seed,
    )  # fmt: skip
