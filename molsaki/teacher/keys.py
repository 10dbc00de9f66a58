"""The command ``molsaki keys``: the words of each text that matter most to a teacher, written as its ``key_spans``.

Every record is copied with the field that ``--key given`` reads. So no model is needed later to find the key words, and
they are part of a store's identity.

    train.keys.jsonl            the records, in their original format; written last
    train.keys.work.jsonl       the results so far, so that an interrupted run can continue; removed at the end
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.batches.tokenized import (
    LeftOut,
    TokenizedText,
    all_left_out,
    check_traces,
    left_out_if_refused,
    list_left_out,
    spans_of,
)
from molsaki.config import KeysConfig, TextOptions, require
from molsaki.functions import is_named, source
from molsaki.io import digest, write_json_lines
from molsaki.modeling.loading import context_length, load_for_command
from molsaki.store.fingerprints import NOT_A_MODULE, fingerprint_examples, fingerprint_model, fingerprint_tokenizer
from molsaki.teacher.teacher_maps import layers_with_maps
from molsaki.teacher.word_scores import NO_SCORE, WORD_SCORES, Array, ScoredText
from molsaki.text.alignment import encode
from molsaki.text.examples import Example, Examples, read_examples
from molsaki.text.formats import to_fields
from molsaki.text.frames import check_template
from molsaki.text.spans import Span, Spans
from molsaki.text.tables import check_json_lines_name
from molsaki.text.thinking import tags_of

logger = logging.getLogger(__name__)

PART = 64  # examples whose results are written together; an interruption loses at most the work on one part
# Options that a continued run may change: files are compared by content, and the others affect only rounding.
NOT_THE_RESULT = ("teacher", "data_file", "output_file", "batch_tokens", "device_map")
Result = dict[str, Any]  # {"key_spans": ...} or {"left_out": reason}, with "words" and "tokens"


def keys(
    config: KeysConfig, teacher: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Write ``config.output_file``: the records of a data set with ``key_spans``; continues an interrupted run.

    Args:
        config: the options of the command.
        teacher, tokenizer: used instead of loading ``config.teacher``; both or neither.

    Returns:
        A summary: ``examples``, ``left_out`` of them by reason, the number of records ``not_read``, ``words`` that were
        candidates and ``key_words`` among them, ``tokens`` and ``seconds`` of this process.

    Raises:
        ValueError, TypeError, OSError: a flag, file or field is not as described, the output exists, or no example can
            be used.
    """
    examples, teacher, tokenizer = prepare_keys(config, teacher, tokenizer)
    data_file, output = config.data_file, Path(str(config.output_file))
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.with_suffix(".work.jsonl")
    description = describe(config, examples, teacher, tokenizer)
    done = len(_read_work(work, description)) * PART
    start, tokens = time.perf_counter(), 0
    with tqdm(total=len(examples), unit="example", desc="keys", initial=min(done, len(examples))) as bar:
        for first in range(done, len(examples), PART):
            results = key_words_of(examples[first : first + PART], config, teacher, tokenizer)
            tokens += sum(result["tokens"] for result in results)
            _append(work, [] if first else [description], {"first": first, "results": results})
            bar.update(len(results))
    seconds = time.perf_counter() - start

    results = [result for found in _read_work(work) for result in found]
    left_out: dict[str, list[str]] = collections.defaultdict(list)
    for example, result in zip(examples, results, strict=True):
        if "left_out" in result:
            left_out[result["left_out"]].append(example.id)
    counts = collections.Counter({reason: len(ids) for reason, ids in left_out.items()})
    if left_out:
        logger.warning("%s: %s", data_file, list_left_out(left_out))
    if counts.total() == len(examples):
        raise ValueError(f"{data_file}: {all_left_out(counts)}")
    write_json_lines(output, _records(examples, results, config.data_format))
    work.unlink()
    spans = [result["key_spans"] for result in results if "key_spans" in result]
    return {
        "output_file": str(output),
        "examples": len(examples),
        "left_out": dict(counts),
        "not_read": len(examples.left_out),
        "words": sum(result["words"] for result in results),
        "key_words": sum(len(found) for sides in spans for found in sides.values()),
        "tokens": tokens,
        "seconds": seconds,
    }


def prepare_keys(
    config: KeysConfig, teacher: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Examples, PreTrainedModel, PreTrainedTokenizerBase]:
    """Load data and teacher and check the options, as `keys` does before it writes anything."""
    data_file, output = require(config, "data_file"), Path(require(config, "output_file"))
    check_json_lines_name("--output_file", output)
    if output.exists():
        raise ValueError(f"--output_file: {output} exists already; choose another name, or delete it")
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            f"WORLD_SIZE: keys runs in one process, got {processes}; start it without torchrun (--device_map auto "
            "spreads a large teacher over several GPUs)"
        )
    examples = read_examples(data_file, data_format=config.data_format)[: config.limit]
    if not any(candidates(example, config).words for example in examples):
        raise ValueError(
            f"--among: {config.among} finds no word in any of the {len(examples)} examples of {data_file}; use another "
            "one, such as words"
        )
    device_map = config.device_map or ({"": 0} if torch.cuda.is_available() else None)
    loading = {"device_map": device_map, "quantize": config.quantize}
    teacher, tokenizer = load_for_command(config, "teacher", teacher, tokenizer, **loading)
    check_template(tokenizer, config.teacher_template, "teacher_template")
    there = layers_with_maps(teacher.base_model) if config.layers else ()
    for layer in config.layers:
        if layer not in there:
            raise ValueError(f"--layers: expected some of {' '.join(map(str, there))}, got {layer}")
    return examples, teacher, tokenizer


def candidates(example: Example, config: KeysConfig) -> Spans:
    """The text and steps of an example, and the words that can be selected.

    Tags of thinking traces cannot be selected, nor can words of earlier turns, which ``key_spans`` do not cover.
    """
    names = ("splitter", "number_words", "teacher_template")
    same = {name: getattr(config, name) for name in names}
    spans = spans_of(example, TextOptions(key=config.among, key_of=config.of, **same))
    asked, tags = spans.asked[-1][1][0], tags_of(spans.text)
    words = [w for w in spans.words if w[0] >= asked and not any(a < w[1] and w[0] < b for a, b in tags)]
    return dataclasses.replace(spans, words=tuple(words))


def key_words_of(
    examples: Sequence[Example], config: KeysConfig, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Result]:
    """The result of each example, in order. Texts share a forward with those of similar length."""
    results: list[Result] = []
    texts: list[tuple[int, Spans, ScoredText]] = []
    for number, example in enumerate(examples):
        try:
            spans = candidates(example, config)
            text = scored_text(example, spans, config, tokenizer, context_length(teacher.config))
            texts.append((number, spans, text))
            results.append({"words": len(spans.words), "tokens": len(text.tokens.input_ids)})
        except LeftOut as reason:
            results.append({"left_out": str(reason), "words": 0, "tokens": 0})
    for batch in batches_of(texts, config.batch_tokens):
        scored = WORD_SCORES[config.by](teacher, [text for *_, text in batch], _pad_id(tokenizer), config.layers)
        for (number, spans, _), scores in zip(batch, scored, strict=True):
            try:
                chosen = [spans.words[w] for w in select(scores, config.top, config.top_share)]
                results[number]["key_spans"] = _key_spans(examples[number], spans, chosen)
            except LeftOut as reason:
                results[number]["left_out"] = str(reason)
    return results


def scored_text(
    example: Example, spans: Spans, config: KeysConfig, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> ScoredText:
    """The tokens of an example's question, rationale and answer; ``cot_template`` joins the last two.

    Args:
        spans: of its question and rationale; their words are scored.
        limit: the longest text in tokens, if ``config.teacher_max_length`` is not set.

    Raises:
        LeftOut: it cannot be used; the message is the reason.
    """
    if not example.rationale.strip():
        raise LeftOut("no rationale")
    if config.drop_wrong and not example.is_right:
        raise LeftOut("wrong answer")
    check_traces(example.rationale)
    before, _, rest = config.cot_template.partition("{rationale}")
    between, _, after = rest.partition("{answer}")
    before, border = before.lstrip(), spans.rationale_start
    head = spans.text[:border] + before + spans.rationale + between
    whole = head + example.answer.strip() + after.rstrip()
    ends = [end if end <= border else end + len(before) for _, end in spans.steps]
    ends[-1] += len(between) - len(between.lstrip())  # white space belongs to the step before it
    words = [(a, b) if a < border else (a + len(before), b + len(before)) for a, b in spans.words]
    answer = (len(head), len(head) + len(example.answer.strip()))
    steps = tuple(itertools.pairwise([0, *ends, len(whole)]))
    with left_out_if_refused():
        encoded = encode(
            Spans(whole, steps, (*words, answer), spans.question_end, spans.turns),
            tokenizer,
            template=config.teacher_template,
        )
    *found, labels = encoded.words
    if not labels:
        raise LeftOut("the answer has no token of its own")
    end, asked = labels[-1] + 1, sum(stop <= border for stop in ends)
    limit = config.teacher_max_length or limit
    if limit is not None and end > limit:
        raise LeftOut("text longer than the teacher's context or teacher_max_length")
    tokens = TokenizedText(
        np.array(encoded.input_ids[:end], np.int32),
        labels[0] if config.labels == "answer" else encoded.target_start,
        [(min(a, end), min(b, end)) for a, b in encoded.steps[asked:]],
        found,
    )
    own = [next(s for s, (_, stop) in enumerate(steps) if a < stop) for a, _ in words]
    return ScoredText(tokens, [max(step + 1 - asked, 0) for step in own])


def select(scores: Array, top: int | None, top_share: float | None) -> list[int]:
    """The words with the largest scores, in the order of the text; of equal scores the first.

    Args:
        scores: ``(W,)``; words with `NO_SCORE` are never selected.
        top: how many, or all if there are fewer.
        top_share: alternatively, the share of the words with a score, rounded, but at least one word.

    Raises:
        LeftOut: the scores are not finite, or all are 0.
    """
    candidates = np.flatnonzero(scores != NO_SCORE)
    if not len(candidates):
        return []
    if not np.isfinite(scores[candidates]).all():
        raise LeftOut("a score is not finite")
    if not scores[candidates].any():
        raise LeftOut("every score is 0")
    count = top if top_share is None else max(round(top_share * len(candidates)), 1)
    return sorted(candidates[np.argsort(-scores[candidates], kind="stable")][:count].tolist())


def describe(
    config: KeysConfig, examples: Examples, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Everything that the results depend on: they are reused only if all of it is the same."""
    found = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_THE_RESULT}
    for name in ("among", "splitter"):
        value = getattr(config, name)
        if is_named(value) and not value.startswith(NOT_A_MODULE):
            found[f"source of {name}"] = digest(source(name, value))
    return found | {
        "data": digest([fingerprint_examples(examples), *(example.answer for example in examples)]),
        "teacher": [fingerprint_model(teacher), str(teacher.dtype)],
        "tokenizer": fingerprint_tokenizer(tokenizer),
    }


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id)


def batches_of(
    texts: Sequence[tuple[int, Spans, ScoredText]], batch_tokens: int
) -> Iterator[list[tuple[int, Spans, ScoredText]]]:
    """The texts, the longest first, in batches of at most ``batch_tokens`` with padding, or of one longer text."""
    batch: list[tuple[int, Spans, ScoredText]] = []
    for item in sorted(texts, key=lambda item: -len(item[2].tokens.input_ids)):
        if batch and (len(batch) + 1) * len(batch[0][2].tokens.input_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _key_spans(example: Example, spans: Spans, words: Sequence[Span]) -> dict[str, list[Span]]:
    """Words of an example's spans as characters of its original question and rationale, including outer white space."""
    border, sides = spans.rationale_start, (example.question, example.rationale)
    asked, told = (len(text) - len(text.lstrip()) for text in sides)
    asked -= spans.asked[-1][1][0]
    return {
        "question": [(a + asked, b + asked) for a, b in words if a < border],
        "rationale": [(a - border + told, b - border + told) for a, b in words if a >= border],
    }


def _records(examples: Examples, results: Sequence[Result], data_format: str) -> Iterator[dict[str, Any]]:
    """The records with their key spans, without those left out; ids that were line numbers are written out."""
    for number, result in enumerate(results):
        if "key_spans" in result:
            record, example = examples.record(number), examples[number]
            given = to_fields(record, data_format)["rationale"]
            opening = len(example.rationale) - len(str(given))  # length of a <think> that was prepended
            spans = result["key_spans"]
            sides = spans | {"rationale": [(a - opening, b - opening) for a, b in spans["rationale"]]}
            yield ({} if str(record.get("id")) == example.id else {"id": example.id}) | record | {"key_spans": sides}


def _read_work(path: Path, description: dict[str, Any] | None = None) -> list[list[Result]]:
    """The results of each finished part; none if there is no file. The file must match a given description."""
    data = path.read_bytes() if path.exists() else b""
    complete = data.rfind(b"\n") + 1
    if complete < len(data):
        os.truncate(path, complete)  # a line that was being written at the interruption
    if not complete:
        return []
    try:
        begun, *lines = map(json.loads, data[:complete].splitlines())
        if [line["first"] for line in lines] != list(range(0, PART * len(lines), PART)):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: damaged; delete it to start over") from None
    for name, value in (description or {}).items():
        if begun.get(name) != json.loads(json.dumps(value)):
            raise ValueError(
                f"{path}: was begun with another {name}; run the old command to continue it, choose another "
                "output_file, or delete it to start over"
            )
    return [line["results"] for line in lines]


def _append(path: Path, begin: list[Any], value: dict[str, Any]) -> None:
    """Append a line and flush it to the disk; with ``begin`` the file begins with it."""
    with path.open("w" if begin else "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in (*begin, value))
        file.flush()
        os.fsync(file.fileno())
