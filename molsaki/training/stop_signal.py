"""`StopOnSignal`: Ctrl-C, or SIGTERM from a scheduler, saves a checkpoint at the end of the current step and stops.

With several processes, all of them stop after the same step, even if the signal reached only one.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from molsaki.training.trainer import DistillTrainer

logger = logging.getLogger(__name__)

# torchrun passes a signal on to its workers, which a terminal's Ctrl-C has already reached: within this many seconds a
# second signal counts as the same.
SAME_SIGNAL = 2.0


class TrainingStopped(KeyboardInterrupt):
    """A signal stopped the training, after a checkpoint was saved.

    Attributes:
        signal: the number of the signal.
        checkpoint: the folder of the checkpoint.
        can_resume: False with ``save_only_model``, whose checkpoints hold no optimizer.
    """

    def __init__(self, number: int, checkpoint: str, can_resume: bool):
        super().__init__(f"signal {number}: saved {checkpoint}")
        self.signal, self.checkpoint, self.can_resume = number, checkpoint, can_resume


class StopOnSignal(TrainerCallback):
    """While it is entered as a context, SIGINT and SIGTERM stop a trainer at the end of its current step.

    ``train()`` then raises `TrainingStopped`, straight after the checkpoint was saved. A second signal raises
    ``KeyboardInterrupt`` at once. The first signal in the last step or after it changes nothing, so the result can be
    saved in the same context. Handlers are installed in the main thread only, and not for a signal that the process
    ignores, as background processes of a shell script or nohup do.

    Example:
        >>> with StopOnSignal(trainer):
        ...     trainer.train()
        ...     trainer.save_model()
    """

    def __init__(self, trainer: DistillTrainer):
        self._trainer = trainer
        self._received, self._time = 0, 0.0
        self._is_agreed = self._is_complete = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        # First, so that everything done at a step that saves, such as logging, is also done at this step.
        self._trainer.callback_handler.callbacks.insert(0, self)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        self._trainer.remove_callback(self)
        if isinstance(error[1], TrainingStopped):  # its frames hold the wrapped model: `DistillTrainer.end_training`
            traceback.clear_frames(error[1].__traceback__)

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._time = number, now
            if os.environ.get("RANK", "0") == "0":
                if self._is_complete:
                    logger.warning("the training is complete and its result is being saved; Ctrl-C again stops at once")
                else:
                    logger.warning("saving a checkpoint at the end of this step; Ctrl-C again stops at once")
        elif not self._is_of_torchrun(number, now):
            error = KeyboardInterrupt()
            error.signal = number  # type: ignore[attr-defined]
            raise error

    def _is_of_torchrun(self, number: int, now: float) -> bool:
        """Whether torchrun sends a signal that no user does: once more to all, or because a process ended first."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return False
        return now - self._time <= SAME_SIGNAL or (self._is_agreed and number == signal.SIGTERM)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            return  # the training is complete
        accelerator = self._trainer.accelerator
        if accelerator.num_processes > 1:
            numbers = accelerator.gather(torch.tensor([self._received], device=accelerator.device))
            self._received = int(numbers.max())
        if self._received:
            self._time = self._time or time.monotonic()
            self._is_agreed = control.should_save = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_complete = True

    @property
    def is_stopping(self) -> bool:
        """Whether all processes save a checkpoint now and stop."""
        return self._is_agreed

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_agreed:
            self._trainer.accelerator.wait_for_everyone()  # torchrun ends all when one has: none before the seal
            folder = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
            raise TrainingStopped(self._received, folder, not args.save_only_model)
