"""The dry run of ``annotate``; no request is sent to an endpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molsaki.annotation.annotate import teacher_of
from molsaki.annotation.demonstrations import demonstrations_by_task, task_of
from molsaki.annotation.prompts import FIRST, SECOND, PromptFormat, question_turns
from molsaki.annotation.teacher import Decoding, Prompt
from molsaki.config import AnnotateConfig, require
from molsaki.dry_run.counts import Counts, Found, count_examples
from molsaki.dry_run.timing import how_decoded, memory_of, time_decoding
from molsaki.evaluation.generate import batches, decode
from molsaki.measuring import bytes_of
from molsaki.text.examples import read_examples


def dry_run_annotate(config: AnnotateConfig) -> Found:
    """What ``molsaki annotate`` would do; no request is sent to an endpoint."""
    start = time.perf_counter()
    data_file, output = require(config, "data_file"), Path(require(config, "output_file"))
    keep = config.rationales == "keep"
    examples = read_examples(data_file, rationale=keep, data_format=config.data_format)[: config.limit]
    form = PromptFormat.of(config.template)
    shown = demonstrations_by_task(config, examples, form)
    teacher: Any = teacher_of(config, form, None, None)
    loading = time.perf_counter() - start
    counts, prompts, most = Counts(), [], {FIRST: 0.0, SECOND: 0.0}
    decoding = Decoding(config.max_new_tokens, form.stop, config.temperature)
    for example in examples:
        if keep and (not example.rationale.strip() or example.keywords is not None):
            counts.leave_out("nothing to ask: no rationale, or it has keywords")
            continue
        turns = question_turns(form, shown[task_of(example)], example, None)
        content, reason = teacher.prompt(turns, config.instruction, config.max_new_tokens)
        if reason:
            counts.leave_out(reason)
            continue
        prompts.append(content)
        counts.add(None, None, len(content) if config.endpoint is None else 0)
        if config.price_in is not None and not keep:
            hinted = question_turns(form, shown[task_of(example)], example, config.hint)
            again, _ = teacher.prompt(hinted, config.instruction, config.max_new_tokens)
            for phase, one in ((FIRST, content), (SECOND, again)):
                body = teacher._body(phase, Prompt(example, 1, one), decoding)
                most[phase] += teacher._spending.most(body) * config.samples
    counts.need_some()
    first = 0 if keep else len(prompts) * config.samples
    asked = {"phase_1": first, "phase_2_at_most": first}
    words = len(prompts) if keep else (first if config.keywords == "teacher" else 0)
    work = output.with_suffix(".work.jsonl")
    kept = max(sum(1 for _ in work.open(encoding="utf-8")) - 1, 0) if work.is_file() else 0
    result: Found = {
        "examples": count_examples(examples, counts),
        "work": {
            "requests" if config.endpoint else "replies": asked
            | {"key_words_at_most": words, "at_most": 2 * first + words},
            "lines_in_the_journal": kept,
        },
    }
    if config.endpoint is not None:
        if config.price_in is not None and not keep:
            result["cost"] = {
                "phase_1_at_most": round(most[FIRST], 4),
                "both_phases_at_most": round(most[FIRST] + most[SECOND], 4),
                "computed": "a token per byte of the prompt and the longest reply; most runs cost a fraction of it",
            } | ({} if config.max_cost is None else {"max_cost": config.max_cost})
        result["time"] = {"note": f"unknown: no request was sent; {config.concurrency} requests are sent at a time"}
        return result
    groups = batches(prompts, config.batch_size)
    model, tokenizer = teacher._model, teacher._tokenizer

    def run(batch: Sequence[int], most: int) -> int:
        return decode(model, tokenizer, [prompts[i] for i in batch], most, stop=form.stop,
                      temperature=config.temperature)[1]  # fmt: skip

    decoded, seconds = time_decoding(run, groups, config.max_new_tokens)
    phases = 1 if keep else 2 * config.samples
    batches_of_words = -(-words // config.batch_size)
    result["per_example"] = counts.summary()
    result["memory"] = memory_of(model.device, {"teacher": bytes_of(model)})
    result["time"] = {
        "seconds_at_most": loading + seconds * (phases * len(groups) + (0 if keep else batches_of_words)),
        "of_which_loading": loading,
        "seconds_of_phase_1": seconds * len(groups) * config.samples,
        "measured": how_decoded(decoded, config.max_new_tokens),
    }
    return result
