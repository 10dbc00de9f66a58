"""Runs the white-box teacher once over a data set and stores its maps: all that training needs of it.

No logits are computed. Texts share a forward pass, packed into one row where the model allows it, else padded to a like
length; meanwhile a thread cuts and tokenizes the next ones. A finished shard is never computed again. Of several
processes, started by torchrun, ``accelerate launch`` or by hand, each takes the next shard that nobody has; they do not
talk to each other, and the others make what a lost one left.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from molsaki.batches.batch import TextBatch
from molsaki.batches.collator import text_batch
from molsaki.batches.tokenized import LeftOut, TokenizedText, TokenizerSpec, all_left_out, cut, spans_of
from molsaki.config import ExtractConfig, MixtureOptions, TextOptions, require
from molsaki.modeling.attention_hook import NAME
from molsaki.modeling.capture import capture
from molsaki.modeling.loading import check_tokenizer, context_length, load_model, load_tokenizer
from molsaki.modeling.packing_probe import can_pack
from molsaki.modeling.unwrap import input_device
from molsaki.teacher.store import Entry, Store, StoreWriter, fingerprint_model, fingerprint_spans, fingerprint_tokenizer
from molsaki.text.examples import Example, read_examples
from molsaki.training.mixture import MixtureOfLayers
from molsaki_kernels import StepPlan

Item = TypeVar("Item")


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

    packing = config.packing is not False and can_pack(teacher)
    if config.packing and not packing:
        raise ValueError(f"--packing: texts that share a row change one another in {type(teacher).__name__}")
    layers, _ = probe(teacher.base_model)
    side = TokenizerSpec(
        tokenizer, config.teacher_template, config.teacher_max_length or context_length(teacher.config)
    )
    sides, student_layers = [side], None
    if config.student is not None:
        student = AutoConfig.from_pretrained(config.student)
        student_layers = student.get_text_config().num_hidden_layers
        if config.too_long == "cut":
            limit = config.max_length or context_length(student)
            sides.append(TokenizerSpec(load_tokenizer(config.student, "--student"), config.student_template, limit))
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
            numbers = writer.examples_of(shard)
            entries: dict[int, Entry] = {}
            for found, count in entries_of(examples, numbers, config, sides, teacher, mixture, packing):
                entries |= found
                tokens += count
                seconds = time.perf_counter() - start
                bar.update(len(found))
                bar.set_postfix_str(f"{tokens / seconds:.0f} tokens/s here")
            writer.write(shard, [entries[number] for number in numbers])
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


class _Text(NamedTuple):
    """An example on its way: its entry, yet without a map, and what the teacher is to run, None if it is left out."""

    number: int
    entry: Entry
    text: TokenizedText | None

    @property
    def tokens(self) -> int:
        return 0 if self.text is None else len(self.text.input_ids)


def entries_of(
    examples: Sequence[Example],
    numbers: Iterable[int],
    config: ExtractConfig,
    sides: Sequence[TokenizerSpec],
    teacher: PreTrainedModel,
    mixture: MixtureOfLayers | None,
    packing: bool,
) -> Iterator[tuple[dict[int, Entry], int]]:
    """The entries of the examples of these numbers, batch by batch, and how many tokens each batch has.

    What is in a batch depends on the numbers and the config alone. While the teacher runs it, a thread makes the next.

    Args:
        sides: the teacher's, and those besides that a text has to fit.
        mixture: None to keep the maps of all layers.
    """
    for batch, task in _ahead(tasks_of(examples, numbers, config, sides, packing)):
        found = {number: entry for number, entry, _ in batch}
        if task is not None:
            run = [number for number, _, text in batch if text is not None]
            for number, maps, weights in zip(run, *_run(teacher, mixture, task), strict=True):
                found[number] = found[number]._replace(maps=maps, weights=weights)
        yield found, sum(item.tokens for item in batch)


def tasks_of(
    examples: Sequence[Example],
    numbers: Iterable[int],
    config: ExtractConfig,
    sides: Sequence[TokenizerSpec],
    packing: bool,
) -> Iterator[tuple[list[_Text], TextBatch | None]]:
    """What runs together, batch by batch: the examples, and a task of those that are not left out, if there are any."""
    pad = sides[0].tokenizer.pad_token_id
    for batch in _batches(_texts(examples, numbers, config, sides), config.batch_tokens, packing):
        texts = [item.text for item in batch if item.text is not None]
        yield batch, text_batch(texts, pad, packing) if texts else None


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, each made by a thread while the one before it is in use; what making one raises is raised here."""
    end = object()
    with ThreadPoolExecutor(1, "extract") as pool:
        made = pool.submit(next, items, end)
        while (item := made.result()) is not end:
            made = pool.submit(next, items, end)
            yield item


def _texts(
    examples: Sequence[Example], numbers: Iterable[int], config: ExtractConfig, sides: Sequence[TokenizerSpec]
) -> Iterator[_Text]:
    for number in numbers:
        example = examples[number]
        try:
            spans, (encoded, *_), _ = cut(example, config, sides)
        except LeftOut as reason:
            entry = Entry(example.id, fingerprint_spans(spans_of(example, config)), reason=str(reason))
            yield _Text(number, entry, None)
            continue
        ids = np.array(encoded.input_ids, np.int32)
        text = TokenizedText(ids, encoded.target_start, encoded.steps, encoded.words)
        yield _Text(number, Entry(example.id, fingerprint_spans(spans)), text)


def _batches(texts: Iterable[_Text], batch_tokens: int, packing: bool) -> Iterator[list[_Text]]:
    """Texts to run together, at most ``batch_tokens`` with padding (or one text): packed in their order, each batch as
    soon as it is full; padded the longest first, once all are there."""
    batch: list[_Text] = []
    real = 0
    for item in texts if packing else sorted(texts, key=lambda item: -item.tokens):
        together = real + item.tokens if packing else (len(batch) + 1) * batch[0].tokens if batch else 0
        if batch and together > batch_tokens:
            yield batch
            batch, real = [], 0
        batch.append(item)
        real += item.tokens
    if batch:
        yield batch


def _run(
    teacher: PreTrainedModel, mixture: MixtureOfLayers | None, task: TextBatch
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each text's maps, ``(K, S, W)`` or ``(Lt, S, W)`` without a mixture, and weights ``(K, Lt)`` or None."""
    device = input_device(teacher)
    plan = task.plan.to(device)
    inputs = {name: value.to(device) for name, value in task.model_inputs().items() if isinstance(value, Tensor)}
    maps = teacher_maps(teacher, plan=plan, **inputs)
    weights: list[Tensor | None] = [None] * len(plan)
    if mixture is not None:
        mixed, maps = mixture.to(maps.device).teacher(maps, plan.to(maps.device))
        weights = list(mixed.cpu())
    sizes = zip(task.plan.step_mask.sum(1).tolist(), task.plan.word_mask.sum(1).tolist(), strict=True)
    return [m[:, :steps, :words] for m, (steps, words) in zip(maps.cpu(), sizes, strict=True)], weights


def describe(
    options: TextOptions | MixtureOptions,
    teacher_layers: int,
    all_layers: bool,
    student_layers: int | None,
    teacher: PreTrainedModel | None,
    side: TokenizerSpec | None,
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
    return MixtureOfLayers(
        teacher_layers, student_layers, value_width, kind=options.mixture, router=options.router, tau_t=options.tau_t,
        tau_s=options.tau_s, teacher_scale=options.teacher_scale, value_heads=options.value_heads,
        pooling=options.pooling, teacher_layer=options.teacher_layer, student_layer=options.student_layer,
        seed=options.mixture_seed,
    )  # fmt: skip
