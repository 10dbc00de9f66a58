"""The command ``distill``: trains as its config says, and exports the student."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, cast

from molsaki.batches.dataset import DistillDataset
from molsaki.batches.streamed import StreamedDataset
from molsaki.config import require
from molsaki.io import write_json
from molsaki.training.config import DistillConfig
from molsaki.training.progress import log_in_place_of_printing
from molsaki.training.stop_signal import StopOnSignal, TrainingStopped
from molsaki.training.trainer import DistillTrainer

logger = logging.getLogger(__name__)

LEFT_OUT = "left_out.json"


def distill(config: DistillConfig) -> dict[str, Any]:
    """Train as the config says, and export the student to ``config.output_dir``.

    SIGINT and SIGTERM save a checkpoint at the end of the step; `TrainingStopped` is then raised. In the last step and
    while the student is exported, they change nothing.

    Returns:
        The trainer's metrics (``train_runtime``, ``train_loss``, ...); ``examples``, ``without_words`` (key words) and
        ``left_out`` by reason, whose ids are in ``left_out.json``; the number of records
        ``not_read``. Streamed data are not counted.
    """
    require(config, "train_file")
    for name in [*config.train_file, *config.eval_file]:  # before a model is loaded
        if not os.path.exists(name):
            raise FileNotFoundError(f"{name}: no such file")
    trainer = DistillTrainer(args=config)
    data = cast("DistillDataset | StreamedDataset", trainer.train_dataset)
    if trainer.is_world_process_zero() and isinstance(data, DistillDataset):
        write_json(Path(str(config.output_dir), LEFT_OUT), data.left_out, indent=1)
    log_in_place_of_printing(trainer)
    with StopOnSignal(trainer):
        try:
            metrics = trainer.train().metrics
            trainer.save_model()
            trainer.save_state()
        except TrainingStopped:
            try:  # closes bar and trackers
                trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
            finally:  # only the first process has trackers, and the others wait for it
                trainer.accelerator.wait_for_everyone()
                trainer.end_training()
            raise
        trainer.end_training()
    counts: dict[str, Any] = {}
    if isinstance(data, DistillDataset):
        counts = {"examples": len(data), "without_words": data.without_words, "left_out": dict(data.skipped)}
        counts["not_read"] = len(getattr(data.examples, "left_out", ()))
    elif trainer.is_world_process_zero() and not config.dataloader_num_workers:
        logger.info("train_dataset, read in the last epoch: %s", data.summary())
    return metrics | counts | {"student": config.output_dir}
