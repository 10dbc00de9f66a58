"""The callbacks that every `DistillTrainer` has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StartOfRun(TrainerCallback):
    """Before the first step, finds the best checkpoint of a run that has been moved, and calls ``start``."""

    def __init__(self, folder: Path, start: Callable[[TrainerState], None]):
        self._folder, self._start = folder, start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._start(state)
        best = self._folder / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)


class LogBeforeSave(TrainerCallback):
    """Logs at every step that saves, so that a resumed run averages its metrics over the same steps."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        control.should_log |= control.should_save

    on_epoch_end = on_step_end


class StopIfBad(TrainerCallback):
    """Before the weights change, stops all processes if the loss of one was not finite.

    Attributes:
        message: the error message of this process, once its loss is not finite.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self.message: str | None = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        bad = torch.tensor(float(self.message is not None), device=self._accelerator.device)
        if self._accelerator.num_processes > 1 and self._accelerator.reduce(bad, "sum") > 0:
            elsewhere = f"the loss of another process is not finite after step {state.global_step}"
            raise FloatingPointError(self.message or elsewhere)
