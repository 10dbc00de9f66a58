"""The terminal output of a training: a progress bar without numbers, and the numbers as log messages.

``Trainer``'s own callbacks print the numbers to standard output, which is for results.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

logger = logging.getLogger("molsaki.training")


class Bar(ProgressCallback):  # type: ignore[misc,unused-ignore]
    """The progress bar alone."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class LogMetrics(TrainerCallback):
    """Logs the numbers of each step that ``Trainer`` logs, as text and, with JSON, by name."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        values = {name: value for name, value in (logs or {}).items() if name not in ("total_flos", "step")}
        if not state.is_world_process_zero or not values or "train_runtime" in values:  # the last entry is the result
            return
        shown = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in values.items())  # fmt: skip
        logger.info(
            "step %d of %d: %s", state.global_step, state.max_steps, shown,
            extra={"values": {"step": state.global_step, "max_steps": state.max_steps} | values},
        )  # fmt: skip


def log_in_place_of_printing(trainer: Trainer) -> None:
    """Have a trainer log its numbers instead of printing them."""
    shown = trainer.pop_callback(ProgressCallback) is not None
    trainer.remove_callback(PrinterCallback)
    if shown:
        trainer.add_callback(Bar())
    trainer.add_callback(LogMetrics())
