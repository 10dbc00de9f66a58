"""Trainers of tiny models, for the tests of training."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainerCallback

from molsaki.text.examples import Example
from molsaki.training.config import DistillConfig
from molsaki.training.trainer import DistillTrainer
from tests.helpers import tiny

TOKENIZER, OTHER = tiny.tokenizer(), tiny.tokenizer(60)
LOSSES = ("step", "loss", "loss_pre", "loss_exp", "loss_att", "entropy_student", "grad_norm", "learning_rate")


def examples(count: int = 8) -> list[Example]:
    return [Example(r["id"], r["question"], r["rationale"], r["answer"]) for r in tiny.problems(count)]


def config(folder: Path | str, **options) -> DistillConfig:
    options = dict(
        max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, save_steps=3, use_cpu=True,
        disable_tqdm=True, seed=3, dataloader_num_workers=0,
    ) | options  # fmt: skip
    return DistillConfig(output_dir=str(folder), **options)


def trainer(folder: Path, data=None, student=None, **options) -> DistillTrainer:
    return DistillTrainer(
        args=config(folder, **options),
        model=student or tiny.model(2),
        processing_class=TOKENIZER,
        teacher_model=tiny.model(3, len(OTHER), seed=1),
        teacher_processing_class=OTHER,
        train_dataset=data or examples(),
    )


def logged(t: DistillTrainer, *names: str) -> list[tuple]:
    return [tuple(entry[name] for name in names) for entry in t.state.log_history if "loss" in entry]


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def gradients(t: DistillTrainer) -> dict[str, torch.Tensor]:
    """The gradient that the first optimizer step sees."""
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.update({n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None})

    t.add_callback(Look())
    t.train()
    return seen
