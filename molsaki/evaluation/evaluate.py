"""The command ``molsaki evaluate``: decodes greedily in batches and scores the answers exactly.

The model is any Hugging Face causal language model. Every prediction is written, so two models can be compared on the
same questions with an exact paired test, and the seeds of two methods with `molsaki.evaluation.compare`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.batches.tokenized import LeftOut, all_left_out, left_out_if_refused, list_left_out, predict_prompt
from molsaki.config import PREDICT_TEMPLATE, EvaluateConfig, require
from molsaki.evaluation.compare import PREDICTIONS, compare, read_predictions
from molsaki.evaluation.generate import batches, decode
from molsaki.evaluation.scoring import score
from molsaki.evaluation.statistics import paired_test, wilson
from molsaki.io import write_json, write_json_lines
from molsaki.modeling.loading import context_length, load_for_command
from molsaki.run_files import CONFIG
from molsaki.text.alignment import prompt
from molsaki.text.examples import Example, read_examples
from molsaki.text.frames import frame_of

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = {"answer": 16, "rationale": 256}


def evaluate(
    config: EvaluateConfig, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Score a model on a data set; write ``predictions.jsonl`` and ``summary.json`` to ``config.output_dir``.

    Args:
        config: the options of the command.
        model, tokenizer: used instead of loading ``config.model``; both or neither.

    Returns:
        The summary: ``accuracy`` with its 95% Wilson interval, counts, throughput and, with ``config.compare``, the
        exact paired (McNemar) test. ``not_read``: the number of unusable records. ``left_out``: the ids of the examples
        that could not be asked, by reason; they count in no other value. With ``config.predictions`` no model runs, and
        the summary is that of `compare`.
    """
    if config.predictions:
        if model is not None or tokenizer is not None:
            raise ValueError("model: expected none with config.predictions, which runs no model")
        return compare(config)
    if len(config.compare) > 1:
        raise ValueError(f"--compare: expected one path without --predictions, got {' '.join(config.compare)}")
    data_file, folder = require(config, "data_file"), Path(require(config, "output_dir"))
    examples = read_examples(data_file, rationale=False, data_format=config.data_format)[: config.limit]
    other = read_predictions("--compare", config.compare[0], examples) if config.compare else None
    model, tokenizer = load_for_command(config, "model", model, tokenizer)
    config = with_templates(config)
    model.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]

    start = time.perf_counter()
    replies, tokens = generate(model, tokenizer, examples, config)
    seconds = time.perf_counter() - start
    records: list[dict[str, Any]] = []
    left_out: dict[str, list[str]] = {}
    for example, reply in zip(examples, replies, strict=True):
        if isinstance(reply, LeftOut):
            left_out.setdefault(str(reply), []).append(example.id)
            record = {"id": example.id, "question": example.question, "gold": example.answer, "left_out": str(reply)}
            records.append(record | {"reply": None, "prediction": None, "right": False})
        else:
            records.append(score(example, reply, config.mode))
    if left_out:
        logger.warning("%s: %s", data_file, list_left_out(left_out))
    scores = [one for one in records if "left_out" not in one]
    total, right = len(scores), sum(one["right"] for one in scores)
    if not scores:
        counts = collections.Counter({reason: len(ids) for reason, ids in left_out.items()})
        raise ValueError(f"{data_file}: {all_left_out(counts)}")
    low, high = wilson(right, total)
    summary: dict[str, Any] = {"model": config.model, "data_file": config.data_file, "mode": config.mode}
    summary |= {"template": config.template, "predict_template": config.predict_template, "left_out": left_out}
    summary["not_read"] = len(examples.left_out)
    summary |= {"examples": total, "right": right, "accuracy": right / total, "low": low, "high": high}
    summary |= {"without_answer": sum(one["prediction"] is None for one in scores), "seconds": seconds}
    summary |= {"examples_per_second": total / seconds, "tokens_per_second": tokens / seconds}
    if other is not None:
        pairs = zip(records, other, strict=True)
        both = [(one["right"], right) for one, right in pairs if right is not None and "left_out" not in one]
        paired = paired_test([a for a, _ in both], [b for _, b in both])
        summary["paired"] = {"other": config.compare[0], "questions": len(both)} | paired
    folder.mkdir(parents=True, exist_ok=True)
    write_json_lines(folder / PREDICTIONS, records)
    write_json(folder / "summary.json", summary, indent=2)
    return summary


def with_templates(config: EvaluateConfig) -> EvaluateConfig:
    """The config with missing templates taken from the model's run, if its folder was written by distill."""
    saved = Path(config.model or ".", CONFIG)
    run = json.loads(saved.read_text(encoding="utf-8")) if config.model and saved.is_file() else {}
    template, predict = run.get("student_template", "plain"), run.get("predict_template", PREDICT_TEMPLATE)
    return dataclasses.replace(
        config,
        template=template if config.template is None else config.template,
        predict_template=predict if config.predict_template is None else config.predict_template,
        thinking=bool(run.get("thinking")) if config.thinking is None else config.thinking,
    )


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], config: EvaluateConfig
) -> tuple[list[str | LeftOut], int]:
    """Greedy replies to the examples, in their order, and how many tokens were decoded.

    Questions of similar length are decoded together, padded on the left. If a question was not asked, its reply is
    replaced by the reason: it does not fit the model's context, or a template or tokenizer refuses it.
    """
    prompts, left_out, new_tokens = prompts_of(model, tokenizer, examples, config)
    replies: list[str | LeftOut] = ["" if number in prompts else left_out[number] for number in range(len(examples))]
    numbers, decoded = list(prompts), 0
    with tqdm(total=len(prompts), unit="question", desc="evaluate") as bar:
        for batch in batches(list(prompts.values()), config.batch_size):
            asked = [numbers[i] for i in batch]
            found, tokens = decode(model, tokenizer, [prompts[i] for i in asked], new_tokens)
            for i, reply in zip(asked, found, strict=True):
                replies[i] = reply.text
            decoded += tokens
            bar.update(len(batch))
    return replies, decoded


def prompts_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], config: EvaluateConfig
) -> tuple[dict[int, list[int]], dict[int, LeftOut], int]:
    """The token ids of each question that is asked, the reasons why others are not, by index, and the longest reply."""
    config = with_templates(config)
    assert config.template is not None and config.predict_template is not None
    frame_of(tokenizer, config.template)  # refuses a template that fails for every text
    new_tokens = config.max_new_tokens or MAX_NEW_TOKENS[config.mode]
    limit = context_length(model.config)
    prompts: dict[int, list[int]] = {}
    left_out: dict[int, LeftOut] = {}
    for number, example in enumerate(examples):
        try:
            with left_out_if_refused():
                if config.mode == "rationale":
                    ids = prompt(
                        example.question,
                        tokenizer,
                        template=config.template,
                        thinking=bool(config.thinking),
                        context=example.context,
                    )
                else:
                    ids = predict_prompt(example, tokenizer, config.template, config.predict_template)
            if limit is not None and len(ids) + new_tokens > limit:
                raise LeftOut(f"question and a reply of {new_tokens} tokens longer than the model's context of {limit}")
            prompts[number] = ids
        except LeftOut as reason:
            left_out[number] = reason
    return prompts, left_out, new_tokens
