"""Shows during training whether the attention loss has an effect: warnings, and pictures of the layer weights."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molsaki.method import losses
from molsaki.method.objectives import counted_entries, objective_of

if TYPE_CHECKING:
    from molsaki.batches.batch import Batch
    from molsaki.training.config import DistillConfig

logger = logging.getLogger(__name__)

COLLAPSED = 0.99  # of the router's weight on one layer
SMALL_SHARE = 0.01  # of the gradient
FADED = 1e-3  # nats, see `IdleLoss.add_maps`
UNRESOLVED = 1e-5  # nats; float32 rounds a log-probability near log W by up to 1e-6
PICTURE = "layer_weights.png"


class IdleLoss:
    """Warns, once each, if the router has collapsed, if the attention loss has hardly any share of the gradient, or if
    it hardly distinguishes maps.

    Args:
        learns_router: whether the student's layer weights are those of a router.
        unit: the unit that has a weight, layer or head.
    """

    def __init__(self, learns_router: bool, unit: str = "layer"):
        self.learns_router, self.unit = learns_router, unit
        self._warned: set[str] = set()
        self._flat: dict[str, list[Tensor]] | None = {"softmax": [], "sum": []}
        self._compares: list[Tensor] = []  # per example with key words: whether a step has two words to compare
        self._words, self._normalise, self._faded = 0, "softmax", FADED

    def add_maps(self, batch: Batch, options: DistillConfig) -> None:
        """Measure, up to the first logging step, how far the teacher's maps are from flat ones, in nats.

        Under ``normalise="softmax"`` the masses of a step are logits. Where they sum to at most m, on either side, the
        loss of a step with W words is at most ``m (e^m - 1) / (e^m + W - 1)``, which is reached if all of the teacher's
        mass is on one word and all of the student's on another. For a sentence m is about 2, so that 1,000 words leave
        at most 0.013 nats, and for a map that is spread over its words the loss is much smaller: the softmax is flat
        for every map. ``normalise="sum"`` divides by the mass, so W does not matter. A step with one word has loss 0
        under both, since its distribution is always 1.

        The measured value is the loss of a map that is the same for every word, as a median over examples, times beta
        if beta is above 1. A student with such maps can lower its loss by no more than that. The warning is given below
        `FADED`, 0.001 nats: a hundredth of 0.1 nats, a small cross-entropy of a trained student, as `SMALL_SHARE` is a
        hundredth of the gradient. It names the cause: single key words, a teacher whose maps are nearly flat, or the
        softmax. With ``attention_share``, which compensates a small loss, it is given only if float32 does not resolve
        the loss.
        """
        if self._flat is None or batch.teacher_map is None:
            return
        if not objective_of(str(options.objective)).attention_loss:
            return
        self._normalise = options.normalise
        self._faded = FADED if options.attention_share is None else UNRESOLVED
        has_words = batch.plan.word_mask.any(1)
        self._words = max(self._words, batch.plan.num_words)
        how = (options.causal_words, options.teacher_temperature, counted_entries(batch, options))
        with torch.no_grad():
            flat = torch.ones_like(batch.teacher_map)
            counted = losses.counted_words(flat, flat, batch.plan, how[0], how[2])[:, 0]
            self._compares.append((counted.sum(-1) > 1).any(-1)[has_words])
            for normalise, found in self._flat.items():
                found.append(losses.attention(flat, batch.teacher_map, batch.plan, normalise, *how)[has_words])

    def look(self, step: int, logs: Mapping[str, Any], student_weights: list[float] | None, beta: float = 1.0) -> None:
        """Check the logged values of a step, and the student's weights ``(Ls,)``, means over the last examples."""
        if self.learns_router and student_weights is not None and len(student_weights) > 1:
            most = max(student_weights)
            if most > COLLAPSED:
                self._warn(
                    "router",
                    f"mixture: at step {step} the router gives {self.unit} {student_weights.index(most)} of the "
                    f"student {100 * most:.1f} % of the weight (entropy_student "
                    f"{logs.get('entropy_student', math.nan):.3g} nats), so the other {self.unit}s learn nothing from "
                    "the attention loss. --pooling mean or a lower --router_learning_rate prevents this",
                )
        self._look_at_maps(logs.get("beta", beta))
        share = logs.get("attention_share")
        if share is not None and share < SMALL_SHARE and logs.get("beta", 0) > 0:
            self._warn(
                "share",
                f"beta: at step {step} the attention loss has {100 * share:.2g} % of the other losses' gradient, so it "
                "hardly changes the student. --attention_share 0.1 holds it at 10 %",
            )

    def _look_at_maps(self, beta: float) -> None:
        measured, self._flat = self._flat, None
        values = {name: torch.cat(found) for name, found in (measured or {}).items() if found}
        if not values or not (examples := len(values["softmax"])):
            return
        medians = {name: found.median().item() for name, found in values.items()}
        if beta <= 0 or max(beta, 1) * medians[self._normalise] >= self._faded:
            return  # there is a separate warning for a beta that is too small
        softmax, shares = medians["softmax"], medians["sum"]
        single = examples - int(torch.cat(self._compares).sum())
        if 2 * single >= examples:
            self._warn(
                "faded",
                f"key: in {single} of the first {examples} examples no step has two key words to compare, so their "
                "attention loss is 0 whatever the maps are, with either --normalise; use another --key, or give the "
                "examples more keywords",
            )
        elif max(beta, 1) * shares < self._faded:
            self._warn(
                "faded",
                f"teacher: its maps hardly distinguish the key words: a map that is the same for every word has a loss "
                f"of {softmax:.2g} nats with --normalise softmax and of {shares:.2g} nats with sum, the median of the "
                f"first {examples} examples (beta is {beta:g}). Look at them with molsaki plot; expected a trained "
                "teacher, and key words (--key) that its attention tells apart",
            )
        else:
            self._warn(
                "faded",
                "normalise: with softmax the attention loss hardly distinguishes maps of texts with this many key "
                f"words (up to {self._words}): a map that is the same for every word has a loss of {softmax:.2g} "
                f"nats, the median of the first {examples} examples (beta is {beta:g}); with --normalise sum "
                f"{shares:.2g} nats",
            )

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s", message)


class LayerWeightPictures(TrainerCallback):
    """Plots the layer weights of both sides over the steps for the trackers, at every checkpoint and at the end.

    TensorBoard, Weights & Biases, MLflow and Comet receive the picture if matplotlib is installed.

    Args:
        records: the file of layer weights (`layer_weights.jsonl`).
        callbacks: the trainer's callbacks, which include the trackers.
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
        if "train_runtime" in (logs or {}):  # the last entry, before the trackers are closed
            self._draw(args, state)

    def _draw(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.is_world_process_zero or not self.records.is_file():
            return
        trackers = [callback for callback in self.callbacks if type(callback).__name__ in TRACKERS]
        if trackers and importlib.util.find_spec("matplotlib") is not None:
            from molsaki.io import read_json_lines
            from molsaki.plotting.curves import plot_layer_weights

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
