"""`StopOnSignal`: Ctrl-C, or SIGTERM from a scheduler, saves a checkpoint at the end of the current step and stops.

With several processes, all of them stop after the same step, even if the signal reached only one.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
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
        self._received, self._time = 0, 0.0  # by this process
        self._agreed = 0  # what all processes stop for
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

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

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a process that was forked here
        now = time.monotonic()
        if not self._received:
            self._received, self._time = number, now
            if os.environ.get("RANK", "0") == "0" and not self._agreed:
                if self._is_too_late():
                    logger.warning("this is the last step or later: the student is saved; Ctrl-C again stops at once")
                else:
                    logger.warning("saving a checkpoint at the end of this step; Ctrl-C again stops at once")
        elif not self._is_of_torchrun(number, now):
            error = KeyboardInterrupt()
            error.signal = number  # type: ignore[attr-defined]
            raise error

    def _is_too_late(self) -> bool:
        """Whether the training is in its last step or complete."""
        state = self._trainer.state
        return self._trainer.control.should_training_stop or 0 < state.max_steps <= state.global_step + 1

    def _is_of_torchrun(self, number: int, now: float) -> bool:
        """Whether torchrun sends a signal that no user does: once more to all, or because a process ended first."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return False
        return now - self._time <= SAME_SIGNAL or (bool(self._agreed) and number == signal.SIGTERM)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            return  # the training is complete
        accelerator, number = self._trainer.accelerator, self._received
        if accelerator.num_processes > 1:  # a signal that arrives in between counts at the next step
            number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
        if number:
            self._agreed, control.should_save = number, True

    @property
    def is_stopping(self) -> bool:
        """Whether all processes save a checkpoint now and stop."""
        return bool(self._agreed)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._agreed:
            self._trainer.accelerator.wait_for_everyone()  # torchrun ends all when one has: none before the seal
            folder = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
            raise TrainingStopped(self._agreed, folder, not args.save_only_model)


def keep_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Let a loader's worker processes live through a signal to all processes, such as torchrun's, scancel's or Ctrl-C.

    The step in which the training stops still needs their batches. They end at SIGTERM of their own parent.
    """
    base = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
    before = base.worker_init_fn
    if not (isinstance(before, functools.partial) and before.func is _start_worker):
        base.worker_init_fn = functools.partial(_start_worker, before=before)
    return loader


def _start_worker(number: int, before: Callable[[int], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # neither on macOS nor on Windows: there SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()
    if before is not None:
        before(number)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
        pass
    os._exit(0)
