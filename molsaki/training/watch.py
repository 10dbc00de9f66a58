"""Shows during a training whether the attention loss does anything: warnings, and pictures of the layer weights."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

COLLAPSED = 0.99  # of the router's weight on one layer
SMALL_SHARE = 0.01  # of the gradient
PICTURE = "layer_weights.png"


class IdleLoss:
    """Warns, once each, that the router has collapsed, or that the attention loss has hardly any of the gradient.

    Args:
        learns_router: whether the student's layer weights are those of a router.
        unit: what the weights are of, layers or heads.
    """

    def __init__(self, learns_router: bool, unit: str = "layer"):
        self.learns_router, self.unit = learns_router, unit
        self._warned: set[str] = set()

    def look(self, step: int, logs: Mapping[str, Any], student_weights: list[float] | None) -> None:
        """Look at what is logged at a step, and at the student's weights ``(Ls,)``, means over the last examples."""
        if self.learns_router and student_weights is not None and len(student_weights) > 1:
            most = max(student_weights)
            if most > COLLAPSED:
                self._warn(
                    "router",
                    f"mixture: at step {step} the router gives {self.unit} {student_weights.index(most)} of the "
                    f"student {100 * most:.1f} % of the weight (entropy_student "
                    f"{logs.get('entropy_student', math.nan):.3g} nats), so the other {self.unit}s learn nothing from "
                    "the attention loss. --pooling mean or a lower --router_learning_rate keeps it from that",
                )
        share = logs.get("attention_share")
        if share is not None and share < SMALL_SHARE and logs.get("beta", 0) > 0:
            self._warn(
                "share",
                f"beta: at step {step} the attention loss has {100 * share:.2g} % of the other losses' gradient, so it "
                "changes the student hardly at all. --attention_share 0.1 holds it at 10 %",
            )

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s", message)


class LayerWeightPictures(TrainerCallback):
    """Draws the layer weights of both sides over the steps, at every checkpoint and at the end, for the trackers.

    TensorBoard, Weights & Biases, MLflow and Comet get the picture, if matplotlib is installed.

    Args:
        records: the file of layer weights (`layer_weights.jsonl`).
        callbacks: of the trainer, among which are the trackers.
    """

    def __init__(self, records: Path, callbacks: Iterable[TrainerCallback]):
        self.records = records
        self.callbacks = callbacks

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._draw(args, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if "train_runtime" in (logs or {}):  # the last one, before the trackers are closed
            self._draw(args, state)

    def _draw(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.is_world_process_zero or not self.records.is_file():
            return
        trackers = [callback for callback in self.callbacks if type(callback).__name__ in TRACKERS]
        if trackers and importlib.util.find_spec("matplotlib") is not None:
            from molsaki.io import read_json_lines
            from molsaki.plotting.plots import plot_layer_weights

            picture = plot_layer_weights(read_json_lines(self.records), Path(str(args.output_dir), PICTURE))
            for tracker in trackers:
                TRACKERS[type(tracker).__name__](tracker, picture, state.global_step)


def _tensorboard(callback: Any, picture: Path, step: int) -> None:
    if callback.tb_writer is not None:
        from matplotlib.image import imread

        callback.tb_writer.add_image("layer_weights", imread(picture)[:, :, :3], step, dataformats="HWC")


def _wandb(callback: Any, picture: Path, step: int) -> None:
    callback._wandb.log({"layer_weights": callback._wandb.Image(str(picture)), "train/global_step": step})


def _mlflow(callback: Any, picture: Path, step: int) -> None:
    callback._ml_flow.log_artifact(str(picture))


def _comet(callback: Any, picture: Path, step: int) -> None:
    if callback._experiment is not None:
        callback._experiment.log_image(str(picture), name="layer_weights", step=step)


TRACKERS = {
    "TensorBoardCallback": _tensorboard,
    "WandbCallback": _wandb,
    "MLflowCallback": _mlflow,
    "CometCallback": _comet,
}
