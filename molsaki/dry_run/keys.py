"""The dry run of ``keys``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from molsaki.batches.tokenized import LeftOut
from molsaki.config import KeysConfig
from molsaki.dry_run.counts import Counts, Found, count_examples
from molsaki.dry_run.timing import memory_of, timed
from molsaki.measuring import bytes_of
from molsaki.modeling.loading import context_length
from molsaki.teacher.keys import PART, batches_of, candidates, prepare_keys, scored_text
from molsaki.teacher.word_scores import WORD_SCORES


def dry_run_keys(config: KeysConfig) -> Found:
    """What ``molsaki keys`` would do."""
    start = time.perf_counter()
    examples, teacher, tokenizer = prepare_keys(config)
    limit = context_length(teacher.config)
    loading, start = time.perf_counter() - start, time.perf_counter()
    counts, groups = Counts(), []
    for first in range(0, len(examples), PART):
        texts = []
        for number in range(first, min(first + PART, len(examples))):
            example = examples[number]
            try:
                spans = candidates(example, config)
                text = scored_text(example, spans, config, tokenizer, limit)
            except LeftOut as reason:
                counts.leave_out(str(reason))
                continue
            counts.add(len(spans.steps), len(spans.words), len(text.tokens.input_ids))
            texts.append((number, spans, text))
        for batch in batches_of(texts, config.batch_tokens):
            groups.append(([number for number, *_ in batch], sum(len(t.tokens.input_ids) for *_, t in batch)))
    counts.need_some()
    tokenizing = time.perf_counter() - start

    def run(numbers: Sequence[int]) -> None:
        texts = [scored_text(examples[n], candidates(examples[n], config), config, tokenizer, limit) for n in numbers]
        WORD_SCORES[config.by](teacher, texts, int(tokenizer.pad_token_id), config.layers)

    probe = timed(run, groups, teacher.device)
    work = Path(str(config.output_file)).with_suffix(".work.jsonl")
    lines = max(sum(1 for _ in work.open(encoding="utf-8")) - 1, 0) if work.is_file() else 0
    return {
        "examples": count_examples(examples, counts),
        "per_example": counts.summary(words="candidates"),
        "work": {
            "batches": len(groups),
            "tokens": sum(counts.tokens),
            "examples_done": min(lines * PART, len(examples)),
        },
        "memory": memory_of(teacher.device, {"teacher": bytes_of(teacher)}),
        "time": {
            "seconds": loading
            + (sum(counts.tokens) / probe.rate + tokenizing) * (1 - min(lines * PART, len(examples)) / len(examples)),
            "of_which_loading": loading,
            "measured": probe.how("batches"),
        },
    }
