"""The command ``molsaki evaluate``: decodes greedily in batches and scores the answers exactly.

The model is any Hugging Face causal language model. Every prediction is written, so two models can be compared on the
same questions with an exact paired test.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.batches.tokenized import predict_prompt
from molsaki.config import EvaluateConfig, require
from molsaki.evaluation.generate import batches, decode
from molsaki.evaluation.scoring import score
from molsaki.io import write_json, write_json_lines
from molsaki.modeling.loading import context_length, load_for_command
from molsaki.text.alignment import prompt
from molsaki.text.examples import Example, read_examples

MAX_NEW_TOKENS = {"answer": 16, "rationale": 256}


def evaluate(
    config: EvaluateConfig, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Score a model on a data set; write ``predictions.jsonl`` and ``summary.json`` to ``config.output_dir``.

    Args:
        config: the options of the command.
        model, tokenizer: used in place of loading ``config.model``; both or neither.

    Returns:
        The summary: ``accuracy`` with its 95% Wilson interval, counts, throughput and, with ``config.compare``, the
        exact paired (McNemar) test.
    """
    data_file, folder = require(config, "data_file"), Path(require(config, "output_dir"))
    examples = read_examples(data_file, rationale=False)[: config.limit]
    other = None if config.compare is None else read_predictions(config.compare, examples)
    model, tokenizer = load_for_command(config, "model", model, tokenizer)
    model.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]

    start = time.perf_counter()
    replies, tokens = generate(model, tokenizer, examples, config)
    seconds = time.perf_counter() - start
    scores = [score(example, reply, config.mode) for example, reply in zip(examples, replies, strict=True)]
    total, right = len(scores), sum(one["right"] for one in scores)
    low, high = wilson(right, total)
    summary: dict[str, Any] = {"model": config.model, "data_file": config.data_file, "mode": config.mode}
    summary |= {"examples": total, "right": right, "accuracy": right / total, "low": low, "high": high}
    summary |= {"without_answer": sum(one["prediction"] is None for one in scores), "seconds": seconds}
    summary |= {"examples_per_second": total / seconds, "tokens_per_second": tokens / seconds}
    if other is not None:
        summary["paired"] = {"other": config.compare} | paired_test([one["right"] for one in scores], other)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_lines(folder / "predictions.jsonl", scores)
    write_json(folder / "summary.json", summary, indent=2)
    return summary


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], config: EvaluateConfig
) -> tuple[list[str], int]:
    """Greedy replies to the examples, in their order, and how many tokens were decoded.

    Questions of similar length are decoded together, padded on the left.
    """
    new_tokens = config.max_new_tokens or MAX_NEW_TOKENS[config.mode]
    limit = context_length(model.config)
    prompts = []
    for example in examples:
        if config.mode == "rationale":
            ids = prompt(example.question, tokenizer, template=config.template)
        else:
            ids = predict_prompt(example, tokenizer, config.template, config.predict_template)
        if limit is not None and len(ids) + new_tokens > limit:
            raise ValueError(
                f"{config.data_file}: example {example.id}: {len(ids)} tokens and a reply of {new_tokens} exceed the "
                f"model's context of {limit}"
            )
        prompts.append(ids)
    replies, decoded = [""] * len(prompts), 0
    with tqdm(total=len(prompts), unit="question", desc="evaluate") as bar:
        for batch in batches(prompts, config.batch_size):
            found, tokens = decode(model, tokenizer, [prompts[i] for i in batch], new_tokens)
            for i, reply in zip(batch, found, strict=True):
                replies[i] = reply.text
            decoded += tokens
            bar.update(len(batch))
    return replies, decoded


def wilson(right: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's confidence interval of a proportion."""
    interval = binomtest(right, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def paired_test(right: Sequence[bool], other: Sequence[bool]) -> dict[str, Any]:
    """The exact McNemar test of two models on the same questions.

    Returns:
        ``only_this`` and ``only_other``: questions that only one model answered right; ``p_value``, two-sided.
    """
    if len(right) != len(other):
        raise ValueError(f"other: expected {len(right)} results for a paired test, got {len(other)}")
    wins = sum(a and not b for a, b in zip(right, other, strict=True))
    losses = sum(b and not a for a, b in zip(right, other, strict=True))
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return {"only_this": wins, "only_other": losses, "p_value": p_value}


def read_predictions(path: str, examples: Sequence[Example]) -> list[bool]:
    """For each example whether another model answered it right, from that model's predictions.jsonl."""
    try:
        right = {
            one["id"]: one["right"] for one in map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--compare: {path}: not a predictions.jsonl of molsaki evaluate ({error!r})") from None
    missing = [e.id for e in examples if e.id not in right]
    if missing or len(right) != len(examples):
        detail = f"lacks {missing[0]!r}" if missing else f"holds {len(right)} examples in place of {len(examples)}"
        raise ValueError(f"--compare: {path}: is of other data: it {detail}")
    return [right[e.id] for e in examples]
