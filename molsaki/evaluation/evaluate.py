"""Decodes greedily in batches and scores exactly: numbers as numbers, choices as choices.

The model is any Hugging Face causal language model. Every prediction is written, so two models can be compared on the
same questions with an exact paired test.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from scipy.stats import binomtest
from tqdm.auto import tqdm

from molsaki.batches.tokenized import predict_prompt
from molsaki.config import EvaluateConfig, require
from molsaki.evaluation.generate import batches, decode, write_whole
from molsaki.modeling.loading import check_tokenizer, context_length, load_model, load_tokenizer
from molsaki.text.answers import find_choice, find_number, parse_number, same_text
from molsaki.text.examples import Example, read_examples
from molsaki.text.tokens import prompt

MAX_NEW_TOKENS = {"answer": 16, "rationale": 256}


def evaluate(config: EvaluateConfig, model=None, tokenizer=None) -> dict:
    """Score a model on a data set; write ``predictions.jsonl`` and ``summary.json`` to ``config.output_dir``.

    Args:
        config: what to evaluate and how.
        model, tokenizer: used in place of loading ``config.model``.

    Returns:
        The summary: ``accuracy`` with its 95% Wilson interval, counts, throughput and, with ``config.compare``, the
        exact paired (McNemar) test.

    Raises:
        ValueError, TypeError, OSError: a flag, file or field is not as described; the message names it.
    """
    require(config, "data_file", "output_dir")
    examples = read_examples(config.data_file, rationale=False)[: config.limit]
    other = None if config.compare is None else read_predictions(config.compare, examples)
    if model is None:
        require(config, "model")
        model = load_model(config.model, "--model", config.dtype)
        tokenizer = load_tokenizer(config.model, "--model")
    check_tokenizer(tokenizer)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()

    start = time.perf_counter()
    replies, tokens = generate(model, tokenizer, examples, config)
    seconds = time.perf_counter() - start
    rows = [score(example, reply, config.mode) for example, reply in zip(examples, replies, strict=True)]
    right = sum(row["right"] for row in rows)
    low, high = wilson(right, len(rows))
    summary = {
        "model": config.model, "data_file": config.data_file, "mode": config.mode, "examples": len(rows),
        "right": right, "accuracy": right / len(rows), "low": low, "high": high,
        "without_answer": sum(row["prediction"] is None for row in rows),
        "seconds": seconds, "examples_per_second": len(rows) / seconds, "tokens_per_second": tokens / seconds,
    }  # fmt: skip
    if other is not None:
        summary["paired"] = {"other": config.compare} | paired_test([row["right"] for row in rows], other)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def generate(model, tokenizer, examples: Sequence[Example], config: EvaluateConfig) -> tuple[list[str], int]:
    """Greedy replies to the examples, in their order, and how many tokens were decoded.

    Questions of like length are decoded together, padded on the left.

    Raises:
        ValueError: a question and its reply do not fit the model's context.
    """
    new_tokens = config.max_new_tokens or MAX_NEW_TOKENS[config.mode]
    prompts = []
    for example in examples:
        if config.mode == "rationale":
            prompts.append(prompt(example.question, tokenizer, template=config.template))
        else:
            prompts.append(predict_prompt(example, tokenizer, config.template, config.predict_template))
    limit = context_length(model.config)
    for example, ids in zip(examples, prompts, strict=True):
        if limit is not None and len(ids) + new_tokens > limit:
            raise ValueError(
                f"{config.data_file}: example {example.id}: {len(ids)} tokens and a reply of {new_tokens} exceed the "
                f"model's context of {limit}"
            )
    replies, decoded = [""] * len(prompts), 0
    with tqdm(total=len(prompts), unit="question", desc="evaluate") as bar:
        for rows in batches(prompts, config.batch_size):
            found, tokens = decode(model, tokenizer, [prompts[i] for i in rows], new_tokens)
            for i, reply in zip(rows, found, strict=True):
                replies[i] = reply.text
            decoded += tokens
            bar.update(len(rows))
    return replies, decoded


def score(example: Example, reply: str, mode: str) -> dict:
    """What is written about one reply: ``id, question, gold, reply, prediction, right``.

    The prediction is the first number (or choice) of an answer, the last of a rationale, or None. Gold answers that
    are neither are compared as text.
    """
    last = mode == "rationale"
    gold = parse_number(example.answer)
    if example.choices:
        prediction = find_choice(reply, example.choices, last)
        right = prediction == example.answer
    elif gold is not None:
        prediction = find_number(reply, last)
        right = prediction is not None and parse_number(prediction) == gold
    else:
        lines = reply.strip().splitlines() or [""]
        prediction = lines[-1 if last else 0].strip() or None
        right = same_text(prediction or "", example.answer)
    return {
        "id": example.id, "question": example.question, "gold": example.answer, "reply": reply,
        "prediction": prediction, "right": right,
    }  # fmt: skip


def wilson(right: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's confidence interval of a proportion."""
    interval = binomtest(right, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def paired_test(right: Sequence[bool], other: Sequence[bool]) -> dict:
    """The exact McNemar test of two models on the same questions.

    Returns:
        ``only_this`` and ``only_other``: questions that one model alone got right; ``p_value``, two-sided.
    """
    if len(right) != len(other):
        raise ValueError(f"other: expected {len(right)} results for a paired test, got {len(other)}")
    wins = sum(a and not b for a, b in zip(right, other, strict=True))
    losses = sum(b and not a for a, b in zip(right, other, strict=True))
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return {"only_this": wins, "only_other": losses, "p_value": p_value}


def read_predictions(path: str, examples: Sequence[Example]) -> list[bool]:
    """Which of the examples another model got right, from its predictions.jsonl.

    Raises:
        ValueError: the file does not hold exactly these examples.
    """
    try:
        right = {row["id"]: row["right"] for row in map(json.loads, Path(path).read_text().splitlines())}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--compare: {path}: not a predictions.jsonl of molsaki evaluate ({error!r})") from None
    missing = [e.id for e in examples if e.id not in right]
    if missing or len(right) != len(examples):
        detail = f"lacks {missing[0]!r}" if missing else f"holds {len(right)} examples in place of {len(examples)}"
        raise ValueError(f"--compare: {path}: is of other data: it {detail}")
    return [right[e.id] for e in examples]
