"""The dry run of ``evaluate``."""

from __future__ import annotations

import time

import torch

from molsaki.config import EvaluateConfig, require
from molsaki.dry_run.counts import Counts, Found, count_examples
from molsaki.dry_run.timing import how_decoded, memory_of, time_decoding
from molsaki.evaluation.compare import read_predictions
from molsaki.evaluation.evaluate import prompts_of
from molsaki.evaluation.generate import batches, decode
from molsaki.measuring import bytes_of
from molsaki.modeling.loading import load_for_command
from molsaki.text.examples import read_examples


def dry_run_evaluate(config: EvaluateConfig) -> Found:
    """What ``molsaki evaluate`` would do."""
    if config.predictions:
        raise ValueError("dry_run: expected no --predictions, which runs no model and takes seconds")
    start = time.perf_counter()
    data_file, _ = require(config, "data_file"), require(config, "output_dir")
    examples = read_examples(data_file, rationale=False, data_format=config.data_format)[: config.limit]
    if config.compare:
        read_predictions("--compare", config.compare[0], examples)
    model, tokenizer = load_for_command(config, "model", None, None)
    model.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    loading = time.perf_counter() - start
    prompts, left_out, new_tokens = prompts_of(model, tokenizer, examples, config)
    counts = Counts()
    for reason in left_out.values():
        counts.leave_out(str(reason))
    for ids in prompts.values():
        counts.add(None, None, len(ids))
    counts.need_some()
    numbers = list(prompts)
    groups = batches(list(prompts.values()), config.batch_size)
    decoded, seconds = time_decoding(
        lambda batch, most: decode(model, tokenizer, [prompts[numbers[i]] for i in batch], most)[1], groups, new_tokens
    )
    return {
        "examples": count_examples(examples, counts),
        "per_example": counts.summary(),
        "work": {"questions": counts.used, "batches": len(groups), "longest_reply": new_tokens},
        "memory": memory_of(model.device, {"model": bytes_of(model)}),
        "time": {
            "seconds": loading + seconds * len(groups),
            "of_which_loading": loading,
            "measured": how_decoded(decoded, new_tokens),
        },
    }
