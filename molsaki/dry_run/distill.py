"""The dry run of ``distill``."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from molsaki import run_files
from molsaki.batches.streamed import StreamedDataset
from molsaki.config import require
from molsaki.dry_run.counts import Counts, Found
from molsaki.dry_run.timing import TYPICAL, memory_of
from molsaki.measuring import resident
from molsaki.training import checkpoints
from molsaki.training.config import DistillConfig
from molsaki.training.probe import Plan, Probe

STREAMED = 256  # examples of a stream that are read


def dry_run_distill(config: DistillConfig) -> Found:
    """What ``molsaki distill`` would do."""
    require(config, "train_file")
    folder = str(config.output_dir)
    existing = run_files.checkpoints(Path(folder)) if Path(folder).is_dir() else []
    last = checkpoints.last_checkpoint(folder) if config.resume and existing else None
    if existing and not (config.resume or config.resume_from_checkpoint):
        raise ValueError(
            f"output_dir: {folder} holds the checkpoints of another run; continue it with --resume, or choose another "
            "folder"
        )
    before, start = resident(), time.perf_counter()
    with tempfile.TemporaryDirectory() as part:
        trainer = Probe(config, part)
        loading = time.perf_counter() - start
        data = cast(Any, trainer.train_dataset)
        is_streamed = isinstance(data, StreamedDataset)
        counts, total = _count_training(data)
        plan = Plan.of(config, None if is_streamed else len(data), total)
        evaluations = _evaluations(config, plan)
        trainer.choose_batches(statistics.fmean(counts.tokens))
        trainer.train()
        evaluating, eval_examples = trainer.time_evaluation() if evaluations else (0.0, 0)
    rate = trainer.rate()
    done = run_files.step_of(last) if last else 0
    left = max(plan.steps - done, 0)
    seconds = left * (plan.tokens_per_step / rate + trainer.optimizer_seconds) + evaluations * evaluating
    examples: Found = {"used": counts.used, "left_out": dict(counts.left_out)}
    if is_streamed:
        examples["note"] = f"of the first {counts.used} of a stream, which is not counted"
    else:
        examples["not_read"] = len(getattr(data.examples, "left_out", ()))
        examples["without_key_words"] = data.without_words
    return {
        "examples": examples,
        "per_example": counts.summary(),
        "work": {
            "objective": trainer.args.objective,
            "optimizer_steps": plan.steps,
            "steps_done": done,
            "epochs": round(plan.epochs, 3) if plan.epochs is not None else None,
            "examples_per_step": plan.per_step,
            "tokens_per_step": round(plan.tokens_per_step),
            "evaluations": evaluations,
            "examples_per_evaluation": eval_examples,
        },
        "memory": memory_of(config.device, trainer.parts(before)),
        "time": {
            "seconds": loading + seconds,
            "of_which_loading": loading,
            "seconds_per_step": plan.tokens_per_step / rate + trainer.optimizer_seconds,
            "measured": f"{TYPICAL} training steps of one batch after one with the longest texts, scaled by their "
            "tokens; without checkpoints and eval_accuracy",
        },
    }


def _evaluations(config: DistillConfig, plan: Plan) -> int:
    strategy = getattr(config.eval_strategy, "value", config.eval_strategy)
    if strategy == "epoch":
        return 0 if plan.epochs is None else -int(-plan.epochs // 1)
    if strategy == "steps":
        every = config.eval_steps or config.logging_steps
        return int(plan.steps // (every if every >= 1 else max(every * plan.steps, 1)))
    return 0


def _count_training(data: Any) -> tuple[Counts, float]:
    """Counts of the training data, and the student's tokens of both texts: of all, or the mean of one if streamed."""
    counts = Counts()
    if isinstance(data, StreamedDataset):
        for tokenized, _ in itertools.islice(data, STREAMED):
            _add(counts, tokenized)
        for reason, count in data.left_out.items():
            counts.leave_out(reason, count)
        counts.need_some()
        return counts, statistics.fmean(counts.tokens)
    for number in range(len(data)):
        _add(counts, data[number][0])
    for reason, ids in data.left_out.items():
        counts.leave_out(reason, len(ids))
    return counts, float(data.lengths.sum())


def _add(counts: Counts, tokenized: Any) -> None:
    tokens = len(tokenized.explain.input_ids) + len(tokenized.predict.input_ids)
    counts.add(len(tokenized.explain.steps), len(tokenized.explain.words), tokens)
