"""Runs the white-box teacher once over a data set and stores its maps: all that training needs of it.

No logits are computed. Texts of like length share a forward pass; a finished shard is never computed again. Processes
started by torchrun or ``accelerate launch`` take a share of the shards each.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

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
        What was done: ``examples``, ``left_out`` by reason, ``tokens_per_second`` of this process, ``finished`` (all
        shards are there, also those of other processes), ``bytes_per_example``.

    Raises:
        ValueError, TypeError, OSError: a flag, file or field is not as described, or the store is of something else.
    """
    require(config, "data_files", "store")
    examples = [example for path in config.data_files for example in read_examples(path)][: config.limit]
    repeated = [id for id, count in collections.Counter(e.id for e in examples).items() if count > 1]
    if repeated:
        raise ValueError(f"--data_files: id {repeated[0]!r} is in two files; ids name examples in the store")
    if teacher is None:
        require(config, "teacher")
        teacher = load_model(config.teacher, "--teacher", config.dtype, config.device_map)
        tokenizer = load_tokenizer(config.teacher, "--teacher")
    check_tokenizer(tokenizer, "--teacher")
    if config.device_map is None and torch.cuda.is_available():
        teacher.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    teacher.eval().set_attn_implementation(NAME)

    layers, _ = probe(teacher)
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

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = [shard for shard in writer.missing() if shard % world == rank]
    skipped, tokens, start = collections.Counter(), 0, time.perf_counter()
    total = sum(len(writer.examples_of(shard)) for shard in mine)
    with tqdm(total=total, unit="example", desc="extract", position=rank) as bar:
        for shard in mine:
            entries: dict[int, Entry] = {}
            texts: list[tuple[int, int, Encoded]] = []
            for number in writer.examples_of(shard):
                try:
                    spans, encoded, _ = cut(examples[number], config, sides)
                    texts.append((number, fingerprint_spans(spans), encoded[0]))
                except LeftOut as reason:
                    text = fingerprint_spans(spans_of(examples[number], config))
                    entries[number] = Entry(examples[number].id, text, reason=str(reason))
                    skipped[str(reason)] += 1
                    bar.update()
            for batch in _batches(texts, config.batch_tokens):
                for (number, text, _), maps, weights in zip(
                    batch, *_run(teacher, mixture, [e for _, _, e in batch], tokenizer.pad_token_id), strict=True
                ):
                    entries[number] = Entry(examples[number].id, text, maps, weights)
                tokens += sum(len(encoded.input_ids) for _, _, encoded in batch)
                bar.update(len(batch))
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s")
            writer.write(shard, [entries[number] for number in writer.examples_of(shard)])
    seconds = time.perf_counter() - start
    finished = writer.finish()
    result = {"store": config.store, "examples": len(examples), "shards_written": len(mine), "finished": finished}
    if tokens:
        result |= {"tokens": tokens, "tokens_per_second": tokens / seconds}
    if finished:
        index = Store(config.store).index
        result["left_out"] = index["left_out"]
        if sum(index["left_out"].values()) == len(examples):
            raise ValueError(all_left_out(collections.Counter(index["left_out"])))
        size = sum(path.stat().st_size for path in Path(config.store).iterdir())
        result["bytes_per_example"] = size / len(examples)
    return result


def _batches(texts: list[tuple[int, int, Encoded]], batch_tokens: int) -> Iterator[list[tuple[int, int, Encoded]]]:
    """Texts of like length together, the longest first, at most ``batch_tokens`` with padding (or one text)."""
    batch: list[tuple[int, int, Encoded]] = []
    for text in sorted(texts, key=lambda item: -len(item[2].input_ids)):
        if batch and (len(batch) + 1) * len(batch[0][2].input_ids) > batch_tokens:
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
    plan = StepPlan.from_spans([text.steps for text in texts], [text.words for text in texts]).to(teacher.device)
    maps = teacher_maps(teacher, input_ids.to(teacher.device), mask.long().to(teacher.device), plan)
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
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
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
