"""The command ``molsaki extract``: runs the white-box teacher once over a data set and stores its maps.

No logits are computed. Texts share a forward pass, packed without padding if the model allows it, else padded and
sorted by length; meanwhile a thread tokenizes the next texts. A finished shard is never computed again. Several
processes, started by torchrun, ``accelerate launch`` or by hand, share the work: each claims the next free shard. They
do not communicate; the others compute the shards of a lost process.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from molsaki.batches.batch import TextBatch
from molsaki.batches.collator import text_batch
from molsaki.batches.dataset import as_examples
from molsaki.batches.tokenized import (
    LeftOut,
    TokenizedText,
    TokenizerSpec,
    all_left_out,
    cut,
    list_left_out,
    spans_of,
)
from molsaki.config import ExtractConfig, require
from molsaki.method.layer_pairs import TEACHER_OPTIONS
from molsaki.method.mixture import MixtureOfLayers
from molsaki.modeling.attention_hook import NAME
from molsaki.modeling.loading import context_length, load_for_command, load_tokenizer
from molsaki.modeling.packing_probe import choose_packing
from molsaki.modeling.unwrap import input_device
from molsaki.store.fingerprints import describe, fingerprint_examples, fingerprint_spans
from molsaki.store.map_store import Entry, Store, read_description
from molsaki.store.map_store_writer import StoreWriter
from molsaki.teacher.teacher_maps import mixture_of, probe, teacher_maps
from molsaki.text.examples import Example, read_examples
from molsaki.text.frames import check_template

logger = logging.getLogger(__name__)

SHARD_BYTES = 1 << 28  # of the maps of a shard
SAMPLED = 64  # texts from which the size of the maps is estimated
MAP_ENTRIES = 1 << 24  # of the padded maps of one layer (64 MiB)

Item = TypeVar("Item")


def extract(
    config: ExtractConfig,
    teacher: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Store the teacher's maps of a data set; continues an unfinished store, and does not change a finished one.

    Args:
        config: the options of the command.
        teacher, tokenizer: used instead of loading ``config.teacher``; both or neither.
        data: used instead of reading ``config.data_files``: a sequence of examples or of dicts, such as a
            ``datasets.Dataset``.

    Returns:
        A summary: ``examples``, ``left_out`` by reason, the number of records ``not_read``, ``bytes_per_example`` of
        the whole store;
        ``shards_written``, ``tokens`` and ``tokens_per_second`` of this process.

    Raises:
        ValueError, TypeError, OSError: a flag, file or field is not as described, or the store has another identity.
    """
    job = prepare_extraction(config, teacher, tokenizer, data)
    folder, examples, shard_size = job.folder, job.examples, job.shard_size
    writer = StoreWriter(folder, job.description, len(examples), shard_size)
    job.check_templates()
    missing = writer.missing()
    written, tokens, seconds, start = 0, 0, 0.0, time.perf_counter()
    left_out: dict[str, list[str]] = {}
    total = sum(len(writer.examples_of(shard)) for shard in missing)
    with tqdm(total=total, unit="example", desc="extract", disable=os.environ.get("RANK", "0") != "0") as bar:
        for shard in writer.claim(missing):
            bar.update(max(missing.index(shard) * shard_size - bar.n, 0))  # shards of other processes
            numbers = writer.examples_of(shard)
            entries: dict[int, Entry] = {}
            for found, count in entries_of(examples, numbers, config, job.specs, job.teacher, job.mixture, job.packing):
                entries |= found
                tokens += count
                seconds = time.perf_counter() - start
                bar.update(len(found))
                bar.set_postfix_str(f"{tokens / seconds:.0f} tokens/s here")
            for entry in entries.values():
                if entry.maps is None:
                    left_out.setdefault(entry.reason, []).append(entry.id)
            writer.write(shard, [entries[number] for number in numbers])
            written += 1
        bar.update(total - bar.n)
    writer.finish()
    if left_out:
        logger.warning("%s: %s", folder, list_left_out(left_out))
    store = Store(folder)
    if sum(store.left_out.values()) == len(examples):
        raise ValueError(f"{folder}: {all_left_out(collections.Counter(store.left_out))}")
    return {
        "store": folder,
        "examples": len(examples),
        "left_out": store.left_out,
        "not_read": len(getattr(examples, "left_out", ())),
        "bytes_per_example": store.num_bytes / len(examples),
        "shards_written": written,
        "tokens": tokens,
    } | ({"tokens_per_second": tokens / seconds} if tokens else {})


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The loaded and checked inputs of an extraction.

    Attributes:
        specs: the teacher's tokenizer first, then others whose limits a text has to fit.
        mixture: None to keep the maps of all layers.
        description: the store's identity.
        entry_bytes: of one step and one word in the store.
    """

    folder: str
    examples: Sequence[Example]
    teacher: PreTrainedModel
    specs: list[TokenizerSpec]
    mixture: MixtureOfLayers | None
    packing: bool
    description: dict[str, Any]
    entry_bytes: int
    shard_size: int

    def check_templates(self) -> None:
        """Refuse a template that cannot be used."""
        for one, option in zip(self.specs, ("teacher_template", "student_template"), strict=False):
            check_template(one.tokenizer, one.template, option)


def prepare_extraction(
    config: ExtractConfig,
    teacher: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Sequence[Any] | None = None,
) -> Extraction:
    """Load data and teacher and check the options, as `extract` does before it writes anything."""
    folder = require(config, "store")
    if data is None:
        examples: Sequence[Example] = read_examples(require(config, "data_files"), data_format=config.data_format)
    elif config.data_files:
        raise ValueError(f"data, data_files: expected one of them, got both: {' '.join(config.data_files)}")
    else:
        examples = as_examples(data, "data", config.data_format)
    examples = examples[: config.limit]
    device_map = config.device_map
    if device_map is None and config.quantize != "none" and torch.cuda.is_available():
        device_map = {"": _local_device()}
    options = {"device_map": device_map, "quantize": config.quantize}
    teacher, tokenizer = load_for_command(config, "teacher", teacher, tokenizer, **options)
    if config.device_map is None and config.quantize == "none" and torch.cuda.is_available():
        teacher.to(_local_device())  # type: ignore[arg-type]
    teacher.set_attn_implementation(NAME)
    packing = choose_packing(config.packing, teacher)
    maps, layers, _ = probe(teacher.base_model, map_heads=config.map_heads)
    limit = config.teacher_max_length or context_length(teacher.config)
    spec = TokenizerSpec(tokenizer, config.teacher_template, limit)
    pairs_all = config.mixture not in TEACHER_OPTIONS
    if config.map_heads == "each" and pairs_all and not config.all_layers:
        raise ValueError(
            f"map_heads: each needs --all_layers with mixture={config.mixture}, which pairs the heads of both sides"
        )
    specs, student_layers = [spec], None
    if config.student is not None:
        student = AutoConfig.from_pretrained(config.student)
        student_layers = student.get_text_config().num_hidden_layers
        if config.too_long == "cut":
            limit = config.max_length or context_length(student)
            specs.append(TokenizerSpec(load_tokenizer(config.student, "--student"), config.student_template, limit))
    if not any(spans_of(example, config).words for example in examples):
        raise ValueError(
            f"key: {config.key} finds no key word in any of the {len(examples)} examples, so every map is empty; use "
            "another --key, or give the examples their keywords"
        )
    description = describe(config, maps, config.all_layers, student_layers, teacher, spec)
    description |= {"num_layers": maps, "data": fingerprint_examples(examples)}
    side = dataclasses.replace(config, student_layer=-1, router="joint")  # options of the student's side are unused
    mixture = None if config.all_layers else mixture_of(side, maps, student_layers or 1, layers, 1)
    pairs = maps if mixture is None else mixture.pairs
    entry_bytes = pairs * (2 if mixture is None else 4)
    shard_size = _shard_size(examples, config, entry_bytes, Path(folder))
    return Extraction(
        folder=folder,
        examples=examples,
        teacher=teacher,
        specs=specs,
        mixture=mixture,
        packing=packing,
        description=description,
        entry_bytes=entry_bytes,
        shard_size=shard_size,
    )


def _shard_size(examples: Sequence[Example], config: ExtractConfig, entry_bytes: int, folder: Path) -> int:
    """Examples per shard: ``config.shard_size``, or fewer if the maps would take more than `SHARD_BYTES`.

    The maps of a shard are in memory until it is written. Their size is estimated from some of the texts, identically
    in every process. An existing store keeps its shard size.

    Args:
        entry_bytes: of one step and one word.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):  # the writer says what is wrong with a damaged store
        existing = int(read_description(folder)["shard_size"])
        return existing if existing <= config.shard_size else config.shard_size
    some = [spans_of(examples[n], config) for n in range(0, len(examples), -(-len(examples) // SAMPLED))]
    mean = sum(len(spans.steps) * len(spans.words) for spans in some) / len(some) * entry_bytes
    return max(min(config.shard_size, int(SHARD_BYTES / max(mean, 1))), 1)


def _local_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


class _Pending(NamedTuple):
    """An example before its forward: its entry, still without a map, and the teacher's text (None if left out)."""

    number: int
    entry: Entry
    text: TokenizedText | None

    @property
    def tokens(self) -> int:
        return 0 if self.text is None else len(self.text.input_ids)

    @property
    def steps(self) -> int:
        return 0 if self.text is None else len(self.text.steps)

    @property
    def words(self) -> int:
        return 0 if self.text is None else len(self.text.words)


def entries_of(
    examples: Sequence[Example],
    numbers: Iterable[int],
    config: ExtractConfig,
    specs: Sequence[TokenizerSpec],
    teacher: PreTrainedModel,
    mixture: MixtureOfLayers | None,
    packing: bool,
) -> Iterator[tuple[dict[int, Entry], int]]:
    """The entries of the examples with these indices, batch by batch, and the number of tokens of each batch.

    The content of a batch depends only on the indices and the config. While the teacher runs one batch, a thread
    prepares the next.

    Args:
        specs: the teacher's tokenizer first, then others whose limits a text has to fit.
        mixture: None to keep the maps of all layers.
    """
    for pending, texts in _ahead(batches_of(examples, numbers, config, specs, packing)):
        found = {number: entry for number, entry, _ in pending}
        if texts is not None:
            run = [number for number, _, text in pending if text is not None]
            for number, maps, weights in zip(run, *mixed_maps(teacher, mixture, texts, config.map_heads), strict=True):
                found[number] = found[number]._replace(maps=maps, weights=weights)
        yield found, sum(item.tokens for item in pending)


def batches_of(
    examples: Sequence[Example],
    numbers: Iterable[int],
    config: ExtractConfig,
    specs: Sequence[TokenizerSpec],
    packing: bool,
) -> Iterator[tuple[list[_Pending], TextBatch | None]]:
    """The examples of each forward, and the batch of the texts that are not left out (None if there are none)."""
    for pending in _grouped(_texts(examples, numbers, config, specs), config.batch_tokens, packing):
        texts = [item.text for item in pending if item.text is not None]
        yield pending, text_batch(texts, specs[0].tokenizer.pad_token_id, packing) if texts else None


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items; a thread computes each one while the previous one is in use. Its errors are raised here."""
    with ThreadPoolExecutor(1, "extract") as pool:
        ahead = pool.submit(next, items, None)
        while (item := ahead.result()) is not None:
            ahead = pool.submit(next, items, None)
            yield item


def _texts(
    examples: Sequence[Example], numbers: Iterable[int], config: ExtractConfig, specs: Sequence[TokenizerSpec]
) -> Iterator[_Pending]:
    for number in numbers:
        example = examples[number]
        try:
            spans, (encoded, *_), _ = cut(example, config, specs)
        except LeftOut as reason:
            entry = Entry(example.id, fingerprint_spans(spans_of(example, config)), reason=str(reason))
            yield _Pending(number, entry, None)
            continue
        ids = np.array(encoded.input_ids, np.int32)
        text = TokenizedText(ids, encoded.target_start, encoded.steps, encoded.words)
        yield _Pending(number, Entry(example.id, fingerprint_spans(spans)), text)


def _grouped(texts: Iterable[_Pending], batch_tokens: int, packing: bool) -> Iterator[list[_Pending]]:
    """Texts in batches of at most ``batch_tokens`` with padding, or of one longer text.

    Packed texts keep their order, and a batch is complete as soon as it is full. Padded texts are sorted, the longest
    first, after all of them are tokenized. The maps of a batch are padded to the most steps and words of its texts. A
    batch of several texts has at most `MAP_ENTRIES` map entries per layer.
    """
    batch: list[_Pending] = []
    for item in texts if packing else sorted(texts, key=lambda item: -item.tokens):
        more = [*batch, item]
        tokens = sum(one.tokens for one in more) if packing else len(more) * more[0].tokens
        entries = len(more) * max(one.steps for one in more) * max(one.words for one in more)
        if batch and (tokens > batch_tokens or entries > MAP_ENTRIES):
            yield batch
            more = [item]
        batch = more
    if batch:
        yield batch


def mixed_maps(
    teacher: PreTrainedModel, mixture: MixtureOfLayers | None, texts: TextBatch, map_heads: str
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each text's maps, ``(K, S, W)`` or ``(Lt, S, W)`` without a mixture, and weights ``(K, Lt)`` or None."""
    moved, plan = texts.to(input_device(teacher)), texts.plan
    assert plan is not None and moved.plan is not None
    maps = teacher_maps(teacher, plan=moved.plan, map_heads=map_heads, **moved.model_inputs())
    weights: list[Tensor | None] = [None] * len(plan)
    if mixture is not None:
        mixed, maps = mixture.to(maps.device).teacher(maps, plan.to(maps.device))
        weights = list(mixed.cpu())
    sizes = zip(plan.step_mask.sum(1).tolist(), plan.word_mask.sum(1).tolist(), strict=True)
    return [m[:, :steps, :words].clone() for m, (steps, words) in zip(maps.cpu(), sizes, strict=True)], weights
